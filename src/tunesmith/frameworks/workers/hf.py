"""What every framework over `transformers.Trainer` is given by its worker, in place of what it would choose itself: our
order of rows, our first adapters, our validation, and a log of what each step did.

Nothing of it decides how a loss, a gradient or an update is computed: that is what frameworks are compared by. All is
hung onto the trainer when the framework calls `Trainer.train`, however it came to make one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import shutil
import time
from pathlib import Path

import torch
import transformers
from capture import IGNORED, Capture, saved_name
from frozen import check_base, count_values, keep_layout
from raw_rows import drop_numbers, keep_order, write_made
from safetensors.torch import load_file
from validation import measure_loss
from worker import Failure, Run, peak_resident_bytes, write_json

COMPANIONS = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges")


def read_rows(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def read_versions(*names: str) -> dict[str, str]:
    """Installed versions of the framework and of what else can change a number."""
    return {
        name: importlib.metadata.version(name) for name in (*names, "transformers", "accelerate", "torch")
    }


def leave_out_unknown(kind: type, settings: dict) -> dict:
    """Settings that this version of a configuration has. What is off (None, False) and unknown to it decides nothing;
    what is on and unknown cannot be obeyed."""
    known = {field.name for field in dataclasses.fields(kind)}
    if missing := [
        name for name, value in settings.items() if name not in known and value not in (None, False)
    ]:
        raise Failure(f"{kind.__name__} has no setting {missing[0]!r}, which the job needs")
    return {name: value for name, value in settings.items() if name in known}


def install(run: Run, *, framework: str, versions: dict[str, str]) -> None:
    """From now on, whoever trains with a `Trainer` does so watched; what the run is asked for is left when it ends."""
    if run.handoff["device"] == "cuda" and not torch.cuda.is_available():
        raise Failure(
            f"torch {torch.__version__} of this environment finds no GPU, and our engine trains on one"
        )
    plain = transformers.Trainer.train

    @functools.wraps(plain)
    def train(trainer, *args, **kwargs):
        watcher = _Watcher(run, trainer, framework, versions)
        watcher.begin()
        result = plain(trainer, *args, **kwargs)
        watcher.end()
        return result

    transformers.Trainer.train = train


class _Order:
    """A sampler: the rows of the epoch that the trainer is at, step after step.

    A step's rows are whole batches of the loader, as `micro_rows` divides `batch_rows`, but for an epoch's last step,
    after which the loader begins anew: so no forward pass has rows of two steps.
    """

    def __init__(self, trainer, order: list[list[list[int]]]) -> None:
        self._trainer, self._order = trainer, order

    def __len__(self) -> int:
        return sum(map(len, self._order[0]))

    def __iter__(self):
        # Told by the steps done, not by how often somebody iterates: some frameworks look at their loaders first.
        epoch = self._trainer.state.global_step // len(self._order[0])
        return (row for step in self._order[min(epoch, len(self._order) - 1)] for row in step)


class _Watcher(transformers.TrainerCallback):
    """Callbacks of one training, in the order in which a `Trainer` calls them."""

    def __init__(self, run: Run, trainer, framework: str, versions: dict[str, str]) -> None:
        self.run, self.handoff, self.trainer = run, run.handoff, trainer
        self.framework, self.versions = framework, versions
        self.order = json.loads(Path(self.handoff["order"]).read_text(encoding="utf-8"))
        self.trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        self.capture = Capture(self) if self.handoff["parity_steps"] else None
        self.losses: list[torch.Tensor] = []
        self.counts: list[torch.Tensor] = []
        self.tokens = self.targets = 0
        self.clips: list[tuple[float, torch.Tensor]] = []
        self.best: tuple[float, int, dict[str, torch.Tensor]] | None = None
        self.validation_loss: float | None = None

    # --- before and after ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        trainer, handoff = self.trainer, self.handoff
        if raw := handoff.get("raw"):
            if self.capture:
                write_made(trainer, raw["report"])
            self.order = keep_order(trainer, self.order, batch_rows=handoff["batch_rows"])
            drop_numbers(trainer)
        rows = sum(map(len, self.order[0]))
        if len(trainer.train_dataset) != rows:
            raise Failure(f"trains on {len(trainer.train_dataset)} rows, and was handed {rows}")
        check_base(trainer.model, handoff)
        keep_layout(trainer.model)
        if handoff["optimizer"] == "adamw-8bit" and handoff["device"] == "cpu":
            self.run.warn(
                "bitsandbytes on a CPU rounds 8-bit states to 65,536 steps before it looks for the nearest level, so "
                "that small second moments are lost: its curve leaves ours"
            )
        if self.capture:
            self.capture.parameters()
        if handoff["lora"]:
            self._take_adapters(Path(handoff["lora"]["start"]) / "adapter_model.safetensors")
        trainer._get_train_sampler = lambda *_, **__: _Order(trainer, self.order)
        trainer.training_step = self._wrap_training_step(trainer.training_step)
        trainer.accelerator.clip_grad_norm_ = self._wrap_clipping(trainer.accelerator.clip_grad_norm_)
        trainer.add_callback(self)
        self.log = open(handoff["steps_file"], "w", encoding="utf-8")  # noqa: SIM115 - closed in end()
        self.validation = read_rows(handoff["validation"]) if handoff["validation"] else []
        self.run.enter("first step")

    def _take_adapters(self, path: Path) -> None:
        """Start from our adapters, which follow from the seed and the layers' names alone."""
        ours = load_file(path)
        for name, parameter in self.trained.items():
            given = ours.pop("base_model.model." + saved_name(name), None)
            if given is None or given.shape != parameter.shape:
                shape = None if given is None else list(given.shape)
                raise Failure(f"trains {name} {list(parameter.shape)}, and was handed {shape}")
            parameter.data.copy_(given)
        if ours:
            raise Failure(f"does not train {next(iter(ours))}, which it was handed")

    def end(self) -> None:
        self.log.close()
        if self.capture:
            write_json(self.handoff["parity"], self.capture.record())
            return
        if self.best and self.handoff["keep_best"]:
            for name, weights in self.best[2].items():
                self.trained[name].data.copy_(weights)
        self.run.enter("saving")
        if self.handoff["weights"]:
            save(self.trainer, self.handoff)
        self.run.enter("done")
        write_json(self.handoff["record"], self._record())

    def _record(self) -> dict:
        on_gpu = self.handoff["device"] == "cuda"
        sizes = {"resident": peak_resident_bytes()}
        hardware = {"threads": torch.get_num_threads()}
        if on_gpu:
            sizes |= {
                "allocated": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved(),
            }
            properties = torch.cuda.get_device_properties(0)
            hardware = {
                "gpu": properties.name,
                "gpu_memory_bytes": properties.total_memory,
                "cuda": torch.version.cuda,
            }
        kept_best = self.best is not None and self.handoff["keep_best"]
        return {
            "framework": self.framework,
            "versions": self.versions,
            "seconds": self.run.seconds,
            "bytes": sizes,
            "hardware": hardware,
            "resolved": describe(self.trainer),
            "steps": self.trainer.state.global_step,
            "train_tokens": self.tokens,
            "target_tokens": self.targets,
            "trained_parameters": sum(p.numel() for p in self.trained.values()),
            "total_parameters": count_values(self.trainer.model),
            "micro_rows": self.trainer.args.per_device_train_batch_size,
            "best_step": self.best[1] if kept_best else None,
            "validation_loss": self.best[0] if kept_best else self.validation_loss,
            "warnings": self.run.warnings,
        }

    # --- what is wrapped -------------------------------------------------------------------------------------------

    def _wrap_training_step(self, plain):
        """Count what a forward pass is given, and keep the loss that it answers with."""

        @functools.wraps(plain)
        def training_step(model, inputs, *args, **kwargs):
            labels, seen = inputs["labels"], inputs.get("attention_mask")
            num_tokens = torch.as_tensor(labels.numel()) if seen is None else seen.sum()
            # A label in the first place has nothing before it that could predict it.
            num_targets = (labels[:, 1:] != IGNORED).sum()
            self.counts.append(torch.stack([num_tokens.to(labels.device), num_targets]))
            if self.capture:
                self.capture.open = True
            loss = plain(model, inputs, *args, **kwargs)
            if self.capture:
                self.capture.open = False
            self.losses.append(loss.detach())
            return loss

        return training_step

    def _wrap_clipping(self, plain):
        @functools.wraps(plain)
        def clip_grad_norm_(parameters, max_norm, *args, **kwargs):
            norm = plain(parameters, max_norm, *args, **kwargs)
            # Where nothing is clipped, the trainer asks for the norm by clipping to infinity.
            self.clips.append((float(max_norm) if math.isfinite(max_norm) else 0.0, norm))
            return norm

        return clip_grad_norm_

    # --- steps -----------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        if self.handoff["device"] == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.began = self.mark = time.perf_counter()
        self.begun_tokens = 0

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Gradients are complete, and clipped where they are clipped: the one place where the host waits."""
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        # In fp16 it is clipping that divides gradients by the loss's scale.
        scale = 1.0 if self.clips or scaler is None else scaler.get_scale()
        if self.capture or not self.clips:
            norms = [
                torch.linalg.vector_norm(p.grad.float()) for p in self.trained.values() if p.grad is not None
            ]
            self.applied_norm = float(torch.linalg.vector_norm(torch.stack(norms))) / scale
        self.clip_norm, norm = self.clips[-1] if self.clips else (0.0, self.applied_norm)
        self.loss = float(torch.stack([loss.double() for loss in self.losses]).sum())
        self.grad_norm = float(norm)
        self.rates = [float(group["lr"]) for group in optimizer.param_groups if group["params"]]
        if not math.isfinite(self.loss) or not (
            math.isfinite(self.grad_norm) or self.handoff["precision"] == "fp16"
        ):
            raise Failure(f"step {state.global_step + 1}: loss {self.loss}, gradient norm {self.grad_norm}")

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        num_tokens, num_targets = torch.stack(self.counts).sum(0).tolist()
        if self.capture:
            self.capture.step(optimizer)
        self.losses, self.counts, self.clips = [], [], []
        self.tokens, self.targets = self.tokens + num_tokens, self.targets + num_targets
        now, step = time.perf_counter(), state.global_step
        seconds, total = now - self.mark, self.handoff["total_steps"]
        epoch, place = divmod(step - 1, len(self.order[0]))
        validation_loss = self._validate(step) if self._is_due(step, place) else None
        peak = (
            torch.cuda.max_memory_allocated() if self.handoff["device"] == "cuda" else peak_resident_bytes()
        )
        row = {
            "schema": 1,
            "step": step,
            "epoch": epoch + (place + 1) / len(self.order[0]),
            "loss": self.loss,
            "grad_norm": self.grad_norm if math.isfinite(self.grad_norm) else 0.0,
            "learning_rate": self.rates[0],
            "num_tokens": num_tokens,
            "num_target_tokens": num_targets,
            "step_seconds": seconds,
            "peak_bytes": peak,
            "validation_loss": validation_loss,
        }
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        rate = self.tokens / (now - self.began)
        left = (now - self.began) / step * (total - step)
        facts = {"loss": self.loss, "tokens_per_second": rate, "eta_seconds": left, "memory_bytes": peak}
        self.run.tell("step", done=step, total=total, **facts)
        if step == 1 or validation_loss is not None:
            self.run.enter("steps")
        if self.capture and step >= self.handoff["parity_steps"]:
            control.should_training_stop = True
        self.mark = time.perf_counter()
        return control

    def _is_due(self, step: int, place: int) -> bool:
        """After every so many steps, or at epochs' ends; the last step counts as both."""
        every = self.handoff["evaluate_every"]
        if not self.validation or every < 0 or self.capture:
            return False
        last = step == self.handoff["total_steps"]
        return last or (step % every == 0 if every else place + 1 == len(self.order[0]))

    # --- validation ------------------------------------------------------------------------------------------------

    def _validate(self, step: int) -> float:
        """Nats per target token over all validation rows; the weights are kept if it is the lowest."""
        self.run.enter("validating")
        loss = self.validation_loss = measure_loss(self.trainer, self.validation)
        if not math.isfinite(loss):
            raise Failure(f"step {step}: the validation loss is {loss}")
        if self.best is None or loss < self.best[0]:
            kept = {n: p.detach().to("cpu", copy=True) for n, p in self.trained.items()}
            self.best = (loss, step, kept if self.handoff["keep_best"] else {})
        return loss


def save(trainer, handoff: dict) -> None:
    """Adapters in PEFT's format, or the model in transformers'; safetensors, with the base's tokenizer beside it."""
    folder, model = Path(handoff["weights"]), trainer.accelerator.unwrap_model(trainer.model)
    folder.mkdir(parents=True, exist_ok=True)
    if handoff["lora"] is None:
        model.to(getattr(torch, handoff["stored_dtype"]))
    model.save_pretrained(str(folder))
    for name in ("README.md", "training_args.bin"):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes files that only their owner reads
    wanted = COMPANIONS if handoff["lora"] else (*COMPANIONS, "generation_config")
    for path in sorted(Path(handoff["model"]).iterdir()):
        if path.is_file() and path.name.startswith(wanted):
            shutil.copyfile(path, folder / path.name)


def describe(trainer) -> dict:
    """The whole configuration as it was used, defaults and all."""
    found = {"arguments": trainer.args.to_dict()}
    for name, config in getattr(trainer.model, "peft_config", {}).items():
        found[f"peft {name}"] = config.to_dict()
    quantization = getattr(trainer.model.config, "quantization_config", None)
    if hasattr(quantization, "to_dict"):
        found["quantization"] = quantization.to_dict()
    # Sets, enums and paths have no JSON; what they hold does.
    return json.loads(
        json.dumps(found, default=lambda item: sorted(item) if isinstance(item, set) else str(item))
    )

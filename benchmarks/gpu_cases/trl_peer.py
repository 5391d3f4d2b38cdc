"""TRL as a contender: its SFTTrainer on rows that are already token ids and labels, in the order of our engine.

Between steps the trainer waits in a callback for the parent. Nothing is logged; the loss is what `training_step`
returned.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpu_cases.protocol import Session, describe_packages, reset_peak

session = Session()
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from gpu_cases.inputs import TARGETS, StoredRows, hash_step, name_parameter, read_adapter  # noqa: E402

datasets.disable_progress_bars()
settings: dict[str, Any] = session.task["settings"]
rows = StoredRows(Path(session.task["rows"]))
SCRATCH = tempfile.mkdtemp(dir=session.task["folder"])


class Trainer(trl.SFTTrainer):
    """SFTTrainer that takes rows in the given order and keeps each forward's loss and, at first, its rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[torch.Tensor] = []
        self.fed: list[tuple[Any, Any]] = []

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if session.wants_rows:
            self.fed += read_inputs(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses.append(loss.detach())
        return loss


def read_inputs(inputs: dict[str, torch.Tensor]) -> list[tuple[Any, Any]]:
    """(ids, kept) of every row in a batch, padded or end to end."""
    ids, kept = inputs["input_ids"].cpu(), (inputs["labels"] != -100).cpu()
    if (mask := inputs.get("attention_mask")) is not None:
        sizes = mask.sum(1).tolist()
        return [(i[:n].numpy(), k[:n].numpy()) for i, k, n in zip(ids, kept, sizes, strict=True)]
    starts = [*(inputs["position_ids"][0].cpu() == 0).nonzero().flatten().tolist(), ids.shape[1]]
    return [(ids[0, a:b].numpy(), kept[0, a:b].numpy()) for a, b in pairwise(starts)]


class Reporter(transformers.TrainerCallback):
    trainer: Any

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        session.loaded()
        reset_peak()

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        numbers = session.task["steps"][state.global_step - 1]
        loss = torch.stack(self.trainer.losses).sum()
        self.trainer.losses.clear()
        if self.trainer.fed:
            session.note_rows(hash_step(self.trainer.fed))
            self.trainer.fed.clear()
        session.step_done(loss, **self.count(numbers))

    def count(self, numbers: list[int]) -> dict[str, int]:
        """Tokens of a step, and those that are trained."""
        return {
            "num_tokens": sum(len(rows[number][0]) for number in numbers),
            "num_target_tokens": sum(int(rows[number][1].sum()) for number in numbers),
        }


class GradientCopier(transformers.TrainerCallback):
    """Copies gradients before the first update. Clipping is off while it is used."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(
        self, _args: Any, _state: Any, _control: Any, model: Any, **_kwargs: Any
    ) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.found[name_parameter(name)] = parameter.grad.detach().float().cpu().clone()


def make_trainer(
    model_folder: str, adapter_folder: str, *, steps: list[list[int]], callback: Any, clip_norm: float
) -> Trainer:
    task = session.task
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder,
        dtype=getattr(torch, settings.get("weights", task["dtype"])),
        device_map={"": 0} if torch.cuda.is_available() else None,
    )
    lora = None
    if task["method"] == "lora":
        lora = peft.LoraConfig(
            r=task["rank"], lora_alpha=task["alpha"], target_modules=list(TARGETS), task_type="CAUSAL_LM"
        )
    micro = min(settings["micro_rows"], task["batch_rows"])
    chosen = {**settings["sft"]}
    if task["dtype"] == "float32":
        chosen["bf16"] = False
    config = trl.SFTConfig(
        output_dir=SCRATCH,
        max_steps=len(steps),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=task["batch_rows"] // micro,
        learning_rate=task["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=clip_norm,
        weight_decay=0.0,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        seed=0,
        dataset_kwargs={"skip_prepare_dataset": True},
        **{"max_length": task["max_tokens"], **chosen},
    )
    trainer = Trainer(
        model=model,
        args=config,
        train_dataset=make_dataset([number for step in steps for number in step]),
        processing_class=transformers.AutoTokenizer.from_pretrained(model_folder),
        peft_config=lora,
        callbacks=[callback],
    )
    if lora is not None:
        _copy_adapter(trainer.model, Path(adapter_folder))
    return trainer


def make_dataset(numbers: list[int]) -> Any:
    taken = [rows[number] for number in numbers]
    return datasets.Dataset.from_dict(
        {
            "input_ids": [ids.tolist() for ids, _ in taken],
            "labels": [
                [int(i) if k else -100 for i, k in zip(ids, kept, strict=True)] for ids, kept in taken
            ],
        }
    )


def _copy_adapter(model: Any, folder: Path) -> None:
    tensors = read_adapter(folder)
    trained = {name_parameter(name): p for name, p in model.named_parameters() if p.requires_grad}
    if trained.keys() != tensors.keys():
        raise RuntimeError(f"trained: {sorted(trained)[:3]} ..., in the adapter: {sorted(tensors)[:3]} ...")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])


def serve(make: Callable[..., Any], reporter: Reporter, copier: GradientCopier) -> None:
    """Answer the parent with the trainers that `make` makes."""
    task = session.task

    def train() -> None:
        reporter.trainer = make(
            task["model"],
            task["adapter"],
            steps=task["steps"],
            callback=reporter,
            clip_norm=task["clip_norm"],
        )
        reporter.trainer.train()

    def gradients(out: Path) -> dict[str, Any]:
        trainer = make(
            task["short_model"],
            task["short_adapter"],
            steps=task["steps"][:1],
            callback=copier,
            clip_norm=0.0,
        )
        trainer.train()
        save_file(copier.found, str(out))
        loss, digest = torch.stack(trainer.losses).sum(), hash_step(trainer.fed)
        return {"loss": float(loss), "digest": digest}

    session.serve(
        gradients=gradients,
        train=train,
        facts=lambda: describe_packages("trl", "accelerate", "datasets", "liger_kernel", "bitsandbytes"),
    )


if __name__ == "__main__":
    serve(make_trainer, Reporter(), GradientCopier())

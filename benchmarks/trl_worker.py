"""Train LoRA with TRL + PEFT on rows that are already tokenised. Runs inside .venv-trl, never in ours.

    .venv-trl/bin/python benchmarks/trl_worker.py task.json result.json

task.json holds: `model` (folder), `rows` (a JSONL file of {"input_ids", "labels"} in training order), `steps`,
`batch_rows`, `lora` ({"rank", "alpha"}, or null: every weight is trained), `learning_rate`, `seed`, `sft` (arguments
for SFTConfig, beyond its defaults) and `weights` ("auto", "float32" or "bfloat16": how the base is loaded).
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import accelerate
import datasets
import peft
import torch
import transformers
import trl

datasets.disable_progress_bars()


class Stopwatch(transformers.TrainerCallback):
    """Wall and CPU seconds of the training loop, from before its first step to after its last, and each loss."""

    def __init__(self) -> None:
        self.step_seconds: list[float] = []
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.wall_seconds = self.cpu_seconds = 0.0

    def on_train_begin(self, *_args, **_kwargs) -> None:
        self.started = time.perf_counter(), time.process_time()

    def on_step_begin(self, *_args, **_kwargs) -> None:
        self.step_started = time.perf_counter()

    def on_step_end(self, *_args, **_kwargs) -> None:
        self.step_seconds.append(time.perf_counter() - self.step_started)

    def on_log(self, _args, _state, _control, logs=None, **_kwargs) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])
            self.grad_norms.append(logs["grad_norm"])

    def on_train_end(self, *_args, **_kwargs) -> None:
        self.wall_seconds = time.perf_counter() - self.started[0]
        self.cpu_seconds = time.process_time() - self.started[1]


def run_task(task: dict) -> dict:
    """Train as the task says. Returns the times, the losses that were logged, and the versions."""
    rows = [json.loads(line) for line in Path(task["rows"]).read_text(encoding="utf-8").splitlines()]
    model = task["model"]
    if task["weights"] != "auto":
        dtype = getattr(torch, task["weights"])
        model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    lora = task["lora"] and peft.LoraConfig(
        r=task["lora"]["rank"], lora_alpha=task["lora"]["alpha"], target_modules="all-linear"
    )
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(
            output_dir=folder,
            max_steps=task["steps"],
            per_device_train_batch_size=task["batch_rows"],
            learning_rate=task["learning_rate"],
            seed=task["seed"],
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            # The rows arrive as token ids and labels, in the order in which our engine trains them.
            dataset_kwargs={"skip_prepare_dataset": True},
            **{"train_sampling_strategy": "sequential", **task["sft"]},
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(task["model"]),
            peft_config=lora,
            callbacks=[stopwatch],
        )
        trainer.train()
    return describe_run(trainer.model, stopwatch)


def describe_run(model: torch.nn.Module, stopwatch: Stopwatch) -> dict:
    """What a worker answers."""
    return {
        "wall_seconds": stopwatch.wall_seconds,
        "cpu_seconds": stopwatch.cpu_seconds,
        "step_seconds": stopwatch.step_seconds,
        "losses": stopwatch.losses,
        "grad_norms": stopwatch.grad_norms,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "versions": {
            "torch": torch.__version__,
            "trl": trl.__version__,
            "peft": peft.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
    }


if __name__ == "__main__":
    task_file, result_file = sys.argv[1:]
    result = run_task(json.loads(Path(task_file).read_text(encoding="utf-8")))
    Path(result_file).write_text(json.dumps(result, indent=1), encoding="utf-8")

"""Train DPO with TRL + PEFT on pairs that are already tokenised. Runs inside .venv-trl, never in ours.

    .venv-trl/bin/python benchmarks/trl_dpo_worker.py task.json result.json

task.json is that of trl_worker.py with `dpo` (arguments of DPOConfig beyond its defaults) in place of `sft`, rows of
{"prompt_ids", "chosen_ids", "rejected_ids"}, `micro_rows` (pairs of a forward pass; the pairs of a step are sorted by
length, so that fewer of its tokens are padding) and `adapter` (a PEFT folder whose values the adapters begin with, or
null). The seconds are those of training, and of the reference's pass before it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import datasets
import peft
import torch
import transformers
import trl
from safetensors.torch import load_file

from trl_worker import Stopwatch, describe_run


class Trainer(trl.DPOTrainer):
    """DPOTrainer on token ids, in the given order; times the reference's pass that it makes before training."""

    reference_seconds = (0.0, 0.0)

    def _prepare_dataset(self, dataset, *_args, **_kwargs):
        return dataset

    def _get_train_sampler(self, *_args, **_kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def _precompute_ref_logps(self, *args, **kwargs):
        wall, cpu = time.perf_counter(), time.process_time()
        found = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_seconds = time.perf_counter() - wall, time.process_time() - cpu
        return found


def run_task(task: dict) -> dict:
    """Train as the task says. Returns the times, the losses that were logged, and the versions."""
    rows = [json.loads(line) for line in Path(task["rows"]).read_text(encoding="utf-8").splitlines()]
    size = task["batch_rows"]
    steps = [rows[start : start + size] for start in range(0, task["steps"] * size, size)]
    rows = [row for step in steps for row in sorted(step, key=lambda row: sum(map(len, row.values())))]
    lora = peft.LoraConfig(
        r=task["lora"]["rank"], lora_alpha=task["lora"]["alpha"], target_modules="all-linear"
    )
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            output_dir=folder,
            max_steps=task["steps"],
            per_device_train_batch_size=task["micro_rows"],
            gradient_accumulation_steps=task["batch_rows"] // task["micro_rows"],
            learning_rate=task["learning_rate"],
            seed=task["seed"],
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            max_length=None,
            **task["dpo"],
        )
        weights = "bfloat16" if task["weights"] == "auto" else task["weights"]
        trainer = Trainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(
                task["model"], dtype=getattr(torch, weights)
            ),
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(task["model"]),
            peft_config=lora,
            callbacks=[stopwatch],
        )
        if task["adapter"]:
            copy_adapter(trainer.model, Path(task["adapter"]))
        trainer.train()
    stopwatch.wall_seconds += trainer.reference_seconds[0]
    stopwatch.cpu_seconds += trainer.reference_seconds[1]
    return describe_run(trainer.model, stopwatch)


def copy_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Let the adapters begin with the folder's values, all of them."""
    tensors = load_file(folder / "adapter_model.safetensors")
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == tensors.keys(), sorted(trained.keys() ^ tensors.keys())[:4]
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])


if __name__ == "__main__":
    task_file, result_file = sys.argv[1:]
    result = run_task(json.loads(Path(task_file).read_text(encoding="utf-8")))
    Path(result_file).write_text(json.dumps(result, indent=1), encoding="utf-8")

"""What a framework is handed, written by one of our own workers: token rows, order, first adapters, every number.

It takes torch, for the first adapters and for what `auto` means here, which the parent of workers never imports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tunesmith.api.devices import pick_device, pick_dtype
from tunesmith.api.fingerprints import fingerprint_run
from tunesmith.api.native import describe_raw
from tunesmith.api.tasks import TrainTask
from tunesmith.api.trainable import load_job_tokenizer, load_trainable
from tunesmith.api.training import resolve_learning_rate
from tunesmith.core.events import Event, OnEvent
from tunesmith.core.fingerprint import describe_hardware
from tunesmith.core.jsonl import write_json, write_jsonl
from tunesmith.core.rundir import RunDir
from tunesmith.core.types import TokenRow
from tunesmith.data.batch import plan_epochs
from tunesmith.data.prepare import Prepared, load_prepared
from tunesmith.frameworks.catalog import find_framework
from tunesmith.frameworks.handoff import Handoff, Lora
from tunesmith.job.spec import Job, LoraSpec
from tunesmith.models.config import load_config
from tunesmith.training.loop import choose_budget
from tunesmith.training.schedule import count_steps, count_warmup_steps

_NAMES: dict[str, Literal["fp32", "bf16", "fp16"]] = {
    "torch.float32": "fp32",
    "torch.bfloat16": "bf16",
    "torch.float16": "fp16",
}


def write_handoff(task: TrainTask, on_event: OnEvent) -> None:
    """Write the task's `handoff/`: `handoff.json` holds the Handoff, and what is known of the run's record."""
    on_event(Event("progress", task.label, "handing over"))
    job, run = Job.model_validate(task.job), RunDir(Path(task.out)).create()
    prepared, device = load_prepared(Path(task.prepared)), pick_device()
    run.handoff.mkdir(exist_ok=True)
    dtype = pick_dtype(job.train.precision, device)
    lengths = prepared.rows("train").lengths
    if job.train.micro_batch_tokens == "auto" and find_framework(task.framework).whole_steps:
        micro_rows = job.train.batch_rows
    else:
        budget = choose_budget(job.train, device)
        micro_rows = choose_micro_rows(job.train.batch_rows, longest=max(lengths), budget=budget)
    total_steps = count_steps(
        epochs=job.train.epochs,
        steps=job.train.steps,
        steps_per_epoch=math.ceil(len(lengths) / job.train.batch_rows),
    )
    order = plan_epochs(len(lengths), batch_rows=job.train.batch_rows, seed=job.train.seed, steps=total_steps)
    write_json(run.handoff / "order.json", order)
    # Its adapter's `can` refuses all others.
    assert job.train.optimizer in ("adamw", "adamw-8bit")
    every, stored = job.train.evaluate_every, load_config(Path(task.model_folder)).dtype
    rate = resolve_learning_rate(job, Path(task.model_folder))
    handoff = Handoff(
        label=task.label,
        model=str(Path(task.model_folder).absolute()),
        stored_dtype="float32" if stored == "auto" else stored,
        rows=str(_write_rows(prepared, "train")),
        validation=str(_write_rows(prepared, "validation")) if "validation" in prepared.splits else None,
        order=str((run.handoff / "order.json").absolute()),
        lora=_write_adapters(job, task, dtype, run.handoff / "adapter")
        if isinstance(job.method_spec, LoraSpec)
        else None,
        base=_name_base(job),
        double_quant=isinstance(job.method_spec, LoraSpec) and job.method_spec.double_quant,
        batch_rows=job.train.batch_rows,
        micro_rows=micro_rows,
        total_steps=total_steps,
        warmup_steps=count_warmup_steps(total_steps, warmup=job.train.warmup),
        learning_rate=rate,
        schedule=job.train.schedule,
        optimizer=job.train.optimizer,
        weight_decay=job.train.weight_decay,
        beta1=job.train.beta1,
        beta2=job.train.beta2,
        epsilon=job.train.epsilon,
        clip_norm=job.train.clip_norm or 0.0,
        seed=job.train.seed,
        precision=_NAMES[str(dtype)],
        device="cuda" if device.type == "cuda" else "cpu",
        compile=job.train.compile is True,
        evaluate_every={"epoch": 0, "never": -1}[every] if isinstance(every, str) else every,
        keep_best=job.train.keep_best,
        scratch=str(run.framework.absolute()),
        steps_file=str(run.steps.absolute()),
        record=str((run.framework / "record.json").absolute()),
        weights=_name_weights(job, run) if task.keep_weights and not task.parity_steps else None,
        parity=str(run.parity.absolute()),
        parity_steps=min(task.parity_steps, total_steps),
        raw=describe_raw(job, prepared, Path(task.model_folder), report=run.made) if task.native else None,
    )
    known = {
        "method": job.method_spec.name,
        "model": task.model_name,
        "seed": job.train.seed,
        "config": task.job,
        "fingerprints": fingerprint_run(task, job, prepared),
        "hardware": describe_hardware(),
        "learning_rate": rate,
        "micro_batch_tokens": micro_rows * max(lengths),
    }
    write_json(run.handoff / "handoff.json", {"handoff": handoff.to_json(), "run": known})


def choose_micro_rows(batch_rows: int, *, longest: int, budget: int) -> int:
    """Rows per forward pass: most that divide a step evenly and, all padded to the longest row, fit the budget."""
    fitting = (n for n in range(1, batch_rows + 1) if batch_rows % n == 0 and n * longest <= budget)
    return max(fitting, default=1)


def _name_base(job: Job) -> Literal["full", "nf4"]:
    method = job.method_spec
    return "nf4" if isinstance(method, LoraSpec) and method.storage == "nf4" else "full"


def _name_weights(job: Job, run: RunDir) -> str:
    return str((run.adapter if isinstance(job.method_spec, LoraSpec) else run.model).absolute())


def _write_rows(prepared: Prepared, split: str) -> Path:
    """Rows of a split as ids and labels, once for all arms and seeds: the file's name tells its content."""
    path = prepared.folder / f"handed-{split}-{prepared.fingerprints[f'{split}_sha256'][:16]}.jsonl"
    if not path.is_file():
        write_jsonl(path, map(label_row, prepared.rows(split)))
    return path.absolute()


def label_row(row: TokenRow) -> dict[str, Sequence[int]]:
    """ids 5 6 7, mask 0 1 1 -> labels -100 6 7. Frameworks shift labels themselves."""
    ids = list(row.ids)
    return {"input_ids": ids, "labels": [i if kept else -100 for i, kept in zip(ids, row.mask, strict=True)]}


def _write_adapters(job: Job, task: TrainTask, dtype: Any, folder: Path) -> Lora:
    """The adapters that our own engine would begin with, in PEFT's format."""
    import torch

    from tunesmith.models.adapter_files import save_adapter

    base = Path(task.model_folder)
    model = load_trainable(job, base, load_job_tokenizer(job, base), torch.device("cpu"), dtype)
    save_adapter(model, folder, base_name=task.model_name, revision=task.revision)
    config = model.adapter_config
    assert config is not None
    return Lora(
        start=str(folder.absolute()),
        rank=config.rank,
        alpha=float(config.alpha),
        dropout=config.dropout,
        targets=config.targets,
        rslora=config.rslora,
        dora=config.dora,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
    )

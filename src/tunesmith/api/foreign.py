"""One training by another framework: hand over, run its worker in its own environment, collect what it left.

Called by the parent of all workers, which measures it as it measures our own engine. An interrupted training is run
again from the start: frameworks' checkpoints are not ours to trust.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tunesmith.api.tasks import TrainTask, mark_finished, mark_started
from tunesmith.core.errors import ArmFailed, ModelError
from tunesmith.core.events import Event, OnEvent
from tunesmith.core.jsonl import read_json, write_bytes_atomic, write_json
from tunesmith.core.records import RunRecord
from tunesmith.core.rundir import RunDir
from tunesmith.frameworks.environments import foreign_environ, require_environment
from tunesmith.frameworks.handoff import Handoff
from tunesmith.frameworks.native import worker_command
from tunesmith.frameworks.port import FrameworkRecord, collect_parity, collect_training
from tunesmith.frameworks.ports import find_port
from tunesmith.frameworks.process import ProcessUse, run_process
from tunesmith.models.adapter_config import check_adapter
from tunesmith.models.config import load_config
from tunesmith.models.headers import check_model

NATIVE_REMARK = "trained on what the framework's own preprocessing makes of the rows (compare.track: native)"


def describe_framework(name: str) -> dict[str, Any]:
    """What decides a framework's results beside the job: which it is, and what is installed."""
    record = require_environment(name)
    return {"name": name, "versions": record.versions, "torch": record.torch, "python": record.python_version}


def run_foreign(
    task: TrainTask, *, task_file: Path, log: Path, on_event: OnEvent, stop: threading.Event, threads: int
) -> None:
    """Carry out one task of another framework; its folder is then as one of our own trainings leaves it.

    Raises ArmFailed naming framework, phase and log; returns without a result if `stop` was set.
    """
    run, name = RunDir(Path(task.out)), task.framework
    python = require_environment(name).python
    mark_started(task)
    for folder in (run.handoff, run.framework, run.adapter, run.model):
        shutil.rmtree(folder, ignore_errors=True)
    for file in (run.record, run.steps, run.parity):
        file.unlink(missing_ok=True)
    run_process(
        worker_command(task_file), log=log, task=task.label, on_event=on_event, stop=stop, threads=threads
    )
    if stop.is_set():
        return
    place = str(run.handoff / "handoff.json")
    handed = read_json(run.handoff / "handoff.json")
    handoff = Handoff.from_json(handed["handoff"], place=place)
    translation = find_port(name).translate(handoff)
    run.framework.mkdir()
    for file, text in translation.files.items():
        write_bytes_atomic(run.framework / file, text.encode())
    try:
        use = _run_worker(
            [python, *translation.argv],
            handoff,
            name=name,
            environ={**foreign_environ(name), **_first_gpu(os.environ), **translation.environ},
            log=log,
            on_event=on_event,
            stop=stop,
            threads=threads,
        )
        if stop.is_set():
            return
        if task.parity_steps:
            collect_parity(handoff, framework=name, log=log)
        else:
            record = _collect(handoff, run, name=name, log=log)
            write_json(run.record, _describe_run(record, handed["run"], handoff, use).to_json())
    except ArmFailed:
        _discard(run, keep=translation.files)
        raise
    mark_finished(task)


def _collect(handoff: Handoff, run: RunDir, *, name: str, log: Path) -> FrameworkRecord:
    """What a training left, its weights' names and shapes looked at: what is no adapter of this base, or cut off, is
    told of the framework that left it and not of the judge."""
    record = collect_training(handoff, framework=name, log=log)
    if handoff.weights:
        try:
            if handoff.lora:
                check_adapter(run.adapter, load_config(Path(handoff.model)))
            else:
                check_model(run.model)
        except ModelError as error:
            finding = f"{name} left weights that cannot be read ({error.place}: {error.finding})"
            raise ArmFailed(handoff.label, finding, cure=f"Its log: {log}") from None
    return record


def _discard(run: RunDir, *, keep: Collection[str]) -> None:
    """Delete what a failed framework left, but for what it was told and the log: it may have filled the disk, which the
    other arms write to."""
    for folder in (run.adapter, run.model):
        shutil.rmtree(folder, ignore_errors=True)
    for path in run.framework.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in keep:
            path.unlink(missing_ok=True)
    for file in (run.steps, run.parity):
        file.unlink(missing_ok=True)


def _first_gpu(environ: Mapping[str, str]) -> dict[str, str]:
    """Only the GPU that our own engine takes: with several in sight, transformers would spread rows over all."""
    return {"CUDA_VISIBLE_DEVICES": environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def _run_worker(
    argv: list[str],
    handoff: Handoff,
    *,
    name: str,
    environ: dict[str, str],
    log: Path,
    on_event: OnEvent,
    stop: threading.Event,
    threads: int,
) -> ProcessUse:
    """Run the framework's worker; what it fails with gets the framework's name and the phase that it was in."""
    phase = "starting"

    def note_phase(event: Event) -> None:
        nonlocal phase
        if event.kind == "progress":
            phase = event.text
        on_event(event)

    try:
        return run_process(
            argv,
            log=log,
            task=handoff.label,
            on_event=note_phase,
            stop=stop,
            threads=threads,
            environ=environ,
        )
    except ArmFailed as error:
        finding = f"{name} failed, {phase}: {error.finding}"
        raise ArmFailed(handoff.label, finding, cure=error.cure) from None
    except OSError as error:
        finding = f"{name} failed, {phase}: {error.filename or argv[0]} does not run ({error.strerror})"
        raise ArmFailed(handoff.label, finding, cure=f"Run: tunesmith frameworks doctor {name}") from None


def _describe_run(
    record: FrameworkRecord, known: dict[str, Any], handoff: Handoff, use: ProcessUse
) -> RunRecord:
    """The record that our own engine would have written. Time and, without a GPU, memory are what the parent saw."""
    weights = Path(handoff.weights).glob("*.safetensors") if handoff.weights else ()
    return RunRecord(
        status="done",
        framework=record.framework,
        versions={**record.versions},
        hardware={**known.pop("hardware"), **record.hardware},
        steps=record.steps,
        trained_parameters=record.trained_parameters,
        total_parameters=record.total_parameters,
        train_tokens=record.train_tokens,
        target_tokens=record.target_tokens,
        wall_seconds=use.wall_seconds,
        cpu_seconds=use.cpu_seconds,
        peak_bytes=record.bytes.get("allocated") or use.peak_bytes,
        size_bytes=sum(path.stat().st_size for path in weights),
        best_step=record.best_step,
        validation_loss=record.validation_loss,
        warnings=[*record.warnings, *([NATIVE_REMARK] if handoff.raw else [])],
        phases=record.seconds,
        memory=record.bytes,
        **known,
    )

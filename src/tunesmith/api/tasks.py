"""What a worker is asked to do, as JSON: train one arm and seed, or judge one. One process may do several in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.core.jsonl import read_json, write_json
from tunesmith.core.rundir import RunDir
from tunesmith.job.spec import Compute, Storage

Weights = Literal["base", "adapter", "model"]


@dataclass(frozen=True, slots=True)
class TrainTask:
    """Train one arm and seed.

    label:        how events and errors call it (`lora seed 0`).
    job:          the resolved job of this arm: its method, seed, learning rate and epochs.
    prepared:     folder of token rows; the sealed test split is not read.
    key:          hash of everything that decides the result; kept when the task is done.
    keep_weights: False for learning-rate trials, of which only the validation loss is wanted.
    skip_bad_rows: set bad rows of a streamed source aside (others are read before, in `prepare`).
    framework:    who trains.
    parity_steps: take that many steps only and leave a ParityRecord of them; 0 trains.
    native:       another framework prepares raw rows by itself (`compare.track: native`).
    """

    label: str
    job: dict[str, Any]
    out: str
    prepared: str
    model_folder: str
    model_name: str
    revision: str | None
    key: str
    resume: bool = True
    keep_weights: bool = True
    skip_bad_rows: bool = False
    framework: str = "tunesmith"
    parity_steps: int = 0
    native: bool = False


@dataclass(frozen=True, slots=True)
class JudgeTask:
    """Score one arm and seed on the sealed test rows.

    weights: what to put on the base: nothing, an adapter folder, or a whole model instead of it.
    storage, double_quant, compute: how the base is held and multiplied, as it was in training: an adapter trained on
             NF4 is judged on NF4.
    quantize: fields of a `QuantizeSpec`: what the model is quantised to after that, None to leave it as it is.
    general: text for the forgetting measure, None to leave it out.
    preferences: folder of prepared pairs to score, None without any.
    start: weights that the arm's training went on from, a folder as `weights_folder`; None where there are none, or
             nothing is measured against them.
    """

    label: str
    job: dict[str, Any]
    out: str
    prepared: str
    model_folder: str
    model_name: str
    key: str
    weights: Weights
    weights_folder: str | None
    storage: Storage
    prompting: Literal["zero-shot", "few-shot", "rag"]
    seed: int
    general: str | None
    double_quant: bool = True
    compute: Compute = "auto"
    quantize: dict[str, Any] | None = None
    preferences: str | None = None
    start: str | None = None


Task = TrainTask | JudgeTask
_KINDS: dict[str, type[TrainTask] | type[JudgeTask]] = {"train": TrainTask, "judge": JudgeTask}


def write_tasks(path: Path, tasks: Sequence[Task]) -> None:
    """The task file of one worker."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {kind: name for name, kind in _KINDS.items()}
    write_json(path, [{"kind": names[type(task)], **dataclasses.asdict(task)} for task in tasks])


def read_tasks(path: Path) -> list[Task]:
    return [_KINDS[value.pop("kind")](**value) for value in read_json(path)]


def is_finished(task: Task) -> bool:
    """True if the task's folder holds the result of exactly this task."""
    folder = RunDir(Path(task.out))
    result = folder.evaluation
    if isinstance(task, TrainTask):
        result = folder.parity if task.parity_steps else folder.record
    return result.is_file() and _read_state(folder).get(_kind(task)) == {"key": task.key, "done": True}


def mark_started(task: Task) -> None:
    """Note which task the folder is at. What an earlier, different one left there is deleted first."""
    folder = RunDir(Path(task.out))
    state = _read_state(folder)
    if state.get(_kind(task), {"key": task.key})["key"] != task.key:
        if isinstance(task, TrainTask):
            folder.clear()
            state = {}
        else:
            clear_scores(folder)
    write_json(folder.create().tasks, {**state, _kind(task): {"key": task.key, "done": False}})


def clear_scores(folder: RunDir) -> None:
    """Delete what a judgement left in a folder."""
    for path in (folder.evaluation, folder.answers, folder.pair_scores):
        path.unlink(missing_ok=True)


def mark_finished(task: Task) -> None:
    folder = RunDir(Path(task.out))
    write_json(folder.tasks, {**_read_state(folder), _kind(task): {"key": task.key, "done": True}})


def _read_state(folder: RunDir) -> dict[str, Any]:
    return read_json(folder.tasks) if folder.tasks.is_file() else {}


def _kind(task: Task) -> str:
    return "train" if isinstance(task, TrainTask) else "judge"

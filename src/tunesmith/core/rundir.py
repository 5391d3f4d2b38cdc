"""The only place that spells the file names of a run folder, and the lock that lets one process own it.

DIR/
  job.json            the resolved job, every default written out
  run.json            RunRecord
  steps.jsonl         StepRecord a line
  prepared/           token rows and conversations of each split (data/prepare.py)
  rejected_rows.jsonl, rejected_stream_rows.jsonl    what --on-bad-row skip set aside
  checkpoints/step-N/ atomic: files, manifest.json with hashes
  adapter/ or model/  what was trained, in PEFT or HF format
  handoff/, framework/ what a framework was handed, and what is its own; parity.json: what it did in its first steps
  eval.json, answers.jsonl, preferences.jsonl (held-out pairs); harness.json for lm-eval's tasks
  preferences/        held-out pairs that arms are judged on; arms/NAME/prepared/ rows of an arm's own
  comparison.json, gates.json (which arms were shown to do the same work), frameworks.json; report.html
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.core.errors import RunDirError


@dataclass(frozen=True, slots=True)
class RunDir:
    root: Path

    @property
    def job(self) -> Path:
        return self.root / "job.json"

    @property
    def record(self) -> Path:
        return self.root / "run.json"

    @property
    def steps(self) -> Path:
        return self.root / "steps.jsonl"

    @property
    def prepared(self) -> Path:
        return self.root / "prepared"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def handoff(self) -> Path:
        return self.root / "handoff"

    @property
    def framework(self) -> Path:
        return self.root / "framework"

    @property
    def made(self) -> Path:
        """What a framework's own preprocessing made of the raw rows."""
        return self.framework / "native.jsonl"

    def native(self, arm: str) -> Path:
        """What differs between that and our rows, of an arm inside a comparison."""
        return self.root / "arms" / arm / "native.json"

    @property
    def parity(self) -> Path:
        return self.root / "parity.json"

    @property
    def regrouped(self) -> Path:
        """Parity records of our own engine that differ by noise alone, a list."""
        return self.root / "regrouped.json"

    @property
    def evaluation(self) -> Path:
        return self.root / "eval.json"

    @property
    def answers(self) -> Path:
        return self.root / "answers.jsonl"

    @property
    def preferences(self) -> Path:
        """Prepared pairs that arms are judged on."""
        return self.root / "preferences"

    @property
    def pair_scores(self) -> Path:
        """What an arm makes of them."""
        return self.root / "preferences.jsonl"

    @property
    def harness(self) -> Path:
        return self.root / "harness.json"

    @property
    def tasks(self) -> Path:
        return self.root / "tasks.json"

    @property
    def rejects(self) -> Path:
        return self.root / "rejected_rows.jsonl"

    @property
    def stream_rejects(self) -> Path:
        return self.root / "rejected_stream_rows.jsonl"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def comparison(self) -> Path:
        return self.root / "comparison.json"

    @property
    def gates(self) -> Path:
        return self.root / "gates.json"

    @property
    def frameworks(self) -> Path:
        return self.root / "frameworks.json"

    def clear(self) -> None:
        """Delete what runs and comparisons write here, and nothing else."""
        names = ("prepared", "checkpoints", "adapter", "model", "arms", "job.json", "run.json", "steps.jsonl")
        names += (
            "handoff",
            "framework",
            "parity.json",
            "regrouped.json",
            "eval.json",
            "harness.json",
            "answers.jsonl",
            "preferences",
            "preferences.jsonl",
            "preferences.rejected.jsonl",
            "pairs.json",
            "reference.safetensors",
            "rewards.log",
            "win_rate.json",
            "tasks.json",
            "rejected_rows.jsonl",
            "rejected_stream_rows.jsonl",
            "comparison.json",
            "gates.json",
            "frameworks.json",
            "report.html",
        )
        for path in (self.root / name for name in names):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def is_own(self) -> bool:
        """True for a folder that is empty, missing, or was begun by us."""
        return (
            self.job.is_file()
            or not self.root.is_dir()
            or {path.name for path in self.root.iterdir()} <= {".lock"}
        )

    @property
    def verb(self) -> Literal["train", "compare"] | None:
        """The verb that has left results here, or None if none has got that far."""
        if self.comparison.is_file() or (self.root / "arms").is_dir():
            return "compare"
        return "train" if any(path.exists() for path in (self.record, self.steps, self.checkpoints)) else None

    def holds_run(self) -> bool:
        """True where a training, a comparison or one of its arms was begun."""
        return any(path.is_file() for path in (self.job, self.record, self.tasks, self.comparison))

    def of_arm(self, name: str) -> RunDir:
        """Folder of all that is one arm's inside a comparison."""
        return RunDir(self.root / "arms" / name)

    def arm(self, name: str, seed: int) -> RunDir:
        """Folder of one arm and seed inside a comparison."""
        return RunDir(self.of_arm(name).root / f"seed-{seed}")

    def trial(self, name: str, trial: int) -> RunDir:
        """Folder of one learning-rate trial of an arm inside a comparison."""
        return RunDir(self.root / "arms" / name / "trials" / str(trial))

    def parity_run(self, name: str, who: str) -> RunDir:
        """Folder of the short run that shows what an arm's framework does; `who` is "reference" for our own engine."""
        return RunDir(self.root / "arms" / name / "parity" / who)

    def create(self) -> RunDir:
        """Make the folder and prove that it can be written, before any work is done."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe.{os.getpid()}"
            probe.write_bytes(b"0" * 4096)
            probe.unlink()
        except OSError as error:
            raise as_rundir_error(error, self.root) from None
        return self

    @contextmanager
    def lock(self, *, cure: str = "Wait, or give another --out") -> Generator[None]:
        """Own the folder; a second owner is refused, naming the first. The lock dies with the process."""
        path = self.root / ".lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise as_rundir_error(error, self.root) from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
                raise RunDirError(
                    str(self.root),
                    f"in use by {owner}",
                    rule="one run owns a folder",
                    cure=cure,
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
            yield
        finally:
            os.close(descriptor)


def as_rundir_error(error: OSError, place: Path) -> RunDirError:
    """Turn a failed write into one line with its cure."""
    if error.errno == errno.ENOSPC:
        return RunDirError(
            str(place), "no space left on the disk", cure="Free some space, then run the command again"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return RunDirError(
            str(place),
            "cannot be written",
            rule="the output folder must be writable",
            cure="Give another --out",
        )
    return RunDirError(str(place), error.strerror or str(error), cure="Give another --out")

"""The port that every framework is run through: what it cannot express, how a job is said to it, what it left.

An adapter is one file with these three. What runs inside a framework's environment is its worker (workers/).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tunesmith.core.checked import read_checked
from tunesmith.core.errors import ArmFailed, DataError
from tunesmith.core.jsonl import read_json
from tunesmith.core.parity import ParityRecord
from tunesmith.frameworks.handoff import Handoff, RawRows
from tunesmith.job.spec import Job

WORKERS = Path(__file__).with_name("workers")


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a framework cannot do what a job asks: the setting, what it is there, and what to do about it."""

    key: str
    finding: str
    cure: str


@dataclass(frozen=True, slots=True)
class Translation:
    """files: name -> text, written into the handoff's scratch folder. argv: what follows the interpreter of the
    framework's environment. environ: added to its own."""

    files: Mapping[str, str]
    argv: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class FrameworkRecord:
    """What a worker says of a finished training. seconds: of `importing`, `loading`, `building`, `first step`, `steps`,
    `validating`, `saving`. bytes: peaks, `allocated` and `reserved` on a GPU, `resident` in any case.

    resolved: the framework's whole configuration as it was used, its own defaults among it.
    """

    framework: str
    versions: dict[str, str]
    seconds: dict[str, float]
    bytes: dict[str, int]
    hardware: dict[str, Any]
    resolved: dict[str, Any]
    steps: int
    train_tokens: int
    target_tokens: int
    trained_parameters: int
    total_parameters: int
    micro_rows: int
    best_step: int | None = None
    validation_loss: float | None = None
    warnings: tuple[str, ...] = ()


class Port(Protocol):
    """One framework."""

    name: str

    def can(self, job: Job) -> Reason | None:
        """None, or the first thing in `job` (of one arm) that it cannot express. Never a silent substitute."""
        ...

    def translate(self, handoff: Handoff) -> Translation:
        """Pure: the framework need not be installed. Every setting of the handoff is written out."""
        ...


@runtime_checkable
class NativePort(Port, Protocol):
    """A framework whose own preprocessing can be told what a job says (`compare.track: native`)."""

    def can_prepare(self, raw: RawRows) -> Reason | None:
        """None, or the first thing about the rows that its own preprocessing cannot be told. `Handoff.raw` is what it
        said None to."""
        ...


def collect_training(handoff: Handoff, *, framework: str, log: Path) -> FrameworkRecord:
    """What a training left. Raises ArmFailed in one line if it left nothing, or something else than a record."""
    record = read_left(FrameworkRecord, Path(handoff.record), what="record", handoff=handoff, log=log)
    if record.framework != framework or record.steps != handoff.total_steps:
        finding = f"its record is of {record.steps} steps by {record.framework}"
        raise ArmFailed(
            handoff.label,
            finding,
            rule=f"{framework} was asked for {handoff.total_steps}",
            cure=f"Its log: {log}",
        )
    weights = Path(handoff.weights) if handoff.weights else None
    if weights is not None and not any(weights.glob("*.safetensors")):
        finding = f"{framework} ended without an error and left no weights in {weights.name}"
        raise ArmFailed(handoff.label, finding, cure=f"Its log: {log}")
    return record


def collect_parity(handoff: Handoff, *, framework: str, log: Path) -> ParityRecord:
    """What a parity run left; raises as `collect_training`."""
    record = read_left(ParityRecord, Path(handoff.parity), what="parity record", handoff=handoff, log=log)
    if record.framework != framework:
        finding = f"its parity record is of {record.framework!r}, not of {framework}"
        raise ArmFailed(handoff.label, finding, cure=f"Its log: {log}")
    return record


def read_left(kind: Any, path: Path, *, what: str, handoff: Handoff, log: Path) -> Any:
    """A worker's file as a `kind`. Raises ArmFailed."""
    cure = f"Its log: {log}"
    if not path.is_file():
        raise ArmFailed(handoff.label, f"ended without an error and left no {what}", cure=cure)
    try:
        value = read_json(path)
        if kind is ParityRecord:
            return ParityRecord.from_json(value, place=path.name)
        return read_checked(kind, value, place=path.name)
    except DataError as error:
        finding = f"wrote a malformed {what} ({error.place}: {error.finding})"
        raise ArmFailed(handoff.label, finding, cure=cure) from None

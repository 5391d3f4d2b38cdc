"""The port that every framework is run through: what it cannot express, how a job is said to it, what it left.

An adapter is one file with these three. What runs inside a framework's environment is its worker (workers/).
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from tunesmith.core.checked import read_checked
from tunesmith.core.errors import ArmFailed, DataError
from tunesmith.core.jsonl import read_json, read_jsonl
from tunesmith.core.parity import ParityRecord
from tunesmith.core.quantities import format_bytes
from tunesmith.core.records import SCHEMA, StepRecord
from tunesmith.frameworks.handoff import Handoff, RawRows
from tunesmith.frameworks.logs import clean_text
from tunesmith.job.spec import Job

WORKERS = Path(__file__).with_name("workers")
# Of what a worker leaves: records have a few thousand values, a step's line a few hundred bytes.
MAX_RECORD_BYTES = 64 << 20
MAX_STEP_BYTES = 4096
MAX_TEXT = 20_000


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
class HardwarePort(Port, Protocol):
    """A framework that cannot do on some hardware what it can on other."""

    def can_on(self, job: Job, *, device: str, precision: str) -> Reason | None:
        """As `can`, with what `auto` means on this machine: `cpu` or `cuda`, and `fp32`, `bf16` or `fp16`."""
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
    _check_steps(handoff, framework=framework, log=log)
    weights = Path(handoff.weights) if handoff.weights else None
    if weights is not None:
        _check_weights(weights, framework=framework, handoff=handoff, log=log)
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
    check_left(path, what=what, label=handoff.label, log=log)
    try:
        value = _clean(read_json(path))
        if kind is ParityRecord:
            return ParityRecord.from_json(value, place=path.name)
        return read_checked(kind, value, place=path.name)
    except DataError as error:
        raise _malformed(what, error, handoff.label, log) from None


def check_left(path: Path, *, what: str, label: str, log: Path, max_bytes: int = MAX_RECORD_BYTES) -> None:
    """Raise ArmFailed unless a worker left a plain file of sensible size. A link could show us anybody's file, and
    reading a pipe would never end."""
    cure = f"Its log: {log}"
    try:
        found = path.lstat()
    except FileNotFoundError:
        raise ArmFailed(label, f"ended without an error and left no {what}", cure=cure) from None
    if not stat.S_ISREG(found.st_mode):
        raise ArmFailed(
            label, f"left something else than a plain file as its {what} ({path.name})", cure=cure
        )
    if found.st_size > max_bytes:
        finding = f"left a {what} of {format_bytes(found.st_size)} ({path.name})"
        raise ArmFailed(label, finding, rule=f"it has at most {format_bytes(max_bytes)}", cure=cure)


def _check_steps(handoff: Handoff, *, framework: str, log: Path) -> None:
    """Raise ArmFailed unless the log of steps has a sound line for each step, in order."""
    path = Path(handoff.steps_file)
    limit = max(MAX_RECORD_BYTES, MAX_STEP_BYTES * handoff.total_steps)
    check_left(path, what="log of steps", label=handoff.label, log=log, max_bytes=limit)
    count = 0
    try:
        for count, (line, value) in enumerate(read_jsonl(path, name=path.name), 1):
            place = f"{path.name}:{line}"
            if not isinstance(value, dict) or value.pop("schema", None) != SCHEMA:  # pyright: ignore[reportUnknownMemberType]
                raise DataError(place, "is no step's record")
            step = read_checked(StepRecord, value, place=place).step
            if step != count:
                raise DataError(f"{place}: step", f"is {step}, and it is line {count}")
        if count != handoff.total_steps:
            raise DataError(
                path.name, f"has {count} steps, and {framework} was asked for {handoff.total_steps}"
            )
    except DataError as error:
        raise _malformed("log of steps", error, handoff.label, log) from None


def _check_weights(folder: Path, *, framework: str, handoff: Handoff, log: Path) -> None:
    files = list(folder.glob("*.safetensors"))
    if not files:
        finding = f"{framework} ended without an error and left no weights in {folder.name}"
        raise ArmFailed(handoff.label, finding, cure=f"Its log: {log}")
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            finding = f"left something else than a plain file among its weights ({folder.name}/{path.name})"
            raise ArmFailed(handoff.label, finding, cure=f"Its log: {log}")


def _malformed(what: str, error: DataError, label: str, log: Path) -> ArmFailed:
    finding = f"wrote a malformed {what} ({clean_text(error.place)}: {clean_text(error.finding)[:300]})"
    return ArmFailed(label, finding, cure=f"Its log: {log}")


def _clean(value: Any) -> Any:
    """JSON whose texts do nothing to a terminal and fill no page: they are shown to people."""
    if isinstance(value, str):
        return clean_text(value)[:MAX_TEXT]
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_clean(item) for item in cast("list[Any]", value)]
    return value

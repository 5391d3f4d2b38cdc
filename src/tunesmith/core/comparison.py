"""The on-disk schema of `comparison.json`: written by `compare`, read by `report`, the command line and notebooks.

Everything a reader needs to show a result without computing one: intervals, verdict words, the table's text.
Losses and answers row by row stay in the arms' own folders.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, cast

from tunesmith.core.errors import DataError
from tunesmith.core.native import NativeTokens
from tunesmith.core.records import SCHEMA


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """How a metric is named and read. unit: "%" (the value is a share, shown times 100), "nats", "bits" or ""."""

    title: str
    unit: str
    higher_is_better: bool


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95% interval; bounds are None where fewer than two clusters leave nothing to resample."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """`arm` minus `other` on one metric, in the metric's own unit.

    low, high:     95% interval.   low90, high90: 90% interval, the one a tie is judged by.
    p, p_adjusted: two-sided, before and after Holm's correction over its family.
    verdict:       better | worse | tie | inconclusive | exploratory, seen from `arm`.
    advice:        what would resolve an inconclusive difference, or "".
    """

    arm: str
    other: str
    metric: str
    delta: float
    low: float | None
    high: float | None
    low90: float | None
    high90: float | None
    p: float
    p_adjusted: float
    verdict: str
    advice: str = ""

    def flip(self) -> Difference:
        """The same difference seen from the other arm."""
        return Difference(
            arm=self.other,
            other=self.arm,
            metric=self.metric,
            delta=-self.delta,
            low=None if self.high is None else -self.high,
            high=None if self.low is None else -self.low,
            low90=None if self.high90 is None else -self.high90,
            high90=None if self.low90 is None else -self.low90,
            p=self.p,
            p_adjusted=self.p_adjusted,
            verdict={"better": "worse", "worse": "better"}.get(self.verdict, self.verdict),
            advice=self.advice,
        )


@dataclass(frozen=True, slots=True)
class Trial:
    """One learning-rate trial. `validation_loss` is nats per target token, None if it diverged."""

    learning_rate: float
    validation_loss: float | None
    wall_seconds: float
    chosen: bool


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm over all its seeds.

    kind:        "prompted" or "trained".   status: "done", "partial" (some seeds missing) or "missing".
    trained_by:  the arm whose training this one uses; its own name when it trained itself; None when prompted.
    seeds:       seeds that were compared: scored in every arm that depends on them; a deterministic arm is scored once.
    per_seed:    metric -> value of each seed, in the order of `seeds`.
    costs:       means over seeds of one training plus one scoring, the shared training included; `wall_seconds` is the
                 sum of `train_wall_seconds` and `eval_wall_seconds`, and so for CPU. `peak_bytes` is the largest.
    quantize:    what its model was quantised to before it was judged, or None; `size_bytes` is then the whole model's.
    dominated_by: cost name -> an arm that is better and cheaper beyond noise.
    objective:   what its training learned. starts_from: the arm whose training its own went on from; costs are its own.
    from_start:  metric -> this arm minus the one it starts from.
    """

    name: str
    kind: str
    framework: str
    method: str
    prompting: str
    status: str
    trained_by: str | None
    deterministic: bool
    seeds: list[int]
    metrics: dict[str, Interval]
    per_seed: dict[str, list[float]]
    versus_base: str | None = None
    differences: dict[str, Difference] = field(default_factory=dict[str, Difference])
    not_comparable: str = ""
    learning_rate: float = 0.0
    steps: int = 0
    trained_parameters: int = 0
    total_parameters: int = 0
    train_tokens: int = 0
    target_tokens: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    train_wall_seconds: float = 0.0
    train_cpu_seconds: float = 0.0
    eval_wall_seconds: float = 0.0
    eval_cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    tune_wall_seconds: float = 0.0
    peak_bytes: int = 0
    size_bytes: int = 0
    forgetting: dict[str, float] | None = None
    trials: list[Trial] = field(default_factory=list[Trial])
    quantize: str | None = None
    dominated_by: dict[str, str] = field(default_factory=dict[str, str])
    objective: str = "sft"
    starts_from: str | None = None
    from_start: dict[str, Difference] = field(default_factory=dict[str, Difference])


@dataclass(frozen=True, slots=True)
class Gate:
    """One parity gate of one arm. word: PASS | FAIL | UNVERIFIED (something could not be seen, or noise hides it) |
    DIFFERS (other tokens, in the native track, where that is a finding).

    figure, tolerance: what was measured and how much of it is noise; None where nothing could be measured.
    unit:   "rows", "tensors" and "settings" are counts that differ, "relative" is a share of ours.
    says:   a sentence: what agrees, what differs, or what could not be seen.
    """

    name: str
    word: str
    figure: float | None
    tolerance: float | None
    unit: str
    says: str


@dataclass(frozen=True, slots=True)
class Parity:
    """Whether a framework does the work that ours does: its gates, in the order of `comparing.parity.GATES`."""

    framework: str
    versions: dict[str, str]
    gates: list[Gate]

    @property
    def failed(self) -> list[str]:
        """Names of gates that say FAIL: one is enough to take the arm out of every ranking."""
        return [gate.name for gate in self.gates if gate.word == "FAIL"]

    @property
    def unverified(self) -> list[str]:
        """Names of gates that could not say."""
        return [gate.name for gate in self.gates if gate.word == "UNVERIFIED"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table. hint: one sentence for a tooltip. numeric: right-aligned."""

    key: str
    title: str
    hint: str = ""
    numeric: bool = True


@dataclass(frozen=True, slots=True)
class Cell:
    """text: what is read first. detail: the interval or remark under it. tone: better | worse | best | muted | ""."""

    text: str
    detail: str = ""
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """The one table: terminal, Markdown and HTML show these words. rows[i] belongs to arm `arms[i]`."""

    columns: list[Column]
    arms: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All arms, judged.

    verdict: the finding in a sentence; details: what supports it, a sentence each.
    base:    the arm that `versus_base` refers to (zero-shot), None if it was not run.
    pairs:   every pair of ranked arms on the declared metric.
    method:  how it was measured: replicates, resampling unit, margins, families of tests.
    record:  config, fingerprints, versions, hardware.
    parity:  arm that another framework trained -> whether it did our work; absent where nobody looked.
    num_pairs: held-out pairs that arms were judged on.
    starts:  arms that go on from another one, each measure against it.
    native:  arm of another framework -> what its own preprocessing makes of the rows (`compare.track: native`).
    """

    metric: str
    verdict: str
    details: list[str]
    base: str | None
    seeds: list[int]
    num_rows: int
    num_clusters: int
    num_target_tokens: int
    arms: list[ArmResult]
    pairs: list[Difference]
    metrics: dict[str, MetricInfo]
    table: Table
    warnings: list[str]
    method: dict[str, Any]
    record: dict[str, Any]
    parity: dict[str, Parity] = field(default_factory=dict[str, Parity])
    native: dict[str, NativeTokens] = field(default_factory=dict[str, NativeTokens])
    num_pairs: int = 0
    starts: Table = field(default_factory=lambda: Table([], [], []))

    def find_arm(self, name: str) -> ArmResult:
        """The arm called `name`. Raises ValueError if there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ValueError(f"no arm {name!r}")

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    def public_json(self, *, report: str | None = None) -> dict[str, Any]:
        """The stable object that `compare --json` prints; fields are added, never renamed.

        report: path of the HTML file, null if none was written. `versus_base` is null for the base, without a base,
        and for prompted arms when the metric is nll, which ranks trained arms only. `parity` is null where no other
        framework trained, or nobody looked. `native` is null but in the native track.
        """
        arms = [
            {
                "name": arm.name,
                "kind": arm.kind,
                "objective": arm.objective if arm.kind == "trained" else None,
                "starts_from": arm.starts_from,
                "from_start": {
                    name: {"delta": d.delta, "low": d.low, "high": d.high, "verdict": d.verdict}
                    for name, d in arm.from_start.items()
                },
                "framework": arm.framework,
                "status": arm.status,
                "seeds": arm.seeds,
                "metrics": {
                    name: {"value": metric.value, "low": metric.low, "high": metric.high}
                    for name, metric in arm.metrics.items()
                },
                "per_seed": arm.per_seed,
                "versus_base": arm.versus_base,
                "not_comparable": arm.not_comparable or None,
                "learning_rate": arm.learning_rate,
                "steps": arm.steps,
                "trained_parameters": arm.trained_parameters,
                "train_tokens": arm.train_tokens,
                "target_tokens": arm.target_tokens,
                "wall_seconds": arm.wall_seconds,
                "cpu_seconds": arm.cpu_seconds,
                "train_wall_seconds": arm.train_wall_seconds,
                "train_cpu_seconds": arm.train_cpu_seconds,
                "eval_wall_seconds": arm.eval_wall_seconds,
                "eval_cpu_seconds": arm.eval_cpu_seconds,
                "gpu_seconds": arm.gpu_seconds,
                "peak_bytes": arm.peak_bytes,
                "size_bytes": arm.size_bytes,
                "quantize": arm.quantize,
                "forgetting": arm.forgetting,
                "parity": _list_gates(self.parity.get(arm.trained_by or "")),
                "native": _show_native(self.native.get(arm.trained_by or "")),
            }
            for arm in self.arms
        ]
        return {
            "schema": SCHEMA,
            "metric": self.metric,
            "verdict": self.verdict,
            "report": report,
            "warnings": self.warnings,
            "arms": arms,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, place: str = "comparison.json") -> Self:
        """Read strictly: a newer schema, an unknown or a missing field raises DataError."""
        if value.get("schema") != SCHEMA:
            raise DataError(
                place,
                f"schema {value.get('schema')!r}",
                rule=f"this version reads schema {SCHEMA}",
                cure="Run `tunesmith compare` again with the same --out",
            )
        return cast(Self, _parse(cls, {k: v for k, v in value.items() if k != "schema"}, place))


def parity_to_json(parity: Mapping[str, Parity]) -> dict[str, Any]:
    """`gates.json`: by arm."""
    return {"schema": SCHEMA, "arms": {name: dataclasses.asdict(one) for name, one in parity.items()}}


def parity_from_json(value: Mapping[str, Any], *, place: str = "gates.json") -> dict[str, Parity]:
    """Read strictly, as `Comparison.from_json` does. Raises DataError."""
    if value.get("schema") != SCHEMA or not isinstance(value.get("arms"), dict):
        raise DataError(place, f"schema {value.get('schema')!r}", rule=f"this version reads schema {SCHEMA}")
    return cast(dict[str, Parity], _parse(dict[str, Parity], value["arms"], f"{place}: arms"))


def native_to_json(native: NativeTokens) -> dict[str, Any]:
    """`native.json` of an arm."""
    return {"schema": SCHEMA, **dataclasses.asdict(native)}


def native_from_json(value: Mapping[str, Any], *, place: str = "native.json") -> NativeTokens:
    """Read strictly, as `Comparison.from_json` does. Raises DataError."""
    if value.get("schema") != SCHEMA:
        raise DataError(place, f"schema {value.get('schema')!r}", rule=f"this version reads schema {SCHEMA}")
    return cast(NativeTokens, _parse(NativeTokens, {k: v for k, v in value.items() if k != "schema"}, place))


def _show_native(native: NativeTokens | None) -> dict[str, Any] | None:
    return dataclasses.asdict(native) if native else None


def _list_gates(parity: Parity | None) -> dict[str, str] | None:
    return {gate.name: gate.word for gate in parity.gates} if parity else None


def _parse(kind: Any, value: Any, place: str) -> Any:
    """Build dataclasses from plain JSON by their annotations; leaves pass through."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _parse(next(a for a in arguments if a is not types.NoneType), value, place)
    if origin is list and isinstance(value, list):
        items = cast(list[Any], value)
        return [_parse(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(items)]
    if origin is dict and isinstance(value, dict):
        pairs = cast(dict[str, Any], value)
        return {key: _parse(arguments[1], item, f"{place}.{key}") for key, item in pairs.items()}
    if not dataclasses.is_dataclass(kind):
        return value
    rule = f"fields of {getattr(kind, '__name__', kind)} are fixed"
    if not isinstance(value, dict):
        raise DataError(place, f"{type(value).__name__} instead of an object", rule=rule)
    given = cast(dict[str, Any], value)
    hints = typing.get_type_hints(kind)
    if unknown := sorted(given.keys() - hints.keys()):
        raise DataError(place, f"unknown field {unknown[0]!r}", rule=rule)
    try:
        return cast(Any, kind)(**{k: _parse(hints[k], v, f"{place}.{k}") for k, v in given.items()})
    except TypeError as error:
        raise DataError(place, str(error), rule=rule) from None

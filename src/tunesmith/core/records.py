"""The on-disk schema: what a run leaves behind and what comparison and report read. Dataclasses to JSON and back.

Every record carries `schema`, raised when a field changes meaning. Readers refuse a newer schema, ignore nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tunesmith.core.errors import DataError
from tunesmith.core.jsonl import read_jsonl

SCHEMA = 1


class _Record:
    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, place: str = "record") -> Self:
        if value.get("schema") != SCHEMA:
            raise DataError(
                place,
                f"record schema {value.get('schema')!r}",
                rule=f"this version reads schema {SCHEMA}",
                cure="Use the version that wrote it",
            )
        names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        given = {key: item for key, item in value.items() if key != "schema"}
        if unknown := sorted(given.keys() - names):
            raise DataError(
                place, f"unknown record field {unknown[0]!r}", rule=f"fields of {cls.__name__} are fixed"
            )
        try:
            return cls(**given)
        except TypeError as error:
            raise DataError(place, str(error), rule=f"fields of {cls.__name__} are fixed") from None


@dataclass(frozen=True, slots=True)
class StepRecord(_Record):
    """One optimizer step, a line of `steps.jsonl`. `loss` is nats per target token over the whole step; of an objective
    of examples (pairs, labelled answers) per example, as are `measures`: what it measures besides (of distillation
    per target token)."""

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_target_tokens: int
    step_seconds: float
    peak_bytes: int
    validation_loss: float | None = None
    measures: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class AnswerRecord(_Record):
    """One test row under one arm and seed, a line of `answers.jsonl`: everything intervals are computed from.

    nll:               sum over target tokens, nats (None where an arm has no likelihood).
    nll_content:       the same without the turn's end token.
    cluster:           rows of one cluster are resampled together.
    scores:            metric name -> value of this row.
    """

    row: int
    row_id: str
    place: str
    cluster: str
    question: str
    truth: str
    answer: str | None = None
    nll: float | None = None
    nll_content: float | None = None
    num_target_tokens: int = 0
    num_bytes: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    finished: bool = True
    scores: dict[str, float] = field(default_factory=dict[str, float])


def read_answers(path: Path) -> list[AnswerRecord]:
    """The answers of one arm and seed, ordered by test row. Raises DataError at the line that is none."""
    rows = [AnswerRecord.from_json(value, place=f"{path}:{line}") for line, value in read_jsonl(path)]
    return sorted(rows, key=lambda answer: answer.row)


@dataclass(frozen=True, slots=True)
class PreferenceRecord(_Record):
    """One held-out pair under one arm and seed, a line of `preferences.jsonl`.

    logps:  log-probability of the chosen and of the rejected answer, nats, summed over their target tokens.
    tokens: how many those are.
    """

    row: int
    row_id: str
    place: str
    cluster: str
    logps: list[float]
    tokens: list[int]

    @property
    def is_right(self) -> float:
        """1 if the chosen answer is likelier per token, so that length decides nothing; of equals 0.5."""
        chosen, rejected = (logp / max(1, count) for logp, count in zip(self.logps, self.tokens, strict=True))
        return 0.5 if chosen == rejected else float(chosen > rejected)

    @property
    def margin(self) -> float:
        """By how much the chosen answer is likelier, nats per answer."""
        return self.logps[0] - self.logps[1]


@dataclass(frozen=True, slots=True)
class EvalRecord(_Record):
    """One arm and seed scored by the judge (`eval.json`), beside its `answers.jsonl`.

    metrics:    name -> mean over rows; `nll` is token-weighted; `perplexity` = exp(nll); `bits_per_byte`.
    forgetting: `general_nll`, `general_nll_base`, `general_tokens`, `kl_from_base` (nats per token), None if not asked.
    quantize:   what the judged model was quantised to, such as `int4`; `size_bytes` is then its whole size.
    """

    model: str
    adapter: str | None
    prompting: str
    metrics: dict[str, float]
    num_rows: int
    num_target_tokens: int
    data_sha256: str
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    forgetting: dict[str, float] | None = None
    quantize: str | None = None
    size_bytes: int = 0
    warnings: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True)
class RunRecord(_Record):
    """One training run (`run.json`), written at its end; `status` is "done", "interrupted" or "failed".

    config:       the resolved job, every default written out.
    fingerprints: sha256 of data splits, template, base weights, code.
    versions:     python, torch, tunesmith ...; hardware: cpu, cores, threads, gpu.
    fp8_check:    with products in fp8, the base's loss on the first step's rows: `reference_loss` without and
                  `fp8_loss` with fp8, nats per target token, and the relative `difference`.
    micro_batch_tokens: most tokens of a forward pass, as the run ended.
    phases:       seconds of `importing`, `loading`, `building`, `first step`, `steps`, `validating` (of our own engine
                  with its checkpoints), `saving`; None after an interruption.
    memory:       peaks in bytes: `allocated` and `reserved` on a GPU, `resident` in any case.
    memory_plan:  on a GPU, what was kept of each block and why: `budget_tokens`, `levels`, `limit_bytes`, predicted
                  `parts` and `peak_bytes`, and the `probe` that corrected them.
    """

    status: str
    method: str
    framework: str
    model: str
    seed: int
    config: dict[str, Any]
    fingerprints: dict[str, str]
    versions: dict[str, str]
    hardware: dict[str, Any]
    learning_rate: float = 0.0
    steps: int = 0
    trained_parameters: int = 0
    total_parameters: int = 0
    train_tokens: int = 0
    target_tokens: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    size_bytes: int = 0
    best_step: int | None = None
    validation_loss: float | None = None
    fp8_check: dict[str, float] | None = None
    micro_batch_tokens: int = 0
    memory_plan: dict[str, Any] | None = None
    phases: dict[str, float] | None = None
    memory: dict[str, int] | None = None
    warnings: list[str] = field(default_factory=list[str])

    @property
    def objective(self) -> str:
        """Name of what was learned. Losses of `sft` are nats per target token, of all others per example."""
        said: Any = self.config.get("objective", "sft")
        return said if isinstance(said, str) else said["name"]


@dataclass(frozen=True, slots=True)
class EnvironmentRecord(_Record):
    """A framework's environment (`environment.json`): the one that jobs are run in.

    origin:      "installed" by us, or "added": an environment of the user's, of which only this record is ours.
    python:      path of its interpreter.
    slot:        folder beside the record that holds it; empty for an added one.
    build:       torch's: "cpu", "cuda", or "default" on systems whose plain build has no CUDA in it.
    lock_sha256: of what was to be installed; an added one has it too, and its `differences` from it.
    installer:   such as `uv 0.13.9`; empty for an added one.
    """

    framework: str
    origin: str
    python: str
    slot: str
    python_version: str
    torch: str
    build: str
    lock_sha256: str
    installer: str
    versions: dict[str, str]
    created: str
    wall_seconds: float
    size_bytes: int
    differences: list[str] = field(default_factory=list[str])

"""How far two honest runs of one job lie apart: what no parity gate can see below.

Measured on our own engine, on the actual model, rows and precision, over regroupings that must not matter: one row at a
time, all at once, other padding, another order within a step. What a sum rounds to depends on its order, and training
amplifies it from step to step, so the curve's noise is kept per step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from tunesmith.core.parity import ParityRecord

FACTOR = 3
_FIRST = 3
SMALLEST = 1e-6


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """Largest relative deviations between any two of `num_records` honest runs; None: could not be measured.

    loss, grad_norm: of the first step, as the largest over the first three: two sums can agree by chance in one step.
    curve: of the loss at each step; never falls, as drift that happened to cancel once is not gone.
    shift: of the mean loss over the curve, where deviations of both signs cancel.
    """

    num_records: int
    loss: float | None
    grad_norm: float | None
    curve: tuple[float, ...] | None
    shift: float | None


def measure_noise(records: Sequence[ParityRecord]) -> NoiseFloor:
    """Compare our own records of one job, regrouped. Raises ValueError for fewer than two, or if they are no
    regroupings: other rows in some step, or another number of steps."""
    if len(records) < 2:
        raise ValueError(f"{len(records)} record(s): noise shows between two or more")
    rows = [[sorted(row.digest for row in step.examples or ()) for step in r.steps] for r in records]
    if any(other != rows[0] for other in rows[1:]):
        raise ValueError("records of other rows, or other steps: not regroupings of one job")
    pairs = list(combinations(records, 2))
    curves = [compare_curves(read_curve(b), read_curve(a)) for a, b in pairs]
    seen = [curve for curve in curves if curve is not None]
    whole = len(seen) == len(pairs) and bool(seen[0])
    return NoiseFloor(
        len(records),
        _largest([d for a, b in pairs for d in _compare_first(a, b, "loss")]),
        _largest([d for a, b in pairs for d in _compare_first(a, b, "grad_norm")]),
        _never_falling([max(step) for step in zip(*seen, strict=True)]) if whole else None,
        _largest([shift_of(read_curve(b), read_curve(a)) for a, b in pairs]) if whole else None,
    )


def tolerate(noise: float) -> float:
    """3x the floor, and never less than rounding of fp32."""
    return max(FACTOR * noise, SMALLEST)


def relate(value: float | None, reference: float | None) -> float | None:
    """value / reference - 1, as a size; infinite where either is not finite, None where either was not seen."""
    if value is None or reference is None:
        return None
    if not (math.isfinite(value) and math.isfinite(reference)):
        return math.inf
    return abs(value - reference) / max(abs(reference), 1e-30)


def read_curve(record: ParityRecord) -> list[float] | None:
    """Losses of all steps, None if one is missing."""
    losses = [step.loss for step in record.steps if step.loss is not None]
    return losses if losses and len(losses) == len(record.steps) else None


def compare_curves(curve: Sequence[float] | None, reference: Sequence[float] | None) -> list[float] | None:
    """Relative deviation of each step that both have."""
    if curve is None or reference is None:
        return None
    pairs = zip(curve, reference, strict=False)
    return [deviation for a, b in pairs if (deviation := relate(a, b)) is not None]


def shift_of(curve: Sequence[float] | None, reference: Sequence[float] | None) -> float | None:
    """Relative deviation of the mean loss over the steps that both have."""
    if not curve or not reference:
        return None
    length = min(len(curve), len(reference))
    return relate(sum(curve[:length]) / length, sum(reference[:length]) / length)


def _compare_first(reference: ParityRecord, other: ParityRecord, name: str) -> list[float | None]:
    steps = zip(reference.steps[:_FIRST], other.steps[:_FIRST], strict=False)
    return [relate(getattr(b, name), getattr(a, name)) for a, b in steps]


def _largest(values: Sequence[float | None]) -> float | None:
    seen = [value for value in values if value is not None]
    return max(seen) if seen and len(seen) == len(values) else None


def _never_falling(values: Sequence[float]) -> tuple[float, ...]:
    largest, kept = max(values[:_FIRST], default=0.0), list[float]()
    for value in values:
        largest = max(largest, value)
        kept.append(largest)
    return tuple(kept)

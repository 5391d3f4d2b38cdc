"""How far two honest runs of one job lie apart: what no parity gate can see below.

Measured on our own engine, on the actual model, rows and precision, over regroupings that must not matter: one row at a
time, all at once, other padding, another order within a step. What a sum rounds to depends on its order, and training
amplifies it from step to step, so the curve's noise is kept per step. A job in 16 bits needs two records more, one with
products in fp32 and one with another attention: regrouped rows alone keep their own rounding (docs/decisions/013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations

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
    """Compare our own records of one job, regrouped; one alone tells nothing. Raises ValueError if they are no
    regroupings: other rows in some step, or another number of steps."""
    if len(records) < 2:
        return NoiseFloor(len(records), None, None, None, None)
    rows = [[sorted(row.digest for row in step.examples or ()) for step in r.steps] for r in records]
    if any(other != rows[0] for other in rows[1:]):
        raise ValueError("records of other rows, or other steps: not regroupings of one job")
    pairs = list(combinations(records, 2))
    curves = [pair_losses(b, a) for a, b in pairs]
    whole = all(len(curve) == len(records[0].steps) > 0 for curve in curves)
    largest = [max(relate(x, y) for _, x, y in step) for step in zip(*curves, strict=True)] if whole else []
    return NoiseFloor(
        len(records),
        _compare_first(pairs, "loss"),
        _compare_first(pairs, "grad_norm"),
        tuple(accumulate(largest, max, initial=max(largest[:_FIRST])))[1:] if whole else None,
        max(map(shift_of, curves)) if whole else None,
    )


def tolerate(noise: float) -> float:
    """3x the floor, and never less than rounding of fp32."""
    return max(FACTOR * noise, SMALLEST)


def relate(value: float, reference: float) -> float:
    """value / reference - 1, as a size; infinite where either is no number."""
    if not (math.isfinite(value) and math.isfinite(reference)):
        return math.inf
    return abs(value - reference) / max(abs(reference), 1e-30)


def pair_losses(record: ParityRecord, reference: ParityRecord) -> list[tuple[int, float, float]]:
    """(step from 0, loss, the reference's loss) wherever both were seen."""
    pairs = enumerate(zip(record.steps, reference.steps, strict=False))
    return [(i, a.loss, b.loss) for i, (a, b) in pairs if a.loss is not None and b.loss is not None]


def shift_of(pairs: Sequence[tuple[int, float, float]]) -> float:
    """Relative deviation of the mean loss over the steps that both have."""
    return relate(sum(loss for _, loss, _ in pairs), sum(right for _, _, right in pairs))


def _compare_first(pairs: Sequence[tuple[ParityRecord, ParityRecord]], name: str) -> float | None:
    """Largest deviation of a figure in the first steps; None if one was not seen."""
    steps = [two for a, b in pairs for two in zip(a.steps[:_FIRST], b.steps[:_FIRST], strict=True)]
    values = [(getattr(b, name), getattr(a, name)) for a, b in steps]
    if not values or any(x is None or y is None for x, y in values):
        return None
    return max(relate(x, y) for x, y in values)

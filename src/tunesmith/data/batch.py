"""Which rows make a step, and which of them share a forward pass. Deterministic, numpy and standard library only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def plan_epoch(num_rows: int, *, batch_rows: int, seed: int, epoch: int) -> list[list[int]]:
    """Row numbers of each optimizer step of one epoch: every row once, the last step may be smaller.

    The order depends on (seed, epoch) alone, so a resumed run and another framework see the same steps.
    """
    if batch_rows < 1:
        raise ValueError(f"batch_rows is {batch_rows}, must be positive")
    order = np.random.default_rng([seed, epoch]).permutation(num_rows).tolist()
    return [order[start : start + batch_rows] for start in range(0, num_rows, batch_rows)]


def plan_epochs(num_rows: int, *, batch_rows: int, seed: int, steps: int) -> list[list[list[int]]]:
    """`plan_epoch` of each epoch that a run of so many optimizer steps begins; it may end within the last."""
    epochs = -(-steps // -(-num_rows // batch_rows))
    return [plan_epoch(num_rows, batch_rows=batch_rows, seed=seed, epoch=epoch) for epoch in range(epochs)]


def plan_micro_batches(lengths: Sequence[int], *, budget_tokens: int) -> list[list[int]]:
    """Positions of a step's rows, grouped so that a group holds at most `budget_tokens` tokens: best fit.

    lengths: tokens of each row. A row longer than the budget stands alone. No row is ever cut.
    From long to short, each row goes where it leaves the least room, or begins a group: at most 2 in 9 more groups than
    the fewest there can be (and a few). Ties keep their order.
    Source: Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms".
    """
    if budget_tokens < 1:
        raise ValueError(f"budget_tokens is {budget_tokens}, must be positive")
    groups: list[list[int]] = []
    room: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        length = lengths[position]
        fits = [number for number, left in enumerate(room) if left >= length]
        if fits:
            best = min(fits, key=lambda number: room[number])
            groups[best].append(position)
            room[best] -= length
        else:
            groups.append([position])
            room.append(budget_tokens - length)
    return groups

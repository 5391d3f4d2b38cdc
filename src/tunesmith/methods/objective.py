"""What a training minimises, as the loop sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossSum:
    """total: sum of losses over the batch's target tokens or examples, nats, a scalar that can run backward. The loop
    divides. measures: sums of what is worth logging, scalars without a gradient; the loop divides them by the step's
    examples, or target tokens."""

    total: Tensor
    num_targets: int
    measures: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True)
class Objective:
    """loss:        (model, batch) -> sum over the batch.
    measures:    names of what the loss measures besides, always the same.
    per_example: losses are summed over examples, not over target tokens.
    before_step: looks at a whole step's examples before its first pass, without gradients: (model, examples).
    measures_tokens: measures are summed over target tokens, not over examples.
    """

    loss: Callable[[Any, Any], LossSum]
    measures: Sequence[str] = ()
    per_example: bool = False
    before_step: Callable[[Any, Sequence[Any]], None] | None = None
    measures_tokens: bool = False

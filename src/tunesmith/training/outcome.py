"""What a run tells while it goes on, and at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Progress:
    """What there is to show after a step. loss: nats per target token of this step. seconds_left: an estimate."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    tokens_per_second: float
    seconds_left: float
    peak_bytes: int
    validation_loss: float | None = None


@dataclass(frozen=True, slots=True)
class TrainOutcome:
    """A finished run. The model holds the best weights if `keep_best` and there was validation, else the last.

    validation_loss: of the weights the model ends with, nats per target token; None without validation.
    best_step:       the step these weights are from; None without validation.
    tokens, seconds and peak include the parts of the run before interruptions.
    """

    steps: int
    epochs: float
    loss: float
    validation_loss: float | None
    best_step: int | None
    trained_parameters: int
    train_tokens: int
    target_tokens: int
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    micro_batch_tokens: int
    continued_from: int | None = None
    memory_plan: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)

"""What a training minimises, on which rows, validated how; and what that is made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.api.trainable import make_training_batch
from tunesmith.core.events import Event, OnEvent
from tunesmith.core.rundir import RunDir
from tunesmith.core.types import Example
from tunesmith.data.collect import Rejects
from tunesmith.data.prepare import Prepared
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.job.spec import Job

if TYPE_CHECKING:
    from tunesmith.methods.objective import Objective
    from tunesmith.models.causal_lm import CausalLM


class Aim(NamedTuple):
    """rows: examples of the training split, or a source of rows. evaluate: mean loss over the validation split; None
    without one. doubts: sentences about the rows, once training has ended. fall_back: puts the last good weights back,
    where training failed for what its answers became; False if there are none."""

    objective: Objective
    rows: Any
    evaluate: Callable[[], float] | None
    doubts: Callable[[], list[str]] = list
    fall_back: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Setting:
    """What an aim is made from.

    model:    as training finds it.
    identity: hash of what else than rows decides what the model says of them (weights, precision).
    rejects:  where bad rows of a stream go.
    """

    job: Job
    model: CausalLM
    prepared: Prepared
    tokenizer: Tokenizer
    run: RunDir
    label: str
    identity: str
    rejects: Rejects
    on_event: OnEvent

    @property
    def budget_tokens(self) -> int:
        """Of a forward pass without gradients."""
        from tunesmith.training.loop import choose_budget

        return choose_budget(self.job.train, self.model.device)

    def make_batch(self, examples: Sequence[Example], device: Any) -> Any:
        return make_training_batch(self.job, device)(examples, device)

    def report(self, text: str, done: int, total: int) -> None:
        self.on_event(Event("progress", self.label, text, done=done, total=total))

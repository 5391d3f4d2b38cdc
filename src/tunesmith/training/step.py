"""One optimizer step: micro-batches forward and backward, one division, clipping, update; repeated where that helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tunesmith.core.errors import TrainingFailed
from tunesmith.core.types import Example
from tunesmith.data.batch import plan_micro_batches
from tunesmith.methods.objective import LossSum, Objective
from tunesmith.training.feed import Feed, MakeBatch
from tunesmith.training.graphs import GraphRunner
from tunesmith.training.optim import LossScale, Optimizer, clip_factor
from tunesmith.training.order import StepRows

_MAX_NAMED_ROWS = 5


class TrainableModel(Protocol):
    def named_trainable(self) -> Iterable[tuple[str, nn.Parameter]]: ...
    def named_matrices(self) -> dict[str, list[slice]]: ...
    def parameters(self) -> Iterable[nn.Parameter]: ...
    def train(self, mode: bool = True) -> Any: ...


LossFunction = Callable[[Any, Any], LossSum]


@dataclass(frozen=True, slots=True)
class StepResult:
    """loss: nats per target token (of an objective of examples: per example) over the whole step; measures: what the
    objective measures besides, per example or per target token; grad_norm: before clipping; notes: halvings of the
    micro-batch budget."""

    loss: float
    grad_norm: float
    num_tokens: int
    num_target_tokens: int
    notes: tuple[str, ...] = ()
    measures: Mapping[str, float] = field(default_factory=dict[str, float])


def read_random(device: torch.device) -> dict[str, Tensor]:
    """The generators that dropout draws from, as byte tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def count_targets(row: Example) -> int:
    """Target tokens of a row."""
    # An array sums itself: adding its uint8 items one by one would wrap at 256.
    return int(row.mask.sum()) if hasattr(row.mask, "sum") else sum(row.mask)  # type: ignore[attr-defined]


class Stepper:
    """Takes optimizer steps.

    The loss of each micro-batch is a sum over its target tokens (or examples), divided by those of the *whole* step,
    which are counted before the first backward. How rows are spread over micro-batches therefore changes nothing
    but rounding. `budget_tokens` bounds the tokens of one forward pass; running out of memory halves it and repeats
    the step from the same random state.

    While a micro-batch runs, the next one is made in the background (feed.py). following: reads the step after
    the one that is taken, in the background; None if there is none or nobody knows.

    in_backward: weights are updated while gradients are made (`train.optimizer_in_backward`). A step is then one
    micro-batch, and nothing repeats it.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Optimizer,
        *,
        make_batch: MakeBatch,
        loss: LossFunction | Objective,
        device: torch.device,
        budget_tokens: int,
        clip_norm: float | None,
        scale: LossScale,
        in_backward: bool = False,
    ) -> None:
        self.model, self.optimizer, self.scale = model, optimizer, scale
        self.in_backward = in_backward
        self.budget_tokens = budget_tokens
        self.feed = Feed(make_batch, device)
        self.graphs: GraphRunner | None = None
        self.following: Callable[[], StepRows] | None = None
        self._make_batch, self._device, self._clip_norm = make_batch, device, clip_norm
        self._objective = loss if isinstance(loss, Objective) else Objective(loss)

    def record_graphs(
        self, refresh: Callable[[], bool], *, any_lengths: bool = False, has_room: bool = False
    ) -> None:
        """From now on, record micro-batches whose shape comes back. Memory plan and what blocks keep stay as they are.

        Arguments as of `GraphRunner`.
        """
        self.graphs = GraphRunner(
            # Not a method: it would hold the stepper, which holds it, in a circle that nothing collects.
            partial(_differentiate, self.model, self._objective),
            hold_gradients=self.optimizer.hold_gradients,
            refresh=refresh,
            num_sums=1 + len(self._objective.measures),
            device=self._device,
            any_lengths=any_lengths,
            # Of answers weighed as a whole, their number is a tensor's length.
            by_rows=self._objective.per_example or bool(self._objective.measures),
            has_room=has_room,
        )

    def close(self) -> None:
        """Give back what only steps need: the feed's thread, and the memory of recorded micro-batches."""
        self.feed.close()
        if self.graphs is not None:
            self.graphs.release()

    def take(self, rows: Sequence[Example], *, step: int, learning_rate: float) -> StepResult:
        """Train on `rows` once. Weights change only if loss and gradients are finite.

        step: counted from 1, for messages.
        Raises TrainingFailed naming step and rows if they aren't finite, or if a single row does not fit memory.
        """
        # Labels come first: the divisor must be known before any backward.
        targets = [count_targets(row) for row in rows]
        trained = [row for row, count in zip(rows, targets, strict=True) if count]
        num_targets = sum(targets)
        divisor = len(trained) if self._objective.per_example else num_targets
        if not num_targets:
            raise TrainingFailed(
                f"step {step}", f"no target token in {name_rows(rows)}", rule="a step trains tokens"
            )
        if self._objective.before_step is not None:
            with torch.no_grad():
                self._objective.before_step(self.model, trained)
        if self.in_backward:
            loss, norm = self._update_in_backward(trained, divisor, step, learning_rate)
            return StepResult(loss, norm, sum(len(row.ids) for row in rows), num_targets)
        random = read_random(self._device)
        notes: list[str] = []
        while True:
            sums, norm = self._accumulate(trained, divisor, step, notes)
            loss, norm = sums[0] / divisor, norm / self.scale.value
            if math.isfinite(loss) and math.isfinite(norm):
                break
            self.optimizer.clear_gradients()
            if not math.isfinite(loss) or not self.scale.shrink():
                set_random(random, self._device)
                raise self._explain_non_finite(trained, step=step, loss=loss, norm=norm)
            set_random(random, self._device)
        factor = clip_factor(norm, clip_norm=self._clip_norm) / self.scale.value
        self.optimizer.update(learning_rate=learning_rate, gradient_factor=factor)
        self.scale.count_good_step()
        counted = num_targets if self._objective.measures_tokens else len(trained)
        values = [value / counted for value in sums[1:]]
        measures = dict(zip(self._objective.measures, values, strict=True))
        num_tokens = sum(len(row.ids) for row in rows)
        return StepResult(loss, norm, num_tokens, num_targets, tuple(notes), measures)

    def rehearse(self, rows: Sequence[Example]) -> bool:
        """Forward and backward pass of `rows` as one micro-batch, and nothing of it stays; False if they don't fit."""
        random = read_random(self._device)
        dropping = self.optimizer.updating_in_backward(None) if self.in_backward else nullcontext()
        with dropping:
            fits = isinstance(self._run_micro_batches(rows, [range(len(rows))], 1), Tensor)
        self.optimizer.clear_gradients()
        set_random(random, self._device)
        return fits

    def _update_in_backward(
        self, rows: Sequence[Example], divisor: int, step: int, learning_rate: float
    ) -> tuple[float, float]:
        """A whole step as one micro-batch; (loss as of `StepResult`, gradient norm)."""
        option = "train.optimizer_in_backward"
        num_tokens = sum(len(row.ids) for row in rows)
        plan = plan_micro_batches([len(row.ids) for row in rows], budget_tokens=self.budget_tokens)
        if len(plan) > 1:
            finding = f"its {num_tokens:,} tokens take {len(plan)} forward passes of {self.budget_tokens:,}"
            rule = f"with {option} a step is one forward pass"
            cure = "Lower train.batch_rows or data.max_tokens, or leave the option out"
            raise TrainingFailed(f"step {step}", finding, rule=rule, cure=cure)
        try:
            batch = self.feed.take([rows[number] for number in plan[0]])
            self.feed.begin(partial(self._choose_next, [], 0, self.following))
            total = self._objective.loss(self.model, batch).total
            loss = total.item() / divisor
            if not math.isfinite(loss):
                raise self._explain_non_finite(rows, step=step, loss=loss, norm=math.nan)
            with self.optimizer.updating_in_backward(learning_rate) as norms:
                (total * (1.0 / divisor)).backward()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            finding = f"out of memory with its {num_tokens:,} tokens"
            rule = f"with {option} a step cannot be repeated"
            cure = "Lower train.batch_rows or data.max_tokens; the checkpoint before is kept"
            raise TrainingFailed(f"step {step}", finding, rule=rule, cure=cure) from None
        norm = torch.linalg.vector_norm(torch.stack(norms)).item()
        if not math.isfinite(norm):
            rule = f"with {option} weights change before all gradients are known"
            cure = "Lower train.learning_rate; the checkpoint before is kept"
            raise TrainingFailed(f"step {step}", f"the gradient norm is {norm}", rule=rule, cure=cure)
        return loss, norm

    def _accumulate(
        self, rows: Sequence[Example], divisor: int, step: int, notes: list[str]
    ) -> tuple[list[float], float]:
        """Gradients of all micro-batches; (sums of loss and measures, norm of the scaled gradient)."""
        lengths = [len(row.ids) for row in rows]
        random = read_random(self._device)
        while True:
            plan = plan_micro_batches(lengths, budget_tokens=self.budget_tokens)
            outcome = self._run_micro_batches(rows, plan, divisor)
            if isinstance(outcome, Tensor):
                # The one place where the host waits for the device: what is not finite must not reach the weights.
                *sums, norm = torch.cat([outcome, self.optimizer.gradient_norm().double()[None]]).tolist()
                return sums, norm
            self.optimizer.clear_gradients()
            if self.graphs is not None:
                self.graphs.has_room = False
                self.graphs.release()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            tokens = sum(lengths[number] for number in plan[outcome])
            if len(plan[outcome]) == 1:
                raise TrainingFailed(
                    f"step {step}",
                    f"out of memory with one row of {tokens} tokens ({name_rows([rows[plan[outcome][0]]])})",
                    cure="Lower data.max_tokens, or take a smaller model or method: qlora",
                )
            self.budget_tokens = tokens // 2
            notes.append(
                f"step {step}: out of memory, repeated with {self.budget_tokens} tokens per forward pass"
            )
            set_random(random, self._device)

    def _run_micro_batches(
        self, rows: Sequence[Example], plan: Sequence[Sequence[int]], divisor: int
    ) -> Tensor | int:
        """The step's sums of loss and measures, float64 on the device; or the number of the micro-batch that didn't
        fit."""
        if self.graphs is None:
            sums = torch.zeros(1 + len(self._objective.measures), dtype=torch.float64, device=self._device)
        else:
            sums = self.graphs.begin()
        factor = self.scale.value / divisor
        groups = [[rows[number] for number in numbers] for numbers in plan]
        for index, group in enumerate(groups):
            try:
                batch = self.feed.take(group)
                self.feed.begin(partial(self._choose_next, groups, index + 1, self.following))
                if self.graphs is None:
                    _differentiate(self.model, self._objective, batch, factor, sums)
                else:
                    self.graphs.run(batch, factor)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                # Returned, not handled here: the traceback holds the very tensors that must be freed first.
                return index
        return sums

    def _choose_next(
        self, groups: Sequence[Sequence[Example]], index: int, following: Callable[[], StepRows] | None
    ) -> Sequence[Example] | None:
        """The step's micro-batch of that number; after its last, the first of the step that follows.

        following: as it is when asked for. By the time the background comes to it, another step may have begun.
        """
        if index < len(groups):
            return groups[index]
        if following is None:
            return None
        trained = [row for row in following().rows if count_targets(row)]
        plan = plan_micro_batches([len(row.ids) for row in trained], budget_tokens=self.budget_tokens)
        return [trained[number] for number in plan[0]] if plan else None

    def _explain_non_finite(
        self, rows: Sequence[Example], *, step: int, loss: float, norm: float
    ) -> TrainingFailed:
        """Run every row alone and name those that are not finite by themselves."""
        if self.graphs is not None:
            self.graphs.release()
        guilty = [row for row in rows if not self._is_finite_alone(row)]
        finding = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        if len(guilty) == len(rows) > 1:
            where, cure = (
                f"for each of {name_rows(rows)}",
                "Lower train.learning_rate, or set train.precision: fp32",
            )
        elif guilty:
            where, cure = f"because of {name_rows(guilty)}", "Repair or remove these rows"
        else:
            where, cure = f"for {name_rows(rows)} together, for none alone", "Lower train.learning_rate"
        return TrainingFailed(
            f"step {step}",
            f"{finding} {where}",
            rule="weights are only updated by finite gradients",
            cure=cure,
        )

    def _is_finite_alone(self, row: Example) -> bool:
        total = self._objective.loss(self.model, self._make_batch([row], self._device)).total
        if not math.isfinite(total.item()):
            return False
        (total * self.scale.value).backward()
        norm = self.optimizer.gradient_norm().item()
        self.optimizer.clear_gradients()
        return math.isfinite(norm)


def _differentiate(
    model: Any, objective: Objective, batch: Any, factor: float | Tensor, sums: Tensor
) -> None:
    """Gradients of the batch's loss times `factor`; loss and measures are added to `sums`."""
    found = objective.loss(model, batch)
    (found.total * factor).backward()
    sums[0] += found.total.detach()
    for number, name in enumerate(objective.measures, 1):
        sums[number] += found.measures[name]


def name_rows(rows: Sequence[Example]) -> str:
    """Places of rows, the first few: `train.jsonl:17, train.jsonl:40 and 3 more`."""
    places = ", ".join(row.origin.place for row in rows[:_MAX_NAMED_ROWS])
    more = len(rows) - _MAX_NAMED_ROWS
    return f"{places} and {more} more" if more > 0 else places

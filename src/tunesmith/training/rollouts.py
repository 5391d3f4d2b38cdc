"""Steps over answers that the model samples itself: another source of rows, the loop unchanged.

A rollout is the answers to some prompts, sampled by the model as it is when the first of its steps is due, and trained
on for some passes. Until its last step a position holds the rollout itself: no one could sample it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tunesmith.core.types import Origin, TokenRow
from tunesmith.data.batch import plan_epoch
from tunesmith.training.order import Position, StepRows

Collect = Callable[[Sequence[int], int], list[TokenRow]]


class Rollouts:
    """A `RowSource` of sampled answers.

    collect:     (numbers of prompts, epoch) -> rows of answers, sampled with the weights as they are.
    num_answers: that `collect` makes of each prompt.
    batch_rows:  answers of an optimizer step.
    """

    # The next step's rows may be sampled only once this step has changed the weights.
    reads_ahead = False

    def __init__(
        self,
        num_prompts: int,
        collect: Collect,
        *,
        prompts: int,
        num_answers: int,
        passes: int,
        batch_rows: int,
        seed: int,
        fingerprint: str,
    ) -> None:
        self._num_prompts, self._collect, self._fingerprint = num_prompts, collect, fingerprint
        self._prompts, self._passes, self._batch_rows, self._seed = prompts, passes, batch_rows, seed
        sizes = [len(group) * num_answers for group in self._plan(0)]
        self.steps_per_epoch = sum(-(-size // batch_rows) * passes for size in sizes)

    def fingerprint(self) -> str:
        return self._fingerprint

    def _plan(self, epoch: int) -> list[list[int]]:
        return plan_epoch(self._num_prompts, batch_rows=self._prompts, seed=self._seed, epoch=epoch)

    def steps_from(self, position: Position | None) -> Iterator[StepRows]:
        given: Mapping[str, Any] = position or {"epoch": 0, "rollout": 0, "step": 0, "rows": []}
        epoch, first, done = given["epoch"], given["rollout"], given["step"]
        rows = [_row_from_json(value) for value in given["rows"]]
        while True:
            plan = self._plan(epoch)
            for number in range(first, len(plan)):
                rows = rows or self._collect(plan[number], epoch)
                yield from self._train_on(rows, done, epoch=epoch, number=number, count=len(plan))
                rows, done = [], 0
            epoch, first = epoch + 1, 0

    def _train_on(
        self, rows: list[TokenRow], done: int, *, epoch: int, number: int, count: int
    ) -> Iterator[StepRows]:
        steps = [step for index in range(self._passes) for step in self._cut(len(rows), epoch, number, index)]
        kept = [_row_to_json(row) for row in rows]
        after: dict[str, Any] = {"epoch": epoch, "rollout": number + 1, "step": 0, "rows": []}
        if number + 1 == count:
            after |= {"epoch": epoch + 1, "rollout": 0}
        for at in range(done, len(steps)):
            ends = at + 1 == len(steps)
            yield StepRows(
                rows=[rows[place] for place in steps[at]],
                epoch=epoch + (number + (at + 1) / len(steps)) / count,
                ends_epoch=ends and number + 1 == count,
                position=after if ends else {"epoch": epoch, "rollout": number, "step": at + 1, "rows": kept},
            )

    def _cut(self, num_rows: int, epoch: int, number: int, index: int) -> list[list[int]]:
        """Places of a pass's answers, step by step, in an order of its own."""
        order = np.random.default_rng([self._seed, epoch, number, index]).permutation(num_rows).tolist()
        return [order[start : start + self._batch_rows] for start in range(0, num_rows, self._batch_rows)]


def _row_to_json(row: TokenRow) -> dict[str, Any]:
    origin = row.origin
    return {
        "ids": row.ids,
        "mask": row.mask,
        "origin": [origin.place, origin.source, origin.index],
        "row_id": row.row_id,
        "numbers": row.numbers,
    }


def _row_from_json(value: Mapping[str, Any]) -> TokenRow:
    origin = Origin(*value["origin"])
    return TokenRow(value["ids"], value["mask"], origin, value["row_id"], numbers=value["numbers"])

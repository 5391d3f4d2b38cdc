"""Which rows each optimizer step trains on, from any point of a run onwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tunesmith.core.fingerprint import hash_rows
from tunesmith.core.types import TokenRow
from tunesmith.data.batch import plan_epoch

Position = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one optimizer step.

    epoch:    passes over the rows when this step is done.
    position: where the step after this one starts; JSON, kept in checkpoints.
    """

    rows: Sequence[TokenRow]
    epoch: float
    ends_epoch: bool
    position: Position


class RowSource(Protocol):
    """Rows in training order, with an exact position. `steps_per_epoch` is None where only reading would tell."""

    @property
    def steps_per_epoch(self) -> int | None: ...

    def fingerprint(self) -> str:
        """Changes when the rows or their order would."""
        ...

    def steps_from(self, position: Position | None) -> Iterator[StepRows]:
        """Steps without end, epoch after epoch, from `position` (None: the start)."""
        ...


class EpochOrder:
    """Rows held in a sequence, reordered every epoch. The order follows from (seed, epoch) alone, so a position is
    two numbers. An epoch's last batch may be smaller: every row is trained once an epoch."""

    def __init__(self, rows: Sequence[TokenRow], *, batch_rows: int, seed: int) -> None:
        if not len(rows):
            raise ValueError("no training rows")
        self._rows, self._batch_rows, self._seed = rows, batch_rows, seed
        self.steps_per_epoch = len(self._plan(0))

    def _plan(self, epoch: int) -> list[list[int]]:
        return plan_epoch(len(self._rows), batch_rows=self._batch_rows, seed=self._seed, epoch=epoch)

    def fingerprint(self) -> str:
        return hash_rows(row.row_id for row in self._rows)

    def steps_from(self, position: Position | None) -> Iterator[StepRows]:
        epoch, done = (position["epoch"], position["step"]) if position else (0, 0)
        while True:
            plan = self._plan(epoch)
            for index in range(done, len(plan)):
                is_last = index + 1 == len(plan)
                yield StepRows(
                    rows=[self._rows[number] for number in plan[index]],
                    epoch=epoch + (index + 1) / len(plan),
                    ends_epoch=is_last,
                    position={"epoch": epoch + 1, "step": 0}
                    if is_last
                    else {"epoch": epoch, "step": index + 1},
                )
            epoch, done = epoch + 1, 0

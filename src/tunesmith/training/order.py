"""Which rows each optimizer step trains on, from any point of a run onwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, cast

from tunesmith.core.errors import DataError
from tunesmith.core.fingerprint import hash_rows
from tunesmith.core.types import Example
from tunesmith.data.batch import plan_epoch

Position = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one optimizer step.

    epoch:    passes over the rows when this step is done.
    position: where the step after this one starts; JSON, kept in checkpoints.
    """

    rows: Sequence[Example]
    epoch: float
    ends_epoch: bool
    position: Position


class RowSource(Protocol):
    """Rows in training order, with an exact position. `steps_per_epoch` is None where only reading would tell.

    reads_ahead: the next step may be read before this one is taken.
    """

    @property
    def reads_ahead(self) -> bool: ...
    @property
    def steps_per_epoch(self) -> int | None: ...

    def fingerprint(self) -> str:
        """Changes when the rows or their order would."""
        ...

    def steps_from(self, position: Position | None) -> Iterator[StepRows]:
        """Steps without end, epoch after epoch, from `position` (None: the start)."""
        ...


class RowPass(Protocol):
    """Rows that are read pass by pass, the same ones for the same epoch (`data.stream.RowStream`)."""

    def rows(self, *, epoch: int, skip: int) -> Iterator[Example]:
        """Rows of one pass without its first `skip`."""
        ...


class EpochOrder:
    """Rows held in a sequence, reordered every epoch. The order follows from (seed, epoch) alone, so a position is
    two numbers. An epoch's last batch may be smaller: every row is trained once an epoch."""

    reads_ahead = True

    def __init__(self, rows: Sequence[Example], *, batch_rows: int, seed: int) -> None:
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


class StreamOrder:
    """Rows from a stream, in its own order: its length is known only at its end, so a run needs `train.steps`.

    fingerprint: hash of what decides the rows (files, data settings, seed).
    Epochs are counted when they are over. Steps do not cross them: a pass's last step may be smaller.
    """

    steps_per_epoch, reads_ahead = None, True

    def __init__(self, stream: RowPass, *, batch_rows: int, fingerprint: str) -> None:
        self._stream, self._batch_rows, self._fingerprint = stream, batch_rows, fingerprint

    def fingerprint(self) -> str:
        return self._fingerprint

    def steps_from(self, position: Position | None) -> Iterator[StepRows]:
        epoch, taken = (position["epoch"], position["row"]) if position else (0, 0)
        while True:
            rows = self._stream.rows(epoch=epoch, skip=taken)
            batch = list(islice(rows, self._batch_rows))
            if not batch:
                raise DataError(
                    "data.train", "has no usable row", rule="training needs rows", cure="Run tunesmith check"
                )
            while batch:
                taken += len(batch)
                # One batch ahead, to know whether this is the pass's last.
                following = list(islice(rows, self._batch_rows))
                is_last = not following
                yield StepRows(
                    rows=batch,
                    epoch=float(epoch + is_last),
                    ends_epoch=is_last,
                    position={"epoch": epoch + 1, "row": 0} if is_last else {"epoch": epoch, "row": taken},
                )
                batch = following
            epoch, taken = epoch + 1, 0


def order_rows(rows: Sequence[Example] | RowSource, *, batch_rows: int, seed: int) -> RowSource:
    """A source as it is; a sequence, reordered every epoch."""
    if hasattr(rows, "steps_from"):
        return cast(RowSource, rows)
    return EpochOrder(cast(Sequence[Example], rows), batch_rows=batch_rows, seed=seed)

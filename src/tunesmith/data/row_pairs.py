"""Rows that lie two by two, as the groups that a loss takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, overload

from tunesmith.core.types import RowGroup, TokenRow


class MeasuredRows(Protocol):
    """Rows whose lengths in tokens are known without reading them."""

    lengths: list[int]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> TokenRow: ...


class RowPairs(Sequence[RowGroup]):
    """Row 2p, the chosen one, and row 2p + 1, the rejected one, as group p; a group is made when asked for.

    lengths: tokens of both rows of each pair.
    """

    def __init__(self, rows: MeasuredRows) -> None:
        if len(rows) % 2:
            raise ValueError(f"{len(rows)} rows are not pairs")
        self._rows = rows
        self.lengths = [a + b for a, b in zip(rows.lengths[::2], rows.lengths[1::2], strict=True)]

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> RowGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[RowGroup]: ...
    def __getitem__(self, index: int | slice) -> RowGroup | list[RowGroup]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        first = 2 * (index % len(self))
        return RowGroup((self._rows[first], self._rows[first + 1]))

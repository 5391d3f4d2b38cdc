"""What a step is made of: rows, or groups of rows, with what is known of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, overload

from tunesmith.core.types import Example, RowGroup, TokenRow


def flatten(examples: Iterable[Example]) -> list[TokenRow]:
    """The rows of examples, in order."""
    return [row for example in examples for row in _rows_of(example)]


class WithNumber(Sequence[Any]):
    """Examples with one more number on each of their rows; made when asked for.

    values: of the rows, example by example, of which each has equally many.
    """

    def __init__(self, examples: Sequence[Any], name: str, values: Sequence[float]) -> None:
        self._examples, self._name, self._values = examples, name, values
        self._size = len(_rows_of(examples[0])) if len(examples) else 1
        if len(values) != len(examples) * self._size:
            raise ValueError(f"{len(values)} numbers for {len(examples)} examples of {self._size} rows")

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each example."""
        return self._examples.lengths  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        example, first = self._examples[index], index % len(self) * self._size
        rows = tuple(
            replace(row, numbers={**row.numbers, self._name: self._values[first + at]})
            for at, row in enumerate(_rows_of(example))
        )
        return RowGroup(rows) if isinstance(example, RowGroup) else rows[0]


def _rows_of(example: Example) -> tuple[TokenRow, ...]:
    return example.rows if isinstance(example, RowGroup) else (example,)

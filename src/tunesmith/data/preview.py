"""Rows as coloured text: which tokens are trained, which not, which end the answer. Data only; the cli prints it."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from tunesmith.core.types import RowGroup, TokenRow
from tunesmith.data.prompts import Prompt
from tunesmith.data.tokenizer import Tokenizer

SegmentKind = Literal["masked", "trained", "stop"]
_SHOWN = {"\n": "↵\n", "\t": "→\t", "\r": "␍"}


class Segment(NamedTuple):
    """A stretch of a row with one fate. `text` is safe to print: control and direction characters are spelled out."""

    text: str
    kind: SegmentKind


@dataclass(frozen=True, slots=True)
class RowPreview:
    """One row: where it came from, how long it is, and its segments in order."""

    place: str
    row_id: str
    num_tokens: int
    num_targets: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class LabelledPreview(RowPreview):
    """A row with the label that its answer has."""

    label: bool


@dataclass(frozen=True, slots=True)
class PromptPreview(RowPreview):
    """A prompt that the model answers itself, with the right answer where there is one, safe to print."""

    truth: str | None


@dataclass(frozen=True, slots=True)
class PairPreview:
    """A pair: the prompt that both rows begin with, and of each row what follows."""

    place: str
    num_tokens: int
    prompt: tuple[Segment, ...]
    chosen: RowPreview
    rejected: RowPreview


def preview_rows(
    examples: Iterable[TokenRow | RowGroup], tokenizer: Tokenizer
) -> list[RowPreview | PairPreview]:
    return [
        preview_pair(example, tokenizer) if isinstance(example, RowGroup) else preview_row(example, tokenizer)
        for example in examples
    ]


def preview_prompts(prompts: Iterable[Prompt], tokenizer: Tokenizer) -> list[RowPreview | PairPreview]:
    found: list[RowPreview | PairPreview] = []
    for prompt in prompts:
        row = preview_row(
            TokenRow(prompt.ids, [0] * len(prompt.ids), prompt.origin, prompt.row_id), tokenizer
        )
        truth = None if prompt.truth is None else make_printable(prompt.truth)
        found.append(
            PromptPreview(row.place, row.row_id, row.num_tokens, row.num_targets, row.segments, truth=truth)
        )
    return found


def preview_pair(pair: RowGroup, tokenizer: Tokenizer) -> PairPreview:
    """Segments of a prompt and of both answers, which begin with their first trained token."""
    chosen, rejected = pair.rows
    start = list(chosen.mask).index(1)
    head = replace(chosen, ids=chosen.ids[:start], mask=chosen.mask[:start])
    answers = (replace(row, ids=row.ids[start:], mask=row.mask[start:]) for row in (chosen, rejected))
    shown = [preview_row(row, tokenizer) for row in (head, *answers)]
    return PairPreview(
        chosen.origin.place, len(chosen.ids) + len(rejected.ids), shown[0].segments, shown[1], shown[2]
    )


def preview_row(row: TokenRow, tokenizer: Tokenizer) -> RowPreview:
    """Segments of a row. "stop" is a stop token or a special token that ends a trained stretch."""
    stops = {*tokenizer.eos_ids, *tokenizer.added_tokens.values()}
    after = [*row.mask[1:], 0]

    def kind_of(position: int) -> SegmentKind:
        if not row.mask[position]:
            return "masked"
        return "stop" if row.ids[position] in stops and not after[position] else "trained"

    segments: list[Segment] = []
    for kind, group in itertools.groupby(range(len(row.ids)), key=kind_of):
        text = "".join(_decode_parts([row.ids[n] for n in group], tokenizer))
        segments.append(Segment(make_printable(text), kind))
    facts = (row.origin.place, row.row_id, len(row.ids), row.num_targets, tuple(segments))
    if "desirable" in row.numbers:
        return LabelledPreview(*facts, label=row.numbers["desirable"] == 1.0)
    return RowPreview(*facts)


def _decode_parts(ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Text of ids in a stretch. A stretch's first word keeps the space that a decoder strips from a text's start."""
    text = tokenizer.decode(ids)
    if ids and tokenizer.token(ids[0]).startswith("▁") and not text.startswith(" "):
        yield " "
    yield text


def make_printable(text: str) -> str:
    """Text that a terminal cannot be steered by: line ends and tabs are marked, other controls become \\u escapes."""
    return "".join(_SHOWN.get(char) or (char if _is_safe(char) else f"\\u{ord(char):04x}") for char in text)


def _is_safe(char: str) -> bool:
    """Controls (Cc), formats such as direction overrides (Cf), surrogates and separators other than space are not."""
    return char == " " or unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}

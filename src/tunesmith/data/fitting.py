"""Conversations of a split as token rows within `data.max_tokens`; what is lost on the way is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.core.errors import DataError
from tunesmith.core.fingerprint import hash_row
from tunesmith.core.types import Conversation, TokenRow
from tunesmith.data.checks import SplitFacts, count_rows, measure_lengths
from tunesmith.data.collect import Rejects
from tunesmith.data.conversation_json import describe_conversation
from tunesmith.data.render import Renderer
from tunesmith.data.split import Likeness
from tunesmith.job.spec import DataSpec

_BATCH = 256


@dataclass(frozen=True, slots=True)
class RenderedSplit:
    """A split in memory: token rows, the conversation number of each, the conversations with rows, their clusters."""

    rows: list[TokenRow]
    numbers: list[int]
    conversations: list[Conversation]
    clusters: list[str]


def render_split(
    conversations: Sequence[Conversation],
    renderer: Renderer,
    data: DataSpec,
    facts: SplitFacts,
    rejects: Rejects,
    likeness: Likeness,
) -> RenderedSplit:
    """Token rows of a split within `max_tokens`; conversations that lose all rows are left out."""
    kept: list[TokenRow] = []
    numbers: list[int] = []
    used: list[Conversation] = []
    lengths: Counter[int] = Counter()
    for start in range(0, len(conversations), _BATCH):
        batch = conversations[start : start + _BATCH]
        for conversation, rows in zip(batch, _render_batch(batch, renderer, rejects), strict=True):
            lengths.update(len(row.ids) for row in rows)
            fits = (fit_row(row, data, facts, is_prompt=conversation.is_prompt) for row in rows)
            fitting = [row for row in fits if row is not None]
            if conversation.rejected and fitting and not _is_whole(fitting, facts, renderer):
                continue
            if fitting:
                kept += fitting
                numbers += [len(used)] * len(fitting)
                used.append(conversation)
    facts.num_conversations = len(used)
    facts.length_percentiles = measure_lengths(lengths)
    count_rows(facts, kept, stop_ids=renderer.stop_ids)
    return RenderedSplit(kept, numbers, used, [likeness.cluster_of(c) for c in used])


def _is_whole(pair: Sequence[TokenRow], facts: SplitFacts, renderer: Renderer) -> bool:
    """Whether what fits of a pair is both rows, and still two different ones. A row that loses its other is dropped."""
    if len(pair) == 1:
        facts.num_dropped += 1
        facts.num_lost_targets += pair[0].num_targets
        return False
    if pair[0].ids == pair[1].ids:
        renderer.counts["pairs_equal_once_cut"] += 1
        return False
    return True


def _render_batch(
    batch: Sequence[Conversation], renderer: Renderer, rejects: Rejects
) -> list[list[TokenRow]]:
    try:
        return renderer.render_conversations(batch)
    except DataError:
        if not rejects.collect:
            raise
    rows: list[list[TokenRow]] = []
    for conversation in batch:
        try:
            rows.append(renderer.render_conversation(conversation))
        except DataError as error:
            rejects.add(conversation.origin, describe_conversation(conversation), error)
            rows.append([])
    return rows


def fit_row(row: TokenRow, data: DataSpec, facts: SplitFacts, *, is_prompt: bool = False) -> TokenRow | None:
    """A row within `max_tokens`, cut if the job says so, or None; what is lost is counted.

    is_prompt: the row needs no target, and is not to be cut: without its end it asks nothing.
    """
    if len(row.ids) > data.max_tokens:
        if data.too_long == "refuse":
            raise DataError(
                row.origin.place,
                f"{len(row.ids)} tokens",
                rule=f"data.max_tokens is {data.max_tokens}",
                cure="Raise it, or set data.too_long to drop or truncate",
            )
        if data.too_long == "drop":
            facts.num_dropped += 1
            facts.num_lost_targets += row.num_targets
            return None
        if is_prompt:
            raise DataError(
                row.origin.place,
                f"a prompt of {len(row.ids)} tokens, with data.too_long: truncate",
                rule="a prompt without its end asks nothing",
                cure="Set data.too_long to drop, or raise data.max_tokens",
            )
        row = _cut_row(row, data.max_tokens, facts)
    if not any(row.mask) and not is_prompt:
        facts.num_without_targets += 1
        return None
    return row


def _cut_row(row: TokenRow, max_tokens: int, facts: SplitFacts) -> TokenRow:
    ids, mask = list(row.ids[:max_tokens]), list(row.mask[:max_tokens])
    facts.num_truncated += 1
    facts.num_lost_targets += row.num_targets - sum(mask)
    # Bytes of the kept part in proportion to its tokens: the cut may fall inside a character.
    num_bytes = round(row.num_answer_bytes * sum(mask) / max(1, row.num_targets))
    return TokenRow(ids, mask, row.origin, hash_row(ids, mask), num_bytes, row.numbers)

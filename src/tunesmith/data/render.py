"""The one decider of trained tokens: a conversation becomes `TokenRow`s, once, for every method, framework and judge.

`transcript.py` says which text is trained; here it becomes tokens.

A text is tokenised in pieces that begin where an answer begins, because that is where a server's tokenised
prompt ends and the model continues. A token can therefore never straddle prompt and answer. `render_prompt` cuts
history in the same places. A row ends with its last trained token; nothing after it could be learned.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.core.fingerprint import hash_row
from tunesmith.core.jsonl import OR_SKIP
from tunesmith.core.types import Conversation, Message, TokenRow
from tunesmith.data.tokenizer import Piece
from tunesmith.data.transcript import RenderedText, Span, TextRenderer
from tunesmith.data.turns import SKIP_CURE


class Renderer(TextRenderer):
    """Renders conversations to tokens with one tokenizer and one chat template."""

    def render_conversation(self, conversation: Conversation) -> list[TokenRow]:
        """Token rows of one conversation, of a pair the chosen row and the rejected one, of a prompt its ids.

        Raises DataError naming the row if it cannot be rendered exactly."""
        return self.render_conversations([conversation])[0]

    def render_conversations(self, conversations: Sequence[Conversation]) -> list[list[TokenRow]]:
        """Token rows of many conversations; faster than one at a time."""
        sides = [_list_sides(conversation) for conversation in conversations]
        rendered = iter(self._render_answers(list(itertools.chain.from_iterable(sides))))
        return [
            self._gather(conversation, list(itertools.islice(rendered, len(own))))
            for conversation, own in zip(conversations, sides, strict=True)
        ]

    def _gather(self, conversation: Conversation, sides: list[list[TokenRow]]) -> list[TokenRow]:
        """The rows of a conversation from those of its sides."""
        if conversation.is_prompt:
            return [self._ask(conversation)]
        if not conversation.rejected and conversation.label is None:
            return sides[0]
        if any(len(rows) != 1 for rows in sides):
            raise self._refuse(
                conversation.origin.place,
                "it rewrites earlier turns, and an answer of several turns is not one row of tokens then",
            )
        rows = [rows[0] for rows in sides]
        if conversation.label is not None:
            return [replace(rows[0], numbers={"desirable": float(conversation.label)})]
        chosen, rejected = rows
        if chosen.ids == rejected.ids:
            raise DataError(
                conversation.origin.place,
                "chosen and rejected are the same tokens",
                rule="one answer is better than the other",
                cure=SKIP_CURE,
            )
        assert _prompt_ids(chosen) == _prompt_ids(rejected), conversation.origin.place
        return rows

    def _ask(self, conversation: Conversation) -> TokenRow:
        """A prompt that the model answers itself: nothing of it is a target."""
        place = conversation.origin.place
        try:
            ids = self.render_question(conversation)
        except DataError as error:
            raise DataError(place, error.finding, rule=error.rule, cure=error.cure) from None
        if not ids:
            raise DataError(
                place, "the prompt has no tokens", rule="an answer follows a token", cure=SKIP_CURE
            )
        if conversation.truth is None:
            self.counts["prompts_without_truth"] += 1
        mask = [0] * len(ids)
        return TokenRow(ids, mask, conversation.origin, hash_row(ids, mask))

    def _render_answers(self, conversations: Sequence[Conversation]) -> list[list[TokenRow]]:
        texts = [self.render_texts(conversation) for conversation in conversations]
        flat = list(itertools.chain.from_iterable(texts))
        pieces = iter(
            self._encode(
                [(item.text, [span.start for span in (*item.history, *item.spans)]) for item in flat]
            )
        )
        return [
            [self._make_row(item, next(pieces), conversation) for item in items]
            for conversation, items in zip(conversations, texts, strict=True)
        ]

    def render_prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Ids of a conversation that the model is to continue, ending with the generation prompt."""
        text = self.render_prompt_text(messages, tools)
        spans = self._find_history(messages, tools, text)
        (pieces,) = self._encode([(text, [span.start for span in spans])])
        ids, _ = self._join_pieces(spans, pieces)
        self._refuse_second_bos(ids, "prompt")
        return ids

    def render_question(self, conversation: Conversation) -> list[int]:
        """Ids of everything before a conversation's last answer: the prompt of a test row of any kind."""
        if conversation.kind == "chat":
            asked = conversation.messages if conversation.is_prompt else conversation.messages[:-1]
            return self.render_prompt(asked, conversation.tools)
        question = "" if conversation.kind == "text" else conversation.messages[0].content
        question = self._drop_second_bos(question)
        ids = [*self.tokenizer.bos_before(question), *self.tokenizer.encode(question)]
        self._refuse_second_bos(ids, conversation.origin.place)
        return ids

    # --- tokens -------------------------------------------------------------------------------------------------------

    def _encode(self, items: Sequence[tuple[str, Sequence[int]]]) -> list[list[Piece]]:
        """For each (text, starts) its pieces: the text before the first start, and one from each start on."""
        cuts = [[0, *starts, len(text)] for text, starts in items]
        parts = [
            text[a:b]
            for (text, _), edges in zip(items, cuts, strict=True)
            for a, b in itertools.pairwise(edges)
        ]
        follows = [bool(a) for edges in cuts for a, _ in itertools.pairwise(edges)]
        pieces = iter(self.tokenizer.encode_pieces(parts, follows))
        return [list(itertools.islice(pieces, len(edges) - 1)) for edges in cuts]

    def _make_row(self, item: RenderedText, pieces: Sequence[Piece], conversation: Conversation) -> TokenRow:
        ids, mask = self._join_pieces((*item.history, *item.spans), pieces)
        if item.history:
            before = len(self._join_pieces(item.history, pieces[: len(item.history) + 1])[0])
            mask[:before] = [0] * before
        ids, mask = [*item.head, *ids], [0] * len(item.head) + mask
        num_bytes = sum(len(item.text[s.start : s.content_end].encode()) for s in item.spans)
        if mask and mask[0]:
            # The first token has nothing before it to be predicted from.
            mask[0] = 0
            num_bytes -= len(self.tokenizer.decode(ids[:1]).encode())
        if item.append_eos and self.tokenizer.eos_id is not None and ids[-1:] != [self.tokenizer.eos_id]:
            ids, mask = [*ids, self.tokenizer.eos_id], [*mask, 1]
            if conversation.kind == "chat":
                self.counts["eos_added_after_answer"] += 1
        self._refuse_second_bos(ids, conversation.origin.place)
        if self.tokenizer.adds_bos and ids[:1] != [self.tokenizer.bos_id]:
            self.counts["rows_without_bos"] += 1
        return TokenRow(ids, mask, conversation.origin, hash_row(ids, mask), max(num_bytes, 0))

    def _refuse_second_bos(self, ids: Sequence[int], place: str) -> None:
        """At the start a second BOS was dropped; anywhere else, what is meant cannot be known.

        Where BOS and EOS are one token, two in a row are the end of a text and the start of the next.
        """
        bos = self.tokenizer.bos_id
        if bos is None or bos in self.tokenizer.eos_ids or ids.count(bos) < 2:
            return
        if any(a == b == bos for a, b in itertools.pairwise(ids)):
            raise DataError(
                place,
                f"{self.tokenizer.bos_token!r} stands twice in a row",
                rule="a text begins once",
                cure=f"Remove one from the row or the template{OR_SKIP}",
            )

    def _join_pieces(self, spans: Sequence[Span], pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
        """Ids and mask of a text from its pieces; each piece but the first begins with an answer."""
        ids = list(pieces[0].ids)
        mask = [0] * len(ids)
        for span, piece in zip(spans, pieces[1:], strict=True):
            answer_ids, rest_ids = self._divide(piece, span.end - span.start)
            ids += answer_ids + rest_ids
            mask += [1] * len(answer_ids) + [0] * len(rest_ids)
        return ids, mask

    def _divide(self, piece: Piece, num_chars: int) -> tuple[list[int], list[int]]:
        """Ids of an answer and of what follows it before the next one."""
        if num_chars == len(piece.text):
            return piece.ids, []
        if (parts := self.tokenizer.divide(piece, num_chars)) is not None:
            return parts
        self.counts["end_markers_cut_from_a_token"] += 1
        answer, rest = piece.text[:num_chars], piece.text[num_chars:]
        return self.tokenizer.encode_continuation(answer), self.tokenizer.encode_continuation(rest)


def _list_sides(conversation: Conversation) -> list[Conversation]:
    """A conversation, or a pair's two: each renders like one whose answers are learned. A prompt has none."""
    if conversation.is_prompt:
        return []
    if not conversation.rejected:
        return [conversation]
    return [
        replace(conversation, messages=m, rejected=()) for m in (conversation.messages, conversation.rejected)
    ]


def _prompt_ids(row: TokenRow) -> Sequence[int]:
    """Ids before the first target."""
    return row.ids[: list(row.mask).index(1)]

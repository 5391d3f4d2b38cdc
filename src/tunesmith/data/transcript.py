"""The text side of rendering: which of the text that a template makes of a conversation is trained.

How the mask is found, without asking the template for marks. For assistant turn i:

    prompt_i   the conversation before it, rendered with the generation prompt: what a model is given when it answers
    upto_i     the conversation up to and including it
    answer_i   what upto_i has after prompt_i, cut behind the turn's end marker: what the model must produce

Trained are exactly the tokens of answer_i. The header (`<|assistant|>`) belongs to the prompt; the end marker to the
answer; a newline that the template writes after the marker to neither. One row serves all turns of a conversation if
every prompt_i + answer_i is a prefix of the whole rendering. Templates that rewrite history (earlier reasoning dropped,
the system text moved to the last question) fail that test; they give one row per turn, each rendered as the model would
meet it.

Where prompt_i is not a prefix of upto_i, the turn is composed as prompt_i + answer_i, with the answer found behind the
same header. Whatever fits none of these is refused with the reason.

Text that is no chat has no BOS: its tokens get it from the tokenizer's own rule.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from tunesmith.core.errors import DataError
from tunesmith.core.types import Conversation, Message, Origin
from tunesmith.data.chat_text import ChatText, TemplateChoice
from tunesmith.data.template import (
    GENERATION_END,
    GENERATION_START,
    TemplateError,
)
from tunesmith.data.tokenizer import Tokenizer

# A header is found by the end of the prompt: its last word, or its last tag and what follows.
_LAST_WORD = re.compile(r"\S+\s*\Z")
_LAST_TAG = re.compile(r"(?:<[^<>\s]+>|\[/?[A-Z_]+\])[^<>\[\]]*\Z")
_OPENED_BLOCK = re.compile(r"<([a-z_]+)>\s*\Z")


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of an answer; `content_end` is where its end marker begins."""

    start: int
    content_end: int
    end: int


@dataclass(frozen=True, slots=True)
class RenderedText:
    """One row as text: what it says and which of it is trained.

    history: earlier answers that are not trained in this row, but at which its text is cut for tokenising.
    head:    ids that stand before the text's own.
    """

    text: str
    spans: tuple[Span, ...]
    append_eos: bool = False
    history: tuple[Span, ...] = ()
    head: tuple[int, ...] = ()


class TextRenderer(ChatText):
    """Conversations as text, and what of it is trained."""

    def __init__(self, tokenizer: Tokenizer, spec: TemplateChoice | None = None) -> None:
        super().__init__(tokenizer, spec)
        self._stops: dict[str, bool] = {}

    def render_texts(self, conversation: Conversation) -> list[RenderedText]:
        """Rows of a conversation as text, before tokenising."""
        self._dropped_bos = False
        try:
            rows = (
                self._render_chat(conversation)
                if conversation.kind == "chat"
                else [self._join_raw(conversation)]
            )
        except TemplateError as error:
            calls = any("tool_calls" in message.extra for message in conversation.messages)
            reason = f"it does not take tool calls ({error})" if calls else str(error)
            raise self._refuse(conversation.origin.place, reason) from None
        if self._dropped_bos:
            self.counts["rows_with_bos_twice"] += len(rows)
        return rows

    def _find_history(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], text: str
    ) -> tuple[Span, ...]:
        """Earlier answers in a prompt, where a training row of the same conversation trains them too."""
        trained = [n for n, m in enumerate(messages) if m.role == "assistant" and m.weight > 0]
        if not trained:
            return ()
        history = Conversation(
            tuple(messages[: trained[-1] + 1]), Origin("prompt", "", 0), tools=tuple(tools)
        )
        counts = self.counts.copy()
        try:
            rows = self._render_chat(history)
        except (TemplateError, DataError):
            return ()
        finally:
            self.counts = counts
        return rows[0].spans if len(rows) == 1 and text.startswith(rows[0].text) else ()

    def _join_raw(self, conversation: Conversation) -> RenderedText:
        """Completion and text rows: BOS as the tokenizer adds it, the text, and EOS."""
        answer = conversation.messages[-1].content
        question = conversation.messages[0].content if conversation.kind == "completion" else ""
        if question:
            question = self._drop_second_bos(question)
        else:
            answer = self._drop_second_bos(answer)
        text = question + answer
        head = tuple(self.tokenizer.bos_before(text))
        return RenderedText(text, (Span(len(question), len(text), len(text)),), append_eos=True, head=head)

    def _render_chat(self, conversation: Conversation) -> list[RenderedText]:
        messages, tools = conversation.messages, conversation.tools
        last = max(n for n, m in enumerate(messages) if m.role == "assistant" and m.weight > 0)
        whole = self._render(messages[: last + 1], tools)
        turns: list[RenderedText] = []
        one_row = True
        for number, message in enumerate(messages):
            if message.role != "assistant" or message.weight <= 0:
                continue
            turn = self._render_turn(conversation, number, whole if number == last else None)
            turns.append(turn)
            one_row = one_row and whole.startswith(turn.text[: turn.spans[0].end])
        if one_row:
            spans = tuple(turn.spans[0] for turn in turns)
            return [RenderedText(whole[: spans[-1].end], spans, append_eos=turns[-1].append_eos)]
        self.counts["conversations_as_one_row_per_turn"] += 1
        numbers = [n for n, m in enumerate(messages) if m.role == "assistant" and m.weight > 0]
        return [
            replace(turn, history=self._find_history(messages[:n], tools, turn.text[: turn.spans[0].start]))
            for n, turn in zip(numbers, turns, strict=True)
        ]

    def _render_turn(self, conversation: Conversation, number: int, upto: str | None) -> RenderedText:
        """The conversation up to one assistant turn, with only that turn trained."""
        messages, tools = conversation.messages, conversation.tools
        message, place = messages[number], conversation.origin.place
        prompt = self._render(messages[:number], tools, prompt=True)
        if upto is None:
            upto = self._render(messages[: number + 1], tools)
        if upto.startswith(prompt):
            answer = upto[len(prompt) :]
        elif (opened := self._find_opened_block(prompt, upto)) is not None:
            body = self._continue_block(place, opened.group(1), upto[opened.start() :], message)
            text = prompt + body + self._ending.marker
            return self._close(text, Span(len(prompt), len(prompt + body), len(text)))
        else:
            answer = self._find_behind_header(place, prompt, upto, message)
        content_end, end = self._find_end(answer, message, place)
        if self.template.marks_generation:
            self._compare_marks(conversation, number, answer[:content_end])
        offset = len(prompt)
        return self._close(prompt + answer[:end], Span(offset, offset + content_end, offset + end))

    def _close(self, text: str, span: Span) -> RenderedText:
        """A turn whose marker is no stop token gets the tokenizer's EOS after the last answer."""
        marker = text[span.content_end : span.end].strip()
        if marker not in self._stops:
            ids = self.tokenizer.encode_continuation(marker)
            self._stops[marker] = bool(ids) and ids[-1] in self.stop_ids
        return RenderedText(text, (span,), append_eos=not self._stops[marker])

    def _find_end(self, answer: str, message: Message, place: str) -> tuple[int, int]:
        """Where the content and the whole of an answer end, in `answer`, the text after the prompt."""
        marker = self._ending.marker
        calls = cast("Sequence[Mapping[str, Any]]", message.extra.get("tool_calls", ()))
        if any(str(call["function"]["name"]) not in answer for call in calls):
            raise self._refuse(place, "it does not write tool calls")
        for content in (message.content, message.content.strip()):
            at = answer.find(content) if content else -1
            if at >= 0 and answer.startswith(marker, at + len(content)):
                end = at + len(content)
                # More than the marker and what closes conversations: tool calls, which are the answer too.
                if self._ending.closing or not answer[end + len(marker) :].strip() or not message.extra:
                    return end, end + len(marker)
        if "tool_calls" not in message.extra and message.content.strip() not in answer:
            self.counts["answers_rewritten_by_template"] += 1
        end = len(answer.removesuffix(self._ending.closing).rstrip())
        if not end:
            raise self._refuse(place, "it renders an answer as nothing")
        if marker.strip() and answer[:end].endswith(marker.strip()):
            return end - len(marker.strip()), end
        # Tool calls may end with a marker of their own (`<|eom_id|>`).
        closing = max(
            (t for t in self.tokenizer.added_tokens if t and answer[:end].endswith(t)), key=len, default=""
        )
        return end - len(closing), end

    def _find_opened_block(self, prompt: str, upto: str) -> re.Match[str] | None:
        """The block (`<think>`) that the generation prompt opens and the rendered turn does not have."""
        opened = _OPENED_BLOCK.search(prompt)
        return opened if opened and upto.startswith(prompt[: opened.start()]) else None

    def _continue_block(self, place: str, tag: str, rendered: str, message: Message) -> str:
        """The answer after a prompt that opened a reasoning block.

        rendered: the turn as the template shows it, without reasoning. An answer without reasoning closes the block at
        once, as such models do.
        """
        content, closing = message.content, f"</{tag}>"
        marker = self._ending.marker
        shown = content.split(closing)[-1] if closing in content else content
        if "tool_calls" in message.extra:
            raise self._refuse(
                place, f"its prompt opens <{tag}>, and a tool call has no reasoning to put there"
            )
        if rendered.rstrip() != (shown + marker).rstrip():
            raise self._refuse(place, f"its prompt opens <{tag}>, and the answer after it is rewritten")
        if closing in content:
            inside = content.lstrip()
            return inside.removeprefix(f"<{tag}>").removeprefix("\n")
        self.counts["empty_reasoning_added"] += 1
        return f"\n{closing}\n\n{content}"

    def _find_behind_header(self, place: str, prompt: str, upto: str, message: Message) -> str:
        """The answer of a turn that is rendered behind the same header as in the prompt, but after other text.

        Templates that write the system text into the last question, or other white space before the header.
        """
        for ending, pattern in itertools.product((prompt, prompt.rstrip()), (_LAST_WORD, _LAST_TAG)):
            header = pattern.search(ending)
            at = upto.rfind(header.group()) if header else -1
            if header is None or at < 0:
                continue
            answer = upto[at + len(header.group()) :]
            if ending != prompt:
                answer = answer.lstrip()
            if " ".join(message.content.split()) in " ".join(answer.split()):
                self.counts["prompts_unlike_rendered_turns"] += 1
                return answer
        raise self._refuse(place, "the generation prompt is not how it writes an assistant turn")

    def _compare_marks(self, conversation: Conversation, number: int, content: str) -> None:
        """`{% generation %}` must enclose what is trained here; a template that marks something else is refused."""
        marked = self._render(conversation.messages[: number + 1], conversation.tools, marks=True)
        _, _, block = marked.rpartition(GENERATION_START)
        block, found, _ = block.partition(GENERATION_END)
        marker = self._ending.marker.strip()
        given = block.strip().removesuffix(marker).strip() if marker else block.strip()
        if not found or given != content.strip():
            raise self._refuse(
                conversation.origin.place, "{% generation %} encloses other text than the answer"
            )


def text_of(messages: Iterable[Message]) -> str:
    """What a conversation says, one turn a line: for duplicates and overlap, not for training."""
    return "\n".join(message.content for message in messages)

"""The text side of rendering: what a template makes of a conversation, and which of it is trained.

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

BOS stands at the start of a text at most once: a second one, from a template or a row that writes it again, is dropped
and counted. Text that is no chat has none: its tokens get it from the tokenizer's own rule.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, cast

from tunesmith.core.errors import DataError
from tunesmith.core.fingerprint import hash_text
from tunesmith.core.types import Conversation, Message, Origin
from tunesmith.data.template import (
    GENERATION_END,
    GENERATION_START,
    ChatTemplate,
    TemplateError,
    find_template,
)
from tunesmith.data.tokenizer import Tokenizer

_TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
# A header is found by the end of the prompt: its last word, or its last tag and what follows.
_LAST_WORD = re.compile(r"\S+\s*\Z")
_LAST_TAG = re.compile(r"(?:<[^<>\s]+>|\[/?[A-Z_]+\])[^<>\[\]]*\Z")
_OPENED_BLOCK = re.compile(r"<([a-z_]+)>\s*\Z")


class TemplateChoice(Protocol):
    """The part of the job's data spec that rendering reads."""

    @property
    def template(self) -> str | None: ...


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


@dataclass(frozen=True, slots=True)
class _Ending:
    """How a template closes an assistant turn.

    marker:  text right after the answer that ends it ("" if there is none), space before it included.
    closing: what it writes only at the end of a conversation (Phi-3.5: EOS; others: the next header, always).
    """

    marker: str
    closing: str = ""


class TextRenderer:
    """Conversations as text, with one tokenizer's special tokens and one chat template.

    counts: what happened beyond plain rendering, by name, for the check report.
    """

    def __init__(self, tokenizer: Tokenizer, spec: TemplateChoice | None = None) -> None:
        self.tokenizer = tokenizer
        self.counts: Counter[str] = Counter()
        self._dropped_bos = False
        self._stops: dict[str, bool] = {}
        self._tools_when_none: list[Mapping[str, Any]] | None = None
        name = spec.template if spec is not None else None
        self._given = find_template(name) if name else None

    @cached_property
    def template(self) -> ChatTemplate:
        """The template in use: the job's, else the tokenizer's own. Raises DataError if there is neither."""
        if self._given is not None:
            return self._given
        if self.tokenizer.chat_template is None:
            raise DataError(
                str(self.tokenizer.folder or "tokenizer"),
                "the tokenizer has no chat template",
                rule="chat rows are rendered with one",
                cure="Set data.template to a name (chatml, llama-3, alpaca, ...) or a Jinja file",
            )
        return ChatTemplate(
            self.tokenizer.chat_template, name=f"{self.tokenizer.folder or 'tokenizer'} chat template"
        )

    @property
    def template_sha256(self) -> str:
        """Hash of the template in use, or of nothing for a tokenizer without one."""
        source = self._given.source if self._given is not None else self.tokenizer.chat_template
        return hash_text(source or "")

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the tokenizer's, and the template's own end marker where that is one token."""
        ids = [*self.tokenizer.eos_ids]
        if (self._given is not None or self.tokenizer.chat_template is not None) and (
            mark := self.end_token
        ) is not None:
            ids.append(mark)
        return tuple(dict.fromkeys(ids))

    @cached_property
    def end_token(self) -> int | None:
        """Id of the template's end marker, if it is a token of its own."""
        try:
            marker = self._ending.marker.strip()
        except DataError:
            return None
        last = max(
            (t for t in self.tokenizer.added_tokens if t and marker.endswith(t)), key=len, default=None
        )
        return None if last is None else self.tokenizer.added_tokens[last]

    def render_prompt_text(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text that `render_prompt` tokenises."""
        try:
            return self._render(messages, tools, prompt=True)
        except TemplateError as error:
            raise self._refuse("prompt", str(error)) from None

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

    def _drop_second_bos(self, text: str) -> str:
        """The text with one BOS at its start where it had several."""
        bos = self.tokenizer.bos_token
        while bos and text.startswith(bos + bos):
            text = text.removeprefix(bos)
            self._dropped_bos = True
        return text

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        *,
        prompt: bool = False,
        marks: bool = False,
    ) -> str:
        """Template text. Tool arguments go in as objects; templates that join them as text get them as JSON text."""
        return self._drop_second_bos(self._render_anyhow(messages, tools, prompt=prompt, marks=marks))

    def _render_anyhow(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, prompt: bool, marks: bool
    ) -> str:
        """With `tools` as the template can take them."""
        if not tools and self._tools_when_none is None:
            try:
                return self._render_tools(messages, None, prompt=prompt, marks=marks)
            except TemplateError:
                # Templates made for tool use iterate `tools` without asking whether there are any.
                text = self._render_tools(messages, [], prompt=prompt, marks=marks)
                self._tools_when_none = []
                return text
        return self._render_tools(messages, list(tools) or self._tools_when_none, prompt=prompt, marks=marks)

    def _render_tools(
        self, messages: Sequence[Message], tools: list[Mapping[str, Any]] | None, *, prompt: bool, marks: bool
    ) -> str:
        arguments: dict[str, Any] = {
            "tools": tools,
            "add_generation_prompt": prompt,
            "mark_generation": marks,
            "bos_token": self.tokenizer.bos_token,
            "eos_token": self.tokenizer.eos_token,
        }
        turns = [self._as_template_message(message) for message in messages]
        try:
            return self.template.render(turns, **arguments)
        except TemplateError:
            if not any("tool_calls" in message.extra for message in messages):
                raise
            return self.template.render([_with_text_arguments(turn) for turn in turns], **arguments)

    def _as_template_message(self, message: Message) -> dict[str, Any]:
        turn = {"role": message.role, "content": message.content, **message.extra}
        if turn["content"] is None and not self._asks_for_none:
            # Templates that join or print the content of a tool call would print the word None.
            turn["content"] = ""
        return turn

    @cached_property
    def _asks_for_none(self) -> bool:
        """Whether the template tells tool calls by a content that is none."""
        return re.search(r"content['\"]?\]?\s+is\s+(not\s+)?none", self.template.source) is not None

    @cached_property
    def _ending(self) -> _Ending:
        """How the template ends an assistant turn, learned from two small conversations."""
        probe = [Message("user", "1 plus 1?"), Message("assistant", "Two."), Message("user", "And 2 plus 2?")]
        try:
            prompt = self._render(probe[:1], (), prompt=True)
            upto = self._render(probe[:2], ())
            longer = self._render([*probe, Message("assistant", "Four.")], ())
        except TemplateError as error:
            raise self._refuse("", str(error)) from None
        start = upto.rfind("Two.", len(_share_start(prompt, upto)))
        if start < 0:
            raise self._refuse("", "an answer does not appear in the rendered conversation")
        tail = upto[start + 4 :]
        if longer.startswith(upto) or not longer.startswith(upto[: start + 4]):
            return _Ending(tail.rstrip())
        # The turn ends before the next header, which opens with the first tag of the whole text, else at its first tag.
        shared = _share_start(tail, longer[start + 4 :])
        opening = _TAG.search(upto.removeprefix(self.tokenizer.bos_token or ""))
        header = shared.find(opening.group()) if opening else -1
        first = _TAG.search(shared)
        cut = header if header > 0 else first.end() if first else len(shared)
        marker = shared[:cut].rstrip()
        return _Ending(marker, closing=tail[len(marker) :])

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

    def _refuse(self, place: str, reason: str) -> DataError:
        reason = reason.removeprefix("UndefinedError: ")
        return DataError(
            place or self.template.name,
            f"the chat template cannot render this: {reason}"
            if place
            else f"the chat template cannot be used: {reason}",
            rule="what is trained must be exactly what the model will be asked to produce",
            cure="Change the row, or set data.template",
        )


def _share_start(left: str, right: str) -> str:
    """The longest text that both begin with."""
    differ = (n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return left[: next(differ, min(len(left), len(right)))]


def _with_text_arguments(turn: dict[str, Any]) -> dict[str, Any]:
    calls = turn.get("tool_calls")
    if not isinstance(calls, list):
        return turn
    written: list[dict[str, Any]] = []
    for call in cast("list[dict[str, Any]]", calls):
        function = dict(cast("Mapping[str, Any]", call["function"]))
        if not isinstance(function.get("arguments"), str):
            function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
        written.append({**call, "function": function})
    return {**turn, "tool_calls": written}


def text_of(messages: Iterable[Message]) -> str:
    """What a conversation says, one turn a line: for duplicates and overlap, not for training."""
    return "\n".join(message.content for message in messages)

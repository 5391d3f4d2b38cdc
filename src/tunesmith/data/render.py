"""The one decider of trained tokens: a conversation becomes `TokenRow`s, once, for every method, framework and judge.

How the mask is found, without asking the template for marks. For assistant turn i:

    prompt_i   the conversation before it, rendered with the generation prompt: what a model is given when it answers
    upto_i     the conversation up to and including it
    answer_i   what upto_i has after prompt_i, cut behind the turn's end marker: what the model must produce

Trained are exactly the tokens of answer_i. The header (`<|assistant|>`) belongs to the prompt; the end marker to the
answer; a newline that the template writes after the marker to neither. One row serves all turns of a conversation if
every prompt_i + answer_i is a prefix of the whole rendering. Templates that rewrite history (earlier reasoning dropped,
the system text moved to the last question) fail that test; they give one row per turn, each rendered as the model would
meet it.

Tokens. The text is tokenised as a whole, as servers do. Where a token would straddle the start or the end of an answer,
the text is cut there and its parts are tokenised separately: a server tokenises the prompt alone, too, and the model
continues from there. A row ends with its last trained token; nothing after it could be learned.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

from tunesmith.core.errors import DataError
from tunesmith.core.fingerprint import hash_row, hash_text
from tunesmith.core.types import Conversation, Message, TokenRow
from tunesmith.data.template import (
    GENERATION_END,
    GENERATION_START,
    ChatTemplate,
    TemplateError,
    find_template,
)
from tunesmith.data.tokenizer import Tokenizer

_TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
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
    """One row as text: what it says and which of it is trained."""

    text: str
    spans: tuple[Span, ...]
    append_eos: bool = False


@dataclass(frozen=True, slots=True)
class _Ending:
    """How a template closes an assistant turn.

    marker:  text right after the answer that ends it ("" if there is none), space before it included.
    closing: whether the template writes more at the end of a conversation than between turns.
    """

    marker: str
    closing: bool


class Renderer:
    """Renders conversations with one tokenizer and one chat template.

    counts: what happened beyond plain rendering, by name, for the check report.
    """

    def __init__(self, tokenizer: Tokenizer, spec: TemplateChoice | None = None) -> None:
        self.tokenizer = tokenizer
        self.counts: Counter[str] = Counter()
        self._stops: dict[str, bool] = {}
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
        ids = list(self.tokenizer.eos_ids)
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

    # --- public -------------------------------------------------------------------------------------------------------

    def render_conversation(self, conversation: Conversation) -> list[TokenRow]:
        """Token rows of one conversation. Raises DataError naming the row if it cannot be rendered exactly."""
        return self.render_conversations([conversation])[0]

    def render_conversations(self, conversations: Sequence[Conversation]) -> list[list[TokenRow]]:
        """Token rows of many conversations; faster than one at a time."""
        texts = [self.render_texts(conversation) for conversation in conversations]
        flat = list(itertools.chain.from_iterable(texts))
        encodings = iter(self.tokenizer.encode_batch([item.text for item in flat]))
        return [
            [self._make_row(item, next(encodings), conversation) for item in items]
            for conversation, items in zip(conversations, texts, strict=True)
        ]

    def render_prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Ids of a conversation that the model is to continue, ending with the generation prompt."""
        return self.tokenizer.encode(self.render_prompt_text(messages, tools))

    def render_prompt_text(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text that `render_prompt` tokenises."""
        try:
            return self._render(messages, tools, prompt=True)
        except TemplateError as error:
            raise self._refuse("prompt", str(error)) from None

    def render_question(self, conversation: Conversation) -> list[int]:
        """Ids of everything before a conversation's last answer: the prompt of a test row of any kind."""
        if conversation.kind == "chat":
            return self.render_prompt(conversation.messages[:-1], conversation.tools)
        question = "" if conversation.kind == "text" else conversation.messages[0].content
        return self.tokenizer.encode(self._bos_before(question) + question)

    def render_texts(self, conversation: Conversation) -> list[RenderedText]:
        """Rows of a conversation as text, before tokenising."""
        if conversation.kind != "chat":
            return [self._join_raw(conversation)]
        try:
            rows = self._render_chat(conversation)
        except TemplateError as error:
            raise self._refuse(conversation.origin.place, str(error)) from None
        return rows

    # --- text ---------------------------------------------------------------------------------------------------------

    def _join_raw(self, conversation: Conversation) -> RenderedText:
        """Completion and text rows: BOS as the tokenizer adds it, the text, and EOS."""
        answer = conversation.messages[-1].content
        question = conversation.messages[0].content if conversation.kind == "completion" else ""
        head = self._bos_before(question or answer) + question
        text = head + answer
        return RenderedText(text, (Span(len(head), len(text), len(text)),), append_eos=True)

    def _bos_before(self, text: str) -> str:
        bos = self.tokenizer.bos_token
        return bos if self.tokenizer.adds_bos and bos and not text.startswith(bos) else ""

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        *,
        prompt: bool = False,
        marks: bool = False,
    ) -> str:
        """Template text. Tool arguments go in as objects; templates that join them as text get them as JSON text."""
        arguments: dict[str, Any] = {
            "tools": list(tools) or None,
            "add_generation_prompt": prompt,
            "mark_generation": marks,
            "bos_token": self.tokenizer.bos_token,
            "eos_token": self.tokenizer.eos_token,
        }
        turns = [_as_template_message(message) for message in messages]
        try:
            return self.template.render(turns, **arguments)
        except TemplateError:
            if not any("tool_calls" in message.extra for message in messages):
                raise
            return self.template.render([_with_text_arguments(turn) for turn in turns], **arguments)

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
        start = upto.rfind("Two.", min(len(os.path.commonprefix([prompt, upto])), len(upto)))
        if start < 0:
            raise self._refuse("", "an answer does not appear in the rendered conversation")
        tail = upto[start + 4 :]
        if longer.startswith(upto) or not longer.startswith(upto[: start + 4]):
            return _Ending(tail.rstrip(), closing=False)
        # Something stands only at the very end (Phi-3.5: EOS). The first marker closes the turn.
        shared = os.path.commonprefix([upto, longer])[start + 4 :]
        first = _TAG.search(shared)
        return _Ending(shared[: first.end()] if first else shared.rstrip(), closing=True)

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
        return turns

    def _render_turn(self, conversation: Conversation, number: int, upto: str | None) -> RenderedText:
        """The conversation up to one assistant turn, with only that turn trained."""
        messages, tools = conversation.messages, conversation.tools
        message = messages[number]
        prompt = self._render(messages[:number], tools, prompt=True)
        if upto is None:
            upto = self._render(messages[: number + 1], tools)
        if not upto.startswith(prompt):
            text, content_end = self._compose_turn(conversation.origin.place, prompt, upto, message)
            return self._close(text, Span(len(prompt), content_end, len(text)))
        answer = upto[len(prompt) :]
        content_end, end = self._find_end(answer, message, conversation.origin.place)
        if self.template.marks_generation:
            self._compare_marks(conversation, number, answer[:content_end])
        offset = len(prompt)
        return self._close(upto[: offset + end], Span(offset, offset + content_end, offset + end))

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
        for content in (message.content, message.content.strip()):
            at = answer.find(content) if content else -1
            if at >= 0 and answer.startswith(marker, at + len(content)):
                end = at + len(content)
                # More than the marker and what closes conversations: tool calls, which are the answer too.
                if self._ending.closing or not answer[end + len(marker) :].strip() or not message.extra:
                    return end, end + len(marker)
        if "tool_calls" not in message.extra and message.content.strip() not in answer:
            self.counts["answers_rewritten_by_template"] += 1
        if self._ending.closing and marker in answer:
            at = answer.rfind(marker)
            return at, at + len(marker)
        end = len(answer.rstrip())
        if not end:
            raise self._refuse(place, "the template renders an answer as nothing")
        if marker.strip() and answer[:end].endswith(marker.strip()):
            return end - len(marker.strip()), end
        # Tool calls may end with a marker of their own (`<|eom_id|>`).
        closing = max(
            (t for t in self.tokenizer.added_tokens if t and answer[:end].endswith(t)), key=len, default=""
        )
        return end - len(closing), end

    def _compose_turn(self, place: str, prompt: str, upto: str, message: Message) -> tuple[str, int]:
        """The turn of a template whose generation prompt is not a prefix of the rendered turn.

        Reasoning templates open a block in the prompt (`<think>`) that they cut from rendered answers. The answer is put
        after that prompt, as a model would write it; one without reasoning closes the block at once.
        """
        shared = len(os.path.commonprefix([prompt, upto]))
        opened = _OPENED_BLOCK.search(prompt, shared) if "<" in prompt[shared:] else None
        marker = self._ending.marker
        if opened is None or prompt[shared : opened.start()].strip():
            raise self._refuse(
                place, "the generation prompt is not how the template writes an assistant turn"
            )
        tag = opened.group(1)
        content = message.content
        rendered = upto[shared:].rstrip()
        shown = content.split(f"</{tag}>")[-1] if f"</{tag}>" in content else content
        if rendered != (shown + marker).rstrip() or "tool_calls" in message.extra:
            raise self._refuse(
                place, f"the prompt opens <{tag}> and the template rewrites the answer after it"
            )
        if f"</{tag}>" in content:
            body = content.lstrip()
            body = (
                body.removeprefix(f"<{tag}>").removeprefix("\n") if body.startswith(f"<{tag}>") else content
            )
        else:
            body = f"\n</{tag}>\n\n{content}"
            self.counts["empty_reasoning_added"] += 1
        text = prompt + body
        return text + marker, len(text)

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

    # --- tokens -------------------------------------------------------------------------------------------------------

    def _make_row(self, item: RenderedText, encoding: Any, conversation: Conversation) -> TokenRow:
        edges = [edge for span in item.spans for edge in (span.start, span.end)]
        ids, cuts = self._tokenise(item.text, edges, encoding)
        mask = [0] * len(ids)
        for first, last in zip(cuts[::2], cuts[1::2], strict=True):
            mask[first:last] = [1] * (last - first)
        num_bytes = sum(len(item.text[s.start : s.content_end].encode()) for s in item.spans)
        if mask and mask[0]:
            # The first token has nothing before it to be predicted from.
            mask[0] = 0
            num_bytes -= len(self.tokenizer.decode(ids[:1]).encode())
        if item.append_eos and self.tokenizer.eos_id is not None and ids[-1:] != [self.tokenizer.eos_id]:
            ids, mask = [*ids, self.tokenizer.eos_id], [*mask, 1]
            if conversation.kind == "chat":
                self.counts["eos_added_after_answer"] += 1
        self._count_specials(ids, mask)
        return TokenRow(ids, mask, conversation.origin, hash_row(ids, mask), max(num_bytes, 0))

    def _tokenise(self, text: str, edges: Sequence[int], encoding: Any) -> tuple[list[int], list[int]]:
        """Ids of the text and the token number of each edge (a character position, ascending).

        encoding: the text tokenised as a whole. Used as it is when every edge falls between two tokens.
        """
        cuts: list[int] = []
        for edge in edges:
            cut = len(encoding.ids) if edge >= len(text) else encoding.char_to_token(edge)
            if cut is None or (edge < len(text) and encoding.token_to_chars(cut)[0] != edge):
                self.counts["boundaries_cut_through_a_token"] += 1
                return self._tokenise_parts(text, edges)
            cuts.append(cut)
        return list(encoding.ids), cuts

    def _tokenise_parts(self, text: str, edges: Sequence[int]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        cuts: list[int] = []
        before = 0
        for edge in (*edges, len(text)):
            part = text[before:edge]
            ids += self.tokenizer.encode_continuation(part) if before else self.tokenizer.encode(part)
            cuts.append(len(ids))
            before = edge
        return ids, cuts[:-1]

    def _count_specials(self, ids: Sequence[int], mask: Sequence[int]) -> None:
        """Facts about BOS and stop tokens that only the finished ids tell."""
        bos = self.tokenizer.bos_id
        if bos is not None:
            if list(ids[:2]) == [bos, bos]:
                self.counts["rows_with_bos_twice"] += 1
            elif self.tokenizer.adds_bos and list(ids[:1]) != [bos]:
                self.counts["rows_without_bos"] += 1


def _as_template_message(message: Message) -> dict[str, Any]:
    return {"role": message.role, "content": message.content, **message.extra}


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

"""What a chat template writes for messages: called as its author meant it, and how it ends an assistant turn.

BOS stands at the start of a text at most once: a second one, from a template or a row that writes it again, is dropped
and counted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

from tunesmith.core.errors import DataError
from tunesmith.core.fingerprint import hash_text
from tunesmith.core.types import Message
from tunesmith.data.template import ChatTemplate, TemplateError, find_template
from tunesmith.data.tokenizer import Tokenizer

_TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


class TemplateChoice(Protocol):
    """The part of the job's data spec that rendering reads."""

    @property
    def template(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Ending:
    """How a template closes an assistant turn.

    marker:  text right after the answer that ends it ("" if there is none), space before it included.
    closing: what it writes only at the end of a conversation (Phi-3.5: EOS; others: the next header, always).
    """

    marker: str
    closing: str = ""


class ChatText:
    """Messages as text, with one tokenizer's special tokens and one chat template.

    counts: what happened beyond plain rendering, by name, for the check report.
    """

    def __init__(self, tokenizer: Tokenizer, spec: TemplateChoice | None = None) -> None:
        self.tokenizer = tokenizer
        self.counts: Counter[str] = Counter()
        self._dropped_bos = False
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
                cure="Give a name (chatml, llama-3, alpaca, ...) or a Jinja file: data.template; for eval --template",
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
    def _ending(self) -> Ending:
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
            return Ending(tail.rstrip())
        # The turn ends before the next header, which opens with the first tag of the whole text, else at its first tag.
        shared = _share_start(tail, longer[start + 4 :])
        opening = _TAG.search(upto.removeprefix(self.tokenizer.bos_token or ""))
        header = shared.find(opening.group()) if opening else -1
        first = _TAG.search(shared)
        cut = header if header > 0 else first.end() if first else len(shared)
        marker = shared[:cut].rstrip()
        return Ending(marker, closing=tail[len(marker) :])

    def _refuse(self, place: str, reason: str) -> DataError:
        reason = reason.removeprefix("UndefinedError: ")
        return DataError(
            place or self.template.name,
            f"the chat template cannot render this: {reason}"
            if place
            else f"the chat template cannot be used: {reason}",
            rule="what is trained must be exactly what the model will be asked to produce",
            cure="Change the row, or the template",
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

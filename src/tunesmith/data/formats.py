"""The shapes of rows that people have, detected per source and parsed strictly into `Conversation`.

Those of preferences are in `preferences.py`, of prompts in `prompts.py`; of answers there are five:

    messages            {"messages": [{"role", "content", "weight"?, "tool_calls"?...}], "tools"?}
    prompt_completion   {"prompt", "completion"}: strings are raw text, lists of messages are a chat
    alpaca              {"instruction", "input"?, "output", "system"?}: one user turn, input after a blank line
    sharegpt            {"conversations": [{"from", "value"}], "system"?, "tools"?}
    text                {"text"}

To add a shape: one `_parse_*` function, one line in `_PARSERS` and one in `_SHAPES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from tunesmith.core.errors import DataError
from tunesmith.core.types import Conversation, Message, Origin
from tunesmith.data.preferences import SHAPES as PREFERENCE_SHAPES
from tunesmith.data.preferences import PreferenceName, parse_preference, rows_of_shape, shape_of_preference
from tunesmith.data.prompts import SHAPES as PROMPT_SHAPES
from tunesmith.data.prompts import PromptName, parse_prompt, shape_of_prompt
from tunesmith.data.turns import (
    fail_row,
    finish_chat,
    parse_message,
    parse_turn,
    take_extra,
    take_instruction,
    take_list,
    take_text,
)
from tunesmith.job.objective import RowKind

AnswerName = Literal["messages", "prompt_completion", "alpaca", "sharegpt", "text"]
FormatName = AnswerName | PreferenceName | PromptName


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as the file has it, and where it stands."""

    value: dict[str, Any]
    origin: Origin


def detect_format(
    values: Iterable[Mapping[str, Any]], *, place: str = "data", rows: RowKind = "answers"
) -> FormatName:
    """The shape that every one of the given rows has. Raises DataError listing the keys found and the shapes known.

    rows: what is looked for; shapes of another kind are told as what they are.
    """
    found: FormatName | None = None
    known: Mapping[Any, str] = PREFERENCE_SHAPES
    if rows in ("answers", "prompts"):
        known = _SHAPES if rows == "answers" else PROMPT_SHAPES
    for row in values:
        shape = shape_of(row, rows)
        if shape is None or (found is not None and shape != found):
            other = f" beside rows of shape {found}" if found and shape != found else ""
            raise DataError(
                place,
                f"rows with keys {', '.join(sorted(map(str, row))[:12]) or '(none)'}{other}",
                rule=f"known shapes are {', '.join(f'{name} ({keys})' for name, keys in known.items())}",
                cure="Rename the keys, or give one file per shape",
            )
        found = shape
    if found is None:
        raise DataError(place, "no rows", rule="a source has at least one row", cure="Check the file")
    return found


def shape_of(row: Mapping[str, Any], rows: RowKind = "answers") -> FormatName | None:
    """The shape that a row's keys tell, None for none of ours."""
    if rows == "prompts":
        return shape_of_prompt(row)
    if (shape := shape_of_preference(row, rows)) is not None:
        return shape
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    if "instruction" in row and ("output" in row or "response" in row):
        return "alpaca"
    return "text" if "text" in row else None


_SHAPES: dict[AnswerName, str] = {
    "messages": "messages: list of role/content",
    "prompt_completion": "prompt, completion",
    "alpaca": "instruction, input or context, output or response",
    "sharegpt": "conversations: list of from/value",
    "text": "text",
}


def parse_row(raw: RawRow, fmt: FormatName, rows: RowKind = "answers") -> Conversation:
    """One row as a checked `Conversation`. Raises DataError naming the row's place.

    rows: of "prompts" the last answer is cut off and is the truth.
    """
    if _holds_nul(raw.value):
        raise fail_row(raw.origin, "contains a NUL character", "rows are text")
    if rows == "prompts":
        return parse_prompt(raw.value, raw.origin, cast("PromptName", fmt))
    if rows_of_shape(fmt) != "answers":
        return parse_preference(raw.value, raw.origin, cast("PreferenceName", fmt))
    return _PARSERS[cast("AnswerName", fmt)](raw.value, raw.origin)


def _holds_nul(value: Any) -> bool:
    """True if a text in `value`, keys included, has U+0000: legal in JSON, and read as an end by much software."""
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, Mapping):
        return any(
            _holds_nul(key) or _holds_nul(item) for key, item in cast("Mapping[Any, Any]", value).items()
        )
    return isinstance(value, list) and any(_holds_nul(item) for item in cast("list[Any]", value))


# --- the shapes -------------------------------------------------------------------------------------------------------


def _parse_messages(row: Mapping[str, Any], origin: Origin) -> Conversation:
    items = take_list(row, "messages", origin)
    messages = [parse_message(item, number, origin) for number, item in enumerate(items, 1)]
    return finish_chat(messages, row, origin)


def _parse_prompt_completion(row: Mapping[str, Any], origin: Origin) -> Conversation:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = [*cast("list[Any]", prompt), *cast("list[Any]", completion)]
        messages = [parse_message(item, number, origin) for number, item in enumerate(turns, 1)]
        start = len(cast("list[Any]", prompt))
        # Only the completion is learned, also where the prompt holds earlier answers.
        messages = [
            Message(m.role, m.content, 0.0, m.extra) if n < start else m for n, m in enumerate(messages)
        ]
        return finish_chat(messages, row, origin)
    prompt_text = take_text(row, "prompt", origin)
    answer = take_text(row, "completion", origin)
    if not answer:
        raise fail_row(origin, "the completion is empty", "an answer has text")
    return Conversation(
        messages=(Message("user", prompt_text), Message("assistant", answer)),
        origin=origin,
        kind="completion",
        extra=take_extra(row),
    )


def _parse_alpaca(row: Mapping[str, Any], origin: Origin) -> Conversation:
    question = take_instruction(row, origin)
    answer = take_text(row, "output" if "output" in row else "response", origin)
    messages = [*question, Message("assistant", answer)]
    return finish_chat(messages, row, origin)


def _parse_sharegpt(row: Mapping[str, Any], origin: Origin) -> Conversation:
    messages: list[Message] = []
    if system := take_text(row, "system", origin, default=""):
        messages.append(Message("system", system))
    for number, item in enumerate(take_list(row, "conversations", origin), 1):
        messages.append(parse_turn(item, number, origin))
    return finish_chat(messages, row, origin)


def _parse_text(row: Mapping[str, Any], origin: Origin) -> Conversation:
    text = take_text(row, "text", origin)
    if not text.strip():
        raise fail_row(origin, "the text is empty", "a row has text")
    return Conversation((Message("assistant", text),), origin, kind="text", extra=take_extra(row))


_PARSERS: dict[AnswerName, Callable[[Mapping[str, Any], Origin], Conversation]] = {
    "messages": _parse_messages,
    "prompt_completion": _parse_prompt_completion,
    "alpaca": _parse_alpaca,
    "sharegpt": _parse_sharegpt,
    "text": _parse_text,
}

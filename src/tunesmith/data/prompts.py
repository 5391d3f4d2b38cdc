"""Rows of objectives whose model answers by itself: a prompt, the truth where the row has one, and other columns.

    prompts             {"prompt"}: a string is raw text, messages are a chat that ends with a question
    any shape of answers but `text`: the prompt is all before the last answer, and that answer is the truth

The truth is a column `answer`, `solution` or `ground_truth`, else the last answer, unless its label calls it bad. All
columns but those that hold turns are kept for reward functions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from tunesmith.core.errors import DataError
from tunesmith.core.jsonl import OR_SKIP
from tunesmith.core.types import Conversation, Message, Origin, TokenRow
from tunesmith.data.preferences import LABELS
from tunesmith.data.turns import (
    check_opening,
    check_systems,
    fail_row,
    parse_tools,
    parse_turn,
    refuse_chat_columns,
    take_extra,
    take_instruction,
    take_list,
    take_text,
)

PromptName = Literal["prompts", "messages", "prompt_completion", "alpaca", "sharegpt"]
SHAPES: dict[PromptName, str] = {
    "prompts": "prompt",
    "messages": "messages: list of role/content",
    "prompt_completion": "prompt, completion",
    "alpaca": "instruction or question, input or context",
    "sharegpt": "conversations: list of from/value",
}
TRUTHS = ("answer", "solution", "ground_truth")
# Columns that hold turns: the prompt itself, or the answer to it.
_TURNS = ("prompt", "messages", "conversations", "completion")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is to answer.

    ids:      its tokens, up to where the answer begins.
    question: the messages of a chat, or raw text.
    truth:    the right answer, None where the row has none.
    columns:  the row's other columns, JSON values; `answer` is always among them where there is a truth.
    """

    ids: Sequence[int]
    question: tuple[Message, ...] | str
    truth: str | None
    columns: Mapping[str, Any]
    origin: Origin
    row_id: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model has answered.

    text:       without the stop token.
    num_tokens: sampled, the stop token among them.
    finished:   it stopped by itself, before the limit.
    ids:        its tokens, without the stop token.
    """

    prompt: Prompt
    text: str
    num_tokens: int
    finished: bool
    ids: Sequence[int]


def make_prompt(row: TokenRow, conversation: Conversation) -> Prompt:
    """The prompt of a token row and the conversation that it was rendered from."""
    messages = conversation.messages
    return Prompt(
        ids=list(row.ids),
        question=messages if conversation.kind == "chat" else messages[0].content,
        truth=conversation.truth,
        columns=conversation.columns or {},
        origin=row.origin,
        row_id=row.row_id,
    )


def shape_of_prompt(row: Mapping[str, Any]) -> PromptName | None:
    """The shape that a row's keys tell, None for none of ours."""
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if "prompt" in row:
        return "prompt_completion" if "completion" in row else "prompts"
    return "alpaca" if "instruction" in row or "question" in row else None


def parse_prompt(row: Mapping[str, Any], origin: Origin, shape: PromptName) -> Conversation:
    """A row as the conversation that the model is to continue. Raises DataError naming the row's place."""
    asked, answer = _read_question(row, origin, shape)
    if any(row.get(key) is False for key in LABELS):
        answer = None
    named = next((row[key] for key in TRUTHS if row.get(key) is not None), None)
    truth = _as_text(named) if named is not None else answer
    columns = _as_json({key: value for key, value in row.items() if key not in _TURNS})
    if truth is not None and columns.get("answer") is None:
        columns["answer"] = truth
    if isinstance(asked, str):
        refuse_chat_columns(row, origin)
        return Conversation(
            (Message("user", asked),),
            origin,
            "completion",
            extra=take_extra(row),
            truth=truth,
            columns=columns,
        )
    if (system := take_text(row, "system", origin, default="")) and shape != "alpaca":
        asked = [Message("system", system), *asked]
    _check_turns(asked, origin)
    return Conversation(
        tuple(asked),
        origin,
        tools=parse_tools(row.get("tools"), origin),
        extra=take_extra(row),
        truth=truth,
        columns=columns,
    )


def _read_question(
    row: Mapping[str, Any], origin: Origin, shape: PromptName
) -> tuple[str | list[Message], str | None]:
    """What is asked, turns or raw text, and the answer that follows it."""
    if shape == "alpaca":
        answer = next((row[key] for key in ("output", "response") if row.get(key) is not None), None)
        return take_instruction(
            {**row, "instruction": row.get("instruction", row.get("question"))}, origin
        ), _as_text(answer)
    if shape in ("messages", "sharegpt"):
        return _split_answer(_read_turns(row, "messages" if shape == "messages" else "conversations", origin))
    completion = row.get("completion")
    answer = _read_turns(row, "completion", origin) if isinstance(completion, list) else []
    if isinstance(row.get("prompt"), list):
        turns = _read_turns(row, "prompt", origin)
    else:
        prompt = take_text(row, "prompt", origin)
        if not prompt.strip():
            raise fail_row(origin, "the prompt is empty", "the model answers a prompt")
        # A prompt beside answers in messages belongs to their chat, as it does where they are learned from.
        if not any(isinstance(row.get(key), list | dict) for key in ("chosen", "rejected", "completion")):
            return prompt, _as_text(completion)
        turns = [Message("user", prompt)]
    return _split_answer([*turns, *answer]) if answer else (turns, _as_text(completion))


def _read_turns(row: Mapping[str, Any], key: str, origin: Origin) -> list[Message]:
    return [parse_turn(item, number, origin) for number, item in enumerate(take_list(row, key, origin), 1)]


def _split_answer(turns: list[Message]) -> tuple[list[Message], str | None]:
    if turns and turns[-1].role == "assistant":
        return turns[:-1], turns[-1].content or None
    return turns, None


def _check_turns(turns: list[Message], origin: Origin) -> None:
    if not turns:
        raise fail_row(origin, "no turn before the answer", "a prompt has at least a question")
    check_systems(turns, origin)
    check_opening(turns, origin)
    if turns[-1].role not in ("user", "tool"):
        raise DataError(
            origin.place,
            f"the prompt's last message is from {turns[-1].role!r}",
            rule="the model answers a user",
            cure=f"Cut the row after a question{OR_SKIP}",
        )


def _as_text(value: Any) -> str | None:
    """A truth as text; None for what no answer could be compared with."""
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, bool | int | float) else None


def _as_json(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns as JSON holds them: dates of a table become text, NaN null."""
    text = json.dumps(columns, default=str)
    return cast("dict[str, Any]", json.loads(text, parse_constant=lambda _: None))

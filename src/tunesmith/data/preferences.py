r"""The shapes of preference rows, detected per source and parsed strictly into `Conversation`.

Pairs, two answers to one prompt:

    pairs               {"prompt", "chosen", "rejected"}: strings are raw text; messages make a chat, in the prompt or
                        in the answers (one, a list, or the whole conversation)
    messages_pairs      {"messages": [...], "chosen", "rejected"}
    sharegpt_pairs      {"conversations": [...], "chosen": {"from", "value"}, "rejected": {...}}
    alpaca_pairs        {"instruction" or "question", "input"?, "chosen", "rejected"}; "output" is not read
    conversation_pairs  {"chosen": [...], "rejected": [...]}: whole conversations, alike up to the answers
    hh_pairs            {"chosen", "rejected"}: the same as text of turns "\n\nHuman: ...\n\nAssistant: ..."

Labelled, an answer that is good or bad ("kto_tag" is another name of "label"):

    labelled            {"prompt", "completion", "label"}: strings are raw text, messages a chat
    messages_labelled   {"messages": [...], "label"}: the last answer is what is labelled
    sharegpt_labelled   {"conversations": [...], "label"}
    alpaca_labelled     {"instruction", "input"?, "output", "label"}

Chats may have "system" and "tools". What comes before the answers gets weight 0. To add a shape: a line in `SHAPES`,
where `shape_of_preference` tells it, and what `_read_question` makes of it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, cast, get_args

from tunesmith.core.errors import DataError
from tunesmith.core.jsonl import OR_SKIP
from tunesmith.core.types import Conversation, Message, Origin, Role
from tunesmith.data.turns import (
    fail_row,
    finish_chat,
    name_type,
    parse_turn,
    refuse_chat_columns,
    take_extra,
    take_instruction,
    take_list,
    take_text,
)
from tunesmith.job.objective import RowKind

PairName = Literal[
    "pairs", "messages_pairs", "sharegpt_pairs", "alpaca_pairs", "conversation_pairs", "hh_pairs"
]
LabelledName = Literal["labelled", "messages_labelled", "sharegpt_labelled", "alpaca_labelled"]
PreferenceName = PairName | LabelledName

SHAPES: dict[PreferenceName, str] = {
    "pairs": "prompt, chosen, rejected",
    "messages_pairs": "messages, chosen, rejected",
    "sharegpt_pairs": "conversations, chosen, rejected",
    "alpaca_pairs": "instruction or question, input, chosen, rejected",
    "conversation_pairs": "chosen, rejected: whole conversations",
    "hh_pairs": "chosen, rejected: text of Human and Assistant turns",
    "labelled": "prompt, completion, label",
    "messages_labelled": "messages, label",
    "sharegpt_labelled": "conversations, label",
    "alpaca_labelled": "instruction, input, output, label",
}
_PAIRS = ("chosen", "rejected")
LABELS = ("label", "kto_tag")
_BASES: dict[str, tuple[PairName, LabelledName | None]] = {
    "prompt": ("pairs", "labelled"),
    "messages": ("messages_pairs", "messages_labelled"),
    "conversations": ("sharegpt_pairs", "sharegpt_labelled"),
    "instruction": ("alpaca_pairs", "alpaca_labelled"),
    "question": ("alpaca_pairs", None),
}
_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_HH_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_FOLLOWS: dict[Role, tuple[Role, ...]] = {
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def rows_of_shape(shape: str) -> RowKind:
    """What the rows of a shape are: a name of `SHAPES`, or any other, whose answers are learned."""
    if shape in get_args(PairName):
        return "pairs"
    return "labelled" if shape in get_args(LabelledName) else "answers"


def shape_of_preference(row: Mapping[str, Any], rows: RowKind) -> PreferenceName | None:
    """The preference shape that a row's keys tell, None for none.

    rows: what is looked for. Where preferences are, a side or a label may be missing or of the wrong type, which the
    parser then says; where answers are, a column named `label` may mean anything, and only true and false tell of KTO.
    """
    bases = [key for key in _BASES if key in row]
    sides = [key for key in _PAIRS if key in row]
    if len(sides) == 2 or (sides and rows != "answers"):
        if bases:
            return _BASES[bases[0]][0]
        return "hh_pairs" if isinstance(row[sides[0]], str) else "conversation_pairs"
    labels = [row[key] for key in LABELS if key in row]
    if not labels or (rows == "answers" and not isinstance(labels[0], bool)):
        return None
    # A prompt beside messages repeats what they begin with.
    whole = [key for key in bases if key != "prompt" or "completion" in row]
    if rows != "answers":
        whole = whole or bases
    return _BASES[whole[0]][1] if whole else None


def parse_preference(row: Mapping[str, Any], origin: Origin, shape: PreferenceName) -> Conversation:
    """A pair (`rejected` is the other conversation) or a labelled row. Raises DataError naming the row's place."""
    if rows_of_shape(shape) == "pairs":
        return _parse_pair(row, origin, cast("PairName", shape))
    return _parse_labelled(row, origin, cast("LabelledName", shape))


def unpair(pair: Conversation) -> tuple[Conversation, Conversation]:
    """A pair as two labelled rows, the chosen answer good and the rejected one bad."""
    return replace(pair, rejected=(), label=True), replace(
        pair, messages=pair.rejected, rejected=(), label=False
    )


# --- pairs ------------------------------------------------------------------------------------------------------------


def _parse_pair(row: Mapping[str, Any], origin: Origin, shape: PairName) -> Conversation:
    asked = _read_question(row, origin, shape)
    chosen, rejected = (_read_side(row, key, origin, hh=shape == "hh_pairs") for key in _PAIRS)
    if isinstance(asked, str) and isinstance(chosen, str) and isinstance(rejected, str):
        if chosen == rejected:
            raise _identical(origin)
        pair = _raw_text(asked, chosen, row, origin)
        return replace(pair, rejected=(pair.messages[0], Message("assistant", rejected)))
    if isinstance(asked, str):
        asked = [Message("user", asked)]
    sides: list[list[Message]] = []
    for key, side in zip(_PAIRS, (chosen, rejected), strict=True):
        with _of_side(key):
            sides.append(_with_system(row, origin, _join(asked, side, origin)))
            _check_order(sides[-1], origin)
    shared = _count_shared(sides[0], sides[1], origin)
    found: list[Conversation] = []
    for key, turns in zip(_PAIRS, sides, strict=True):
        with _of_side(key):
            found.append(finish_chat(_train_from(shared, turns, origin), row, origin))
    return replace(found[0], rejected=found[1].messages)


def _read_question(row: Mapping[str, Any], origin: Origin, shape: PreferenceName) -> str | list[Message]:
    """What is asked: turns, or the raw text of a prompt."""
    base = shape.split("_")[0]
    if base == "alpaca":
        asked = {**row, "system": None, "instruction": row.get("instruction", row.get("question"))}
        return take_instruction(asked, origin)
    if base in ("messages", "sharegpt"):
        return _read_turns(row, "messages" if base == "messages" else "conversations", origin)
    if base in ("conversation", "hh"):
        return []
    if isinstance(row.get("prompt"), list):
        return _read_turns(row, "prompt", origin)
    prompt = take_text(row, "prompt", origin)
    if not prompt.strip():
        raise fail_row(origin, "the prompt is empty", "an answer is to a prompt")
    return prompt


def _read_turns(row: Mapping[str, Any], key: str, origin: Origin) -> list[Message]:
    turns = [parse_turn(item, number, origin) for number, item in enumerate(take_list(row, key, origin), 1)]
    if not turns:
        raise fail_row(origin, f"{key} is an empty list", f"{key} has at least one turn")
    return turns


def _read_side(row: Mapping[str, Any], key: str, origin: Origin, *, hh: bool = False) -> str | list[Message]:
    """One answer: its text, or its turns."""
    value = row.get(key)
    if value is None:
        raise fail_row(origin, f"no {key!r}", "a row has every answer that its shape names")
    with _of_side(key):
        if isinstance(value, list):
            return _read_turns(row, key, origin)
        if isinstance(value, dict):
            return [parse_turn(value, 1, origin)]
        if not isinstance(value, str):
            raise fail_row(origin, name_type(value), "an answer is text, a message or a list of messages")
        if not value.strip():
            raise fail_row(origin, "the answer is empty", "an answer has text")
        return _read_hh(value, origin) if hh else value


def _read_hh(text: str, origin: Origin) -> list[Message]:
    r"""Turns of a text "\n\nHuman: ...\n\nAssistant: ..."; white space around a turn is not of it."""
    before, *parts = _HH_TURN.split(text)
    if before or not parts:
        raise fail_row(
            origin,
            "the text does not begin with 'Human:'",
            "strings without a prompt are turns of Human and Assistant",
            f"Give prompt, chosen and rejected{OR_SKIP}",
        )
    return [Message(_HH_ROLES[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _join(asked: Sequence[Message], side: str | list[Message], origin: Origin) -> list[Message]:
    """The whole conversation of one side. Turns that begin with a question are the whole of it already."""
    if isinstance(side, str):
        return [*asked, Message("assistant", side)]
    if side[0].role not in ("system", "user"):
        return [*asked, *side]
    if asked and not any(_says_the_same(asked[-1], turn) for turn in side):
        raise fail_row(
            origin, "a conversation without the prompt's last turn", "a whole conversation has its prompt"
        )
    return side


def _count_shared(chosen: Sequence[Message], rejected: Sequence[Message], origin: Origin) -> int:
    """Turns that both sides begin with: the prompt. Raises DataError unless an answer on both sides comes next."""
    same = [_says_the_same(a, b) for a, b in zip(chosen, rejected, strict=False)]
    shared = same.index(False) if False in same else len(same)
    if shared == len(chosen) == len(rejected):
        raise _identical(origin)
    if not any(turn.role == "user" for turn in chosen[:shared]):
        raise fail_row(origin, "chosen and rejected share no user turn", "both answer the same prompt")
    if shared in (len(chosen), len(rejected)):
        short = _PAIRS[shared == len(rejected)]
        raise fail_row(origin, f"{short} is only the beginning of the other", "both answer the same prompt")
    for turn in (chosen[shared], rejected[shared]):
        if turn.role != "assistant":
            raise fail_row(
                origin,
                f"chosen and rejected differ first in message {shared + 1}, which is from {turn.role!r}",
                "both answer the same prompt",
            )
    return shared


def _says_the_same(left: Message, right: Message) -> bool:
    return (left.role, left.content, left.extra) == (right.role, right.content, right.extra)


def _identical(origin: Origin) -> DataError:
    return fail_row(origin, "chosen and rejected are the same", "one answer is better than the other")


# --- labelled rows ----------------------------------------------------------------------------------------------------


def _parse_labelled(row: Mapping[str, Any], origin: Origin, shape: LabelledName) -> Conversation:
    asked = _read_question(row, origin, shape)
    label = _read_label(row, origin)
    if shape in ("labelled", "alpaca_labelled"):
        key = "completion" if shape == "labelled" else "output" if "output" in row else "response"
        answer = _read_side(row, key, origin)
        if isinstance(asked, str) and isinstance(answer, str):
            return replace(_raw_text(asked, answer, row, origin), label=label)
        asked = [Message("user", asked)] if isinstance(asked, str) else asked
        turns = [*asked, *([Message("assistant", answer)] if isinstance(answer, str) else answer)]
        num_asked = len(asked)
    else:
        turns = cast("list[Message]", asked)
        num_asked = len(turns) - 1
    whole = _with_system(row, origin, turns)
    _check_order(whole, origin)
    trained = _train_from(num_asked + len(whole) - len(turns), whole, origin)
    return replace(finish_chat(trained, row, origin), label=label)


def _read_label(row: Mapping[str, Any], origin: Origin) -> bool:
    key = next((key for key in LABELS if key in row), "label")
    value = row.get(key)
    if not isinstance(value, bool):
        shown = f" ({value!r:.40})" if isinstance(value, str | int | float) else ""
        raise fail_row(origin, f"{key} is {name_type(value)}{shown}", f"{key} is true (good) or false (bad)")
    return value


# --- both -------------------------------------------------------------------------------------------------------------


def _raw_text(prompt: str, answer: str, row: Mapping[str, Any], origin: Origin) -> Conversation:
    refuse_chat_columns(row, origin)
    messages = (Message("user", prompt), Message("assistant", answer))
    return Conversation(messages, origin, kind="completion", extra=take_extra(row))


def _with_system(row: Mapping[str, Any], origin: Origin, turns: list[Message]) -> list[Message]:
    system = take_text(row, "system", origin, default="")
    return [Message("system", system), *turns] if system else turns


def _check_order(turns: Sequence[Message], origin: Origin) -> None:
    for number, (before, turn) in enumerate(itertools.pairwise(turns), 2):
        if turn.role not in _FOLLOWS[before.role]:
            raise fail_row(
                origin, f"message {number} is from {turn.role!r} after {before.role!r}", "turns alternate"
            )
    if turns[-1].role != "assistant":
        raise fail_row(origin, f"the last message is from {turns[-1].role!r}", "an answer comes last")


def _train_from(start: int, turns: Sequence[Message], origin: Origin) -> list[Message]:
    """The turns, those before `start` with weight 0."""
    for number, turn in enumerate(turns[start:], start + 1):
        if turn.role == "assistant" and not turn.weight:
            raise fail_row(origin, f"message {number} has weight 0", "all of an answer counts")
    return [replace(turn, weight=0.0) if n < start else turn for n, turn in enumerate(turns)]


@contextmanager
def _of_side(key: str) -> Generator[None]:
    """Say of an error in which answer it is."""
    try:
        yield
    except DataError as error:
        raise DataError(error.place, f"{key}: {error.finding}", rule=error.rule, cure=error.cure) from None

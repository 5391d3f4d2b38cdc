"""What rows of every shape are made of: texts, turns of a chat, tool calls, and the rules that hold for a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from tunesmith.core.errors import DataError
from tunesmith.core.jsonl import OR_SKIP
from tunesmith.core.types import Conversation, Message, Origin, Role

SKIP_CURE = f"Repair the row{OR_SKIP}"
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
_CLUSTER_KEYS = ("cluster", "family")
_CHOICE_KEYS = ("choices", "answer_index")
# Message keys that this module reads itself; the others go to the template as they are.
_OWN_KEYS = ("role", "content", "weight", "loss_weight")


def fail_row(origin: Origin, finding: str, rule: str, cure: str = SKIP_CURE) -> DataError:
    return DataError(origin.place, finding, rule=rule, cure=cure)


def take_text(row: Mapping[str, Any], key: str, origin: Origin, *, default: str | None = None) -> str:
    """The string under `key`; null counts as absent."""
    value = row.get(key)
    if value is None:
        if default is not None:
            return default
        raise fail_row(origin, f"no {key!r}", f"{key} is a string")
    if not isinstance(value, str):
        raise fail_row(origin, f"{key} is {name_type(value)}", f"{key} is a string")
    return value


def name_type(value: Any) -> str:
    """How an error calls a JSON value of the wrong type."""
    if value is None:
        return "null"
    names = (
        (bool, "a boolean"),
        (int | float, "a number"),
        (str, "a string"),
        (list, "a list"),
        (dict, "an object"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), "of an unknown type")


def take_extra(row: Mapping[str, Any]) -> dict[str, Any]:
    """What later steps read besides the messages: the row's cluster, and the options of a multiple-choice row."""
    extra: dict[str, Any] = {key: row[key] for key in _CHOICE_KEYS if row.get(key) is not None}
    for key in _CLUSTER_KEYS:
        if isinstance(row.get(key), str | int) and "cluster" not in extra:
            extra["cluster"] = str(row[key])
    return extra


def take_list(row: Mapping[str, Any], key: str, origin: Origin) -> Sequence[Any]:
    items = row.get(key)
    if not isinstance(items, list):
        raise fail_row(origin, f"{key} is {name_type(items)}", f"{key} is a list of turns")
    return cast("list[Any]", items)


def parse_message(item: Any, number: int, origin: Origin) -> Message:
    if not isinstance(item, dict):
        raise fail_row(
            origin, f"message {number} is {name_type(item)}", "a message is an object with role and content"
        )
    turn = cast("dict[str, Any]", item)
    if "role" not in turn:
        keys = ", ".join(sorted(map(str, turn))) or "(none)"
        raise fail_row(origin, f"message {number} has no role (its keys: {keys})", "every message has a role")
    role = _take_role(turn["role"], number, origin)
    extra = {key: value for key, value in turn.items() if key not in _OWN_KEYS and value is not None}
    if "tool_calls" in extra:
        extra["tool_calls"] = _parse_tool_calls(extra["tool_calls"], number, origin)
        if not extra["tool_calls"]:
            del extra["tool_calls"]
        elif turn.get("content") is None:
            # Some templates ask `content is none` to recognise a call, so null stays null for them.
            extra["content"] = None
    content = _take_content(turn.get("content"), number, origin, may_be_null="tool_calls" in extra)
    return Message(role=role, content=content, weight=_take_weight(turn, number, origin), extra=extra)


def _take_role(value: Any, number: int, origin: Origin) -> Role:
    role = _ROLES.get(value) if isinstance(value, str) else None
    if role is None:
        raise fail_row(
            origin,
            f"message {number} has role {value!r}",
            "roles are system, user, assistant and tool",
            SKIP_CURE,
        )
    return role


def _take_content(value: Any, number: int, origin: Origin, *, may_be_null: bool) -> str:
    """A string, or a list of text parts joined; anything else is refused."""
    if isinstance(value, str):
        return value
    if value is None and may_be_null:
        return ""
    if isinstance(value, list):
        texts: list[str] = []
        for part in cast("list[Any]", value):
            if not isinstance(part, dict) or cast("dict[str, Any]", part).get("type") != "text":
                raise fail_row(origin, f"message {number} has a part that is not text", "content is text")
            piece = cast("dict[str, Any]", part)
            text = piece.get("text", piece.get("value"))
            if not isinstance(text, str):
                raise fail_row(origin, f"message {number} has a text part without text", "content is text")
            texts.append(text)
        return "".join(texts)
    raise fail_row(origin, f"message {number} has content that is {name_type(value)}", "content is a string")


def _take_weight(turn: Mapping[str, Any], number: int, origin: Origin) -> float:
    weight = turn.get("weight", turn.get("loss_weight"))
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
        raise fail_row(
            origin, f"message {number} has weight {weight!r}", "a weight is 0 (not trained) or 1 (trained)"
        )
    return float(weight)


def _parse_tool_calls(value: Any, number: int, origin: Origin) -> list[dict[str, Any]]:
    """Calls with their arguments as objects: templates write them with `tojson`, which would quote a string twice."""
    if not isinstance(value, list):
        raise fail_row(
            origin, f"message {number} has tool_calls that are {name_type(value)}", "tool_calls is a list"
        )
    calls: list[dict[str, Any]] = []
    for item in cast("list[Any]", value):
        call = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(
            cast("dict[str, Any]", function).get("name"), str
        ):
            raise fail_row(
                origin,
                f"message {number} has a tool call without a function name",
                "a call names its function",
            )
        named = dict(cast("dict[str, Any]", function))
        if isinstance(named.get("arguments"), str):
            try:
                named["arguments"] = json.loads(named["arguments"] or "{}")
            except json.JSONDecodeError:
                raise fail_row(
                    origin,
                    f"message {number} has tool call arguments that are not JSON",
                    "arguments are an object",
                ) from None
        calls.append(
            {"type": "function", **call, "function": named}
            if "function" in call
            else {"type": "function", "function": named}
        )
    return calls


def parse_tools(value: Any, origin: Origin) -> tuple[Mapping[str, Any], ...]:
    """The `tools` of a row: a list of objects, or the same as a JSON string."""
    if value is None or value == "" or value == []:
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise fail_row(
                origin, "tools is a string that is not JSON", "tools is a list of objects"
            ) from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in cast("list[Any]", value)):
        raise fail_row(origin, f"tools is {name_type(value)}", "tools is a list of objects")
    tools = cast("list[dict[str, Any]]", value)
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def parse_turn(item: Any, number: int, origin: Origin) -> Message:
    """A turn of from and value, or of role and content."""
    turn = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
    if "from" not in turn or "value" not in turn:
        if "role" in turn:
            return parse_message(turn, number, origin)
        raise fail_row(
            origin, f"turn {number} has no from or no value", "a turn is an object with from and value"
        )
    role = _take_role(turn["from"], number, origin)
    text = _take_content(turn["value"], number, origin, may_be_null=False)
    weight = _take_weight(turn, number, origin)
    if turn["from"] == "function_call":
        return Message(role, "", weight, {"content": None, "tool_calls": _read_call(text, number, origin)})
    return Message(role, text, weight)


def _read_call(text: str, number: int, origin: Origin) -> list[dict[str, Any]]:
    """A function_call turn holds one call, or a list of calls, as JSON text."""
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError:
        raise fail_row(
            origin, f"turn {number} is a function_call that is not JSON", "a call is a JSON object"
        ) from None
    return _parse_tool_calls(value if isinstance(value, list) else [value], number, origin)


def take_instruction(row: Mapping[str, Any], origin: Origin) -> list[Message]:
    """The question of an alpaca row: its system text, if any, and one user turn with the input after a blank line."""
    question = take_text(row, "instruction", origin)
    given = take_text(row, "input" if "input" in row else "context", origin, default="")
    system = take_text(row, "system", origin, default="")
    if not question.strip():
        raise fail_row(origin, "the instruction is empty", "an instruction has text")
    messages = [Message("system", system)] if system else []
    return [*messages, Message("user", f"{question}\n\n{given}" if given else question)]


def finish_chat(messages: list[Message], row: Mapping[str, Any], origin: Origin) -> Conversation:
    """Rules that hold for a chat whatever its shape on disk."""
    if not messages:
        raise fail_row(origin, "no messages", "a row has at least a question and an answer")
    check_systems(messages, origin)
    if not any(message.role == "assistant" for message in messages):
        raise fail_row(origin, "no assistant turn", "SFT learns from an assistant answer")
    if messages[-1].role != "assistant":
        raise fail_row(
            origin,
            f"last message is from {messages[-1].role!r}",
            "SFT learns from an assistant answer",
            f"Add one, cut the row after its last answer{OR_SKIP}",
        )
    for number, message in enumerate(messages, 1):
        if message.role == "assistant" and not message.content.strip() and "tool_calls" not in message.extra:
            raise fail_row(
                origin, f"the answer in message {number} is empty", "an answer has text or a tool call"
            )
    check_opening(messages, origin)
    if not any(message.role == "assistant" and message.weight > 0 for message in messages):
        raise fail_row(origin, "every assistant turn has weight 0", "a training row has something to learn")
    return Conversation(
        messages=tuple(messages),
        origin=origin,
        tools=parse_tools(row.get("tools"), origin),
        extra=take_extra(row),
    )


def check_systems(messages: Sequence[Message], origin: Origin) -> None:
    """Raise DataError unless there is at most one system message, at the start."""
    systems = [number for number, message in enumerate(messages, 1) if message.role == "system"]
    if len(systems) > 1:
        raise fail_row(
            origin,
            f"two system messages ({systems[0]} and {systems[1]})",
            "a row has at most one, at its start",
        )
    if systems and systems[0] != 1:
        raise fail_row(origin, f"the system message is number {systems[0]}", "a system message comes first")


def check_opening(messages: Sequence[Message], origin: Origin) -> None:
    """Raise DataError unless a user speaks first, after the system message."""
    first = messages[1] if messages[0].role == "system" and len(messages) > 1 else messages[0]
    if first.role != "user":
        raise fail_row(
            origin,
            f"the conversation opens with {first.role!r}",
            "after an optional system message a user speaks",
        )


def refuse_chat_columns(row: Mapping[str, Any], origin: Origin) -> None:
    """Raise DataError if a row whose prompt is raw text has what only a chat can have."""
    for key in ("system", "tools"):
        if row.get(key):
            raise fail_row(
                origin,
                f"{key} beside a prompt that is raw text",
                f"{key} is of a chat",
                f"Write the prompt as messages{OR_SKIP}",
            )

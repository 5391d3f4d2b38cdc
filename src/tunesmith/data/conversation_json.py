"""Conversations as JSON, in prepared folders and among rows set aside."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.core.types import Conversation, Message, Origin
from tunesmith.data.split import hash_conversation


def conversation_to_json(conversation: Conversation) -> dict[str, Any]:
    """Everything of a conversation, and its hash; other side, label and columns only where there are any."""
    return {
        "hash": hash_conversation(conversation),
        "kind": conversation.kind,
        "messages": _messages_to_json(conversation.messages),
        **({"rejected": _messages_to_json(conversation.rejected)} if conversation.rejected else {}),
        **({"label": conversation.label} if conversation.label is not None else {}),
        **({"columns": conversation.columns, "truth": conversation.truth} if conversation.is_prompt else {}),
        "tools": [dict(tool) for tool in conversation.tools],
        "extra": dict(conversation.extra),
        "origin": dataclasses.asdict(conversation.origin),
    }


def conversation_from_json(value: Mapping[str, Any]) -> Conversation:
    return Conversation(
        messages=tuple(Message(**item) for item in value["messages"]),
        origin=Origin(**value["origin"]),
        kind=value["kind"],
        tools=tuple(value["tools"]),
        extra=value["extra"],
        rejected=tuple(Message(**item) for item in value.get("rejected", ())),
        label=value.get("label"),
        columns=value.get("columns"),
        truth=value.get("truth"),
    )


def describe_conversation(conversation: Conversation) -> dict[str, Any]:
    """The row of a conversation, for people: what a template refused, after its shape was read."""
    value = conversation_to_json(conversation)
    return {key: value[key] for key in value if key not in ("hash", "origin")}


def _messages_to_json(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [
        {"role": m.role, "content": m.content, "weight": m.weight, "extra": dict(m.extra)} for m in messages
    ]

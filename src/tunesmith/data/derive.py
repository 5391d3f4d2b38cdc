"""Prompts made of answered rows, in the same splits: no sealed row becomes a prompt to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tunesmith.core.errors import DataError
from tunesmith.core.fingerprint import hash_rows
from tunesmith.core.jsonl import write_json
from tunesmith.core.types import Conversation, Message, TokenRow
from tunesmith.data.fitting import RenderedSplit
from tunesmith.data.prepare import Prepared, identify_rows, write_split
from tunesmith.data.prompts import Prompt, make_prompt
from tunesmith.data.render import Renderer


def derive_prompts(
    prepared: Prepared, renderer: Renderer, folder: Path, *, splits: Sequence[str] = ("train", "validation")
) -> Prepared:
    """The last question of every answered conversation as a prompt, its answer the truth; in `folder`.

    Raises DataError for plain text, which asks nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = prepared.fingerprints
    fingerprints = {name: known[name] for name in ("template_sha256", "tokenizer_sha256")}
    kept = [name for name in splits if name in prepared.splits]
    for name in kept:
        asked = [ask(conversation) for conversation in prepared.conversations(name)]
        rows = [_render(conversation, renderer) for conversation in asked]
        clusters = prepared.conversation_clusters(name)
        split = RenderedSplit(rows, list(range(len(rows))), asked, clusters)
        fingerprints[f"{name}_sha256"] = hash_rows(identify_rows(split))
        write_split(folder, name, split)
    index = {"schema": 1, "splits": kept, "fingerprints": fingerprints, "rows": "prompts"}
    write_json(folder / "prepared.json", index)
    return Prepared(folder)


def list_prompts(prepared: Prepared, renderer: Renderer, split: str, *, count: int) -> dict[int, Prompt]:
    """What the judge asks: the last question of the first `count` conversations of a split, by their number. Plain text
    asks nothing and is left out."""
    rows = enumerate(prepared.conversations(split)[:count])
    asked = {number: ask(conversation) for number, conversation in rows if conversation.kind != "text"}
    return {
        n: make_prompt(_render(conversation, renderer), conversation) for n, conversation in asked.items()
    }


def ask(conversation: Conversation) -> Conversation:
    """The conversation without its last answer, which becomes the truth."""
    if conversation.kind == "text":
        raise DataError(
            conversation.origin.place,
            "is plain text",
            rule="a prompt ends with a question",
            cure="Give chats, or prompts with a completion",
        )
    truth = conversation.answer
    columns = {**conversation.extra, "answer": truth}
    return replace(conversation, messages=conversation.messages[:-1], truth=truth, columns=columns)


def name_question(conversation: Conversation) -> str:
    """What a conversation asks, in one string: equal questions are equal, however their answers differ."""
    turns: Sequence[Message] = conversation.prompt or conversation.messages
    return "\n".join(
        f"{turn.role}: {' '.join(turn.content.split())}" for turn in turns if turn.role != "system"
    )


def _render(conversation: Conversation, renderer: Renderer) -> TokenRow:
    (row,) = renderer.render_conversation(conversation)
    return row

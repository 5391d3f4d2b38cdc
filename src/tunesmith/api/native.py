"""The native track: raw rows for frameworks' own preprocessing, and what it made of them against our rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tunesmith.api.trainable import load_job_tokenizer
from tunesmith.comparing.native import Rules, TheirRow, compare_rows
from tunesmith.core.checked import read_checked
from tunesmith.core.comparison import native_to_json
from tunesmith.core.errors import DataError, JobError
from tunesmith.core.jsonl import read_jsonl, write_json, write_jsonl
from tunesmith.core.native import NativeTokens
from tunesmith.core.rundir import RunDir
from tunesmith.core.types import Conversation, Message
from tunesmith.data.prepare import Prepared
from tunesmith.data.render import Renderer
from tunesmith.frameworks.handoff import RawRows
from tunesmith.frameworks.port import MAX_RECORD_BYTES, NativePort, check_left
from tunesmith.frameworks.ports import find_port
from tunesmith.job.spec import Job


def check_native(name: str, job: Job, prepared: Prepared, base: Path, *, place: str) -> None:
    """Raise JobError if a framework cannot be told to prepare the training rows as the job says. place: the arm."""
    port = find_port(name)
    if not isinstance(port, NativePort):
        raise JobError(
            f"{place}: compare.track",
            f"{name}'s own preprocessing cannot be compared yet",
            rule="the native track says every setting of it in the framework's words",
            cure="Set compare.track: tokens",
        )
    numbers = prepared.conversation_numbers("train")
    if numbers != list(range(len(prepared.conversations("train")))):
        raise JobError(
            f"{place}: compare.track",
            "the chat template rewrites earlier turns, so that some conversations are several rows of ours",
            rule="the native track holds one row of theirs against one of ours",
            cure="Set compare.track: tokens",
        )
    if reason := port.can_prepare(describe_raw(job, prepared, base, report=Path())):
        raise JobError(
            f"{place}: {reason.key}",
            reason.finding,
            rule="in the native track a framework's own preprocessing does what the job says, or its arm is refused",
            cure=reason.cure,
        )


def describe_raw(job: Job, prepared: Prepared, base: Path, *, report: Path) -> RawRows:
    """The training rows as they were read, written beside the prepared ones, and what a framework is told of them."""
    conversations = prepared.conversations("train")
    path = prepared.folder / f"raw-train-{prepared.fingerprints['train_sha256'][:16]}.jsonl"
    if not path.is_file():
        write_jsonl(path, map(show_raw, conversations))
    kinds = {conversation.kind for conversation in conversations}
    tokenizer = load_job_tokenizer(job, base)
    renderer = Renderer(tokenizer, job.data) if kinds == {"chat"} else None
    ends = {number: text for text, number in tokenizer.added_tokens.items()}
    return RawRows(
        rows=str(path.absolute()),
        kind=conversations[0].kind if len(kinds) == 1 else "several kinds",
        trains=_name_trained(conversations),
        max_tokens=job.data.max_tokens,
        too_long=job.data.too_long,
        bos=(tokenizer.bos_token or "") if tokenizer.adds_bos else "",
        stop_token=tokenizer.eos_token or "",
        template=renderer.template.source if renderer else None,
        end_token=ends.get(renderer.end_token, "") if renderer and renderer.end_token is not None else "",
        system_turn=_render_system(renderer) if renderer else None,
        marks_answers=bool(renderer and renderer.template.marks_generation),
        extras=next(filter(None, map(_name_extras, conversations)), ""),
        report=str(report.absolute()),
    )


def show_raw(conversation: Conversation) -> dict[str, Any]:
    """A row in the plainest shape of its kind, which all frameworks read."""
    if conversation.kind == "text":
        return {"text": conversation.answer}
    if conversation.kind == "completion":
        return {"prompt": conversation.messages[0].content, "completion": conversation.answer}
    row: dict[str, Any] = {
        "messages": [{"role": m.role, "content": m.content} for m in conversation.messages]
    }
    if any(m.role == "assistant" and m.weight <= 0 for m in conversation.messages):
        row["train"] = [m.role == "assistant" and m.weight > 0 for m in conversation.messages]
    return row


def _render_system(renderer: Renderer) -> str | None:
    try:
        return renderer.render_prompt_text([Message("system", "{{content}}")])
    except DataError:
        return None


def _name_trained(
    conversations: Sequence[Conversation],
) -> Literal["the answer", "all answers", "last answer", "some answers", "everything"]:
    if conversations[0].kind == "text":
        return "everything"
    weights = [[m.weight > 0 for m in c.messages if m.role == "assistant"] for c in conversations]
    if all(len(row) == 1 for row in weights):
        return "the answer"
    if all(all(row) for row in weights):
        return "all answers"
    return "last answer" if all(row[-1] and not any(row[:-1]) for row in weights) else "some answers"


def _name_extras(conversation: Conversation) -> str:
    if conversation.tools:
        return "tools"
    fields = (name for message in conversation.messages for name in message.extra)
    return next((f"{name!r} in a message" for name in fields), "")


def compare_native(
    run: RunDir, arm: str, framework: str, job: Job, prepared: Prepared, base: Path
) -> NativeTokens:
    """Hold what a framework's parity run made of the raw rows against ours; written to the arm's `native.json`.

    Raises ArmFailed if it left no rows, DataError if they are malformed.
    """
    folder = run.parity_run(arm, "parity")
    path, log = folder.made, folder.root / f"{arm}-parity.log"
    # Two numbers a token, of ten digits at most; twice that.
    limit = MAX_RECORD_BYTES + 48 * sum(prepared.rows("train").lengths)
    what = f"account of what {framework}'s preprocessing made of the rows"
    check_left(path, what=what, label=arm, log=log, max_bytes=limit)
    lines = (
        read_checked(TheirRow, value, place=f"{path.name}:{number}") for number, value in read_jsonl(path)
    )
    tokenizer = load_job_tokenizer(job, base)
    rules = Rules(
        stop_ids=Renderer(tokenizer, job.data).stop_ids,
        bos_id=tokenizer.bos_id,
        max_tokens=job.data.max_tokens,
        decode=tokenizer.decode,
    )
    found = compare_rows(framework, prepared.rows("train"), {line.row: line for line in lines}, rules)
    if not job.compare.samples:
        found = found.without_examples()
    write_json(run.native(arm), native_to_json(found))
    return found

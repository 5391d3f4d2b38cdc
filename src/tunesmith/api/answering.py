"""Answers of another model to prompts, as rows to learn from: distillation from text alone, by any endpoint.

The file of answers only grows, a whole line at a time, so that a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunesmith.core.errors import DataError, RunDirError, SetupError
from tunesmith.core.events import Event, OnEvent, ignore_event
from tunesmith.core.fingerprint import hash_json
from tunesmith.core.jsonl import OR_SKIP, dump_json, read_json, read_jsonl, write_json
from tunesmith.core.quantities import format_number
from tunesmith.core.rundir import as_rundir_error
from tunesmith.core.types import Conversation
from tunesmith.data.checks import SourceFacts
from tunesmith.data.collect import Rejects, read_conversations
from tunesmith.data.sources import find_sources
from tunesmith.infer.endpoint import Endpoint, Reply, Status, ask_all
from tunesmith.job.spec import SourceSpec

# So many refused requests without any answer are a wrong setting, not a matter of prompts.
_REFUSED_AT_FIRST = 5
_NAMED_ROWS = 3


@dataclass(slots=True)
class Answered:
    """What `answer_prompts` did. kept: answers that were there before. counts: of the prompts asked now, by status."""

    out: str
    prompts: int
    kept: int
    counts: dict[Status, int]
    prompt_tokens: int = 0
    answer_tokens: int = 0
    wall_seconds: float = 0.0
    warnings: list[str] = field(default_factory=list[str])

    def to_json(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        counts = own.pop("counts")
        return {"schema": 1, **own, **counts}


def answer_prompts(
    prompts: str | Path,
    *,
    endpoint: str,
    model: str,
    out: str | Path,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    parallel: int = 8,
    timeout: float = 120.0,
    key_name: str = "OPENAI_API_KEY",
    on_bad_row: Literal["refuse", "skip"] = "refuse",
    fresh: bool = False,
    on_event: OnEvent = ignore_event,
) -> Answered:
    """Let `model` behind `endpoint` answer every prompt, and append rows of `messages` to `out`, ready for SFT.

    prompts:  rows as GRPO and PPO take them; of rows with an answer, what comes before it.
    endpoint: base URL of an API of OpenAI's shape. key_name: environment variable with its key.
    system:   in front of prompts that have no system message of their own; it becomes part of the row.
    max_tokens, temperature: left to the endpoint if not given. timeout: seconds, of one attempt.
    Answers that were cut by the limit, empty or refused are counted, left out, and asked for again next time.
    Raises DataError, SetupError, RunDirError and EndpointFailed in one line.
    """
    asked = Endpoint(endpoint, model, key_name=key_name, parallel=parallel, timeout_seconds=timeout)
    options = {"max_tokens": max_tokens, "temperature": temperature}
    options = {name: value for name, value in options.items() if value is not None}
    started, path = time.perf_counter(), Path(out)
    rejects = Rejects(None, collect=on_bad_row == "skip")
    rows = [_begin_row(conversation, system) for conversation in _read_prompts(str(prompts), rejects)]
    if not rows:
        raise DataError(
            str(prompts),
            f"all {len(rejects.rows)} rows are bad",
            rule="there is something to ask",
            cure=f"The first: {rejects.rows[0]['reason']}",
        )
    settings = {"endpoint": asked.address, "model": model, "system": system, **options}
    with _open_answers(path, settings, fresh=fresh) as append:
        left = _leave_out(rows, path)
        result = Answered(str(path), len(rows), len(rows) - len(left), dict.fromkeys(_STATUSES, 0))
        if rejects.rows:
            skipped = f"{format_number(len(rejects.rows), 'bad row')} skipped"
            result.warnings.append(f"{skipped}, the first: {rejects.rows[0]['reason']}")
        _ask(asked, left, options, result, append, on_event)
    result.wall_seconds = time.perf_counter() - started
    for text in result.warnings:
        on_event(Event("warning", text=text))
    return result


_STATUSES: tuple[Status, ...] = ("answered", "cut", "empty", "refused")
_SAID: dict[Status, str] = {
    "cut": "cut by the limit of tokens and left out",
    "empty": "empty and left out",
    "refused": "refused",
}


@dataclass(frozen=True, slots=True)
class _Row:
    """messages: what is asked. extra: what else the row of the answer has."""

    place: str
    messages: list[dict[str, Any]]
    extra: Mapping[str, Any]

    @property
    def key(self) -> str:
        return _hash_prompt(self.messages)


def _read_prompts(name: str, rejects: Rejects) -> Generator[Conversation]:
    found = find_sources(SourceSpec(path=name))
    if "train" not in found:
        raise DataError(name, "no train split", rule="prompts come from a split named train")
    facts = SourceFacts(name=name, split="train", format="auto")
    for conversation in read_conversations(found["train"], rejects, facts, kind="prompts"):
        if conversation.tools or any("tool_calls" in m.extra for m in conversation.messages):
            error = DataError(
                conversation.origin.place,
                "uses tools",
                rule="endpoints are asked for text",
                cure=f"Remove the row{OR_SKIP}",
            )
            if not rejects.collect:
                raise error
            rejects.add(conversation.origin, {}, error)
            continue
        yield conversation


def _begin_row(conversation: Conversation, system: str | None) -> _Row:
    messages: list[dict[str, Any]] = [{"role": m.role, "content": m.content} for m in conversation.messages]
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return _Row(conversation.origin.place, messages, conversation.extra)


def _finish_row(row: _Row, answer: str) -> dict[str, Any]:
    """The row to learn from. Earlier answers of the conversation are not the asked model's, and not trained."""
    before = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in row.messages]
    return {"messages": [*before, {"role": "assistant", "content": answer}], **row.extra}


def _hash_prompt(messages: Sequence[Mapping[str, Any]]) -> str:
    return hash_json([[message["role"], message["content"]] for message in messages])


def _leave_out(rows: Sequence[_Row], path: Path) -> list[_Row]:
    """Rows without those that `path` has answers to; a prompt that comes twice is answered twice."""
    done: Counter[str] = Counter()
    for number, value in read_jsonl(path):
        try:
            done[_hash_prompt(value["messages"][:-1])] += 1
        except (LookupError, TypeError):
            raise RunDirError(
                f"{path}:{number}", "is no row of answers", cure="Repair it, or --fresh to start over"
            ) from None
    left: list[_Row] = []
    for row in rows:
        if done[row.key]:
            done[row.key] -= 1
        else:
            left.append(row)
    return left


def _ask(
    endpoint: Endpoint,
    rows: Sequence[_Row],
    options: Mapping[str, Any],
    result: Answered,
    append: Callable[[str], None],
    on_event: OnEvent,
) -> None:
    """Ask for all rows, append the answers, count."""
    places: dict[Status, list[str]] = {status: [] for status in _STATUSES}

    def tell() -> None:
        done = result.kept + sum(result.counts.values())
        on_event(Event("progress", text=f"asking {endpoint.model}", done=done, total=result.prompts))

    tell()
    chats = [row.messages for row in rows]
    with closing(ask_all(endpoint, chats, options=options)) as replies:
        for number, reply in replies:
            row = rows[number]
            if reply.status == "answered":
                append(dump_json(_finish_row(row, reply.text)) + "\n")
            result.counts[reply.status] += 1
            result.prompt_tokens += reply.prompt_tokens
            result.answer_tokens += reply.answer_tokens
            places[reply.status].append(row.place + (f" ({reply.reason})" if reply.reason else ""))
            tell()
            _refuse_only_refusals(endpoint, reply, result)
    for status, said in _SAID.items():
        if count := result.counts[status]:
            named = ", ".join(places[status][:_NAMED_ROWS])
            more = f" and {count - _NAMED_ROWS} more" if count > _NAMED_ROWS else ""
            result.warnings.append(f"{format_number(count, 'answer')} {said}: {named}{more}")


def _refuse_only_refusals(endpoint: Endpoint, reply: Reply, result: Answered) -> None:
    """Raise SetupError when nothing but refusals has come: every further request would be paid for nothing."""
    others = result.kept + sum(result.counts.values()) - result.counts["refused"]
    if not others and result.counts["refused"] == _REFUSED_AT_FIRST:
        raise SetupError(
            endpoint.url,
            f"refuses the first {_REFUSED_AT_FIRST} requests ({reply.reason})",
            cure="Check model and options",
        )


@contextmanager
def _open_answers(
    path: Path, settings: Mapping[str, Any], *, fresh: bool
) -> Generator[Callable[[str], None]]:
    """A function that appends text to `path`, which no one else writes to meanwhile.

    What the answers came from lies beside them and must stay the same. Half a line at the end, left when the machine
    went down, is cut off. Raises RunDirError.
    """
    beside = path.with_name(f"{path.name}.meta")
    if path.suffix != ".jsonl":
        raise RunDirError(
            str(path), "is no .jsonl file", rule="answers are rows, one a line", cure="Give --out FILE.jsonl"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size and not beside.is_file():
            cure = "Give another --out"
            raise RunDirError(
                str(path), "holds no answers of ours", rule="answers have a file of their own", cure=cure
            )
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise as_rundir_error(error, path) from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            cure = "Wait, or give another --out"
            raise RunDirError(str(path), "in use by another process", cure=cure) from None
        if fresh:
            os.ftruncate(file, 0)
        elif beside.is_file() and path.stat().st_size:
            _refuse_other_settings(path, read_json(beside), settings)
        write_json(beside, dict(settings))
        _cut_half_line(path, file)
        yield lambda text: _append(file, text.encode())
        os.fsync(file)
    except OSError as error:
        raise as_rundir_error(error, path) from None
    finally:
        os.close(file)


def _append(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _cut_half_line(path: Path, file: int) -> None:
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.ftruncate(file, path.read_bytes().rfind(b"\n") + 1)


def _refuse_other_settings(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            raise RunDirError(
                str(path),
                f"was begun with {key}={before.get(key)!r}, not {now.get(key)!r}",
                rule="a file holds answers of one kind",
                cure="Give another --out, or --fresh to start over",
            )

"""`tunesmith check`: everything that preparing a job's data would find, and of a stream what one pass over it tells."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tunesmith.core.types import Conversation, TokenRow
from tunesmith.data.checks import (
    CheckReport,
    Finding,
    Overlap,
    count_rows,
    find_special_tokens,
    measure_lengths,
    ngrams_of,
    question_of,
)
from tunesmith.data.collect import Rejects
from tunesmith.data.fitting import RenderedSplit
from tunesmith.data.prepare import HasData, conclude, read_splits
from tunesmith.data.render import Renderer
from tunesmith.data.split import NearIndex, hash_conversation
from tunesmith.data.stream import open_stream
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.job.objective import RowKind
from tunesmith.job.spec import DataSpec


def check(
    job: HasData,
    *,
    tokenizer: Tokenizer,
    on_bad_row: Literal["refuse", "skip"] = "refuse",
    rejects: Path | None = None,
    rows: RowKind = "answers",
) -> CheckReport:
    """Everything `prepare_data` would find, without writing a prepared folder. A streaming job's rows are all read.

    rejects: where skipped rows go (default: nowhere; they are counted).
    rows: what the job's objective learns from.
    """
    collected = Rejects(rejects, collect=on_bad_row == "skip")
    renderer = Renderer(tokenizer, job.data)
    report, rendered = read_splits(job.data, renderer, collected, rows)
    if job.data.streaming:
        _survey_stream(job.data, renderer, report, rendered, collected)
    collected.write()
    return report


def first_rows(data: DataSpec, tokenizer: Tokenizer, count: int, rejects: Rejects) -> list[TokenRow]:
    """The first rows of a stream in the order of its files."""
    stream = open_stream(_in_order(data), tokenizer=tokenizer, rejects=rejects)
    return list(itertools.islice(stream.rows(), count))


def _in_order(data: DataSpec) -> DataSpec:
    return data.model_copy(update={"shuffle_window": 1})


def _survey_stream(
    data: DataSpec,
    renderer: Renderer,
    report: CheckReport,
    rendered: dict[str, RenderedSplit],
    rejects: Rejects,
) -> None:
    """Add the streamed training rows to a report; near-duplicates are looked for among held-out rows only."""
    stream = open_stream(_in_order(data), tokenizer=renderer.tokenizer, rejects=rejects)
    stream.renderer = renderer
    meetings = {name: _Meeting(split.conversations) for name, split in rendered.items()}
    num_special = 0

    def look(conversation: Conversation) -> None:
        nonlocal num_special
        num_special += find_special_tokens([conversation], renderer)
        for meeting in meetings.values():
            meeting.look(conversation)

    stream.look = look
    for row in stream.rows():
        count_rows(stream.facts, [row], stop_ids=renderer.stop_ids)
    stream.facts.length_percentiles = measure_lengths(stream.lengths)
    report.splits = {"train": stream.facts} | {name: report.splits[name] for name in rendered}
    report.sources = [*stream.sources, *report.sources]
    report.counts["rows_with_special_tokens"] = report.counts.get("rows_with_special_tokens", 0) + num_special
    report.overlap = {name: meeting.count() for name, meeting in meetings.items()}
    conclude(report, renderer, rejects)
    if not stream.facts.num_rows:
        message = f"train: none of its rows can be used; a row has at most {data.max_tokens} tokens"
        report.findings.insert(0, Finding("error", "no_rows", message, split="train"))
    message = "train is streamed: near-duplicates within it were not looked for"
    report.findings.append(Finding("note", "streamed", message, split="train"))


class _Meeting:
    """Which rows of a held-out split a stream has met: equal, with the same question, near, or sharing words."""

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self._num_rows = len(conversations)
        self._near_index = NearIndex(conversations)
        self._by_hash, self._by_question = dict[str, list[int]](), dict[str, list[int]]()
        self._by_gram = dict[int, list[int]]()
        for number, conversation in enumerate(conversations):
            self._by_hash.setdefault(hash_conversation(conversation), []).append(number)
            self._by_question.setdefault(question_of(conversation), []).append(number)
            for gram in ngrams_of(conversation):
                self._by_gram.setdefault(gram, []).append(number)
        self._exact, self._asked, self._near, self._shared = set[int](), set[int](), set[int](), set[int]()

    def look(self, conversation: Conversation) -> None:
        self._exact.update(self._by_hash.get(hash_conversation(conversation), ()))
        self._asked.update(self._by_question.get(question_of(conversation), ()))
        self._near.update(self._near_index.find(conversation))
        for gram in self._by_gram.keys() & ngrams_of(conversation):
            self._shared.update(self._by_gram[gram])

    def count(self) -> Overlap:
        return Overlap(
            num_rows=self._num_rows,
            num_exact=len(self._exact),
            num_same_question=len(self._asked),
            num_near=len(self._near),
            num_shared_13grams=len(self._shared),
        )

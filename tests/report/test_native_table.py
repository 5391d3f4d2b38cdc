"""What frameworks make of the rows by themselves has a table of its own, and only in the native track."""

from __future__ import annotations

from dataclasses import replace

from tunesmith.core.comparison import Comparison
from tunesmith.core.native import NativeExample, NativeKind, NativeTokens
from tunesmith.core.rundir import RunDir
from tunesmith.job.spec import Job
from tunesmith.report.page import build_page

Example = tuple[RunDir, Job, Comparison]
FOUND = NativeTokens(
    "trl", 400, 100, 9000, 9812, 4000, 4812,
    [NativeKind("trained template", "Template trained", 300, 812, [NativeExample("a.jsonl:7", 31, "", "\n<b>")])],
    "trl trains 812 more tokens; 300 of 400 rows differ: it trains 812 tokens after the answers",
)  # fmt: skip


def test_it_counts_each_kind_and_shows_where(example: Example) -> None:
    run, _, comparison = example
    page = build_page(run, replace(comparison, native={"lora": FOUND}))

    for text in (
        "lora: 100 of 400 rows as ours",
        FOUND.says,
        '<th scope="row">Template trained</th><td>300</td><td>812</td>',
        "a.jsonl:7, token 31: <code></code> | <code>⏎&lt;b&gt;</code>",
    ):
        assert text in page


def test_without_samples_it_counts_and_quotes_nothing(example: Example) -> None:
    run, _, comparison = example
    job = comparison.record["job"]
    record = comparison.record | {"job": {**job, "compare": {**job["compare"], "samples": False}}}
    page = build_page(run, replace(comparison, record=record, native={"lora": FOUND.without_examples()}))

    assert '<th scope="row">Template trained</th><td>300</td><td>812</td></tr>' in page
    assert "Where, ours, theirs" not in page
    assert "a.jsonl:7" not in page


def test_without_the_native_track_there_is_none(example: Example) -> None:
    run, _, comparison = example

    assert '<section id="native">' not in build_page(run, comparison)

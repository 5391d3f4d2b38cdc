"""Scoring any model on any rows: where the scores go, and what is never overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tunesmith
from tunesmith.core.errors import DataError, RunDirError
from tunesmith.core.events import Event
from tunesmith.core.jsonl import read_jsonl
from tunesmith.core.rundir import RunDir


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Four good rows and, third, a bad one."""
    lines = [json.dumps({"prompt": f"Count to {n}:", "completion": f" {n}"}) for n in range(4)]
    lines.insert(2, '{"prompt": "no completion", "completion": null}')
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_bad_rows_are_refused_or_set_aside(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:3: .*--on-bad-row skip"):
        tunesmith.evaluate("tunesmith/tiny", data=rows, generate=False)
    events: list[Event] = []
    out = tmp_path / "scores"
    record = tunesmith.evaluate(
        "tunesmith/tiny", data=rows, out=out, generate=False, on_bad_row="skip", on_event=events.append
    )
    assert record.num_rows == 4
    assert [row["place"] for _, row in read_jsonl(out / "rejected_rows.jsonl")] == ["rows.jsonl:3"]
    assert len(list(read_jsonl(out / "answers.jsonl"))) == 4
    assert [e.text for e in events if e.kind == "warning" and "1 bad row skipped" in e.text]
    assert [row.place for row in tunesmith.preview(
        {"model": "tunesmith/tiny", "data": {"train": str(rows), "split": {"validation": 0.0, "test": 0.0}}},
        rows=3, on_bad_row="skip",
    )] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:4"]  # fmt: skip


def test_scores_never_replace_what_a_run_holds(rows: Path, tmp_path: Path) -> None:
    job = {
        "model": "tunesmith/tiny",
        "data": {"train": "tunesmith/tickets"},
        "method": {"name": "lora", "rank": 4},
        "train": {"steps": 1, "evaluate_every": "never", "learning_rate": 1e-3},
    }
    run = tmp_path / "run"
    tunesmith.train(job, out=run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(RunDirError, match=rf"{run}: holds a run, .* such as {run}/eval"):
        tunesmith.evaluate(run, data=rows, out=run, generate=False, on_bad_row="skip")
    assert before == {path: path.read_bytes() for path in before}
    for _ in range(2):  # into a place of its own, as often as wanted
        tunesmith.evaluate(run, data=rows, out=run / "eval", generate=False, on_bad_row="skip")
    assert before == {path: path.read_bytes() for path in before}
    assert not (run / "eval" / "prepared").exists()
    with RunDir(run / "eval").lock(), pytest.raises(RunDirError, match="in use by process"):
        tunesmith.evaluate(run, data=rows, out=run / "eval", generate=False, on_bad_row="skip")

"""`check` and `preview` of a job that learns from preferences, from the job file to what is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.api.opening import open_base
from tunesmith.api.trainable import load_job_tokenizer, training_lengths
from tunesmith.core.errors import DataError, JobError
from tunesmith.data.prepare import prepare_data
from tunesmith.data.preview import LabelledPreview, PairPreview
from tunesmith.job.load import job_from

WORDS = "river stone lamp green quiet seven table cloud paper bread horse winter".split()


@pytest.fixture
def make_job(tmp_path: Path) -> Any:
    """A job over 12 pairs."""
    rows = [
        {"instruction": f"{w} {w[::-1]} {n * 7919}?", "chosen": f"yes {w}", "rejected": f"no {w} at all"}
        for n, w in enumerate(WORDS)
    ]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows))

    def make(objective: Any, **data: Any) -> dict[str, Any]:
        return {"model": "tunesmith/tiny", "data": {"train": str(path), **data}, "objective": objective}

    return make


def test_check_and_preview_of_pairs(make_job: Any) -> None:
    job = make_job({"name": "dpo", "beta": 0.2})
    report = tunesmith.check(job)
    assert {name: facts.num_examples for name, facts in report.preferences.items()} == {
        "train": 10,
        "validation": 1,
        "test": 1,
    }
    assert report.preferences["train"].num_chosen_shorter == 10
    shown = tunesmith.preview(job, rows=2)
    assert len(shown) == 2
    for pair in shown:
        assert isinstance(pair, PairPreview)
        assert {kind for _, kind in pair.prompt} == {"masked"}
        assert pair.chosen.segments[0].text.startswith("yes ")
        assert pair.rejected.segments[0].text.startswith("no ")
        assert [kind for _, kind in pair.chosen.segments] == ["trained", "stop"]


def test_check_and_preview_of_the_same_pairs_for_labels(make_job: Any) -> None:
    job = make_job("kto")
    report = tunesmith.check(job)
    assert report.preferences["train"].num_answers == {"desirable": 10, "undesirable": 10}
    assert "unpaired" in {finding.code for finding in report.findings}
    shown = tunesmith.preview(job, rows=2)
    assert [item.label for item in shown if isinstance(item, LabelledPreview)] == [True, False]


def test_pairs_are_refused_without_an_objective_for_them(make_job: Any) -> None:
    for look in (tunesmith.check, tunesmith.preview):
        with pytest.raises(
            DataError, match=r"pairs\.json: its rows are chosen and rejected.* Set objective: dpo"
        ):
            look(make_job("sft"))


def test_preferences_are_not_streamed(make_job: Any) -> None:
    with pytest.raises(
        JobError, match=r"data\.streaming is of objectives sft and distill; dpo reads its rows whole"
    ):
        tunesmith.check(make_job("dpo", streaming=True, split={"validation": 0.0, "test": 0.0}))


def test_a_plan_counts_pairs_with_the_tokens_of_both_rows(make_job: Any, tmp_path: Path) -> None:
    job = job_from(make_job("dpo"))
    tokenizer = load_job_tokenizer(job, open_base(job).folder)
    prepared = prepare_data(job, tokenizer=tokenizer, folder=tmp_path / "prepared", rows="pairs")
    lengths = training_lengths(job, prepared)
    rows = prepared.rows("train").lengths
    assert list(lengths) == [a + b for a, b in zip(rows[::2], rows[1::2], strict=True)]
    assert len(lengths) == 10

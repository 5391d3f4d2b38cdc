"""Whether a training repays compiling follows from its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.api.devices import _count_tokens, compiles
from tunesmith.core.bundled import bundled_path
from tunesmith.data.prepare import prepare_data
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.job.load import job_from
from tunesmith.models.load import load_model


@pytest.mark.parametrize(
    ("train", "expected"),
    [({"epochs": 1}, False), ({"epochs": 1e10}, True), ({"steps": 10}, False), ({"steps": 10**9}, True)],
)
def test_only_long_trainings_are_compiled(tmp_path: Path, train: dict[str, Any], expected: bool) -> None:
    folder = bundled_path("tunesmith/tiny")
    assert folder is not None
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"prompt": "Say one.", "completion": "one"}\n{"prompt": "Say two.", "completion": "two"}\n'
    )
    job = job_from(
        {
            "model": str(folder),
            "data": {"train": str(rows), "split": {"validation": 0, "test": 0}},
            "method": "lora",
            "train": train,
        }
    )
    prepared = prepare_data(
        job, tokenizer=load_tokenizer(folder), folder=tmp_path / "out", on_bad_row="refuse"
    )
    values = sum(p.in_features * p.out_features for p in load_model(folder).projections())
    assert compiles(job, values, _count_tokens(job, prepared)) is expected

"""Look at data before training, without torch."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tunesmith.api.opening import note_long_rows, open_base, open_job
from tunesmith.api.trainable import load_job_tokenizer
from tunesmith.comparing.plan import plan_arms
from tunesmith.data.checks import CheckReport
from tunesmith.data.collect import Rejects
from tunesmith.data.prepare import prepare_data
from tunesmith.data.preview import PairPreview, RowPreview, preview_prompts, preview_rows
from tunesmith.data.survey import check as check_data
from tunesmith.data.survey import first_rows
from tunesmith.job.load import job_from
from tunesmith.job.objective import kind_of_rows
from tunesmith.job.spec import CompareSpec, Job


def check(job: Job | Mapping[str, Any], *, on_bad_row: Literal["refuse", "skip"] = "refuse") -> CheckReport:
    """Counts, lengths, losses by truncation, duplicates, leaks and masks of a job's data. Writes nothing.

    Arms other than the default ones are looked at too; a job for `train` alone names none.
    """
    job = job if isinstance(job, Job) else job_from(job)
    base = open_job(job, plan_arms(job) if job.compare.arms != CompareSpec().arms else ())
    report = check_data(
        job,
        tokenizer=load_job_tokenizer(job, base.folder),
        on_bad_row=on_bad_row,
        rows=kind_of_rows(job.objective),
    )
    note_long_rows(report, job, base)
    return report


def preview(
    job: Job | Mapping[str, Any],
    *,
    rows: int = 3,
    split: Literal["train", "validation"] = "train",
    on_bad_row: Literal["refuse", "skip"] = "refuse",
) -> list[RowPreview | PairPreview]:
    """The first rows of a split as they are trained: text in pieces, each trained, masked or stop. Of a pair the prompt
    once; of a prompt its truth, too."""
    job = job if isinstance(job, Job) else job_from(job)
    tokenizer = load_job_tokenizer(job, open_base(job).folder)
    if job.data.streaming and split == "train":
        rejects = Rejects(None, collect=on_bad_row == "skip")
        return preview_rows(first_rows(job.data, tokenizer, rows, rejects), tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "prepared"
        prepared = prepare_data(
            job, tokenizer=tokenizer, folder=folder, on_bad_row=on_bad_row, rows=kind_of_rows(job.objective)
        )
        if prepared.kind == "prompts":
            return preview_prompts(prepared.prompts(split)[:rows], tokenizer)
        return preview_rows(prepared.examples(split)[:rows], tokenizer)

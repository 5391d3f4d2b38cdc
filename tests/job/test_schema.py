"""Schema and reference page come from the spec and cannot drift from it."""

from __future__ import annotations

from pathlib import Path

import jsonschema

from tunesmith.job.load import load_job
from tunesmith.job.schema import EXAMPLE_JOB, job_reference, job_schema
from tunesmith.job.spec import Job

DOCS = Path(__file__).parents[2] / "docs"


def test_the_example_is_a_valid_job_under_both_readers(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(EXAMPLE_JOB)
    job = load_job(tmp_path / "job.yaml")
    jsonschema.Draft202012Validator(job_schema()).validate(job.model_dump(mode="json"))


def test_editors_refuse_what_we_refuse() -> None:
    validator = jsonschema.Draft202012Validator(job_schema())
    assert list(validator.iter_errors({"model": "m", "data": {"train": "t"}, "trian": {}}))


def test_every_key_is_documented() -> None:
    schema = Job.model_json_schema()
    silent = [
        f"{name}.{key}"
        for name, definition in {**schema["$defs"], "Job": schema}.items()
        for key, node in definition.get("properties", {}).items()
        if "description" not in node
    ]
    assert silent == []


def test_the_reference_page_is_current() -> None:
    assert (DOCS / "job-file.md").read_text() == job_reference(), (
        "run: tunesmith schema --markdown > docs/job-file.md"
    )

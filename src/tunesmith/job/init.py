"""The job file that `tunesmith init` writes."""

from __future__ import annotations

from pathlib import Path

from tunesmith.core.errors import JobError
from tunesmith.core.jsonl import write_bytes_atomic, write_json
from tunesmith.job.schema import EXAMPLE_JOB, job_schema

SCHEMA_FILE = "tunesmith.schema.json"


def write_example_job(path: Path, *, model: str | None = None, data: str | None = None) -> None:
    """Write a commented job file and, beside it, the schema that its first line names. Never overwrites a job."""
    if path.exists():
        raise JobError(str(path), "exists already", rule="init never overwrites", cure="Give another name")
    text = EXAMPLE_JOB
    if model:
        text = text.replace("tunesmith/tiny              # bundled; or a folder, or a hub id", _quote(model))
    if data:
        text = text.replace(
            "tunesmith/tickets         # bundled; or a file, folder, glob or hub id; a list mixes sources",
            _quote(data),
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path.parent / SCHEMA_FILE, job_schema())
        write_bytes_atomic(path, text.encode())
    except OSError as error:
        raise JobError(
            str(path), f"cannot be written ({error.strerror or error})", cure="Give another name or folder"
        ) from None


def _quote(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"

"""The job file of an import: each key with the place that its value comes from."""

# pyright: standard
# Untyped values of YAML pass through here; strict would only ask for casts.

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.core.errors import JobError
from tunesmith.core.jsonl import write_bytes_atomic, write_json
from tunesmith.job.importing.engine import Import
from tunesmith.job.init import SCHEMA_FILE
from tunesmith.job.schema import job_schema

_COLUMN = 48


def job_text(made: Import) -> str:
    """The job as YAML with comments. made: an import with a job."""
    assert made.job is not None
    title = f"{made.framework.title} (what it does not say: defaults of {made.framework.version})"
    lines = [
        f"# yaml-language-server: $schema=./{SCHEMA_FILE}",
        f"# Made by `tunesmith import` from {_plain(str(made.file))}, a configuration of {title}.",
    ]
    if made.not_supported:
        lines.append(
            f"# NOT SUPPORTED ({len(made.not_supported)}), so this job trains something else in these points:"
        )
        lines += [f"#   {_plain(_told(entry))}" for entry in made.not_supported]
    lines += _lines(made.job, made.origins, "", 0)
    return "\n".join(lines) + "\n"


def write_job(made: Import, path: Path) -> None:
    """Write the job, and the schema that its first line names, beside it. Never overwrites a file."""
    if path.exists():
        raise JobError(
            str(path), "exists already", rule="import never overwrites", cure="Name another with --out"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path.parent / SCHEMA_FILE, job_schema())
        write_bytes_atomic(path, job_text(made).encode())
    except OSError as error:
        raise JobError(
            str(path), f"cannot be written ({error.strerror or error})", cure="Give another name or folder"
        ) from None


def _told(entry: Any) -> str:
    where = f"{entry.place} " if entry.place else "default: "
    return f"{where}{entry.key}: {entry.remark}"


def _lines(node: Mapping[str, Any], origins: Mapping[str, str], path: str, depth: int) -> list[str]:
    lines: list[str] = []
    for key, value in node.items():
        target, head = path + key, "  " * depth + f"{key}:"
        section: dict[str, Any] = value if isinstance(value, dict) and target not in origins else {}
        text = head if section else f"{head} {_flow(value)}"
        origin = _plain(origins.get(target, ""))
        listed = isinstance(value, list) and any(isinstance(item, dict) for item in value)
        text = head if listed else text
        lines.append(f"{text.ljust(_COLUMN)} # {origin}" if origin else text)
        if listed:
            lines += [f"{'  ' * (depth + 1)}- {_flow(item)}" for item in value]
        elif section:
            lines += _lines(section, origins, target + ".", depth + 1)
    return lines


def _flow(value: Any) -> str:
    """A value on one line. JSON is YAML; bare words are left bare."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return json.dumps(value, ensure_ascii=True)


def _plain(text: str) -> str:
    """On one line, and without characters that end a comment or drive a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))

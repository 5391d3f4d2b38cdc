"""Where rows come from, as every framework's table says it to `data.train`."""

# pyright: standard
# Untyped values of YAML pass through here; strict would only ask for casts.

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunesmith.core.bundled import BUNDLED
from tunesmith.job.importing.rules import NotSupported

_BUCKETS = ("s3://", "gs://", "gcs://", "az://", "abfs://", "oci://", "https://", "http://")
PREFERENCES = "learning from preferences or rewards is not part of a job yet; only supervised fine-tuning is"


def source(
    path: str,
    *,
    split: str | None = None,
    format: str | None = None,  # noqa: A002 - the job's own word
    revision: str | None = None,
    weight: float | None = None,
) -> str | dict[str, Any]:
    """One source as a job writes it; a bare path where nothing else is said."""
    if path.startswith(_BUCKETS):
        raise NotSupported(f"rows at {path}: download them and name the file", fatal=True)
    if split and path not in BUNDLED:
        path = f"{path}:{split.partition('[')[0]}"
    more = {"format": format, "revision": revision, "weight": weight if weight != 1 else None}
    kept = {key: value for key, value in more.items() if value is not None}
    return {"path": path, **kept} if kept else path


def mixed(sources: list[str | dict[str, Any]]) -> Any:
    """A list of sources, or the only one."""
    return sources[0] if len(sources) == 1 else sources


def is_file(path: str) -> bool:
    return path.endswith((".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt"))


def count_rows(path: Path) -> int | None:
    """Rows of a .jsonl or .json file; None of anything else, or larger than 256 MB."""
    try:
        if path.suffix not in (".jsonl", ".json") or path.stat().st_size > 1 << 28:
            return None
        if path.suffix == ".json":
            rows = json.loads(path.read_bytes())
            return len(rows) if isinstance(rows, list) else None
        with path.open("rb") as file:
            return sum(bool(line.strip()) for line in file)
    except (OSError, ValueError, RecursionError):
        return None


def shape_of_file(path: Path | None) -> str | None:
    """`messages`, `sharegpt`, `prompt_completion`, `alpaca`, `text` by the keys of a file's first row; else None."""
    if path is None or path.suffix not in (".jsonl", ".json") or not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                row = json.loads(file.readline(1 << 20))
            else:
                row = json.loads(file.read(1 << 24))[0]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    for key, shape in (("messages", "messages"), ("conversations", "sharegpt"), ("text", "text")):
        if key in row:
            return shape
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    return "alpaca" if "instruction" in row else None

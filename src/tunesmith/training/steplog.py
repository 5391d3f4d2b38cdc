"""`steps.jsonl`: one StepRecord a line, on disk as it happens, cut back exactly when a run continues."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tunesmith.core.jsonl import dump_json, write_bytes_atomic
from tunesmith.core.records import StepRecord
from tunesmith.core.rundir import as_rundir_error


class StepLog:
    """Appends to the log, keeping what it holds up to `last_step` and nothing after it.

    A run that died after its last checkpoint has logged steps that will be taken again; none may appear twice. A line
    cut off by a crash goes too.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        self._path = path
        try:
            write_bytes_atomic(path, b"".join(_lines_up_to(path, last_step)))
            self._handle = path.open("ab", buffering=0)
        except OSError as error:
            raise as_rundir_error(error, path) from None

    def append(self, record: StepRecord) -> None:
        try:
            self._handle.write((dump_json(record.to_json()) + "\n").encode())
        except OSError as error:
            raise as_rundir_error(error, self._path) from None

    def flush_to_disk(self) -> None:
        """Make all lines durable; called before a checkpoint that counts on them."""
        try:
            os.fsync(self._handle.fileno())
        except OSError as error:
            raise as_rundir_error(error, self._path) from None

    def close(self) -> None:
        self._handle.close()


def _lines_up_to(path: Path, last_step: int) -> list[bytes]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            break
        if step > last_step or not line.endswith(b"\n"):
            break
        kept.append(line)
    return kept

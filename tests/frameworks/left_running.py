"""Which processes a test has left, found by a mark in their environment, whatever group or session they are in."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from pathlib import Path

import pytest

NAME = "TUNESMITH_TEST_MARK"


def mark_processes(patch: pytest.MonkeyPatch) -> str:
    """From now on, whatever this process starts carries the mark that is returned."""
    mark = f"{NAME}={uuid.uuid4().hex}"
    patch.setenv(*mark.split("=", 1))
    return mark


def list_left(mark: str, *, seconds: float = 10) -> list[str]:
    """Command lines of living processes with the mark, after so many seconds at most; none as soon as there is none."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("processes are looked for in /proc")
    waited = time.monotonic() + seconds
    while (found := _find(mark)) and time.monotonic() < waited:
        time.sleep(0.05)
    return found


def _find(mark: str) -> list[str]:
    found: list[str] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(folder.name) != os.getpid() and mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found

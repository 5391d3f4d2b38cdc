"""What every worker does, whatever framework it runs: say where it is, time its phases, fail in one line.

Runs in a framework's environment: standard library only, nothing of Tunesmith. stdout belongs to events, one JSON
object a line; whatever else prints goes to stderr, which the parent keeps as the log.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path


class Failure(Exception):
    """Something a person can understand from one line."""


class Run:
    """One call of a worker: its settings, its events, the seconds of its phases."""

    def __init__(self, settings: dict, channel) -> None:
        self.settings, self.handoff = settings, settings["handoff"]
        self.label = self.handoff["label"]
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self._channel, self._phase, self._since = channel, "starting", time.perf_counter()

    def tell(self, kind: str, **facts) -> None:
        self._channel.write(json.dumps({"kind": kind, "task": self.label, **facts}) + "\n")
        self._channel.flush()

    def enter(self, phase: str) -> None:
        """Begin a phase; the one before ends. Twice the same adds up."""
        now = time.perf_counter()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now
        self.tell("progress", text=phase)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.tell("warning", text=text)


def write_json(path: str, value) -> None:
    """Whole or not at all."""
    temporary = f"{path}.part"
    Path(temporary).write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def peak_resident_bytes() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(work) -> int:
    """work: gets a `Run`. The exit status is 0 only if it returned."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    run = Run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), channel)
    try:
        work(run)
    except Exception as error:
        traceback.print_exc()
        said = " ".join(str(error).split())[:500]
        run.tell("failed", text=said if isinstance(error, Failure) else f"{type(error).__name__}: {said}")
        return 1
    return 0

"""A framework whose worker is a script that a test wrote, run by a real interpreter in a real arm."""

from __future__ import annotations

import dataclasses
import json
import sys

from tunesmith.core.records import EnvironmentRecord
from tunesmith.frameworks.environments import open_environment
from tunesmith.frameworks.handoff import Handoff
from tunesmith.frameworks.port import Reason, Translation
from tunesmith.job.spec import Job

# How every script begins.
BEGIN = """\
import json, os, sys
task = json.load(open(sys.argv[1]))
print(json.dumps({"kind": "progress", "task": task["label"], "text": "loading"}), flush=True)
print("what a framework says of itself", file=sys.stderr)
"""


@dataclasses.dataclass
class Script:
    """A framework whose worker is a script."""

    name: str
    text: str

    def can(self, job: Job) -> Reason | None:
        return None

    def translate(self, handoff: Handoff) -> Translation:
        files = {"task.json": json.dumps(handoff.to_json()), "worker.py": self.text}
        return Translation(files, (f"{handoff.scratch}/worker.py", f"{handoff.scratch}/task.json"))


def add_environment(name: str, *, python: str = sys.executable) -> None:
    record = EnvironmentRecord(
        framework=name, origin="added", python=python, slot="", python_version="3", torch="0", build="cpu",
        lock_sha256="", installer="", versions={}, created="", wall_seconds=0.0, size_bytes=0,
    )  # fmt: skip
    environment = open_environment(name)
    with environment.own():
        environment.write(record)

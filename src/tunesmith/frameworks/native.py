"""Our own engine behind the port: the same task file and the same timing parent as every other framework."""

from __future__ import annotations

import sys
from pathlib import Path


def worker_command(task_file: Path) -> list[str]:
    """argv of a worker that carries out one task file."""
    return [sys.executable, "-m", "tunesmith.api.worker", str(task_file)]

"""Run inside a framework's environment: does it import, which versions are there, what does torch see?

    python inspect_environment.py ANSWER SCRATCH [MODULE or MODULE:NAME ...]

Writes ANSWER, a JSON object; SCRATCH is a folder for what imports leave in the working directory.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any


def inspect(imports: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "prefix": sys.prefix, "problems": []}
    found["base"] = sys.prefix == sys.base_prefix
    started = time.monotonic()
    # Before torch, because Unsloth wants to be imported before what it patches.
    for wanted in imports:
        module, _, name = wanted.partition(":")
        try:
            imported = importlib.import_module(module)
            if name:
                getattr(imported, name)
        except BaseException as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
            found["problems"].append(f"{wanted} does not import: {type(error).__name__}: {lines[0]}")
    found["import_seconds"] = time.monotonic() - started
    found["torch"] = describe_torch()
    versions = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            # The first of two is the one that is imported.
            versions.setdefault(name.lower().replace("_", "-").replace(".", "-"), distribution.version)
    found["versions"] = versions
    return found


def describe_torch() -> dict[str, Any]:
    try:
        import torch

        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}
    except BaseException as error:
        return {"version": "", "cuda": None, "gpus": [], "problem": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    # This script's own folder must not stand before the environment's packages.
    sys.path.pop(0)
    answer, scratch, *modules = sys.argv[1:]
    answer = os.path.abspath(answer)
    os.chdir(scratch)
    text = json.dumps(inspect(modules))
    Path(answer).write_text(text, encoding="utf-8")
    # Threads that a framework started shall not keep the process.
    sys.stdout.flush()
    os._exit(0)

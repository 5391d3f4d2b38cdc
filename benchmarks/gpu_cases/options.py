"""How cases are run on this machine: folders, environment of the measured processes, time."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent.parent
_BEGAN = time.monotonic()


@dataclass(frozen=True)
class Options:
    """What the command line decides. `deadline` is on the clock of time.monotonic."""

    folder: Path
    device: str
    rounds: int
    deadline: float
    rows: Path | None
    site: Path | None
    peer_python: str
    plain: bool
    skip_parity: bool
    job: dict[str, Any]
    # The most that a case may take, its inputs apart; a group of cases has as much for each.
    case_seconds: float = 240.0

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


class CaseFailed(Exception):
    """A case cannot be measured; one line."""


def say(text: str) -> None:
    """A line of the log, after the seconds since the start."""
    # In one piece: threads write, too.
    sys.stderr.write(f"{time.monotonic() - _BEGAN:6.1f} {text}\n")
    sys.stderr.flush()


def run_helper(module: str, task: dict[str, Any], options: Options) -> None:
    """Run one of our own steps in a process of its own: it leaves no memory behind."""
    file = options.folder / f"{module}-{Path(task['out']).name}.json"
    file.write_text(json.dumps(task), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", f"gpu_cases.{module}", str(file)],
        env=make_environment(options),
        cwd=options.folder,
        capture_output=True,
        text=True,
        timeout=max(1.0, options.seconds_left()),
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        raise CaseFailed(f"{module} ended with {done.returncode}: {lines[-1][:500]}")


def make_environment(options: Options) -> dict[str, str]:
    """Of the measured processes. What they compile stays in our folder, beside the word that it is there: torch's
    caches by TMPDIR, since Unsloth forgets TORCHINDUCTOR_CACHE_DIR."""
    compiled = options.folder / "compiled"
    compiled.mkdir(exist_ok=True)
    paths = [CHECKOUT / "benchmarks", CHECKOUT / "src", *([options.site] if options.site else [])]
    inherited = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *([inherited] if inherited else [])]),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(compiled),
        "TRITON_CACHE_DIR": str(compiled / "triton"),
        "UNSLOTH_COMPILE_LOCATION": str(compiled / "unsloth_compiled_cache"),
    }
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    if options.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return environment


def install_wheels(wheels: Path, folder: Path) -> Path:
    """Unpack carried wheels into a folder. Returns it."""
    site, made = folder / "site", folder / "site.tmp"
    with locked(site):
        if site.is_dir():
            return site
        say(f"installing {len(list(wheels.glob('*.whl')))} wheels")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        command += ["--no-compile", "--no-cache-dir", "--upgrade", "--target", str(made)]
        subprocess.run([*command, *map(str, sorted(wheels.glob("*.whl")))], check=True)
        made.rename(site)
    return site


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process, and only one thread of it, makes `folder` at a time; the next one finds it made."""
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def merge_keys(into: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, the second one's values on top."""
    merged = dict(into)
    for key, value in more.items():
        known = merged.get(key)
        merged[key] = (
            merge_keys(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
        )
    return merged


def strip_paths(record: dict[str, Any], options: Options) -> dict[str, Any]:
    """The record without the folders of the machine that it was made on."""
    text = json.dumps(record)
    for folder in (options.folder, *([options.rows.parent] if options.rows else []), CHECKOUT):
        text = text.replace(f"{folder}/", "")
    return json.loads(text)

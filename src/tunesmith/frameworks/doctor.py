"""Does a framework's environment work: what imports, which versions, which torch, and what differs from the lock."""

from __future__ import annotations

import datetime
import json
import os
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.core.errors import ArmFailed
from tunesmith.core.events import ignore_event
from tunesmith.core.records import EnvironmentRecord
from tunesmith.frameworks.catalog import (
    FRAMEWORKS,
    Framework,
    find_framework,
    hash_locks,
    read_lock,
    torch_lock,
)
from tunesmith.frameworks.environments import foreign_environ, open_environment
from tunesmith.frameworks.installers import choose_build
from tunesmith.frameworks.process import run_process

OWN = "tunesmith"
TIMEOUT_SECONDS = 600.0
_INSPECT = Path(__file__).with_name("workers") / "inspect_environment.py"
_OWN_SHOWN = ("tunesmith", "torch", "transformers", "tokenizers", "safetensors", "torchao")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found in one environment.

    versions:    of the distributions that decide results; all of them are in `installed`.
    cuda, gpus:  torch's CUDA version, None for a CPU build, and the GPUs that it sees.
    differences: from the lock, one phrase each; empty where all is as locked.
    problems:    why it does not work; empty if it does. warnings: what still works, though not as it should.
    """

    framework: str
    origin: str
    python: str
    python_version: str = ""
    torch: str = ""
    cuda: str | None = None
    gpus: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict[str, str])
    installed: dict[str, str] = field(default_factory=dict[str, str])
    size_bytes: int = 0
    import_seconds: float = 0.0
    differences: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "status": "ok" if self.ok else "broken"}


def inspect_environment(
    name: str, python: str, *, timeout_seconds: float = TIMEOUT_SECONDS, stop: threading.Event | None = None
) -> Diagnosis:
    """Import a framework in an interpreter of its own and report. What goes wrong there is a problem, never raised."""
    own = name == OWN
    imports, shown = (("tunesmith.api",), _OWN_SHOWN) if own else _wanted(name)
    origin = OWN if own else ""
    environ = dict(os.environ) if own else foreign_environ(name)
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        answer, log, scratch = (Path(folder) / part for part in ("answer.json", "log.txt", "scratch"))
        scratch.mkdir()
        argv = [python, str(_INSPECT), str(answer), str(scratch), *imports]
        lines: list[str] = []
        try:
            run_process(
                argv,
                log=log,
                task=name,
                on_event=ignore_event,
                on_line=lines.append,
                stop=stop or threading.Event(),
                idle_seconds=timeout_seconds,
                environ=environ,
            )
            found = json.loads(answer.read_text(encoding="utf-8"))
        except OSError as error:
            return Diagnosis(name, origin, python, problems=(f"{python} does not run ({error.strerror})",))
        except (ArmFailed, ValueError) as error:
            finding = error.finding if isinstance(error, ArmFailed) else "left no answer"
            said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
            return Diagnosis(name, origin, python, problems=(f"its Python {finding}: {said[:200]}",))
    return _diagnose(name, origin, python, found, shown)


def _wanted(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    framework = find_framework(name)
    return framework.imports, framework.shown


def _diagnose(
    name: str, origin: str, python: str, found: Mapping[str, Any], shown: tuple[str, ...]
) -> Diagnosis:
    torch, installed = found["torch"], found["versions"]
    problems = list(found["problems"])
    if not torch["version"]:
        problems.append(f"torch does not import: {torch.get('problem', '')[:200]}")
    return Diagnosis(
        framework=name,
        origin=origin,
        python=python,
        python_version=found["python"],
        torch=torch["version"],
        cuda=torch["cuda"],
        gpus=tuple(torch["gpus"]),
        versions={key: installed[key] for key in shown if key in installed},
        installed=dict(installed),
        import_seconds=round(found["import_seconds"], 1),
        differences=compare_with_lock(name, installed) if name in FRAMEWORKS else (),
        problems=tuple(problems),
    )


def compare_with_lock(name: str, installed: Mapping[str, str]) -> tuple[str, ...]:
    """What is not as locked: of the packages that decide results by name, of the rest by count."""
    framework = find_framework(name)
    locked = {**read_lock(framework.lock), "torch": read_lock(torch_lock())["torch"]}
    # `2.13.0+cpu` is a build of 2.13.0.
    other = [k for k, v in locked.items() if k in installed and installed[k].split("+")[0] != v.split("+")[0]]
    absent = [key for key in locked if key not in installed]
    phrases: list[str] = []
    for key in ("torch", *framework.shown):
        if key in other:
            phrases.append(f"{key} {installed[key]} (lock: {locked[key]})")
        elif key in absent:
            phrases.append(f"{key} is missing (lock: {locked[key]})")
    for keys, words in ((other, "in other versions"), (absent, "missing")):
        if rest := [key for key in keys if key not in ("torch", *framework.shown)]:
            named = ", ".join(rest[:3]) + (", ..." if len(rest) > 3 else "")
            phrases.append(f"{len(rest)} other packages {words}: {named}")
    return tuple(phrases)


def examine(name: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> Diagnosis | None:
    """The environment of one framework, or of Tunesmith itself; None if there is none."""
    if name == OWN:
        return inspect_environment(OWN, sys.executable, timeout_seconds=timeout_seconds)
    environment = open_environment(name)
    record = environment.read()
    if record is None:
        return None
    if not Path(record.python).exists():
        gone = (f"its interpreter is gone ({record.python})",)
        return Diagnosis(name, record.origin, record.python, problems=gone)
    found = inspect_environment(name, record.python, timeout_seconds=timeout_seconds)
    size = measure_folder(environment.root / record.slot) if record.slot else 0
    values = {key: getattr(found, key) for key in Diagnosis.__dataclass_fields__}
    values |= {"origin": record.origin, "size_bytes": size, "warnings": tuple(_warn(record, found))}
    return Diagnosis(**values)


def _warn(record: EnvironmentRecord, found: Diagnosis) -> list[str]:
    warnings: list[str] = []
    name = record.framework
    if record.origin == "installed" and record.lock_sha256 != hash_locks(find_framework(name)):
        warnings.append(
            f"made from another lock than this version's; run: tunesmith frameworks install {name}"
        )
    if found.ok:
        build = choose_build()
        if build == "cuda" and found.cuda is None:
            warnings.append("torch is a CPU build, but this machine has an NVIDIA GPU")
        elif build == "cuda" and not found.gpus:
            warnings.append("torch does not see this machine's GPU")
    return warnings


def measure_folder(folder: Path) -> int:
    """Bytes of all files, each once however many names it has. uv's files may share their blocks with its cache."""
    seen: dict[tuple[int, int], int] = {}
    for parent, _, files in os.walk(folder):
        for file in files:
            facts = os.lstat(os.path.join(parent, file))
            seen[facts.st_dev, facts.st_ino] = facts.st_size
    return sum(seen.values())


def make_record(
    framework: Framework,
    found: Diagnosis,
    *,
    origin: str,
    slot: str,
    build: str,
    installer: str,
    seconds: float,
    size_bytes: int = 0,
) -> EnvironmentRecord:
    """The record of an environment as it was found to be."""
    return EnvironmentRecord(
        framework=framework.name,
        origin=origin,
        python=found.python,
        slot=slot,
        python_version=found.python_version,
        torch=found.torch,
        build=build,
        lock_sha256=hash_locks(framework),
        installer=installer,
        versions=dict(sorted(found.installed.items())),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        wall_seconds=round(seconds, 1),
        size_bytes=size_bytes,
        differences=list(found.differences),
    )

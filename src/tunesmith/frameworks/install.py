"""Make a framework's environment from its lock, step by step.

Nothing is there until everything is: the new environment is made beside the old one and becomes it when the record is
written, after it has imported what it must. Until then a failure or a signal deletes what was begun.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import ArmFailed, SetupError
from tunesmith.core.events import Event, OnEvent, ignore_event
from tunesmith.core.records import EnvironmentRecord
from tunesmith.frameworks.catalog import (
    CUDA_GIB,
    Framework,
    find_framework,
    hash_locks,
    read_lock,
    torch_lock,
    torch_requirement,
)
from tunesmith.frameworks.causes import explain_failure
from tunesmith.frameworks.doctor import Diagnosis, inspect_environment, make_record, measure_folder
from tunesmith.frameworks.environments import SLOTS, EnvironmentDir, delete_tree, open_environment
from tunesmith.frameworks.installers import (
    TORCH_CPU_INDEX,
    Build,
    Installer,
    ask_version,
    choose_build,
    find_installer,
    find_python,
    python_of,
)
from tunesmith.frameworks.process import run_process

IDLE_SECONDS = 1800.0
_NUM_STEPS = 5


class Stopped(Exception):
    """A signal came; what was begun has been deleted."""


@dataclass(frozen=True, slots=True)
class Installation:
    """record: the environment. fresh: whether it was made now, or found as it should be."""

    record: EnvironmentRecord
    fresh: bool


def install_framework(
    name: str,
    *,
    python: str | None = None,
    installer: str | None = None,
    again: bool = False,
    on_event: OnEvent = ignore_event,
    stop: threading.Event | None = None,
) -> Installation:
    """Bring a framework's environment into being, or find that it is there.

    python:    its interpreter; else ours or one on PATH. installer: uv or pip; else uv where it is found.
    again:     make it anew although it is as locked.
    stop:      when set, what was begun is deleted.
    Raises SetupError naming the step, its cause and the log; Stopped after `stop`. The environment that was there
    before then still is.
    """
    framework, build = find_framework(name), choose_build()
    environment = open_environment(name)
    with environment.own():
        before = environment.read()
        chosen = find_python(framework.pythons, wanted=python, place=name) if python else None
        if before is not None and before.origin == "added":
            cure = f"Run first: tunesmith frameworks remove {name}"
            raise SetupError(name, f"uses an environment of yours ({before.python})", cure=cure)
        if before is not None and not again and _is_as_wanted(before, framework, build, chosen):
            return Installation(before, fresh=False)
        environment.sweep(keep=before.slot if before else "")
        _check_disk(framework, environment.root, build)
        work = _Work(
            framework=framework,
            environment=environment,
            slot=next(slot for slot in SLOTS if before is None or slot != before.slot),
            build=build,
            python=chosen or find_python(framework.pythons, wanted=None, place=name),
            installer=find_installer(installer),
            on_event=on_event,
            stop=stop or threading.Event(),
        )
        environment.log.unlink(missing_ok=True)
        try:
            record = work.carry_out()
        except BaseException:
            delete_tree(work.folder)
            raise
        environment.write(record)
        environment.sweep(keep=record.slot)
    return Installation(record, fresh=True)


def _is_as_wanted(record: EnvironmentRecord, framework: Framework, build: Build, python: str | None) -> bool:
    version = ".".join(map(str, ask_version(python) or ())) if python else record.python_version
    return (
        record.lock_sha256 == hash_locks(framework)
        and record.build == build
        and record.python_version.startswith(version)
        and Path(record.python).exists()
    )


def _check_disk(framework: Framework, root: Path, build: Build) -> None:
    needed_gib = framework.needed_gib + (CUDA_GIB if build == "cuda" else 0.0)
    free_gib = shutil.disk_usage(root).free / 2**30
    if free_gib < needed_gib:
        raise SetupError(
            str(root),
            f"{free_gib:.1f} GiB are free",
            rule=f"{framework.title} needs {needed_gib:g} GiB",
            cure="Free some space, or set TUNESMITH_HOME to a folder on another disk",
        )


@dataclass
class _Work:
    """One installation under way: five steps into one slot."""

    framework: Framework
    environment: EnvironmentDir
    slot: str
    build: Build
    python: str
    installer: Installer
    on_event: OnEvent
    stop: threading.Event
    step: str = ""
    num_done: int = 0

    @property
    def folder(self) -> Path:
        return self.environment.root / self.slot

    def carry_out(self) -> EnvironmentRecord:
        started = time.monotonic()
        program = f"{self.installer.name} {self.installer.version}".strip()
        with self._step(f"environment for {self.framework.title}, by {program}"):
            self._run(self.installer.make_command(self.folder, python=self.python))
        with self._step(f"{torch_requirement()}, the {self.build} build"):
            self._install_torch()
        with self._step(f"{len(read_lock(self.framework.lock))} packages of its lock"):
            self._install("--require-hashes", "--requirement", str(self.framework.lock))
        repairs = self.framework.cpu_repairs if self.build == "cpu" else ()
        with self._step("repairs: " + ("; ".join(f"no {each.path}" for each in repairs) or "none needed")):
            for repair in repairs:
                for packages in self.folder.glob("lib/python*/site-packages"):
                    delete_tree(packages / repair.path)
        with self._step(f"importing {self.framework.imports[0]}"):
            found = self._check()
        seconds = time.monotonic() - started
        size = measure_folder(self.folder)
        record = make_record(
            self.framework,
            found,
            origin="installed",
            slot=self.slot,
            build=self.build,
            installer=program,
            seconds=seconds,
            size_bytes=size,
        )
        self.on_event(Event("done", self.framework.name, f"installed in {seconds:.0f} s"))
        return record

    @contextmanager
    def _step(self, title: str) -> Generator[None]:
        self.num_done += 1
        self.step = f"step {self.num_done} of {_NUM_STEPS} ({title.split(',')[0]})"
        self.on_event(Event("stage", text=f"{self.num_done}/{_NUM_STEPS}  {title}"))
        yield
        if self.stop.is_set():
            raise Stopped

    def _fail(self, finding: str, cure: str = "") -> SetupError:
        return SetupError(
            f"frameworks install {self.framework.name}",
            f"{self.step}: {finding}",
            cure=f"{cure}{'. ' if cure else ''}Its log: {self.environment.log}",
        )

    def _install_torch(self) -> None:
        """torch alone, before anything can ask for some torch."""
        if self.build == "cuda":
            # The CPU build of the same version has another hash, so a local one cannot be taken by mistake.
            self._install("--require-hashes", "--requirement", str(torch_lock()))
            return
        if self.build == "default":
            self._install(torch_requirement())
            return
        if "find-links" in self.installer.settings or "UV_FIND_LINKS" in self.installer.environ:
            try:
                self._install("--no-index", torch_requirement())
                return
            except SetupError:
                self.on_event(Event("note", text="     no CPU build in find-links"))
        index = os.environ.get("TUNESMITH_TORCH_INDEX") or TORCH_CPU_INDEX
        arguments, environ = self.installer.only_from(index)
        try:
            self._install(*arguments, torch_requirement(), environ=environ)
        except SetupError as error:
            finding = error.finding.removeprefix(f"{self.step}: ")
            raise self._fail(
                f"no CPU build of {torch_requirement()} in pip's find-links, nor from {index}: {finding}",
                "Put its wheel into a folder and set PIP_FIND_LINKS to it",
            ) from None

    def _install(self, *arguments: str, environ: dict[str, str] | None = None) -> None:
        self._run(self.installer.install_command(self.folder, arguments), environ=environ)

    def _run(self, command: Sequence[str], *, environ: dict[str, str] | None = None) -> None:
        """One program of a step. Raises SetupError with its cause in one line, Stopped after a signal."""
        lines: deque[str] = deque(maxlen=1000)
        with self.environment.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n")
        try:
            run_process(
                command,
                log=self.environment.log,
                task=self.framework.name,
                on_event=ignore_event,
                on_line=self._follow(lines),
                stop=self.stop,
                idle_seconds=IDLE_SECONDS,
                environ=environ or self.installer.environ,
            )
        except (ArmFailed, OSError) as error:
            said = "\n".join(lines)
            raise self._fail(
                *explain_failure(said, otherwise=getattr(error, "finding", str(error)))
            ) from None
        if self.stop.is_set():
            raise Stopped

    def _follow(self, lines: deque[str]) -> Callable[[str], None]:
        seen = 0

        def take(line: str) -> None:
            nonlocal seen
            lines.append(line.rstrip())
            if found := re.match(
                r"\s*(Collecting|Downloading|Building|Prepared|Installing|Installed) (.*)", line
            ):
                seen += found[1] == "Collecting"
                what = found[2].split(" (from ")[0]
                self.on_event(Event("progress", text=f"{found[1].lower()} {what}", done=seen))

        return take

    def _check(self) -> Diagnosis:
        """The new environment imports what it must and holds the torch that was meant."""
        found = inspect_environment(self.framework.name, str(python_of(self.folder)), stop=self.stop)
        if self.stop.is_set():
            raise Stopped
        with self.environment.log.open("a", encoding="utf-8") as log:
            log.write("\n".join(["$ doctor", *found.problems, *found.differences]) + "\n")
        if self.build == "cpu" and found.cuda is not None:
            raise self._fail(
                f"torch {found.torch} for CUDA {found.cuda} came, but this machine has no NVIDIA GPU",
                "Keep it with TUNESMITH_TORCH=cuda, or give a CPU build by PIP_FIND_LINKS",
            )
        if found.problems:
            raise self._fail(found.problems[0])
        if self.build == "cuda" and not found.gpus:
            text = f"torch {found.torch} sees no GPU: is the driver new enough for CUDA {found.cuda}?"
            self.on_event(Event("warning", text=text))
        return found

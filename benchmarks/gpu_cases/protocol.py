"""How the parent asks and a contender answers: one JSON object a line, over the contender's stdin and stdout.

    {"do": "gradients", "out": FILE}  gradients of step 0 on the shortened model -> {"did": "gradients", ...}
    {"do": "load"}                    the model, on the device; no step is taken -> {"did": "load"}
    {"do": "steps", "count": N}       the next N optimizer steps; loads first, if need be -> {"did": "steps", ...}
    {"do": "quit"}                    the process ends

A contender works only while it is asked. After its answer it gives cached device memory back, so that of several
contenders alive the measured one has the card, less the others' weights and optimizer states, to itself.

What libraries print goes to stderr: the channel is a copy of stdout made before anything is imported.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO


class Quit(SystemExit):
    """Raised inside a contender's training when the parent has asked it to end."""


# --- the contender's side ---------------------------------------------------------------------------------------------


class Session:
    """One contender's end of the line. `loaded` is called once, when the model is on the device, and `step_done` after
    every optimizer step; each returns when a step is wanted: whatever runs the steps (a loop, a trainer's callback)
    needs no other change."""

    def __init__(self) -> None:
        self.task: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        self._channel: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._left = 0
        self._digests: list[str] = []
        self._forget_round()

    def serve(
        self,
        *,
        gradients: Callable[[Path], dict[str, Any]],
        train: Callable[[], None],
        facts: Callable[[], Any],
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        """Answer until told to quit. `train` trains without end and calls `loaded` and `step_done`; `facts` describes
        versions; `rest` gives back what only who is at work needs."""
        self._facts, self._rest = facts, rest
        while True:
            command = self._read()
            if command["do"] == "gradients":
                self._answer({"did": "gradients", **gradients(Path(command["out"]))})
                _free_cached_memory()
            else:
                self._start_round(command)
                train()
                raise RuntimeError("training ended before the parent asked for it")

    def loaded(self) -> None:
        """The model is on the device, and no step is prepared: if that is all that was asked for, wait here."""
        if not self._left:
            _free_cached_memory()
            self._answer({"did": "load"})
            self._start_round(self._read())

    def note_rows(self, digest: str) -> None:
        """The rows that the step about to run trains on (inputs.hash_step)."""
        self._digests.append(digest)

    @property
    def wants_rows(self) -> bool:
        """Whether the next step's rows are to be noted: the first steps', which are not timed."""
        return len(self._digests) < self.task["checked_steps"]

    def step_done(self, loss: Any, *, num_tokens: int, num_target_tokens: int) -> None:
        """A step has ended. loss: nats per target token, a number or a tensor."""
        assert self._left > 0, "a step that nobody asked for: train has not called loaded()"
        _wait_for_device()
        now = time.perf_counter()
        self._seconds.append(now - self._mark)
        self._tokens.append(num_tokens)
        self._targets.append(num_target_tokens)
        self._losses.append(float(loss))
        self._left -= 1
        if self._left:
            # Bookkeeping is the harness's, not the contender's.
            self._mark = time.perf_counter()
            return
        answer = {
            "did": "steps",
            "seconds": self._seconds,
            "tokens": self._tokens,
            "targets": self._targets,
            "losses": self._losses,
            "digests": self._digests,
            **_measure_memory(),
            "facts": self._facts(),
        }
        self._forget_round()
        # Before the answer: who is asked next plans with the memory that it finds.
        _free_cached_memory()
        self._rest()
        self._answer(answer)
        self._start_round(self._read())

    def _start_round(self, command: Mapping[str, Any]) -> None:
        self._left = command.get("count", 0)
        self._mark = time.perf_counter()

    def _forget_round(self) -> None:
        self._seconds: list[float] = []
        self._tokens: list[int] = []
        self._targets: list[int] = []
        self._losses: list[float] = []

    def _read(self) -> dict[str, Any]:
        line = sys.stdin.readline()
        command = json.loads(line) if line else {"do": "quit"}
        if command["do"] == "quit":
            raise Quit(0)
        return command

    def _answer(self, value: dict[str, Any]) -> None:
        self._channel.write(json.dumps(value) + "\n")
        self._channel.flush()


def _torch_on_gpu() -> Any:
    """torch, if it is imported and has a GPU."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() else None


def _wait_for_device() -> None:
    if torch := _torch_on_gpu():
        torch.cuda.synchronize()


def _free_cached_memory() -> None:
    gc.collect()
    if torch := _torch_on_gpu():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    """Peaks are those of training: call it when the model is loaded."""
    if torch := _torch_on_gpu():
        torch.cuda.reset_peak_memory_stats()


def _measure_memory() -> dict[str, int]:
    if torch := _torch_on_gpu():
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": peak, "reserved_bytes": peak}


def describe_packages(*names: str) -> dict[str, Any]:
    """Versions of what a contender runs on, and the GPU that torch sees."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": sys.version.split()[0]}
    for name in ("torch", "triton", "transformers", "peft", *names):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    gpu: dict[str, Any] = {}
    if torch := _torch_on_gpu():
        properties = torch.cuda.get_device_properties(0)
        gpu = {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
        gpu["cuda"] = torch.version.cuda
    return {"versions": versions, "gpu": gpu}


# --- the parent's side ------------------------------------------------------------------------------------------------


class ContenderFailed(Exception):
    """A contender died, or did not answer in time. The text is one line; the log says more."""


class Contender:
    """A contender's process. `started` is when it was started, on the clock of time.perf_counter."""

    def __init__(
        self,
        module: str,
        task: dict[str, Any],
        *,
        folder: Path,
        environment: dict[str, str],
        python: str = sys.executable,
    ) -> None:
        self.module = module
        self.log = folder / f"{module}.log"
        task_file = folder / f"{module}.json"
        task_file.write_text(json.dumps(task), encoding="utf-8")
        self.started = time.perf_counter()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [python, "-m", f"gpu_cases.{module}", str(task_file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                cwd=folder,
            )
        self._hangs = False
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read_lines, daemon=True)
        self._reader.start()

    def ask(self, command: dict[str, Any], *, timeout: float) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises ContenderFailed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ContenderFailed(self._describe_death()) from None
        try:
            line = self._lines.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            self._hangs = True
            raise ContenderFailed(f"{self.module}: no answer to {command['do']} in time") from None
        if not line:
            raise ContenderFailed(self._describe_death())
        return json.loads(line)

    def stop(self) -> None:
        """End the process, kindly if it listens."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write('{"do": "quit"}\n')
            self._process.stdin.close()
        except OSError:
            pass
        try:
            self._process.wait(timeout=0.1 if self._hangs else 20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=5)
        self._process.stdout.close()

    def _read_lines(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _describe_death(self) -> str:
        status = self._process.wait()
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        return f"{self.module} ended with {status}: {last[:500]}"

"""The only place that starts workers: a supervisor each, bounded log, timeouts, resource use read by the parent.

A worker gets the path of a task file, prints events as JSON lines on stdout and logs on stderr, and leaves its result
in files. Nothing that it prints is trusted further than being shown. Whatever it starts ends with it, and it ends with
this process, however that ends (supervise.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from tunesmith.core.errors import ArmFailed, DataError
from tunesmith.core.events import Event, OnEvent
from tunesmith.frameworks.logs import MAX_LINE_BYTES, Lines, Log, clean_text

GRACE_SECONDS = 60.0
# Of `idle_seconds`: for a worker that says something, though nothing of its work.
_EVENTLESS = 6
MAX_TEXT = 1000
_SUPERVISE = Path(__file__).with_name("supervise.py")
# oneDNN keeps a compiled kernel per shape, 1,024 of them unless told otherwise: about 0.3 MB each.
_KERNEL_CACHE = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "320"}


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """What a worker cost, measured from outside.

    cpu_seconds: user and system time of the worker and its children. peak_bytes: largest resident size.
    """

    exit_code: int
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int


def run_process(
    argv: Sequence[str],
    *,
    log: Path,
    task: str,
    on_event: OnEvent,
    stop: threading.Event,
    threads: int = 1,
    idle_seconds: float = 3600.0,
    environ: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> ProcessUse:
    """Run one worker to its end, passing its events on.

    stop:         when set, the worker gets SIGTERM (it saves a checkpoint) and, after a grace period, SIGKILL.
    idle_seconds: a worker silent for this long is ended; one that prints, but tells no event, after six times that.
    environ:      in place of this process's environment; thread counts are set in either.
    on_line:      for a program that is no worker: gets every line of both pipes, which all go to the log.
    Raises ArmFailed in one line when it ends badly (the line is the worker's own last error, or names the log), and
    OSError if the program does not run at all.
    """
    started = time.monotonic()
    kept = Log(log)
    mine, theirs = socket.socketpair()
    with contextlib.closing(kept), mine:
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SUPERVISE), str(theirs.fileno()), *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(os.environ if environ is None else environ, threads),
                start_new_session=True,
                pass_fds=[theirs.fileno()],
            )
        reading = _Reading(child, mine, kept, on_event, on_line)
        try:
            reading.pump(stop, idle_seconds)
        finally:
            reading.kill()
            _, status, use = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            for pipe in (child.stdout, child.stderr):
                if pipe:
                    pipe.close()
    if reading.errno:
        raise OSError(reading.errno, os.strerror(reading.errno), argv[0])
    outcome = ProcessUse(
        child.returncode if reading.status is None else reading.status,
        time.monotonic() - started,
        use.ru_utime + use.ru_stime,
        # The kernel's own figure starts at what the parent held when it forked; it only serves where /proc is missing.
        reading.peak_bytes or use.ru_maxrss * 1024,
    )
    if reading.left and not stop.is_set():
        what = "a process" if reading.left == 1 else f"{reading.left} processes"
        on_event(Event("warning", task, f"left {what} running, ended now. Its log: {log}"))
    if outcome.exit_code and not stop.is_set():
        finding = reading.failure or (
            "was silent for too long" if reading.timed_out else f"ended with exit code {outcome.exit_code}"
        )
        raise ArmFailed(task, finding, cure=f"Its log: {log}")
    return outcome


def _environment(environ: Mapping[str, str], threads: int) -> dict[str, str]:
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    quiet = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**_KERNEL_CACHE, **environ, **counts, **quiet}


class _Reading:
    """Both pipes of one worker, and what its supervisor says, until that has ended.

    failure: the worker's last error line. timed_out: whether it was ended for silence. peak_bytes: its largest resident
    size. errno: why it did not run. status: its exit code. left: processes that outlived it.
    """

    def __init__(
        self,
        child: subprocess.Popen[bytes],
        channel: socket.socket,
        log: Log,
        on_event: OnEvent,
        on_line: Callable[[str], None] | None,
    ) -> None:
        assert child.stdout is not None
        assert child.stderr is not None
        self._stdout, self._channel, self._log = child.stdout, channel, log
        self._on_event, self._on_line = on_event, on_line
        self._pid, self._last_sign, self._last_event = 0, time.monotonic(), time.monotonic()
        self._buffers: dict[IO[bytes] | socket.socket, Lines] = {
            source: Lines() for source in (child.stdout, child.stderr, channel)
        }
        self.failure, self.timed_out, self.peak_bytes = "", False, 0
        self.errno, self.left = 0, 0
        self.status: int | None = None

    def pump(self, stop: threading.Event, idle_seconds: float) -> None:
        ended_at: float | None = None
        with selectors.DefaultSelector() as selector:
            for source in self._buffers:
                os.set_blocking(source.fileno(), False)
                selector.register(source, selectors.EVENT_READ)
            while self._channel in selector.get_map():
                self.peak_bytes = max(self.peak_bytes, _read_peak_bytes(self._pid))
                for key, _ in selector.select(timeout=0.2):
                    if not self._read(key.fileobj):  # type: ignore[arg-type]
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                self.timed_out |= now - self._last_sign > idle_seconds
                self.timed_out |= not self._on_line and now - self._last_event > _EVENTLESS * idle_seconds
                if (stop.is_set() or self.timed_out) and ended_at is None:
                    ended_at = now
                    with contextlib.suppress(OSError):
                        self._channel.send(b"t")
                if ended_at is not None and now - ended_at > GRACE_SECONDS:
                    self.kill()
        for source in (pipe for pipe in self._buffers if pipe is not self._channel):
            # All that could write into them has ended.
            with contextlib.suppress(BlockingIOError):
                while self._read(source):
                    pass
            self._take(source, self._buffers[source].take_rest())

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_WR)

    def _read(self, source: IO[bytes] | socket.socket) -> bool:
        """Take what a pipe holds; False at its end."""
        try:
            chunk = os.read(source.fileno(), MAX_LINE_BYTES)
        except ConnectionResetError:
            return False
        self._take(source, self._buffers[source].take(chunk))
        if chunk and source is not self._channel:
            self._last_sign = time.monotonic()
        return bool(chunk)

    def _take(self, source: IO[bytes] | socket.socket, lines: Sequence[bytes]) -> None:
        if source is self._channel:
            for line in lines:
                said = json.loads(line)
                self._pid, self.errno = said.get("pid", self._pid), said.get("errno", 0)
                self.status, self.left = said.get("status"), said.get("left", 0)
            return
        if self._on_line or source is not self._stdout:
            self._log.write(lines)
        if self._on_line:
            for line in lines:
                self._on_line(line.decode(errors="replace"))
        elif source is self._stdout:
            for event in _read_events(lines):
                self._last_event = time.monotonic()
                if event.kind == "failed":
                    self.failure = event.text
                else:
                    self._on_event(event)


def _read_peak_bytes(pid: int) -> int:
    """Largest resident size of a living process so far; 0 where /proc cannot tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _read_events(lines: Sequence[bytes]) -> list[Event]:
    """The lines of a worker's stdout that are events; anything else on stdout is dropped."""
    events: list[Event] = []
    for line in lines:
        if b'"kind"' not in line:
            continue
        try:
            event = Event.from_json(json.loads(line))
            events.append(replace(event, text=clean_text(event.text)[:MAX_TEXT]))
        except (ValueError, TypeError, AttributeError, RecursionError, DataError):
            continue
    return events

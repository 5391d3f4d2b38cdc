"""The only place that starts workers: own process group, bounded log, timeouts, resource use read by the parent.

A worker gets the path of a task file, prints events as JSON lines on stdout and logs on stderr, and leaves its result
in files. Nothing that it prints is trusted further than being shown.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from tunesmith.core.errors import ArmFailed, DataError
from tunesmith.core.events import Event, OnEvent

MAX_LINE_BYTES = 1 << 16
MAX_LOG_BYTES = 32 << 20
GRACE_SECONDS = 60.0
# Terminals' escape sequences (colours, cursor, titles), and every control character but tab and newline.
_CONTROLS = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
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
    idle_seconds: a worker silent for this long is ended.
    environ:      in place of this process's environment; thread counts are set in either.
    on_line:      for a program that is no worker: gets every line of both pipes, which all go to the log.
    Raises ArmFailed in one line when it ends badly; the line is the worker's own last error, or names the log.
    """
    started = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as log_handle:
        child = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(os.environ if environ is None else environ, threads),
            start_new_session=True,
        )
        try:
            failure, timed_out, peak_bytes = _pump(child, log_handle, on_event, on_line, stop, idle_seconds)
        finally:
            _end_group(child.pid, signal.SIGKILL)
            _, status, use = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            for pipe in (child.stdout, child.stderr):
                if pipe:
                    pipe.close()
    outcome = ProcessUse(
        child.returncode,
        time.monotonic() - started,
        use.ru_utime + use.ru_stime,
        # The kernel's own figure starts at what the parent held when it forked; it only serves where /proc is missing.
        peak_bytes or use.ru_maxrss * 1024,
    )
    if outcome.exit_code and not stop.is_set():
        finding = failure or (
            "was silent for too long" if timed_out else f"ended with exit code {outcome.exit_code}"
        )
        raise ArmFailed(task, finding, cure=f"Its log: {log}")
    return outcome


def _environment(environ: Mapping[str, str], threads: int) -> dict[str, str]:
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    quiet = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**_KERNEL_CACHE, **environ, **counts, **quiet}


def _pump(
    child: subprocess.Popen[bytes],
    log_handle: IO[bytes],
    on_event: OnEvent,
    on_line: Callable[[str], None] | None,
    stop: threading.Event,
    idle_seconds: float,
) -> tuple[str, bool, int]:
    """Read both pipes until they close.

    Returns the worker's last error line, whether it was ended for silence, and its peak resident size, bytes.
    """
    assert child.stdout is not None
    assert child.stderr is not None
    selector = selectors.DefaultSelector()
    buffers = {child.stdout: bytearray(), child.stderr: bytearray()}
    for pipe in buffers:
        os.set_blocking(pipe.fileno(), False)
        selector.register(pipe, selectors.EVENT_READ)
    failure, logged, last_sign = "", 0, time.monotonic()
    ended_at: float | None = None
    timed_out, peak_bytes = False, 0
    while selector.get_map():
        peak_bytes = max(peak_bytes, _read_peak_bytes(child.pid))
        for key, _ in selector.select(timeout=0.2):
            chunk = os.read(key.fd, MAX_LINE_BYTES)
            if not chunk:
                selector.unregister(key.fileobj)
                continue
            last_sign = time.monotonic()
            if key.fileobj is child.stderr or on_line:
                if logged < MAX_LOG_BYTES:
                    log_handle.write(chunk)
                    log_handle.flush()
                logged += len(chunk)
            if on_line:
                for line in _take_lines(buffers[key.fileobj], chunk):  # type: ignore[index]
                    on_line(line.decode(errors="replace"))
                continue
            if key.fileobj is child.stderr:
                continue
            for event in _take_events(buffers[child.stdout], chunk):
                if event.kind == "failed":
                    failure = event.text
                else:
                    on_event(event)
        now = time.monotonic()
        timed_out = timed_out or now - last_sign > idle_seconds
        if (stop.is_set() or timed_out) and ended_at is None:
            ended_at = now
            _end_group(child.pid, signal.SIGTERM)
        if ended_at is not None and now - ended_at > GRACE_SECONDS:
            _end_group(child.pid, signal.SIGKILL)
    return failure, timed_out, peak_bytes


def _read_peak_bytes(pid: int) -> int:
    """Largest resident size of a living process so far; 0 where /proc cannot tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _take_lines(buffer: bytearray, chunk: bytes) -> list[bytes]:
    """Complete lines; what follows the last of them waits in the buffer."""
    buffer += chunk
    *lines, rest = bytes(buffer).split(b"\n")
    buffer[:] = rest[-MAX_LINE_BYTES:]
    return lines


def clean_text(text: str) -> str:
    """Without escape sequences and control characters, which would act on the terminal that shows it."""
    return _CONTROLS.sub("", text)


def _take_events(buffer: bytearray, chunk: bytes) -> list[Event]:
    """Complete lines of the worker's stdout that are events; anything else on stdout is dropped."""
    events: list[Event] = []
    for line in _take_lines(buffer, chunk):
        try:
            event = Event.from_json(json.loads(line))
            events.append(replace(event, text=clean_text(event.text)))
        except (ValueError, TypeError, AttributeError, DataError):
            continue
    return events


def _end_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return

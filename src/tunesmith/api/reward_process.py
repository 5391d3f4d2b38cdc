"""The process that a job's reward functions run in: one for the whole training, ended with all it has started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from tunesmith.core.errors import TunesmithError

MAX_LOG_BYTES = 8 << 20
_SLICE_SECONDS = 0.2
_WORKER = Path(__file__).with_name("reward_worker.py")


class RewardProcess:
    """Answers requests one after the other, each within its time. Started when it is first asked.

    log: gets what functions print, up to `MAX_LOG_BYTES`.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._child: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._keeper: threading.Thread | None = None

    def ask(
        self, request: dict[str, Any], *, place: str, timeout: float, fails: type[TunesmithError]
    ) -> list[float | None]:
        """The values that a request gives.

        timeout: seconds; the process is ended when they are over.
        Raises `fails` at `place`: a function at fault, one that took too long, or the end of the process.
        """
        if self._child is None:
            self._start()
        try:
            reply = self._exchange(json.dumps(request).encode() + b"\n", timeout)
        except TimeoutError:
            self.close()
            raise fails(
                place,
                f"took longer than {timeout:g} s, and was ended",
                rule="timeout is for all answers of one rollout",
                cure="Make it faster, or raise its timeout",
            ) from None
        except (EOFError, OSError):
            ending = self._tell_ending()
            self.close()
            raise fails(
                place, ending, rule="its process lives as long as training", cure=self._see_log
            ) from None
        if "fault" in reply:
            finding, rule, cure = [*reply["fault"], "", ""][:3]
            raise fails(place, finding, rule=rule, cure=cure or self._see_log)
        return reply["values"]

    @property
    def _see_log(self) -> str:
        return f"What it printed is in {self._log}"

    def _start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._channel, other = socket.socketpair()
        with other:
            # -P: a file of the person's is not to be hidden by one beside the worker.
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-u", str(_WORKER), str(other.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[other.fileno()],
                start_new_session=True,
            )
        assert self._child.stdout is not None
        self._keeper = threading.Thread(target=_keep_log, args=(self._child.stdout, self._log), daemon=True)
        self._keeper.start()

    def _exchange(self, request: bytes, timeout: float) -> dict[str, Any]:
        """Raises TimeoutError, EOFError or OSError where no reply comes."""
        assert self._child is not None
        assert self._channel is not None
        deadline = time.monotonic() + timeout
        self._channel.settimeout(timeout)
        self._channel.sendall(request)
        reply = bytearray()
        while not reply.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._channel.settimeout(min(left, _SLICE_SECONDS))
            try:
                chunk = self._channel.recv(1 << 20)
            except TimeoutError:
                # What it has started may keep the socket open when it is gone itself.
                if self._child.poll() is not None:
                    raise EOFError from None
                continue
            if not chunk:
                raise EOFError
            reply += chunk
        return json.loads(reply)

    def _tell_ending(self) -> str:
        assert self._child is not None
        try:
            code = self._child.wait(_SLICE_SECONDS * 10)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code >= 0:
            return f"ended its process with exit code {code}"
        if -code == signal.SIGKILL:
            return "its process was killed, as the kernel does when memory runs out"
        return f"its process crashed ({signal.Signals(-code).name})"

    def close(self) -> None:
        """End the process and its group."""
        if self._child is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        if self._channel is not None:
            self._channel.close()
        if self._keeper is not None:
            self._keeper.join(1.0)
        self._child = None


def _keep_log(pipe: IO[bytes], path: Path) -> None:
    """Write what comes through a pipe to a file up to a limit; the rest is read and dropped, so that nobody waits."""
    left = MAX_LOG_BYTES
    with pipe, path.open("ab") as log:
        while chunk := os.read(pipe.fileno(), 1 << 16):
            try:
                log.write(chunk[:left])
                log.flush()
            except OSError:
                left = 0
            left = max(0, left - len(chunk))

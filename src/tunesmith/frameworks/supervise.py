"""`python -I -S supervise.py CHANNEL ARGV...`: run one program, and leave nothing of it behind.

CHANNEL is the number of a socket whose other end the parent holds. A byte from it asks the program to end (SIGTERM);
its end, which comes too when the parent is killed, kills all that is left. Said back, a JSON line each: `pid` or
`errno`; then `status`, negative for a signal, and `left`, how many processes outlived the program.

On Linux whatever loses its parent below this process becomes its child, so that what left its process group (setsid,
double fork) is found. Elsewhere only the group is. Standard library only; runs apart from the parent's interpreter.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

# Helpers of multiprocessing end by themselves a moment after the program.
LINGER_SECONDS = 0.5
# A process that the kernel cannot end (a dead network disk) is given up after this.
GIVE_UP_SECONDS = 10.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main(channel: int, argv: list[str]) -> None:
    is_linux = sys.platform.startswith("linux")
    if is_linux:
        _control_process(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        child = subprocess.Popen(
            argv, start_new_session=True, preexec_fn=_die_with_parent if is_linux else None
        )
    except OSError as error:
        _say(channel, errno=error.errno)
        return
    _say(channel, pid=child.pid)
    # The program's pipes close when it and its children have closed them.
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    killed = threading.Event()

    def kill(*_: object) -> None:
        killed.set()
        _signal_group(child.pid, signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, kill)

    def obey() -> None:
        # A parent that was killed before it read what was said resets the socket.
        with contextlib.suppress(ConnectionError):
            while os.read(channel, 1):
                _signal_group(child.pid, signal.SIGTERM)
        kill()

    threading.Thread(target=obey, daemon=True).start()
    status = _wait_for(child.pid)
    left = _end_rest(child.pid, killed)
    _say(channel, status=os.waitstatus_to_exitcode(status), left=left)
    os._exit(0)


def _wait_for(pid: int) -> int:
    """The program's wait status; orphans that end before it are buried on the way."""
    while True:
        ended, status = os.wait()
        if ended == pid:
            return status


def _end_rest(group: int, killed: threading.Event) -> int:
    """Kill what outlived the program. Returns how many processes that were."""
    began, ended = time.monotonic(), set[int]()
    while (since := time.monotonic() - began) < GIVE_UP_SECONDS:
        if since > LINGER_SECONDS or killed.is_set():
            _signal_group(group, signal.SIGKILL)
            # Their children become ours when they end, and are met in the next round.
            for pid in _list_children():
                ended.add(pid)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
        time.sleep(0.01)
    _signal_group(group, signal.SIGKILL)
    return len(ended)


def _list_children() -> list[int]:
    """Processes whose parent this is; none where there is no /proc."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # `12 (a name, with any character) S PARENT ...`
            if int(entry.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(entry.parent.name))
    return found


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _die_with_parent() -> None:
    """In the program, before it begins: should this process be killed alone, the program goes with it."""
    _control_process(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _control_process(option: int, value: int) -> None:
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _say(channel: int, **facts: int | None) -> None:
    with contextlib.suppress(OSError):
        os.write(channel, (json.dumps(facts) + "\n").encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])

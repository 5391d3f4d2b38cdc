"""Workers are real processes: their events arrive, their cost is measured outside, and none outlives its parent."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tunesmith.core.errors import ArmFailed
from tunesmith.core.events import Event
from tunesmith.frameworks import logs, process
from tunesmith.frameworks.process import ProcessUse, run_process


def run(
    code: str, log: Path, *, stop: threading.Event | None = None, idle_seconds: float = 30
) -> tuple[ProcessUse, list[Event]]:
    events: list[Event] = []
    argv = [sys.executable, "-c", code]
    stopper = stop or threading.Event()
    use = run_process(
        argv, log=log, task="lora seed 0", on_event=events.append, stop=stopper, idle_seconds=idle_seconds
    )
    return use, events


def is_alive(pid: int) -> bool:
    """False for a process that is gone or only waits for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_events_arrive_in_order_and_noise_is_dropped(tmp_path: Path) -> None:
    code = (
        "import json\n"
        "print('not json'); print(json.dumps([1])); print(json.dumps({'kind': 'step', 'done': 1, 'total': 2}))\n"
        "print(json.dumps({'kind': 'step', 'done': 2, 'total': 2, 'unknown': 1}))"
    )
    use, events = run(code, tmp_path / "log.txt")
    assert use.exit_code == 0
    assert [(event.done, event.total) for event in events] == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"done": "many"},
        {"kind": "dance"},
        {"text": ["a"]},
        {"loss": None, "total": 1.5},
        {"done": 10**400},
        {"loss": 10**400},
        {"eta_seconds": float("inf")},
        {"loss": float("nan")},
    ],
)
def test_an_event_of_other_types_is_noise(tmp_path: Path, wrong: dict[str, object]) -> None:
    lines = [json.dumps({"kind": "step", "done": 1} | change) for change in (wrong, {})]
    _, events = run(f"print({lines[0]!r}); print({lines[1]!r})", tmp_path / "log.txt")
    assert events == [Event("step", done=1)]


def test_what_would_act_on_a_terminal_is_cut_from_what_is_shown(tmp_path: Path) -> None:
    text = "\x1b[31mred\x1b[0m\x00 \x1b]0;title\x07\x9b1mend\r"
    _, events = run(
        f"import json; print(json.dumps({{'kind': 'note', 'text': {text!r}}}))", tmp_path / "log.txt"
    )
    assert [event.text for event in events] == ["red 1mend"]


def test_cpu_seconds_and_peak_memory_are_the_workers_own(tmp_path: Path) -> None:
    code = (
        "import time; x = bytearray(200 << 20); end = time.process_time() + .5\n"
        "while time.process_time() < end: pass"
    )
    use, _ = run(code, tmp_path / "log.txt")
    assert 0.4 < use.cpu_seconds < 2
    assert 200 << 20 < use.peak_bytes < 400 << 20


def test_a_crash_is_one_line_naming_the_log(tmp_path: Path) -> None:
    with pytest.raises(ArmFailed, match=r"lora seed 0: ended with exit code 3\. Its log: .*log\.txt"):
        run("import sys; print('why', file=sys.stderr); sys.exit(3)", tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text() == "why\n"


def test_the_workers_own_error_is_passed_on(tmp_path: Path) -> None:
    code = "import json, sys; print(json.dumps({'kind': 'failed', 'text': 'rows.jsonl:3: no answer'})); sys.exit(2)"
    with pytest.raises(ArmFailed, match=r"rows\.jsonl:3: no answer"):
        run(code, tmp_path / "log.txt")


def test_a_silent_worker_is_ended(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ArmFailed, match="silent for too long"):
        run("import time; time.sleep(60)", tmp_path / "log.txt", idle_seconds=0.5)
    assert time.monotonic() - started < 10


def test_a_worker_that_only_prints_is_ended_too(tmp_path: Path) -> None:
    code = "import sys, time\nwhile True: print('still here', file=sys.stderr); time.sleep(.05)"
    with pytest.raises(ArmFailed, match="silent for too long"):
        run(code, tmp_path / "log.txt", idle_seconds=0.5)


def test_stopping_lets_the_worker_save_first(tmp_path: Path) -> None:
    stop = threading.Event()
    saved = tmp_path / "saved"
    code = (
        "import signal, sys, time, pathlib\n"
        f"def save(*_): pathlib.Path({str(saved)!r}).write_text('x'); sys.exit(143)\n"
        'signal.signal(signal.SIGTERM, save); print(\'{"kind": "note"}\', flush=True); time.sleep(60)'
    )
    threading.Timer(1.5, stop.set).start()
    use, _ = run(code, tmp_path / "log.txt", stop=stop)
    assert use.exit_code == 143
    assert saved.exists()


def test_a_worker_that_ignores_the_request_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.5)
    stop = threading.Event()
    pid_file = tmp_path / "pid"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "deaf = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)'\n"
        "child = subprocess.Popen([sys.executable, '-c', deaf])\n"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    threading.Timer(1.5, stop.set).start()
    use, _ = run(code, tmp_path / "log.txt", stop=stop)
    assert use.exit_code == -9
    time.sleep(0.2)
    assert not is_alive(int(pid_file.read_text()))


# A child that leaves its parent's process group, session and pipes, as a daemon does. It notes its process id.
DETACHES = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    for fd in {closed}:
        os.close(fd)
    open({pid_file!r}, "w").write(str(os.getpid()))
    time.sleep(600)
    os._exit(0)
while not os.path.exists({pid_file!r}) or not open({pid_file!r}).read():
    time.sleep(0.01)
"""


@pytest.mark.parametrize("closed", [(), (0, 1, 2)], ids=["holding the pipes", "without pipes"])
def test_what_leaves_the_process_group_ends_with_the_worker_and_is_told(
    tmp_path: Path, closed: tuple[int, ...]
) -> None:
    pid_file = tmp_path / "pid"
    started = time.monotonic()
    use, events = run(DETACHES.format(closed=closed, pid_file=str(pid_file)), tmp_path / "log.txt")

    assert use.exit_code == 0
    assert not is_alive(int(pid_file.read_text()))
    assert time.monotonic() - started < 10
    (told,) = events
    assert told.kind == "warning"
    assert told.text.startswith("left a process running, ended now")


def test_all_of_a_worker_is_killed_with_whoever_started_it(tmp_path: Path) -> None:
    pid_file, worker_file = tmp_path / "pid", tmp_path / "worker"
    worker = DETACHES.format(closed=(), pid_file=str(pid_file)) + (
        f"open({str(worker_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    )
    starter = (
        "import sys, threading; from pathlib import Path; from tunesmith.frameworks.process import run_process\n"
        f"run_process([sys.executable, '-c', {worker!r}], log=Path({str(tmp_path / 'log.txt')!r}), task='t', "
        "on_event=print, stop=threading.Event())"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter])
    pids = [read_pid(file) for file in (worker_file, pid_file)]
    assert all(map(is_alive, pids))

    parent.kill()
    parent.wait()

    waited = time.monotonic() + 10
    while any(map(is_alive, pids)):
        assert time.monotonic() < waited, "something is left running"
        time.sleep(0.05)


def test_also_with_one_that_ended_before_it_heard_of_the_worker(tmp_path: Path) -> None:
    # What was said and never read resets the socket in place of ending it.
    pid_file = tmp_path / "pid"
    code = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    mine, theirs = socket.socketpair()
    number = str(theirs.fileno())
    command = [sys.executable, "-I", "-S", str(process._SUPERVISE), number, sys.executable, "-c", code]
    with theirs, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as supervisor:
        pid = read_pid(pid_file)
        mine.close()
        assert supervisor.wait(10) == 0
    assert not is_alive(pid)


def read_pid(file: Path) -> int:
    """The number in a file, once somebody has written it."""
    waited = time.monotonic() + 30
    while not file.exists() or not file.read_text():
        assert time.monotonic() < waited, f"{file.name} was not written"
        time.sleep(0.05)
    return int(file.read_text())


def test_a_worker_that_closes_its_pipes_and_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(ArmFailed, match="silent for too long"):
        run(
            "import os, time; os.close(1); os.close(2); time.sleep(600)", tmp_path / "log.txt", idle_seconds=1
        )


def test_a_program_that_cannot_be_run_is_an_os_error_with_its_name(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("no program")
    broken.chmod(0o755)
    for path, reason in ((broken, "Exec format error"), (tmp_path / "nowhere", "No such file")):
        with pytest.raises(OSError, match=reason) as caught:
            run_process([str(path)], log=tmp_path / "x.log", task="t", on_event=print, stop=threading.Event())
        assert caught.value.filename == str(path)


def test_an_endless_log_keeps_its_beginning_and_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_LOG_BYTES", 1 << 20)
    code = (
        "import sys; print('first', file=sys.stderr)\n"
        "for _ in range(400): sys.stderr.write('x' * 16384)\n"
        "for _ in range(400): sys.stderr.write('\\n' * 16384)\n"
        "print('\\nlast', file=sys.stderr)"
    )
    run(code, tmp_path / "log.txt")
    text = (tmp_path / "log.txt").read_text()
    assert len(text) < 2 << 20
    assert text.startswith("first\n")
    assert text.endswith("\nlast\n")
    assert re.search(r"^\[\d+,\d+,\d+ bytes left out\]$", text, re.MULTILINE)


def test_a_log_is_text_that_does_nothing_to_a_terminal(tmp_path: Path) -> None:
    said = b"a\x00b \x1b[31mred\x1b[0m\n 10%\r 20%\r\n\xff\x9b2J\x1b]0;title\x07end"
    run(f"import os; os.write(2, {said!r})", tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "ab red\n 20%\n\ufffd\ufffd2Jend\n"


def test_a_log_on_a_full_disk_stops_nobody(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "log.txt").symlink_to("/dev/full")
    use, _ = run("import sys; print('lost', file=sys.stderr)", tmp_path / "log.txt")
    assert use.exit_code == 0


def test_a_program_that_is_no_worker_gives_its_lines_and_all_of_them_to_the_log(tmp_path: Path) -> None:
    lines: list[str] = []
    code = "import os, sys; print(os.environ['SAID'], flush=True); print('to stderr', file=sys.stderr)"
    run_process(
        [sys.executable, "-c", code],
        log=tmp_path / "log.txt",
        task="install",
        on_event=lambda event: None,
        on_line=lines.append,
        stop=threading.Event(),
        environ={"SAID": "to stdout"},
    )
    assert sorted(lines) == ["to stderr", "to stdout"]
    assert sorted((tmp_path / "log.txt").read_text().splitlines()) == ["to stderr", "to stdout"]

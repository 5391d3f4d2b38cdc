"""Workers are real processes: their events arrive, their cost is measured outside, and none outlives its parent."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import pytest

from tunesmith.core.errors import ArmFailed
from tunesmith.core.events import Event
from tunesmith.frameworks import process
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
    "wrong", [{"done": "many"}, {"kind": "dance"}, {"text": ["a"]}, {"loss": None, "total": 1.5}]
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


def test_an_endless_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAX_LOG_BYTES", 1 << 20)
    run("import sys\nfor _ in range(400): sys.stderr.write('x' * 16384)", tmp_path / "log.txt")
    assert (tmp_path / "log.txt").stat().st_size < 2 << 20


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

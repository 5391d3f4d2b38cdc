"""`tunesmith answer` as a person meets it: results on stdout, progress and faults on stderr, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loopback import Loopback, Said, fail, say


def command(folder: Path, loopback: Loopback, *more: str) -> list[str]:
    rows = "".join(json.dumps({"prompt": f"Question {number}?"}) + "\n" for number in range(6))
    (folder / "prompts.jsonl").write_text(rows)
    return [
        *(sys.executable, "-m", "tunesmith.cli.main", "answer", "prompts.jsonl"),
        *("--endpoint", loopback.url, "--model", "large", "--out", "answers.jsonl", *more),
    ]


def run(folder: Path, loopback: Loopback, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, loopback, *more), cwd=folder, capture_output=True, text=True, check=False
    )


def test_a_summary_for_people_and_one_for_programs(tmp_path: Path, loopback: Loopback) -> None:
    loopback.script(*[say("yes")] * 5, say(""))
    first = run(tmp_path, loopback, "--parallel", "1")
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines() == ["answers.jsonl: 5 answered, 1 empty", "48 tokens asked, 24 answered"]
    assert "warning: 1 answer empty and left out: prompts.jsonl:6" in first.stderr
    loopback.script(say("yes"))
    second = run(tmp_path, loopback, "--json")
    found = json.loads(second.stdout)
    assert (found["schema"], found["kept"], found["answered"], found["empty"]) == (1, 5, 1, 0)
    assert found["out"] == "answers.jsonl"
    assert "counts" not in found


@pytest.mark.parametrize(
    ("said", "code", "finding"),
    [(fail(401, "no"), 2, "asks for a key (401: no)"), (fail(404), 2, "knows no model 'large'")],
)
def test_a_fault_is_one_line(tmp_path: Path, loopback: Loopback, said: Said, code: int, finding: str) -> None:
    loopback.script(said)
    failed = run(tmp_path, loopback)
    assert failed.returncode == code
    assert failed.stdout == ""
    assert failed.stderr.splitlines()[-1].startswith(f"error: {loopback.url}: {finding}")
    assert "Traceback" not in failed.stderr


def test_ctrl_c_ends_at_once_and_keeps_what_was_answered(tmp_path: Path, loopback: Loopback) -> None:
    loopback.answer = lambda number, _: say("yes") if number < 3 else Said(say("never"), seconds=30)
    process = subprocess.Popen(command(tmp_path, loopback), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    out = tmp_path / "answers.jsonl"
    while not out.is_file() or out.read_bytes().count(b"\n") < 3:
        time.sleep(0.02)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - started < 5
    assert process.returncode == 130
    assert "Traceback" not in said
    assert out.read_bytes().count(b"\n") == 3


def test_it_needs_no_torch(tmp_path: Path, loopback: Loopback) -> None:
    arguments = command(tmp_path, loopback)[3:]
    code = (
        "import sys; from tunesmith.cli.main import app\n"
        f"app({arguments!r}, standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=dict(os.environ), check=False)
    assert ran.returncode == 0

"""Comparisons as a person meets them at the command line: one JSON object, and signals that lose nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import script_framework
from left_running import list_left, mark_processes
from script_framework import BEGIN

JOB = """\
model: tunesmith/tiny
data: {train: rows.jsonl, split: {validation: 0.0, test: test.jsonl}}
method: {name: lora, rank: 4}
train: {steps: 1, evaluate_every: never, learning_rate: 1e-3}
evaluate: {max_new_tokens: 4, forgetting: false}
compare: {arms: [zero-shot, lora], seeds: [0]}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of eight rows to train on and two to judge."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "job.yaml").write_text(JOB)
    rows = [json.dumps({"prompt": f"Count to {n}:", "completion": f" {n}"}) for n in range(10)]
    (folder / "rows.jsonl").write_text("\n".join(rows[:8]))
    (folder / "test.jsonl").write_text("\n".join(rows[8:]))
    return folder


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tunesmith.cli.main", *arguments]
    return subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )


def finish(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = child.communicate(timeout=200)
    return child.returncode, out, err


def test_compare_and_report_print_the_same_json_object(folder: Path) -> None:
    code, out, err = finish(start("compare", "job.yaml", "--out", "run", "--json", cwd=folder))
    assert code == 0, err
    value = json.loads(out)
    assert out.count("\n") == 1
    assert [arm["name"] for arm in value["arms"]] == ["zero-shot", "lora"]
    assert {"schema", "metric", "verdict", "report", "warnings"} <= value.keys()
    assert (folder / "run" / "report.html").is_file()
    code, out, err = finish(start("report", "run", "--json", cwd=folder))
    assert (code, json.loads(out)) == (0, value), err
    code, out, err = finish(start("report", "run", "--markdown", cwd=folder))
    assert code == 0, err
    assert "| lora |" in out


def test_a_failed_arm_is_in_the_json_and_the_exit_code(folder: Path) -> None:
    arm = "[zero-shot, {name: broken, method: full, learning_rate: 1e30}]"
    arguments = [
        "compare",
        "job.yaml",
        "--out",
        "failed",
        "--json",
        "--set",
        f"compare.arms={arm}",
        "--set",
        "train.steps=3",
    ]
    code, out, err = finish(start(*arguments, cwd=folder))
    assert code == 1, err
    value = json.loads(out)
    assert value["verdict"].startswith("No trained arm has a result (broken failed)")
    assert [line for line in err.splitlines() if line.count("broken seed 0") > 1] == []


def test_demo_prints_one_json_object(folder: Path) -> None:
    changes = [
        "compare.arms=[zero-shot]",
        "compare.seeds=[0]",
        "evaluate.max_rows=2",
        "evaluate.max_new_tokens=4",
    ]
    arguments = [part for change in changes for part in ("--set", change)]
    code, out, err = finish(start("demo", "--out", "demo-run", "--json", *arguments, cwd=folder))
    assert code == 0, err
    assert [arm["name"] for arm in json.loads(out)["arms"]] == ["zero-shot"]


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_comparison_in_one_line_and_keeps_its_checkpoints(
    folder: Path, number: signal.Signals, expected: int
) -> None:
    name = f"cut-{expected}"
    long_run = ["--set", "train.steps=100000", "--set", "compare.arms=[lora]"]
    child = start("compare", "job.yaml", "--out", name, *long_run, cwd=folder)
    arm = folder / name / "arms" / "lora" / "seed-0"
    waited = time.monotonic() + 150
    while not (arm / "steps.jsonl").is_file() or not (arm / "steps.jsonl").stat().st_size:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < waited, "no step was taken"
        time.sleep(0.2)
    child.send_signal(number)
    code, out, err = finish(child)
    assert (code, out) == (expected, "")
    assert err.splitlines()[-1] == (
        "error: compare: interrupted; what is finished and every checkpoint is kept. "
        "Run the same command again to go on"
    )
    assert "Traceback" not in err
    assert list((arm / "checkpoints").glob("step-*"))
    assert not (arm / "run.json").exists()


# A framework that waits for ever, and so does its child, in a session of its own.
WAITS = (
    BEGIN
    + """\
import subprocess, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(os.path.join(task["scratch"], "ready"), "w").close()
time.sleep(600)
"""
)
COMPARE = """\
import sys
sys.path.insert(0, sys.argv.pop(1))
from script_framework import Script, add_environment
from tunesmith.cli.main import main
from tunesmith.frameworks.ports import PORTS
add_environment("axolotl")
PORTS["axolotl"] = Script("axolotl", sys.argv.pop(1))
main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_however_a_comparison_ends_nothing_of_its_frameworks_is_left_running(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    mark = mark_processes(monkeypatch)
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    arms = "compare.arms=[{method: lora, framework: axolotl}]"
    command = [sys.executable, "-c", COMPARE, str(Path(script_framework.__file__).parent), WAITS, "compare"]
    child = subprocess.Popen(
        [
            *command,
            "job.yaml",
            "--out",
            str(tmp_path / "out"),
            "--set",
            arms,
            "--set",
            "train.precision=fp32",
        ],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    waited = time.monotonic() + 150
    while not list(tmp_path.glob("out/arms/*/parity/parity/framework/ready")):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < waited, "the framework was not started"
        time.sleep(0.2)
    child.send_signal(number)
    child.wait(60)

    assert list_left(mark) == []
    _, err = child.communicate()
    assert child.returncode == code
    assert "Traceback" not in err
    if number == signal.SIGINT:
        assert err.splitlines()[-1].startswith("error: compare: interrupted; what is finished")

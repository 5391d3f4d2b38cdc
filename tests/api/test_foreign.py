"""Arms of other frameworks whose workers misbehave, and jobs that they cannot do: one line each, the others go on."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from left_running import list_left, mark_processes
from script_framework import BEGIN, Script, add_environment

import tunesmith
from tunesmith import api
from tunesmith.api.foreign import run_foreign
from tunesmith.api.pool import _has_gpu
from tunesmith.api.tasks import TrainTask, is_finished, read_tasks
from tunesmith.core.errors import ArmFailed, JobError, SetupError
from tunesmith.core.events import Event
from tunesmith.core.frameworks import FrameworkPages
from tunesmith.core.jsonl import read_json
from tunesmith.frameworks import process
from tunesmith.frameworks.ports import PORTS

# Real scripts, run by a real interpreter.
CRASHES = BEGIN + "os.abort()\n"
LEAVES_NOTHING = BEGIN
WAITS = BEGIN + "import time; time.sleep(600)\n"
# As our own engine's, which lies beside the first arm that trains like it, under the name that it was asked under.
LEAVES_ALL = (
    BEGIN
    + """\
path = task["parity"]
arms = os.path.join(os.path.dirname(path), "..", "..", "..")
record = json.load(open(os.path.join(arms, "lora-llamafactory", "parity", "reference", "parity.json")))
json.dump({**record, "framework": "axolotl"}, open(path, "w"))
"""
)
# Neither it nor its child, which is in a session of its own, ends when it is asked to.
DEAF = (
    BEGIN
    + """\
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(json.dumps({"kind": "progress", "task": task["label"], "text": "deaf"}), flush=True)
time.sleep(600)
"""
)
ORPHAN = """\
import subprocess
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
"""
# As far as a process can tell: the disk itself stays as it is.
FILLS_DISK = (
    BEGIN
    + """\
os.makedirs(os.path.join(task["scratch"], "output"))
for name in ("core", "output/checkpoint"):
    open(os.path.join(task["scratch"], name), "wb").write(bytes(1 << 20))
try:
    os.write(os.open("/dev/full", os.O_WRONLY), b"x")
except OSError as error:
    print(json.dumps({"kind": "failed", "text": f"OSError: {error}"}), flush=True)
sys.exit(1)
"""
)
LEAVES_NONSENSE = (
    BEGIN + 'open(task["parity"], "w").write(json.dumps({"schema": 1, "framework": "unsloth"}))\n'
)


def job(arms: list[Any], **more: Any) -> dict[str, Any]:
    return {
        "model": "tunesmith/tiny",
        "data": {"train": "tunesmith/tickets"},
        "method": {"name": "lora", "rank": 4},
        "train": {
            "steps": 1,
            "evaluate_every": "never",
            "batch_rows": 2,
            "learning_rate": 1e-3,
            "precision": "fp32",
        },
        "evaluate": {"max_rows": 3, "max_new_tokens": 2, "precision": "fp32", "forgetting": False},
        "compare": {"arms": arms, "seeds": [0]},
        **more,
    }


def arm(framework: str, **more: Any) -> dict[str, Any]:
    return {"method": "lora", "framework": framework, **more}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """One comparison of our own engine with three frameworks that fail, each in another way."""
    home, out = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("compare")
    scripts = {"llamafactory": CRASHES, "axolotl": LEAVES_NOTHING, "unsloth": LEAVES_NONSENSE}
    events: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(home))
        for name, text in scripts.items():
            patch.setitem(PORTS, name, Script(name, text))
            add_environment(name)
        tunesmith.compare(job(["lora", *map(arm, scripts)]), out=out, on_event=events.append)
    return out, events


@pytest.mark.parametrize(
    ("framework", "finding"),
    [
        ("llamafactory", "llamafactory failed, loading: ended with exit code -6"),
        ("axolotl", "ended without an error and left no parity record"),
        ("unsloth", "wrote a malformed parity record (parity.json: has no 'groups')"),
    ],
)
def test_a_worker_that_fails_is_one_line_naming_what_and_where(
    said: tuple[Path, list[Event]], framework: str, finding: str
) -> None:
    out, events = said
    lines = [e.text for e in events if e.kind == "failed" and e.task == f"lora-{framework} parity"]

    assert len(lines) == 1
    assert finding in lines[0]
    assert "\n" not in lines[0]
    log = Path(lines[0].rpartition("Its log: ")[2])
    assert log.is_relative_to(out)
    assert "what a framework says of itself" in log.read_text()


def test_the_other_arms_go_on_and_the_report_tells_of_the_failure(said: tuple[Path, list[Event]]) -> None:
    out, _ = said
    public = api.comparison_json(api.report(out), out)

    assert "nll" in public["arms"][0]["metrics"]
    assert not (out / "arms" / "lora-axolotl" / "seed-0" / "run.json").exists()
    assert any("lora-axolotl" in text for text in public["warnings"])


def test_each_framework_has_a_page_with_the_end_of_its_log(said: tuple[Path, list[Event]]) -> None:
    out, _ = said
    pages = FrameworkPages.from_json(read_json(out / "frameworks.json")).pages
    assert [page.framework for page in pages] == ["llamafactory", "axolotl", "unsloth"]
    for page in pages:
        assert "what a framework says of itself" in page.log
        assert str(out) not in json.dumps(read_json(out / "frameworks.json"))
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "not ranked: no result" in report
    assert "what a framework says of itself" in report


@dataclasses.dataclass
class Begun:
    """The parity run of the arm of Axolotl, to be run again by another script. log: what it prints."""

    task: TrainTask
    file: Path
    log: Path
    patch: pytest.MonkeyPatch
    mark: str
    events: list[Event] = dataclasses.field(default_factory=list[Event])

    def run(self, text: str, *, stop_at: str = "") -> None:
        """Whole, or until a phase of this name is told."""
        stop = threading.Event()

        def take(event: Event) -> None:
            self.events.append(event)
            if event.text == stop_at:
                stop.set()

        self.patch.setitem(PORTS, "axolotl", Script("axolotl", text))
        run_foreign(self.task, task_file=self.file, log=self.log, on_event=take, stop=stop, threads=1)


@pytest.fixture
def begun(said: tuple[Path, list[Event]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begun:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    add_environment("axolotl")
    file = said[0] / "arms" / "lora-axolotl" / "parity" / "parity" / "lora-axolotl-parity.tasks.json"
    (task,) = read_tasks(file)
    assert isinstance(task, TrainTask)
    return Begun(task, file, tmp_path / "x.log", monkeypatch, mark_processes(monkeypatch))


def test_an_interrupted_run_leaves_no_result_and_is_run_again(begun: Begun) -> None:
    begun.run(WAITS, stop_at="loading")
    assert not is_finished(begun.task)
    assert list_left(begun.mark) == []

    begun.run(LEAVES_ALL)
    assert is_finished(begun.task)


def test_one_that_ignores_being_asked_to_end_is_killed_with_its_children(begun: Begun) -> None:
    begun.patch.setattr(process, "GRACE_SECONDS", 0.5)
    begun.run(DEAF, stop_at="deaf")
    assert list_left(begun.mark) == []


def test_one_that_leaves_an_orphan_is_told_of_it_and_keeps_its_result(begun: Begun) -> None:
    begun.run(LEAVES_ALL + ORPHAN)
    assert is_finished(begun.task)
    assert list_left(begun.mark) == []
    (warning,) = [event.text for event in begun.events if event.kind == "warning"]
    assert warning == f"left a process running, ended now. Its log: {begun.log}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_what_it_filled_the_disk_with_is_deleted_when_it_fails(begun: Begun) -> None:
    with pytest.raises(ArmFailed, match=r"axolotl failed, loading: OSError: .*No space left on device"):
        begun.run(FILLS_DISK)
    left = Path(begun.task.out) / "framework"
    assert sorted(path.name for path in left.iterdir()) == ["task.json", "worker.py"]


def test_what_it_prints_is_kept_as_plain_text(begun: Begun) -> None:
    with pytest.raises(
        ArmFailed, match=r"axolotl failed, loading: ended with exit code 3\. Its log: .*x\.log"
    ):
        begun.run(BEGIN + "os.write(2, b'\\x00\\x1b[31mred\\x1b[2J\\n'); sys.exit(3)\n")
    assert begun.log.read_text(encoding="utf-8").endswith("\nred\n")


def test_an_interpreter_that_broke_meanwhile_is_named(begun: Begun, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("no program")
    broken.chmod(0o755)
    add_environment("axolotl", python=str(broken))
    finding = (
        f"lora-axolotl parity: axolotl failed, starting: {broken} does not run (Exec format error). "
        "Run: tunesmith frameworks doctor axolotl"
    )
    with pytest.raises(ArmFailed, match=re.escape(finding)):
        begun.run(LEAVES_ALL)


def test_our_own_engine_leaves_the_same_record_once_for_all_that_train_alike(
    said: tuple[Path, list[Event]],
) -> None:
    (reference,) = (said[0] / "arms").glob("*/parity/reference/parity.json")
    record = read_json(reference)

    assert reference.is_relative_to(said[0] / "arms" / "lora-llamafactory")
    assert record["framework"] == "tunesmith"
    assert len(record["steps"]) == 1
    assert len(record["steps"][0]["examples"]) == 2


def test_a_framework_that_is_not_installed_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))

    with pytest.raises(SetupError, match=r"trl: not installed\. Run: tunesmith frameworks install trl"):
        tunesmith.compare(job([arm("trl")]), out=tmp_path / "out")


def test_what_a_framework_cannot_do_is_told_before_anything_runs(tmp_path: Path) -> None:
    text = "compare.arms, lora-trl-rank8: train.memory_limit: TRL cannot be held to one; .*"
    bad = job([arm("trl", name="lora-trl-rank8")])
    bad["train"]["memory_limit"] = "10GiB"

    with pytest.raises(JobError, match=text):
        tunesmith.compare(bad, out=tmp_path / "out")
    assert not (tmp_path / "out" / "prepared").exists()


@pytest.mark.skipif(_has_gpu(), reason="what a CPU stands in the way of")
def test_what_a_framework_cannot_do_on_this_machine_is_told_before_anything_runs(tmp_path: Path) -> None:
    text = "compare.arms, lora-axolotl: train.precision: Axolotl has no bf16 on a CPU; .* Set train.precision: fp32"
    bad = job([arm("axolotl")])
    bad["train"]["precision"] = "bf16"

    with pytest.raises(JobError, match=text):
        tunesmith.compare(bad, out=tmp_path / "out")
    assert not (tmp_path / "out" / "prepared").exists()


@pytest.mark.slow
def test_a_framework_that_divides_each_forward_pass_by_its_own_tokens_gets_whole_steps(
    tmp_path: Path,
) -> None:
    wanted = job([arm("trl"), arm("axolotl")])
    wanted["train"]["batch_rows"] = 32
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
        for name in ("trl", "axolotl"):
            patch.setitem(PORTS, name, Script(name, CRASHES))
            add_environment(name)
        with pytest.raises(ArmFailed, match="every arm failed"):
            tunesmith.compare(wanted, out=tmp_path / "out")

    micro_rows = {
        name: read_json(
            tmp_path / "out" / "arms" / f"lora-{name}" / "parity" / "parity" / "handoff" / "handoff.json"
        )["handoff"]["micro_rows"]
        for name in ("trl", "axolotl")
    }
    assert micro_rows["axolotl"] == 32
    assert micro_rows["trl"] < 32

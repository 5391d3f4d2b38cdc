"""What is gathered of frameworks for the report: harmless logs, no folder of this machine, every arm."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tunesmith.api.pages import MAX_LINE, MAX_LOG_LINES, read_log_end, write_pages
from tunesmith.comparing.plan import plan_arms
from tunesmith.core.frameworks import FrameworkPage, FrameworkPages
from tunesmith.core.jsonl import read_json, write_json
from tunesmith.core.rundir import RunDir
from tunesmith.job.load import job_from

ARMS = plan_arms(
    job_from(
        {
            "model": "tunesmith/tiny",
            "data": {"train": "tunesmith/tickets"},
            "compare": {"arms": ["lora", {"method": "lora", "framework": "trl"}], "seeds": [0, 1]},
        }
    )
)


def gather(run: RunDir, *, samples: bool = True) -> FrameworkPage:
    write_pages(run, ARMS, samples=samples)
    (page,) = FrameworkPages.from_json(read_json(run.frameworks)).pages
    return page


def leave(run: RunDir, seed: int, *, record: bool = True, log: str = "", **more: Any) -> None:
    """What a training of `lora-trl` leaves."""
    folder = run.arm("lora-trl", seed).create()
    folder.framework.mkdir()
    if record:
        write_json(folder.record, {})
        write_json(folder.framework / "record.json", {"versions": {"trl": "1.16.0"}, **more})
    (folder.root / f"lora-trl-seed-{seed}.log").write_text(log, encoding="utf-8")


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))


def test_a_logs_end_is_harmless_and_bounded(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_bytes(
        b"lost\n" * 300_000
        + b"\x1b[31mred\x1b[0m\x00\n 10%|#\r100%|##########\r\n\n"
        + b"y" * 9999
        + b"\n\xff\n"
    )

    lines = read_log_end(log).split("\n")

    assert lines[-4:] == ["red", "100%|##########", "y" * (MAX_LINE - 1) + "…", "\ufffd"]
    assert len(lines) == MAX_LOG_LINES


def test_a_page_shows_no_folder_of_this_machine(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run").create()
    leave(
        run,
        0,
        log=f"wrote {run.root}/arms/lora-trl/x, loaded {Path.home()}/model\n",
        warnings=[f"\x1b[1m{run.root}/y is large"],
    )
    page = gather(run)

    assert page.log == "wrote DIR/arms/lora-trl/x, loaded ~/model"
    assert page.warnings == ("DIR/y is large",)
    assert page.versions == {"trl": "1.16.0"}
    assert page.log_file == "arms/lora-trl/seed-0/lora-trl-seed-0.log"


def test_the_log_of_the_training_that_failed_is_shown(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run").create()
    leave(run, 0, log="went well\n")
    leave(run, 1, record=False, log="out of memory\n")
    assert gather(run).log == "out of memory"


def test_without_samples_no_log_is_shown(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run").create()
    leave(run, 0, log="cannot tokenize 'a row that nobody else may read'\n")
    page = gather(run, samples=False)
    assert (page.log, page.log_file, page.versions) == ("", "", {"trl": "1.16.0"})


def test_an_arm_that_never_trained_shows_its_first_steps(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run").create()
    shown = run.parity_run("lora-trl", "parity").create()
    (shown.root / "lora-trl-parity.log").write_text("no such module\n", encoding="utf-8")
    page = gather(run)
    assert (page.log, page.fixed, page.title) == ("no such module", (), "TRL and PEFT")


def test_an_arm_that_left_nothing_has_a_page_all_the_same(tmp_path: Path) -> None:
    page = gather(RunDir(tmp_path / "run").create())
    assert (page.arm, page.log, page.log_file) == ("lora-trl", "", "")


def test_without_another_framework_nothing_is_left(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run").create()
    write_json(run.frameworks, {})
    write_pages(run, ARMS[:1], samples=True)
    assert not run.frameworks.exists()


def test_importing_it_takes_no_torch() -> None:
    import subprocess

    code = "import sys; import tunesmith.api.pages; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout.lower()) is False

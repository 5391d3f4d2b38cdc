"""A run folder has one owner, and an unwritable one is refused before any work."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.core.errors import RunDirError
from tunesmith.core.rundir import RunDir, as_rundir_error


def test_a_second_process_is_refused_naming_the_first(tmp_path: Path) -> None:
    second = (
        "from pathlib import Path; from tunesmith.core.rundir import RunDir\n"
        f"with RunDir(Path({str(tmp_path)!r})).lock(): pass"
    )
    with RunDir(tmp_path).lock():
        run = subprocess.run([sys.executable, "-c", second], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert f"in use by process {os.getpid()} on " in run.stderr
    free = subprocess.run([sys.executable, "-c", second], capture_output=True, text=True, check=False)
    assert free.returncode == 0


def test_a_folder_below_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirError, match="Give another --out"):
        RunDir(tmp_path / "file" / "run").create()


@pytest.mark.parametrize(
    ("number", "finding"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EROFS, "cannot be written"),
        (errno.EACCES, "cannot be written"),
    ],
)
def test_failed_writes_are_told_with_their_cure(number: int, finding: str) -> None:
    error = as_rundir_error(OSError(number, os.strerror(number)), Path("out"))
    assert finding in str(error)
    assert error.cure
    assert error.exit_code == 2


def test_clearing_leaves_nothing_that_a_run_wrote(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for path in (run.job, run.record, run.harness, run.answers, run.tasks, run.comparison):
        path.write_text("{}")
    run.clear()
    assert list(tmp_path.iterdir()) == []


def test_creating_leaves_no_trace(tmp_path: Path) -> None:
    RunDir(tmp_path / "a" / "b").create()
    assert list((tmp_path / "a" / "b").iterdir()) == []

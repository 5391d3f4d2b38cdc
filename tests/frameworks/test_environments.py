"""Environments as a person meets them: listed, examined, added, removed; and nothing of someone else's touched."""

from __future__ import annotations

import json
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from tiny_framework import Tiny, write_torch
from typer.testing import CliRunner

from tunesmith.cli.main import app
from tunesmith.core.errors import SetupError, TunesmithError
from tunesmith.frameworks import doctor as doctoring
from tunesmith.frameworks.adding import add_environment
from tunesmith.frameworks.doctor import examine, inspect_environment
from tunesmith.frameworks.environments import foreign_environ, frameworks_folder, require_environment
from tunesmith.frameworks.install import install_framework


def frameworks(*arguments: str) -> tuple[int, str]:
    """(exit code, stdout) of `tunesmith frameworks ...`; faults are raised, as `main` gets them."""
    done = CliRunner().invoke(app, ["frameworks", *arguments])
    if isinstance(done.exception, TunesmithError):
        raise done.exception
    return done.exit_code, done.stdout


def packages_of(python: str) -> Path:
    return next(Path(python).parents[1].glob("lib/python*/site-packages"))


@pytest.fixture
def own_environment(tmp_path: Path, tiny: Tiny) -> Path:
    """An environment made by hand, with another version of the framework: what `add` is for."""
    folder = tmp_path / "cluster"
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    tiny.release("0.9")
    for wheel in (
        tiny.wheels / "tiny-0.9-py3-none-any.whl",
        write_torch(tmp_path, version="2.12.0", cuda="13.0"),
    ):
        zipfile.ZipFile(wheel).extractall(packages)
    tiny.release("1.0")
    return folder / "bin" / "python"


def test_list_shows_ours_and_what_each_framework_has(tiny: Tiny) -> None:
    code, text = frameworks("list")
    assert code == 0
    assert [line.split()[0] for line in text.splitlines()] == [
        *("framework", "tunesmith", "trl", "llamafactory", "axolotl", "unsloth", "tiny"),
    ]
    assert "not installed" in text
    assert "(1.16.0)" in text
    install_framework("tiny")

    listed = json.loads(frameworks("list", "--json")[1])

    assert listed["trl"] == {"status": "not installed"}
    assert listed["tiny"]["status"] == "installed"
    assert listed["tiny"]["lock_is_current"]
    tiny.release("2.0")
    assert "lock has changed" in frameworks("list")[1]


def test_doctor_reports_versions_torch_and_size_of_what_works(tiny: Tiny) -> None:
    install_framework("tiny")

    code, text = frameworks("doctor", "tiny", "--json")

    found = json.loads(text)["tiny"]
    assert code == 0
    assert found["status"] == "ok"
    assert found["versions"] == {"tiny": "1.0", "needed": "1.0"}
    assert (found["torch"], found["cuda"], found["gpus"]) == ("2.13.0+cpu", None, [])
    assert found["size_bytes"] > 1000
    assert found["differences"] == found["problems"] == found["warnings"] == []


def test_doctor_ends_with_1_and_says_why_when_an_import_fails(tiny: Tiny) -> None:
    record = install_framework("tiny").record
    (packages_of(record.python) / "tiny" / "__init__.py").write_text(
        "import gone_missing\n", encoding="utf-8"
    )

    code, text = frameworks("doctor", "tiny")

    assert code == 1
    assert "tiny:train does not import: ModuleNotFoundError: No module named 'gone_missing'" in text


def test_doctor_tells_what_is_no_longer_as_locked(tiny: Tiny) -> None:
    record = install_framework("tiny").record
    for path in packages_of(record.python).glob("needed*"):
        path.unlink() if path.is_file() else [child.unlink() for child in path.iterdir()]
    found = examine("tiny")
    assert found is not None
    assert found.ok
    assert found.differences == ("needed is missing (lock: 1.0)",)

    tiny.release("2.0")
    found = examine("tiny")
    assert found is not None
    assert "tiny 1.0 (lock: 2.0)" in found.differences
    assert found.warnings == (
        "made from another lock than this version's; run: tunesmith frameworks install tiny",
    )


def test_doctor_of_an_interpreter_that_is_gone_is_a_problem_with_a_place(tiny: Tiny) -> None:
    record = install_framework("tiny").record
    Path(record.python).unlink()
    found = examine("tiny")
    assert found is not None
    assert found.problems == (f"its interpreter is gone ({record.python})",)
    with pytest.raises(SetupError, match=r"interpreter is gone .*Run: tunesmith frameworks install tiny"):
        require_environment("tiny")


@pytest.mark.parametrize(
    ("code", "finding"),
    [
        ("import os; os._exit(7)", "ended with exit code 7"),
        ("import sys; print('cannot go on'); sys.stdout.flush(); import os; os.abort()", "cannot go on"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
    ],
)
def test_an_import_that_ends_the_process_is_a_problem_of_one_line(
    tiny: Tiny, code: str, finding: str
) -> None:
    record = install_framework("tiny").record
    (packages_of(record.python) / "tiny" / "__init__.py").write_text(code, encoding="utf-8")
    (problem,) = inspect_environment("tiny", record.python).problems
    assert finding in problem
    assert "\n" not in problem


def test_an_import_that_hangs_is_ended(tiny: Tiny) -> None:
    record = install_framework("tiny").record
    (packages_of(record.python) / "tiny" / "__init__.py").write_text(
        "import time; time.sleep(600)", encoding="utf-8"
    )
    (problem,) = inspect_environment("tiny", record.python, timeout_seconds=0.5).problems
    assert "was silent for too long" in problem


def test_doctor_of_what_is_not_installed_says_how_to_install_it(tiny: Tiny) -> None:
    with pytest.raises(SetupError, match=r"tiny: not installed. Run: tunesmith frameworks install tiny"):
        frameworks("doctor", "tiny")
    with pytest.raises(
        SetupError, match=r"tini: no such framework; one of trl, .*tiny. Did you mean .tiny.\?"
    ):
        frameworks("doctor", "tini")


def test_doctor_of_ourselves_runs_in_this_interpreter() -> None:
    found = examine(doctoring.OWN)
    assert found is not None
    assert found.ok, found.problems
    assert found.python == sys.executable
    assert found.versions["torch"]


def test_an_added_environment_is_used_as_it_is_and_told_apart_from_the_lock(
    tiny: Tiny, own_environment: Path
) -> None:
    before = sorted(own_environment.parents[1].rglob("*"))

    code, text = frameworks("add", "tiny", "--python", str(own_environment), "--json")

    record = json.loads(text)
    assert code == 0
    assert (record["origin"], record["python"], record["build"]) == ("added", str(own_environment), "cuda")
    assert record["differences"] == [
        "torch 2.12.0 (lock: 2.13.0)",
        "tiny 0.9 (lock: 1.0)",
        "needed is missing (lock: 1.0)",
    ]
    assert require_environment("tiny").python == str(own_environment)
    assert [
        p for p in sorted(own_environment.parents[1].rglob("*")) if "__pycache__" not in p.parts
    ] == before
    with pytest.raises(SetupError, match=r"uses an environment of yours .*Run first"):
        install_framework("tiny")


def test_an_environment_without_the_framework_is_not_added(tiny: Tiny) -> None:
    with pytest.raises(SetupError, match=r"frameworks add tiny: tiny:train does not import.*Repair"):
        add_environment("tiny", sys.executable)
    with pytest.raises(SetupError, match=r"no-such-python does not run .*another --python"):
        add_environment("tiny", "no-such-python")
    assert tiny.environment.read() is None


def test_removing_an_added_environment_forgets_it_and_deletes_nothing(
    tiny: Tiny, own_environment: Path
) -> None:
    add_environment("tiny", str(own_environment))

    assert tiny.environment.remove() == []

    assert tiny.environment.read() is None
    assert not tiny.environment.root.exists()
    assert own_environment.exists()


def test_remove_deletes_what_we_made_and_leaves_the_rest(tiny: Tiny) -> None:
    install_framework("tiny")
    kept = tiny.environment.root / "notes.txt"
    kept.write_text("mine", encoding="utf-8")

    code, text = frameworks("remove", "tiny", "--json")

    assert (code, json.loads(text)) == (0, {"removed": "tiny", "left": [str(kept)]})
    assert list(tiny.environment.root.iterdir()) == [kept]


def test_remove_refuses_a_folder_that_is_not_ours(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="tiny: not installed"):
        tiny.environment.remove()
    root = tiny.environment.root
    root.mkdir(parents=True)
    (root / "a").mkdir()
    with pytest.raises(SetupError, match="was not made by tunesmith; only our own folders"):
        tiny.environment.remove()
    assert (root / "a").exists()

    (root / "a").rmdir()
    root.rmdir()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "made-by-tunesmith").touch()
    root.symlink_to(theirs)
    with pytest.raises(SetupError, match="was not made by tunesmith"):
        tiny.environment.remove()


def test_a_slot_that_is_a_link_loses_the_link_and_not_what_it_points_to(tiny: Tiny, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    with tiny.environment.own():
        (tiny.environment.root / "a").symlink_to(theirs)
    tiny.environment.remove()
    assert theirs.is_dir()


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"schema": 1}', '{"schema": 99}'])
def test_a_record_that_cannot_be_read_names_the_file_and_the_cure(tiny: Tiny, text: str) -> None:
    with tiny.environment.own():
        tiny.environment.record_file.write_text(text, encoding="utf-8")
    with pytest.raises(SetupError, match=r"environment\.json: cannot be read .*frameworks remove tiny"):
        require_environment("tiny")
    tiny.environment.remove()
    assert tiny.environment.read() is None


def test_environments_lie_in_the_users_data_folder(tmp_path: Path) -> None:
    assert (
        frameworks_folder({"TUNESMITH_HOME": str(tmp_path), "XDG_DATA_HOME": "/x"}) == tmp_path / "frameworks"
    )
    if sys.platform.startswith("linux"):
        assert frameworks_folder({"XDG_DATA_HOME": "/x"}) == Path("/x/tunesmith/frameworks")
        default = Path.home() / ".local/share/tunesmith/frameworks"
        assert frameworks_folder({}) == frameworks_folder({"XDG_DATA_HOME": "relative"}) == default


def test_a_framework_does_not_see_our_own_pythons_paths(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    assert "PYTHONPATH" not in foreign_environ("tiny")
    assert foreign_environ("unsloth")["HF_HUB_OFFLINE"] == "1"

"""Environments are made by the real uv and pip, from wheels of a few bytes, and are there whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from left_running import list_left, mark_processes
from tiny_framework import Tiny, write_slow_source, write_torch, write_wheel

from tunesmith.core.errors import RunDirError, SetupError
from tunesmith.core.events import Event
from tunesmith.frameworks import install as installing
from tunesmith.frameworks.environments import require_environment
from tunesmith.frameworks.install import Stopped, install_framework
from tunesmith.frameworks.installers import find_installer

both = pytest.mark.parametrize("installer", ["uv", "pip"])


@pytest.fixture(autouse=True)
def has_installer(request: pytest.FixtureRequest) -> None:
    if "installer" in request.fixturenames and request.getfixturevalue("installer") == "uv":
        try:
            find_installer("uv")
        except SetupError:
            pytest.skip("uv is not here")


@both
def test_an_install_says_its_steps_and_leaves_what_the_lock_names(tiny: Tiny, installer: str) -> None:
    events: list[Event] = []

    done = install_framework("tiny", installer=installer, on_event=events.append)

    assert done.fresh
    assert done.record == tiny.environment.read() == require_environment("tiny")
    assert done.record.versions["tiny"] == "1.0"
    assert done.record.versions["torch"] == "2.13.0+cpu"
    assert done.record.installer.startswith(installer)
    assert done.record.differences == []
    assert done.record.size_bytes > 1000
    stages = [event.text for event in events if event.kind == "stage"]
    assert [stage[:3] for stage in stages] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert stages[1:3] == ["2/5  torch==2.13.0, the cpu build", "3/5  2 packages of its lock"]
    code = "import tiny, torch; print(torch.__version__)"
    said = subprocess.run([done.record.python, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "2.13.0+cpu\n"


def test_repairs_are_made_on_a_cpu_and_not_with_cuda(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = install_framework("tiny").record
    (package,) = Path(record.python).parents[1].glob("lib/python*/site-packages/tiny")
    assert not (package / "lib").exists()

    monkeypatch.setenv("TUNESMITH_TORCH", "cuda")
    monkeypatch.setenv("PIP_FIND_LINKS", f"{tiny.wheels} {tmp_path / 'cuda'}")
    record = install_framework("tiny").record
    (package,) = Path(record.python).parents[1].glob("lib/python*/site-packages/tiny")
    assert (package / "lib").exists()


@both
def test_a_gpu_gets_the_locked_cuda_build_although_a_cpu_build_lies_nearer(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installer: str
) -> None:
    monkeypatch.setenv("TUNESMITH_TORCH", "cuda")
    monkeypatch.setenv("PIP_FIND_LINKS", f"{tiny.wheels} {tmp_path / 'cuda'}")

    events: list[Event] = []

    record = install_framework("tiny", installer=installer, on_event=events.append).record

    assert (record.torch, record.build) == ("2.13.0", "cuda")
    (warning,) = [event.text for event in events if event.kind == "warning"]
    assert warning == "torch 2.13.0 sees no GPU: is the driver new enough for CUDA 13.0?"


@both
def test_without_a_cpu_build_in_find_links_torch_comes_from_the_cpu_index(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installer: str
) -> None:
    (tiny.wheels / "torch-2.13.0+cpu-py3-none-any.whl").unlink()
    wheel = write_torch(tmp_path / "elsewhere", version="2.13.0+cpu", cuda=None)
    page = tmp_path / "index" / "torch" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="{wheel.as_uri()}">{wheel.name}</a>', encoding="utf-8")
    monkeypatch.setenv("TUNESMITH_TORCH_INDEX", (tmp_path / "index").as_uri())

    assert install_framework("tiny", installer=installer).record.torch == "2.13.0+cpu"


def test_with_no_cpu_build_anywhere_both_places_are_named_and_nothing_is_left(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny.wheels / "torch-2.13.0+cpu-py3-none-any.whl").unlink()
    monkeypatch.setenv("TUNESMITH_TORCH_INDEX", (tmp_path / "empty").as_uri())

    with pytest.raises(
        SetupError, match=r"step 2 of 5 \(torch==2\.13\.0\): no CPU build .*PIP_FIND_LINKS"
    ) as caught:
        install_framework("tiny")

    assert (tmp_path / "empty").as_uri() in str(caught.value)
    assert tiny.slots() == []


def test_a_cuda_build_on_a_machine_without_a_gpu_is_refused_with_the_cure(tiny: Tiny) -> None:
    (tiny.wheels / "torch-2.13.0+cpu-py3-none-any.whl").unlink()
    write_torch(tiny.wheels, version="2.13.0", cuda="13.0")

    with pytest.raises(SetupError, match=r"torch 2\.13\.0 for CUDA 13\.0 came, .*TUNESMITH_TORCH=cuda"):
        install_framework("tiny")

    assert tiny.slots() == []


def test_a_second_install_does_nothing_until_the_lock_changes(tiny: Tiny) -> None:
    first = install_framework("tiny").record
    again = install_framework("tiny")
    assert (again.fresh, again.record) == (False, first)
    assert not install_framework("tiny", python=sys.executable).fresh
    with pytest.raises(SetupError, match="no-such-python is no Python that runs"):
        install_framework("tiny", python="no-such-python")

    tiny.release("2.0")
    changed = install_framework("tiny")

    assert changed.fresh
    assert changed.record.versions["tiny"] == "2.0"
    assert [first.slot, changed.record.slot] == ["a", "b"]
    assert tiny.slots() == ["b"]
    assert install_framework("tiny", again=True).record.slot == "a"


@both
def test_a_file_that_is_not_the_locked_one_is_refused_and_the_old_environment_stays(
    tiny: Tiny, installer: str
) -> None:
    before = install_framework("tiny").record
    tiny.release("2.0")
    write_wheel(tiny.wheels, "tiny", "2.0", {"tiny/__init__.py": "def train(): steal()\n"})

    with pytest.raises(SetupError) as caught:
        install_framework("tiny", installer=installer)

    told = str(caught.value)
    assert told.startswith(
        "frameworks install tiny: step 3 of 5 (2 packages of its lock): a package is not the one"
    )
    assert str(tiny.environment.log) in told
    assert "\n" not in told
    assert tiny.environment.read() == before
    assert tiny.slots() == [before.slot]
    assert Path(before.python).exists()


def test_a_package_that_no_index_has_is_named(tiny: Tiny) -> None:
    next(tiny.wheels.glob("needed-*")).unlink()

    with pytest.raises(SetupError, match=r"step 3 of 5 .*: there is no needed"):
        install_framework("tiny")


def test_what_does_not_import_is_no_environment(tiny: Tiny) -> None:
    before = install_framework("tiny").record
    tiny.release("2.0", code="raise RuntimeError('no CUDA runtime\\nmore')\n")

    with pytest.raises(
        SetupError, match=r"step 5 of 5 .*tiny:train does not import: RuntimeError: no CUDA runtime"
    ):
        install_framework("tiny")

    assert tiny.environment.read() == before
    assert tiny.slots() == [before.slot]


def test_what_a_killed_install_left_is_swept_by_the_next(tiny: Tiny) -> None:
    with tiny.environment.own():
        (tiny.environment.root / "a" / "lib").mkdir(parents=True)
    assert tiny.environment.read() is None

    assert install_framework("tiny").record.slot == "a"
    assert not (tiny.environment.root / "a" / "lib").is_symlink()
    assert tiny.slots() == ["a"]


def test_two_installs_at_once_are_refused(tiny: Tiny) -> None:
    with tiny.environment.own(), pytest.raises(RunDirError, match=r"in use by process \d+.*Wait until"):
        install_framework("tiny")


def test_a_disk_too_small_is_refused_before_anything_is_made(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installing, "CUDA_GIB", 1e9)
    monkeypatch.setenv("TUNESMITH_TORCH", "cuda")

    with pytest.raises(SetupError, match=r"GiB are free; Tiny needs .* GiB\. Free some space"):
        install_framework("tiny")

    assert tiny.slots() == []


@both
def test_a_stop_in_the_middle_of_a_step_leaves_the_old_environment_alone(
    tiny: Tiny, tmp_path: Path, installer: str
) -> None:
    before = install_framework("tiny").record
    sign = tmp_path / "building"
    tiny.lock(write_slow_source(tiny.wheels, "slow", "1.0", sign=sign))
    stop = threading.Event()
    threading.Thread(target=_set_when_there, args=(sign, stop), daemon=True).start()

    with pytest.raises(Stopped):
        install_framework("tiny", installer=installer, stop=stop)

    assert tiny.environment.read() == before
    assert tiny.slots() == [before.slot]


def cut_install(tiny: Tiny, tmp_path: Path, number: signal.Signals) -> tuple[int, str]:
    """(exit code, stderr) of the command, which got a signal while it built a package."""
    sign = tmp_path / "building"
    tiny.lock(write_slow_source(tiny.wheels, "slow", "1.0", sign=sign))
    script = (
        "import sys; sys.argv = ['tunesmith', 'frameworks', 'install', 'tiny']\n"
        "from pathlib import Path; from tunesmith.frameworks import catalog; from tiny_framework import TINY\n"
        f"catalog.LOCKS = Path({str(tiny.locks)!r}); catalog.FRAMEWORKS['tiny'] = TINY\n"
        "from tunesmith.cli.main import main; main()"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    ) as child:
        _wait_for(sign)
        child.send_signal(number)
        told = child.communicate(timeout=60)[1]
    return child.returncode, told


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_in_one_line_with_nothing_half_made(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    mark = mark_processes(monkeypatch)
    found, told = cut_install(tiny, tmp_path, number)

    assert found == code
    last = told.strip().splitlines()[-1]
    assert last == (
        "error: frameworks install tiny: interrupted; what was begun is deleted, "
        "what was there before is untouched. Run it again"
    )
    assert tiny.slots() == []
    assert tiny.environment.read() is None
    assert list_left(mark) == []


def test_a_command_that_is_killed_leaves_no_environment_and_nothing_running(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = mark_processes(monkeypatch)
    assert cut_install(tiny, tmp_path, signal.SIGKILL)[0] == -signal.SIGKILL

    assert list_left(mark) == []
    assert tiny.environment.read() is None
    tiny.release("1.0")
    assert install_framework("tiny").record.versions["tiny"] == "1.0"


def test_a_folder_of_someone_else_is_not_touched(tiny: Tiny) -> None:
    root = tiny.environment.root
    root.mkdir(parents=True)
    (root / "thesis.txt").write_text("mine", encoding="utf-8")

    with pytest.raises(SetupError, match="was not made by tunesmith"):
        install_framework("tiny")

    assert [path.name for path in root.iterdir()] == ["thesis.txt"]


def _wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.05)


def _set_when_there(path: Path, stop: threading.Event) -> None:
    _wait_for(path)
    stop.set()

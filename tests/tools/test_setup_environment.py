"""The set-up script, tried with real virtual environments and a wheel of a few bytes that says it is torch."""

import subprocess
import zipfile
from pathlib import Path

import pytest

import setup_environment as setup


def write_torch_wheel(folder: Path, *, version: str, cuda: str | None) -> Path:
    """A wheel that installs and imports like torch, and knows which CUDA it was built for."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"torch-{version}-py3-none-any.whl"
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("torch/__init__.py", "from torch import version\n__version__ = version.__version__\n")
        wheel.writestr("torch/version.py", f"__version__ = {version!r}\ncuda = {cuda!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def write_index(folder: Path, wheel: Path) -> str:
    """A package index as in PEP 503, in a folder. Returns its address."""
    page = folder / "torch" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="{wheel.as_uri()}">{wheel.name}</a>', encoding="utf-8")
    return folder.as_uri()


@pytest.fixture
def closed_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pip sees only what a test gives it: no configuration, no index that could be reached."""
    for name in (
        "PIP_EXTRA_INDEX_URL",
        "PIP_FIND_LINKS",
        "PIP_CONSTRAINT",
        "TUNESMITH_TORCH",
        "TUNESMITH_TORCH_INDEX",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "no-index").as_uri())


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose environment holds torch alone, so that nothing has to be fetched."""
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "pins.txt").write_text("torch==2.13.0\n", encoding="utf-8")
    recipe = setup.Recipe(folder=".venv", installs=(), decided_by=("pins.txt",), needed_gib=0.1)
    monkeypatch.setitem(setup.RECIPES, "runtime", recipe)
    return root


def ask_torch(checkout: Path) -> str:
    command = [
        setup.python_of(checkout / ".venv"),
        "-c",
        "import torch; print(torch.__version__, torch.version.cuda)",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.usefixtures("closed_network")
class TestTorchWithoutGpu:
    def test_comes_from_find_links_and_no_index_is_asked(self, checkout, tmp_path, monkeypatch):
        write_torch_wheel(tmp_path / "wheels", version="2.13.0+cpu", cuda=None)
        decoy = write_torch_wheel(tmp_path / "decoys", version="2.13.0", cuda="13.0")
        index = write_index(tmp_path / "index", decoy)
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))

        made = setup.set_up(
            "runtime", checkout=checkout, environ={"TUNESMITH_TORCH": "cpu", "TUNESMITH_TORCH_INDEX": index}
        )

        assert made
        assert ask_torch(checkout) == "2.13.0+cpu None"

    def test_comes_from_the_cpu_index_when_find_links_has_none(self, checkout, tmp_path):
        wheel = write_torch_wheel(tmp_path / "wheels", version="2.13.0+cpu", cuda=None)
        index = write_index(tmp_path / "index", wheel)

        setup.set_up(
            "runtime", checkout=checkout, environ={"TUNESMITH_TORCH": "cpu", "TUNESMITH_TORCH_INDEX": index}
        )

        assert ask_torch(checkout) == "2.13.0+cpu None"

    def test_stops_with_the_cure_when_it_turns_out_to_be_a_cuda_build(self, checkout, tmp_path):
        wheel = write_torch_wheel(tmp_path / "wheels", version="2.13.0", cuda="13.0")
        index = write_index(tmp_path / "index", wheel)
        environ = {"TUNESMITH_TORCH": "cpu", "TUNESMITH_TORCH_INDEX": index}

        with pytest.raises(setup.CannotSetUp, match=r"torch 2\.13\.0 for CUDA 13\.0.*Run make clean"):
            setup.set_up("runtime", checkout=checkout, environ=environ)

        assert not setup.is_ready("runtime", checkout=checkout, environ=environ)

    def test_stops_with_both_sources_named_when_neither_has_it(self, checkout, tmp_path):
        empty = (tmp_path / "empty").as_uri()

        with pytest.raises(
            setup.CannotSetUp, match=r"no CPU build of torch==2\.13\.0.*PIP_FIND_LINKS"
        ) as caught:
            setup.set_up(
                "runtime",
                checkout=checkout,
                environ={"TUNESMITH_TORCH": "cpu", "TUNESMITH_TORCH_INDEX": empty},
            )

        assert empty in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("closed_network")
def test_second_run_does_nothing_until_a_deciding_file_changes(checkout, tmp_path, monkeypatch):
    write_torch_wheel(tmp_path / "wheels", version="2.13.0+cpu", cuda=None)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    environ = {"TUNESMITH_TORCH": "cpu"}

    assert setup.set_up("runtime", checkout=checkout, environ=environ)
    assert not setup.set_up("runtime", checkout=checkout, environ=environ)
    (checkout / "pins.txt").write_text("torch==2.13.0  # looked at again\n", encoding="utf-8")
    assert setup.set_up("runtime", checkout=checkout, environ=environ)
    setup.python_of(checkout / ".venv").unlink()
    assert not setup.is_ready("runtime", checkout=checkout, environ=environ)


def test_environment_of_someone_else_is_left_alone(checkout):
    (checkout / ".venv").mkdir()

    with pytest.raises(setup.CannotSetUp, match="was not made by this script"):
        setup.set_up("runtime", checkout=checkout, environ={"TUNESMITH_TORCH": "cpu"})

    assert list((checkout / ".venv").iterdir()) == []


def test_old_python_is_refused_before_anything_is_made():
    with pytest.raises(setup.CannotSetUp, match=r"this is Python 3\.10\.13; Tunesmith needs 3\.11"):
        setup.check_python((3, 10, 13))


def test_full_disk_is_refused_before_anything_is_made(checkout, monkeypatch):
    recipe = setup.Recipe(folder=".venv", installs=(), decided_by=("pins.txt",), needed_gib=1e9)
    monkeypatch.setitem(setup.RECIPES, "runtime", recipe)

    with pytest.raises(setup.CannotSetUp, match=r"GiB are free on this disk; \.venv needs 1e\+09 GiB"):
        setup.set_up("runtime", checkout=checkout, environ={"TUNESMITH_TORCH": "cpu"})

    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        (
            "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(...)': /simple/rich/\n"
            "ERROR: Could not find a version that satisfies the requirement rich\n"
            "ERROR: No matching distribution found for rich\n",
            "no package index could be reached",
        ),
        ("ERROR: No matching distribution found for rensa==0.5.0\n", "there is no rensa==0.5.0 for Python"),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n",
            "disk is full",
        ),
        ("ERROR: something never seen before\nhint: look\n", "ERROR: something never seen before"),
        ("", "no output"),
    ],
)
def test_what_pip_printed_becomes_one_line(printed, told):
    line = setup.explain_failure(printed, doing="pip install")

    assert told in line
    assert "\n" not in line


def test_misspelt_setting_is_refused():
    with pytest.raises(setup.CannotSetUp, match="TUNESMITH_TORCH is 'gpu'; it can be cpu or cuda"):
        setup.choose_torch_build({"TUNESMITH_TORCH": "gpu"})


def test_unknown_environment_prints_the_usage(capsys):
    assert setup.main(["everything"]) == 2
    assert "runtime|dev|trl" in capsys.readouterr().err

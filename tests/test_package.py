"""What a user installs: the wheel holds the bundled model and data, the templates, and nothing else's files."""

import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import tunesmith

CHECKOUT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """File names inside a wheel built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_file_of_the_package_that_git_knows(wheel_names):
    listed = subprocess.run(
        ["git", "ls-files", "src"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    tracked = {name.removeprefix("src/") for name in listed.stdout.split("\n") if name}
    present = {name for name in tracked if (CHECKOUT / "src" / name).exists()}

    assert present <= wheel_names


@pytest.mark.parametrize(
    "name",
    [
        "tunesmith/py.typed",
        "tunesmith/demo/tiny/model.safetensors",
        "tunesmith/demo/tiny/tokenizer.json",
        "tunesmith/demo/tickets/train.jsonl",
        "tunesmith/demo/tickets/test.jsonl",
        "tunesmith/report/template.html.j2",
        "tunesmith/report/page.css",
    ],
)
def test_wheel_holds_what_the_demo_and_the_report_need(wheel_names, name):
    assert name in wheel_names


def test_wheel_holds_nothing_beside_the_package(wheel_names):
    assert {name.split("/")[0] for name in wheel_names} == {
        "tunesmith",
        f"tunesmith-{tunesmith.__version__}.dist-info",
    }


def test_version_is_the_same_in_the_code_and_in_the_metadata():
    assert tunesmith.__version__ == version("tunesmith")

"""A framework of a few hundred bytes, with a torch to match, which the real uv and pip install from a folder."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tunesmith.frameworks import catalog
from tunesmith.frameworks.catalog import Framework, Repair
from tunesmith.frameworks.environments import EnvironmentDir, open_environment

TORCH = """\
from types import SimpleNamespace as _Names
__version__ = {version!r}
version = _Names(cuda={cuda!r})
cuda = _Names(device_count=lambda: 0, get_device_name=lambda index: "")
"""
# Building it takes longer than any test waits, unless it is stopped.
SLOW_BACKEND = """\
import pathlib, time
def _wait(*args, **kwargs):
    pathlib.Path({sign!r}).touch()
    time.sleep(600)
prepare_metadata_for_build_wheel = build_wheel = _wait
"""


def write_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for file, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{file},sha256={digest},{len(text.encode())}\n"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in {**files, f"{info}/RECORD": record + f"{info}/RECORD,,\n"}.items():
            wheel.writestr(file, text)
    return path


def write_torch(folder: Path, *, version: str, cuda: str | None) -> Path:
    return write_wheel(
        folder, "torch", version, {"torch/__init__.py": TORCH.format(version=version, cuda=cuda)}
    )


def write_slow_source(folder: Path, name: str, version: str, *, sign: Path) -> Path:
    """A source distribution whose build never ends; it makes the file `sign` when it begins."""
    path = folder / f"{name}-{version}.tar.gz"
    project = '[build-system]\nrequires = []\nbuild-backend = "slow"\nbackend-path = ["."]\n[project]\n'
    files = {
        "pyproject.toml": project + f'name = "{name}"\nversion = "{version}"\n',
        "slow.py": SLOW_BACKEND.format(sign=str(sign)),
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
    }
    with tarfile.open(path, "w:gz") as archive:
        for file, text in files.items():
            facts = tarfile.TarInfo(f"{name}-{version}/{file}")
            facts.size = len(text.encode())
            archive.addfile(facts, io.BytesIO(text.encode()))
    return path


def lock_line(path: Path) -> str:
    name, version = path.name.removesuffix(".tar.gz").split("-")[:2]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{name}=={version.split('+')[0]} \\\n    --hash=sha256:{digest}\n"


@dataclass
class Tiny:
    """The framework `tiny`: `wheels` is the folder that pip looks in, `home` the user's data folder."""

    wheels: Path
    locks: Path
    home: Path

    @property
    def environment(self) -> EnvironmentDir:
        return open_environment("tiny")

    def release(self, version: str, *, code: str = "def train(): pass\n") -> None:
        """Write a version of it, and the lock that asks for that and for another package."""
        files = {"tiny/__init__.py": code, "tiny/lib/broken.py": ""}
        wheel = write_wheel(self.wheels, "tiny", version, files)
        needed = write_wheel(self.wheels, "needed", "1.0", {"needed.py": ""})
        self.lock(wheel, needed)

    def lock(self, *files: Path) -> None:
        (self.locks / "tiny.txt").write_text("".join(map(lock_line, files)), encoding="utf-8")

    def slots(self) -> list[str]:
        return sorted(path.name for path in self.environment.root.iterdir() if path.is_dir())


TINY = Framework(
    name="tiny",
    title="Tiny",
    imports=("tiny:train",),
    shown=("tiny", "needed"),
    pythons=((3, 11), (3, 13)),
    needed_gib=0.05,
    cpu_repairs=(Repair("tiny/lib", "to see it go"),),
)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Version 1.0 of it ready to be installed, without a GPU, an index or this machine's own configuration."""
    made = Tiny(tmp_path / "wheels", tmp_path / "locks", tmp_path / "home")
    made.locks.mkdir()
    for lock in catalog.LOCKS.glob("*.txt"):
        (made.locks / lock.name).symlink_to(lock)
    (made.locks / "torch.txt").unlink()
    write_torch(made.wheels, version="2.13.0+cpu", cuda=None)
    # What a GPU would take has the plain name, lies in another folder, and is what the lock's hash means.
    plain = write_torch(tmp_path / "cuda", version="2.13.0", cuda="13.0")
    (made.locks / "torch.txt").write_text(lock_line(plain).replace("==", "===", 1), encoding="utf-8")
    made.release("1.0")
    monkeypatch.setattr(catalog, "LOCKS", made.locks)
    monkeypatch.setitem(catalog.FRAMEWORKS, "tiny", TINY)
    for name in (
        "PIP_EXTRA_INDEX_URL",
        "PIP_CONSTRAINT",
        "TUNESMITH_TORCH_INDEX",
        "UV_INDEX",
        "UV_FIND_LINKS",
    ):
        monkeypatch.delenv(name, raising=False)
    settings = {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(made.wheels),
        "TUNESMITH_HOME": str(made.home),
        "TUNESMITH_TORCH": "cpu",
        "UV_CACHE_DIR": str(tmp_path / "uv-cache"),
        "UV_NO_CONFIG": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return made

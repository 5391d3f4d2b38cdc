"""Where frameworks' environments lie, and which one a job is run in.

    HOME/frameworks/trl/
      made-by-tunesmith    this folder is ours to change and delete
      environment.json     EnvironmentRecord: written last, and the only thing that says that an environment is there
      a/ or b/             the virtual environment; another is made in the free one, then the record names that
      install.log

HOME is $TUNESMITH_HOME, or the user's data folder. A virtual environment cannot be moved, because its scripts name
their interpreter by its path; so the record moves.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import DataError, SetupError
from tunesmith.core.records import EnvironmentRecord
from tunesmith.core.rundir import RunDir
from tunesmith.frameworks.catalog import FRAMEWORKS, find_framework

SLOTS = ("a", "b")


def frameworks_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Folder of all environments: inside $TUNESMITH_HOME, else where the system keeps a user's data."""
    if home := environ.get("TUNESMITH_HOME"):
        return Path(home).absolute() / "frameworks"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "tunesmith" / "frameworks"
    data = environ.get("XDG_DATA_HOME", "")
    # The specification has relative paths ignored.
    root = Path(data) if os.path.isabs(data) else Path.home() / ".local" / "share"
    return root / "tunesmith" / "frameworks"


@dataclass(frozen=True, slots=True)
class EnvironmentDir:
    """The folder of one framework."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def marker(self) -> Path:
        return self.root / "made-by-tunesmith"

    @property
    def record_file(self) -> Path:
        return self.root / "environment.json"

    @property
    def log(self) -> Path:
        return self.root / "install.log"

    def read(self) -> EnvironmentRecord | None:
        """The environment that is there, or None."""
        try:
            value = json.loads(self.record_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from None
        try:
            return EnvironmentRecord.from_json(value, place=str(self.record_file))
        except (DataError, AttributeError) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> SetupError:
        return SetupError(
            str(self.record_file),
            f"cannot be read ({error})",
            cure=f"Run: tunesmith frameworks remove {self.name}",
        )

    def write(self, record: EnvironmentRecord) -> None:
        """From one moment to the next, so that there is always one whole record or none."""
        part = self.record_file.with_suffix(".part")
        part.write_text(json.dumps(record.to_json(), indent=2) + "\n", encoding="utf-8")
        part.replace(self.record_file)

    @contextmanager
    def own(self) -> Generator[None]:
        """Make the folder, or find it ours, and keep other processes out while the block runs."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not self.is_ours() and any(self.root.iterdir()):
                raise self._not_ours()
            self.marker.touch()
        except OSError as error:
            raise SetupError(
                str(self.root),
                f"cannot be written ({error.strerror})",
                cure="Set TUNESMITH_HOME to a folder that can",
            ) from None
        with RunDir(self.root).lock(cure=f"Wait until that is done with {self.name}"):
            yield

    def is_ours(self) -> bool:
        return self.marker.is_file() and not self.root.is_symlink()

    def _not_ours(self) -> SetupError:
        return SetupError(
            str(self.root),
            "was not made by tunesmith",
            rule="only our own folders are changed or deleted",
            cure="Move it away, or set TUNESMITH_HOME to another folder",
        )

    def sweep(self, *, keep: str) -> None:
        """Delete the slots that no record names: left by a process that was killed, or replaced."""
        for slot in SLOTS:
            if slot != keep:
                delete_tree(self.root / slot)

    def remove(self) -> list[Path]:
        """Delete what we made. Returns what is left because it is not ours. Of an added one only the record goes."""
        if not self.is_ours():
            if self.root.exists():
                raise self._not_ours()
            raise SetupError(self.name, "not installed", cure="See: tunesmith frameworks list")
        with self.own():
            # The record first: what is half deleted must not look like an environment.
            self.record_file.unlink(missing_ok=True)
            self.sweep(keep="")
            for path in (self.record_file.with_suffix(".part"), self.log, self.marker, self.root / ".lock"):
                path.unlink(missing_ok=True)
        left = sorted(self.root.iterdir())
        if not left:
            self.root.rmdir()
        return left


def delete_tree(folder: Path) -> None:
    """A folder and all in it; a link is deleted, never what it points to."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def open_environment(name: str) -> EnvironmentDir:
    return EnvironmentDir(frameworks_folder() / find_framework(name).name)


def list_environments() -> dict[str, EnvironmentRecord | None]:
    """Framework -> its environment, or None where there is none."""
    return {name: open_environment(name).read() for name in FRAMEWORKS}


def require_environment(name: str) -> EnvironmentRecord:
    """The environment that a framework's jobs run in. Raises SetupError with the command that makes it."""
    record = open_environment(name).read()
    if record is None:
        raise SetupError(name, "not installed", cure=f"Run: tunesmith frameworks install {name}")
    if not Path(record.python).exists():
        cure = f"Run: tunesmith frameworks install {name}"
        if record.origin == "added":
            cure = f"Run: tunesmith frameworks add {name} --python PATH"
        raise SetupError(name, f"its interpreter is gone ({record.python})", cure=cure)
    return record


def foreign_environ(name: str) -> dict[str, str]:
    """This process's environment as a framework's interpreter should see it: without our own Python's paths."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    return {**kept, **(find_framework(name).environ if name in FRAMEWORKS else {})}

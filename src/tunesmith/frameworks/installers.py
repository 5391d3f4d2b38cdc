"""uv where it is found, pip otherwise, both with the package indexes and certificates that pip is configured to use.

uv reads none of pip's configuration, so `translate_settings` says the same in uv's variables. A variable of uv's that
is set already wins.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tunesmith.core.errors import SetupError

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
Build = Literal["cpu", "cuda", "default"]


@dataclass(frozen=True, slots=True)
class Installer:
    """A program that makes environments and fills them.

    program:  path of uv; empty for pip, which each environment brings.
    environ:  what it runs with.
    settings: pip's configuration: `find-links`, `index-url` ... in pip's own words.
    """

    name: Literal["uv", "pip"]
    program: str
    version: str
    environ: Mapping[str, str]
    settings: Mapping[str, str] = field(default_factory=dict[str, str])

    def make_command(self, folder: Path, *, python: str) -> list[str]:
        """argv that makes an empty virtual environment."""
        if self.name == "uv":
            return [self.program, "venv", "--no-project", "--python", python, str(folder)]
        return [python, "-m", "venv", str(folder)]

    def install_command(self, folder: Path, arguments: Sequence[str]) -> list[str]:
        """argv that installs exactly what it is told: what that needs in turn is in the lock."""
        python = str(python_of(folder))
        if self.name == "uv":
            # From inside the environment: a project in the working directory must not have a say.
            command = [self.program, "--directory", str(folder), "pip", "install", "--python", python]
        else:
            command = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
        return [*command, "--no-deps", *arguments]

    def only_from(self, index: str) -> tuple[list[str], dict[str, str]]:
        """(arguments, environment) that make this index the only one."""
        without = {k: v for k, v in self.environ.items() if k not in ("UV_INDEX", "UV_EXTRA_INDEX_URL")}
        without |= {"PIP_EXTRA_INDEX_URL": "", "PIP_NO_INDEX": "0"}
        without.pop("UV_NO_INDEX", None)
        option = "--default-index" if self.name == "uv" else "--index-url"
        return [option, index], without


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def find_installer(wanted: str | None = None, environ: Mapping[str, str] = os.environ) -> Installer:
    """uv if there is one, else pip; `wanted` or $TUNESMITH_INSTALLER insists on one of them."""
    wanted = wanted or environ.get("TUNESMITH_INSTALLER") or None
    if wanted not in (None, "uv", "pip"):
        raise SetupError("TUNESMITH_INSTALLER", f"is {wanted!r}", rule="uv or pip")
    settings = read_pip_settings(environ)
    if wanted != "pip":
        beside = Path(sys.executable).with_name("uv")
        program = shutil.which("uv", path=environ.get("PATH")) or (str(beside) if beside.exists() else "")
        if program:
            version = (_ask([program, "--version"], environ).split() or ["", "?"])[1]
            return Installer("uv", program, version, {**translate_settings(settings), **environ}, settings)
        if wanted == "uv":
            raise SetupError("uv", "not found on PATH", cure="Install uv, or leave out --installer uv")
    version = (_ask([sys.executable, "-m", "pip", "--version"], environ).split() or ["", ""])[1]
    return Installer("pip", "", version, dict(environ), settings)


# --- pip's configuration ----------------------------------------------------------------------------------------------


def read_pip_settings(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """pip's configuration for installing, its files and PIP_* variables taken together as pip does."""
    listing = ""
    for pip in ([sys.executable, "-m", "pip"], ["pip3"], ["pip"]):
        if listing := _ask([*pip, "config", "list"], environ):
            break
    settings = parse_pip_settings(listing)
    # Said again because a machine may have variables for pip and no pip that could be asked.
    for name, value in environ.items():
        if name.startswith("PIP_") and value and name != "PIP_CONFIG_FILE":
            settings[name.removeprefix("PIP_").lower().replace("_", "-")] = value
    return settings


def parse_pip_settings(listing: str) -> dict[str, str]:
    """What `pip config list` prints, by rank: variables before [install] before [global]."""
    settings: dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for name, value in re.findall(rf"^{section}\.([a-z-]+)=(.+)$", listing, flags=re.MULTILINE):
            try:
                settings[name] = str(ast.literal_eval(value))
            except (ValueError, SyntaxError):
                settings[name] = value
    return settings


def translate_settings(settings: Mapping[str, str]) -> dict[str, str]:
    """pip's settings as variables of uv. Anything that only concerns pip is left out."""
    said: dict[str, str] = {}
    for name, variable, separator in (
        ("index-url", "UV_DEFAULT_INDEX", ""),
        ("extra-index-url", "UV_INDEX", " "),
        ("find-links", "UV_FIND_LINKS", ","),
        ("trusted-host", "UV_INSECURE_HOST", " "),
        ("cert", "SSL_CERT_FILE", ""),
        ("client-cert", "SSL_CLIENT_CERT", ""),
        ("timeout", "UV_HTTP_TIMEOUT", ""),
        ("default-timeout", "UV_HTTP_TIMEOUT", ""),
    ):
        if value := settings.get(name):
            said[variable] = separator.join(value.split()) if separator else value
    if proxy := settings.get("proxy"):
        said |= {"HTTPS_PROXY": proxy, "HTTP_PROXY": proxy}
    if _is_on(settings.get("no-index", "")):
        said["UV_NO_INDEX"] = "1"
    if "UV_INDEX" in said:
        # As pip chooses: the best version wherever it is. The locks' hashes say which file is meant.
        said["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return said


def _is_on(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on", "y", "t")


# --- the machine ------------------------------------------------------------------------------------------------------


def choose_build(environ: Mapping[str, str] = os.environ) -> Build:
    """Which torch this machine needs: TUNESMITH_TORCH, else what the NVIDIA driver says."""
    asked = environ.get("TUNESMITH_TORCH", "")
    if asked in ("cpu", "cuda"):
        return asked
    if asked:
        raise SetupError(
            "TUNESMITH_TORCH", f"is {asked!r}", rule="cpu or cuda", cure="Correct it, or unset it"
        )
    if not sys.platform.startswith("linux"):
        return "default"
    return "cuda" if has_nvidia_gpu(environ) else "cpu"


def has_nvidia_gpu(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the driver lists a GPU. A machine with only the CUDA toolkit has none."""
    return "GPU" in _ask(["nvidia-smi", "-L"], environ)


def find_python(pythons: tuple[tuple[int, int], tuple[int, int]], *, wanted: str | None, place: str) -> str:
    """An interpreter of a version that the lock is good for: the one wanted, ours, or the newest on PATH."""
    oldest, newest = pythons
    rule = f"the lock is for Python {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}"
    if wanted is not None:
        path = shutil.which(wanted) or wanted
        version = ask_version(path)
        if version is None:
            raise SetupError(
                place, f"{wanted} is no Python that runs", cure="Give the path of an interpreter"
            )
        if not oldest <= version <= newest:
            raise SetupError(place, f"{wanted} is Python {version[0]}.{version[1]}", rule=rule)
        return path
    names = [sys.executable, *(f"python{oldest[0]}.{minor}" for minor in range(newest[1], oldest[1] - 1, -1))]
    for name in names:
        path = shutil.which(name)
        version = ask_version(path) if path else None
        if path and version and oldest <= version <= newest:
            return path
    raise SetupError(
        place, "no fitting Python was found", rule=rule, cure="Install one, or give --python PATH"
    )


def ask_version(python: str) -> tuple[int, int] | None:
    """(major, minor) of an interpreter, or None if it does not run."""
    found = _ask([python, "-c", "import sys; print(*sys.version_info[:2])"], os.environ).split()
    return (int(found[0]), int(found[1])) if len(found) == 2 else None


def _ask(command: Sequence[str], environ: Mapping[str, str]) -> str:
    """What a program prints; nothing if it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=dict(environ),
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

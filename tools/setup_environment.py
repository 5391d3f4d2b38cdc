"""Make a virtual environment in this checkout, or find that it is ready. Standard library only.

    python3 tools/setup_environment.py runtime    # .venv      what `tunesmith` needs
    python3 tools/setup_environment.py dev        # .venv      and what `make test` needs
    python3 tools/setup_environment.py trl        # .venv-trl  TRL and PEFT, for comparisons

Torch comes first and alone. Left to itself, pip on Linux takes the CUDA build and gigabytes of libraries with it,
so without an NVIDIA GPU this installs a CPU build: from the folders that pip is configured to look in
(`find-links`), else from PyTorch's CPU index. Everything else follows with pinned versions.

A stamp (a hash of what decides the result) lets the next run see in milliseconds that nothing has to be done.

Settings, all optional, from the environment:
    TUNESMITH_TORCH         cpu or cuda: take this build without looking for a GPU
    TUNESMITH_TORCH_INDEX   address used in place of PyTorch's CPU index (a mirror, say)

Exit status: 0 ready; 2 not ready, with the reason and the cure in one line on stderr; 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_GIB = 6.0  # what the CUDA build and its libraries take beyond the CPU build, rounded up
OLDEST_PYTHON = (3, 11)
MARKER = "tunesmith-environment.json"
LOG = "tunesmith-setup.log"


class CannotSetUp(Exception):
    """The environment could not be made; the text is one line with the cure."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What goes into one environment.

    folder: relative to the checkout.
    installs: what pip installs after torch: for each call what to say, and its arguments.
    decided_by: files whose content decides the result.
    needed_gib: disk space that the finished environment takes, measured and rounded up.
    contains: smaller environments that are ready once this one is.
    """

    folder: str
    installs: tuple[tuple[str, tuple[str, ...]], ...]
    decided_by: tuple[str, ...]
    needed_gib: float
    contains: tuple[str, ...] = ()


_PINNED = ("--constraint", "constraints.txt")
# The build tools go in first, pinned like the rest: an isolated build would fetch its own, unpinned.
_BUILD_TOOLS = ("build tools", (*_PINNED, "hatchling", "editables"))
_IN_PLACE = (*_PINNED, "--no-build-isolation", "--editable")
_OWN_FILES = ("pyproject.toml", "constraints.txt", "tools/setup_environment.py")
_TRL_FILE = "benchmarks/trl-requirements.txt"
RECIPES = {
    "runtime": Recipe(
        folder=".venv",
        installs=(_BUILD_TOOLS, ("tunesmith and what it needs, pinned", (*_IN_PLACE, "."))),
        decided_by=_OWN_FILES,
        needed_gib=1.5,
    ),
    "dev": Recipe(
        folder=".venv",
        installs=(
            _BUILD_TOOLS,
            ("tunesmith, what it needs and the test tools, pinned", (*_IN_PLACE, ".[dev]")),
        ),
        decided_by=_OWN_FILES,
        needed_gib=2.5,
        contains=("runtime",),
    ),
    "trl": Recipe(
        folder=".venv-trl",
        installs=(("TRL, PEFT and what they need, pinned", ("--requirement", _TRL_FILE)),),
        decided_by=(_TRL_FILE, "tools/setup_environment.py"),
        needed_gib=2.0,
    ),
}


# --- the whole --------------------------------------------------------------------------------------------------------


def set_up(name: str, *, checkout: Path = CHECKOUT, environ: Mapping[str, str] = os.environ) -> bool:
    """Bring the environment `name` into being. Returns False if it was ready already."""
    check_python()
    if is_ready(name, checkout=checkout, environ=environ):
        return False
    with only_one_at_a_time():
        if is_ready(name, checkout=checkout, environ=environ):  # made by the process that we waited for
            return False
        recipe = RECIPES[name]
        folder = checkout / recipe.folder
        started = time.monotonic()
        say(f"Setting up {recipe.folder} ({name}), once; details in {recipe.folder}/{LOG}")
        build = choose_torch_build(environ)
        check_disk(recipe, checkout=checkout, build=build)
        make_venv(folder, checkout=checkout)
        install_torch(folder, build=build, checkout=checkout, environ=environ)
        for says, arguments in recipe.installs:
            run_pip(folder, arguments, checkout=checkout, says=says)
        check_torch(folder, expect_cpu=build == "cpu")
        for done in (name, *recipe.contains):
            stamp = compute_stamp(RECIPES[done], checkout=checkout, environ=environ)
            stamp_path(folder, done).write_text(stamp + "\n", encoding="ascii")
        say(f"{recipe.folder} is ready after {time.monotonic() - started:.0f} s")
    return True


def is_ready(name: str, *, checkout: Path, environ: Mapping[str, str]) -> bool:
    """Whether the stamp says that nothing has changed since the environment was made."""
    recipe = RECIPES[name]
    folder = checkout / recipe.folder
    try:
        stamped = stamp_path(folder, name).read_text(encoding="ascii").strip()
    except OSError:
        return False
    # The interpreter may be gone although the stamp is there: its link dangles after a system upgrade.
    return python_of(folder).exists() and stamped == compute_stamp(recipe, checkout=checkout, environ=environ)


def compute_stamp(recipe: Recipe, *, checkout: Path, environ: Mapping[str, str]) -> str:
    """Hash of all that decides the environment: files, Python, where the checkout stands, the torch asked for."""
    digest = hashlib.sha256()
    asked = environ.get("TUNESMITH_TORCH", "")
    for part in (platform.python_version(), platform.machine(), str(checkout), asked, repr(recipe)):
        digest.update(part.encode() + b"\0")
    for file in recipe.decided_by:
        digest.update((checkout / file).read_bytes() + b"\0")
    return digest.hexdigest()


def stamp_path(folder: Path, name: str) -> Path:
    return folder / f"tunesmith-{name}.stamp"


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


@contextmanager
def only_one_at_a_time() -> Iterator[None]:
    """Wait while another set-up runs in this checkout (`make demo` beside `make test`)."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    with Path(__file__).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another set-up is running in this checkout; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- refusing early what would fail late ------------------------------------------------------------------------------


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> None:
    found = ".".join(map(str, version))
    if version < OLDEST_PYTHON:
        raise CannotSetUp(f"this is Python {found}; Tunesmith needs 3.11 or newer. {suggest_python()}")
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            package = f"python{version[0]}.{version[1]}-venv"
            raise CannotSetUp(
                f"this Python {found} has no module {module!r}. Install it (Debian, Ubuntu: apt install {package})"
            )


def suggest_python() -> str:
    """The cure for a wrong Python: one that is on PATH, or where to get one."""
    for minor in (13, 12, 11):
        name = f"python3.{minor}"
        if (
            shutil.which(name)
            and subprocess.run([name, "-V"], capture_output=True, check=False).returncode == 0
        ):
            return f"This machine has one: run make with PYTHON={name}"
    return "Install Python 3.11, 3.12 or 3.13 and run make with PYTHON=python3.13 (or which it is)"


def check_disk(recipe: Recipe, *, checkout: Path, build: str) -> None:
    if (checkout / recipe.folder / MARKER).exists():
        return  # an update, whose needs cannot be told; pip says it if they are not met
    needed_gib = recipe.needed_gib + (CUDA_GIB if build == "cuda" else 0)
    free_gib = shutil.disk_usage(checkout).free / 2**30
    if free_gib < needed_gib:
        raise CannotSetUp(
            f"{free_gib:.1f} GiB are free on this disk; {recipe.folder} needs {needed_gib:g} GiB. Free some space"
        )


# --- making it --------------------------------------------------------------------------------------------------------


def make_venv(folder: Path, *, checkout: Path) -> None:
    """An empty virtual environment, or the one that is there if it was made for this Python and this place."""
    # A moved checkout needs a new one: its scripts name their interpreter by absolute path.
    made_for = {"python": platform.python_version(), "checkout": str(checkout)}
    marker = folder / MARKER
    if folder.exists():
        if not marker.exists():
            raise CannotSetUp(
                f"{folder.name} exists and was not made by this script, which would change it. "
                f"Move it away, or delete it (make clean)"
            )
        if json.loads(marker.read_text(encoding="utf-8")) == made_for and python_of(folder).exists():
            return
        say(f"  {folder.name} was made for another Python or another place: starting afresh")
        shutil.rmtree(folder)
    folder.mkdir()
    marker.write_text(json.dumps(made_for) + "\n", encoding="utf-8")
    say(f"  virtual environment, Python {platform.python_version()}")
    command = [sys.executable, "-m", "venv", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotSetUp(explain_failure(done.stdout + done.stderr, doing="python -m venv"))


def choose_torch_build(environ: Mapping[str, str]) -> str:
    """'cuda', 'cpu', or 'default' on systems whose plain build has no CUDA in it."""
    asked = environ.get("TUNESMITH_TORCH", "")
    if asked not in ("", "cpu", "cuda"):
        raise CannotSetUp(f"TUNESMITH_TORCH is {asked!r}; it can be cpu or cuda. Correct it, or unset it")
    if asked:
        return asked
    if not sys.platform.startswith("linux"):
        return "default"
    return "cuda" if has_nvidia_gpu() else "cpu"


def has_nvidia_gpu() -> bool:
    """Whether the driver lists a GPU. A machine with only the CUDA toolkit has none."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def install_torch(folder: Path, *, build: str, checkout: Path, environ: Mapping[str, str]) -> None:
    """Torch alone, before anything can ask pip for 'some torch'. Its own needs follow with the rest."""
    if build != "cpu":
        run_pip(folder, (TORCH,), checkout=checkout, says=f"{TORCH}, the {build} build")
        return
    # First only what lies in pip's own find-links folders, if it has any: no index is asked.
    local = ("--no-index", "--no-deps", "--only-binary", ":all:", TORCH)
    try:
        run_pip(folder, local, checkout=checkout, says=f"{TORCH}, a CPU build from pip's find-links")
        return
    except CannotSetUp:
        pass
    index = environ.get("TUNESMITH_TORCH_INDEX") or TORCH_CPU_INDEX
    remote = ("--index-url", index, "--no-deps", "--retries", "2", "--only-binary", ":all:", TORCH)
    try:
        run_pip(folder, remote, checkout=checkout, says=f"  none there; from {index}")
    except CannotSetUp as error:
        raise CannotSetUp(
            f"no CPU build of {TORCH} in pip's find-links, nor from {index} ({error}). "
            f"Or put its wheel into a folder and set PIP_FIND_LINKS to it"
        ) from None


def check_torch(folder: Path, *, expect_cpu: bool) -> None:
    """The finished environment holds a torch that imports, and a CPU build where one was meant."""
    command = [str(python_of(folder)), "-c", "import torch; print(torch.__version__, torch.version.cuda)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise CannotSetUp(f"torch does not import: {reason}. Run make clean and try again")
    version, cuda = done.stdout.split()[-2:]
    if expect_cpu and cuda != "None":
        raise CannotSetUp(
            f"{folder.name} holds torch {version} for CUDA {cuda}, but this machine has no NVIDIA GPU. "
            f"Run make clean and try again, or keep the CUDA build with TUNESMITH_TORCH=cuda"
        )
    say(f"  torch {version} imports, CUDA: {cuda}")


# --- pip --------------------------------------------------------------------------------------------------------------


def run_pip(folder: Path, arguments: tuple[str, ...], *, checkout: Path, says: str) -> None:
    """One `pip install`, its output into the log and as progress. Raises CannotSetUp with the reason."""
    command = [str(python_of(folder)), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    say(f"  {says}")
    seen: list[str] = []
    progress = Progress()
    with (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(f"\n$ pip install {' '.join(arguments)}\n")
        with subprocess.Popen(
            [*command, *arguments],
            cwd=checkout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as pip:
            assert pip.stdout is not None
            for line in pip.stdout:
                log.write(line)
                seen.append(line)
                progress.show(line)
    progress.end()
    if pip.returncode:
        raise CannotSetUp(explain_failure("".join(seen), doing="pip install"))


class Progress:
    """What pip is doing: one line rewritten in place on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self.on_terminal = sys.stderr.isatty()
        self.started = self.last_shown = time.monotonic()
        self.num_packages = 0

    def show(self, line: str) -> None:
        match = re.match(r"\s*(Collecting|Downloading|Processing|Installing collected packages:) ?(.*)", line)
        if not match:
            return
        doing, what = match.groups()
        self.num_packages += doing == "Collecting"
        if doing.startswith("Installing"):
            doing, what = "Installing", f"{what.count(',') + 1} packages"
        now = time.monotonic()
        if not self.on_terminal and doing != "Installing" and now - self.last_shown < 10:
            return
        self.last_shown = now
        text = (
            f"    {now - self.started:3.0f} s  {doing} {Path(what).name if doing == 'Processing' else what}"
        )
        width = shutil.get_terminal_size().columns
        print(f"\r\033[K{text[: width - 1]}" if self.on_terminal else text, end="", file=sys.stderr)
        print("" if self.on_terminal else "\n", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.on_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# In this order: pip without network also says 'No matching distribution', a line later.
_FAILURES = (
    (r"No space left on device", "the disk is full. Free some space and run it again"),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError",
        "{doing}: the index's certificate is not trusted. Set PIP_CERT",
    ),
    (r"ProxyError", "{doing}: the proxy refuses. Correct HTTPS_PROXY, or pip's proxy setting"),
    (
        r"NewConnectionError|NameResolutionError|Temporary failure in name resolution|Network is unreachable"
        r"|ConnectTimeoutError|ReadTimeoutError|ConnectionResetError|Connection refused|Max retries exceeded",
        "{doing}: no package index could be reached. Connect to the network, or set pip's index-url to a mirror",
    ),
    (
        r"Permission denied|Read-only file system",
        "{doing}: this folder cannot be written. Use a checkout that can",
    ),
    (
        r"No matching distribution found for (?P<what>\S+)",
        "{doing}: there is no {what} for Python {python} on {machine}. Try PYTHON=python3.11, 3.12 or 3.13",
    ),
)


def explain_failure(output: str, *, doing: str) -> str:
    """The cause and the cure in one line, from what pip printed."""
    for pattern, text in _FAILURES:
        match = re.search(pattern, output)
        if match:
            return text.format(
                doing=doing,
                python=platform.python_version(),
                machine=platform.machine(),
                what=match.groupdict().get("what", ""),
            )
    errors = [line.strip() for line in output.splitlines() if line.lstrip().lower().startswith("error")]
    lines = errors or [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    return f"{doing} failed: {lines[-1]}. The whole output is in {LOG} inside the environment"


# --- command line -----------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in RECIPES:
        say(f"usage: python3 tools/setup_environment.py {'|'.join(RECIPES)}")
        return 2
    try:
        set_up(arguments[0])
    except CannotSetUp as error:
        say(f"set-up: {error}")
        return 2
    except OSError as error:
        say(f"set-up: {error}. Free some space or correct the permissions, and run it again")
        return 2
    except KeyboardInterrupt:
        say("set-up: interrupted; the next run goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""pip's configuration said to uv, the torch a machine needs, the Python a lock is good for, and the locks."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tunesmith.core.errors import SetupError
from tunesmith.frameworks.catalog import FRAMEWORKS, LOCKS, read_lock, torch_requirement
from tunesmith.frameworks.causes import explain_failure
from tunesmith.frameworks.installers import (
    choose_build,
    find_installer,
    find_python,
    parse_pip_settings,
    read_pip_settings,
    translate_settings,
)

LISTING = """\
:env:.find-links='/wheels'
global.cert='/certs.pem'
global.extra-index-url='file:///one file:///two'
global.find-links='/old'
global.index-url='https://mirror/simple'
install.no-index='true'
"""


def test_pips_configuration_is_read_by_rank_and_said_in_uvs_words() -> None:
    settings = parse_pip_settings(LISTING)
    assert settings["find-links"] == "/wheels"
    assert translate_settings(settings) == {
        "UV_DEFAULT_INDEX": "https://mirror/simple",
        "UV_INDEX": "file:///one file:///two",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/wheels",
        "SSL_CERT_FILE": "/certs.pem",
        "UV_NO_INDEX": "1",
    }


def test_several_folders_of_wheels_are_divided_as_each_wants() -> None:
    assert translate_settings({"find-links": "/a\n/b  /c"}) == {"UV_FIND_LINKS": "/a,/b,/c"}
    assert translate_settings({"no-index": "0"}) == {}
    assert translate_settings({}) == {}


def test_pips_file_is_read_and_its_variables_win(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text(
        "[global]\nfind-links = /file\nindex-url = https://file\n", encoding="utf-8"
    )
    environ = {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "PIP_FIND_LINKS": "/variable", "PATH": ""}
    settings = read_pip_settings(environ)
    assert (settings["find-links"], settings["index-url"]) == ("/variable", "https://file")


def test_a_variable_of_uvs_that_is_set_wins_over_pips(tmp_path: Path) -> None:
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\necho uv 9.9.9\n", encoding="utf-8")
    uv.chmod(0o755)
    environ = {"PATH": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "https://pip"}

    found = find_installer(environ=environ)
    assert (found.name, found.program, found.version) == ("uv", str(uv), "9.9.9")
    assert found.environ["UV_DEFAULT_INDEX"] == "https://pip"
    kept = find_installer(environ={**environ, "UV_DEFAULT_INDEX": "https://uv"})
    assert kept.environ["UV_DEFAULT_INDEX"] == "https://uv"
    assert find_installer("pip", environ=environ).name == "pip"
    with pytest.raises(SetupError, match="is 'conda'; uv or pip"):
        find_installer(environ={**environ, "TUNESMITH_INSTALLER": "conda"})


def test_a_machine_without_a_gpu_gets_a_cpu_build_and_one_with_it_cuda(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("elsewhere the plain build has no CUDA")
    assert choose_build({"PATH": ""}) == "cpu"
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: some card'\n", encoding="utf-8")
    smi.chmod(0o755)
    assert choose_build({"PATH": str(tmp_path)}) == "cuda"
    assert choose_build({"PATH": str(tmp_path), "TUNESMITH_TORCH": "cpu"}) == "cpu"
    smi.write_text("#!/bin/sh\necho 'GPU drivers are missing'; exit 9\n", encoding="utf-8")
    assert choose_build({"PATH": str(tmp_path)}) == "cpu"
    with pytest.raises(SetupError, match="TUNESMITH_TORCH: is 'rocm'; cpu or cuda"):
        choose_build({"TUNESMITH_TORCH": "rocm"})


def test_the_python_is_one_that_the_lock_is_good_for() -> None:
    here = sys.version_info[:2]
    assert find_python((here, here), wanted=None, place="tiny") == sys.executable
    later = (3, here[1] + 20)
    with pytest.raises(SetupError, match=r"tiny: no fitting Python was found; the lock is for Python 3\.\d+"):
        find_python((later, later), wanted=None, place="tiny")
    with pytest.raises(SetupError, match=rf"is Python 3\.{here[1]}; the lock is for"):
        find_python((later, later), wanted=sys.executable, place="tiny")
    with pytest.raises(SetupError, match="is no Python that runs"):
        find_python((here, here), wanted="/dev/null", place="tiny")


@pytest.mark.parametrize("name", ["torch", *FRAMEWORKS])
def test_every_lock_is_exact_hashed_and_names_no_place(name: str) -> None:
    text = (LOCKS / f"{name}.txt").read_text(encoding="utf-8")
    entries = re.findall(r"^(?!#)(\S.*)\n((?: {4}.*\n)*)", text, flags=re.MULTILINE)
    assert entries
    for requirement, hashes in entries:
        assert re.fullmatch(r"[a-z0-9-]+===?[0-9][a-z0-9.]* \\", requirement)
        assert re.fullmatch(r"(    --hash=sha256:[0-9a-f]{64}( \\)?\n)+", hashes)
    assert "://" not in text


def test_locks_hold_the_frameworks_and_leave_torch_to_the_machine() -> None:
    assert torch_requirement() == "torch==2.13.0"
    for framework in FRAMEWORKS.values():
        locked = read_lock(framework.lock)
        assert {"torch", "torchvision"}.isdisjoint(locked)
        assert not [name for name in locked if name.startswith("nvidia-") and name != "nvidia-ml-py"]
        assert set(framework.shown) <= locked.keys()
        # Triton belongs to torch's CUDA build, which asks for exactly one.
        assert locked.get("triton", "3.7.1") == read_lock(LOCKS / "torch.txt")["triton"] == "3.7.1"


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("ERROR: [Errno 28] No space left on device", "the disk is full"),
        ("error: Failed to fetch: `x`\n  cause: dns error", "no package index could be reached"),
        ("ERROR: No matching distribution found for needed==1.0", "there is no needed==1.0 for this Python"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM", "not the one that was locked"),
        ("noise\nerror: something new\nmore", "error: something new"),
        ("Resolved 2 packages\n", "ended with exit code 3; it last said: Resolved 2 packages"),
        ("", "ended with exit code 3"),
    ],
)
def test_a_failure_is_told_in_one_line(said: str, cause: str) -> None:
    finding, _ = explain_failure(said, otherwise="ended with exit code 3")
    assert cause in finding
    assert "\n" not in finding

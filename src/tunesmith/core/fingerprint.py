"""Hashes and descriptions that tie a number to what made it: rows, files, code, versions, hardware."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import struct
import subprocess
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

_VERSIONED = (
    "tunesmith",
    "torch",
    "torchao",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "peft",
)


def hash_row(ids: Sequence[int], mask: Sequence[int]) -> str:
    """16 hex digits of SHA-256 over (ids, mask): equal for equal training rows on every platform."""
    digest = hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids))
    digest.update(bytes(mask))
    return digest.hexdigest()[:16]


def hash_rows(row_ids: Iterable[str]) -> str:
    """SHA-256 over row hashes in order."""
    digest = hashlib.sha256()
    for row_id in row_ids:
        digest.update(row_id.encode())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hash_text(text: str) -> str:
    return hash_bytes(text.encode())


def hash_json(value: Any) -> str:
    return hash_text(json.dumps(value, sort_keys=True, ensure_ascii=False))


@cache
def hash_code() -> str:
    """SHA-256 over the package's own sources, so a result made by edited code is seen as such."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def describe_versions() -> dict[str, str]:
    """Installed versions of what can change a number, without importing any of it."""
    versions = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if commit := _read_commit():
        versions["commit"] = commit
    return versions


def _read_commit() -> str | None:
    """Commit of a source checkout, `+dirty` when it has changes; None for an installed package. A copy that has lost
    its history is told by the environment: TUNESMITH_COMMIT."""
    if told := os.environ.get("TUNESMITH_COMMIT"):
        return told
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        run = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None


@cache
def describe_hardware() -> dict[str, Any]:
    """CPU, cores and memory. A GPU is added by whoever has imported torch."""
    hardware: dict[str, Any] = {"machine": platform.machine(), "system": platform.system()}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        hardware["cpu"] = names[0] if names else platform.processor()
    except OSError:
        hardware["cpu"] = platform.processor()
    hardware["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        hardware["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return hardware

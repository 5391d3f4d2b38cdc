"""Checkpoints on disk: safetensors and JSON, atomic, hashed, never pickle.

    checkpoints/step-120/
      weights.safetensors  optimizer.safetensors  random.safetensors  [best.safetensors]
      state.json
      manifest.json        sha256 and size of every file above

A folder is made under another name, every file and the folder are fsynced, then renamed: whatever has the name
`step-N` was complete. Damage that happens later is found by the hashes; a damaged folder is renamed, kept for its
owner to look at, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.core.errors import RunDirError
from tunesmith.core.fingerprint import hash_file, hash_json
from tunesmith.core.jsonl import dump_json, fsync_folder
from tunesmith.core.rundir import as_rundir_error

CHECKPOINT_SCHEMA = 1
_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")
_DAMAGED = "damaged-"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
# JSON files, safetensors headers, folder entries.
_OVERHEAD_BYTES = 1 << 20


class DamagedCheckpoint(Exception):
    """What is wrong with one checkpoint folder. Callers turn it into a warning or a RunDirError."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint; tensors are read when asked for."""

    folder: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of one file, on the CPU; empty if the checkpoint has no such file."""
        path = self.folder / f"{name}.safetensors"
        return load_file(path) if path.exists() else {}


def _reach(point: str) -> None:
    """Die here like in a power cut when TUNESMITH_FAILPOINT names this point or its number in the process.

    Crash tests need exact places; nothing else sets the variable.
    """
    wanted = os.environ.get("TUNESMITH_FAILPOINT")
    if wanted is None:
        return
    _reach.count = getattr(_reach, "count", 0) + 1  # type: ignore[attr-defined]
    if wanted in (point, str(_reach.count)):  # type: ignore[attr-defined]
        os.kill(os.getpid(), signal.SIGKILL)


def write_checkpoint(
    parent: Path, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write `step-N` below `parent`, durable when this returns. Tensors stream one by one from their device.

    Raises RunDirError when the disk is full or read-only: earlier checkpoints are untouched, nothing partial is left.
    """
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    temporary = parent / f".step-{step}.tmp"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _check_free_bytes(parent, needed + _OVERHEAD_BYTES)
        _delete_leftovers(parent)
        temporary.mkdir()
        files = {
            f"{name}.safetensors": _write_tensors(temporary, name, group) for name, group in tensors.items()
        }
        files["state.json"] = _write_bytes(
            temporary, "state.json", (dump_json(state, indent=1) + "\n").encode()
        )
        manifest = {"schema": CHECKPOINT_SCHEMA, "step": step, "files": files}
        _write_bytes(temporary, "manifest.json", _render_manifest(manifest))
        fsync_folder(temporary)
        _reach("before rename")
        final = _free_name(parent, step)
        os.rename(temporary, final)
        _reach("after rename")
        fsync_folder(parent)
        _reach("after parent fsync")
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        failure = as_rundir_error(error, parent)
        finding = f"{failure.finding} (the checkpoint of step {step} takes {_in_megabytes(needed)})"
        raise RunDirError(failure.place, finding, rule=failure.rule, cure=failure.cure) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _in_megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _check_free_bytes(parent: Path, needed: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise RunDirError(
            str(parent),
            f"a checkpoint takes {_in_megabytes(needed)}, {_in_megabytes(free)} are free",
            cure="Free some space, or give --out on another disk; earlier checkpoints are untouched",
        )


def _free_name(parent: Path, step: int) -> Path:
    """`step-N`; a second one of the same step is `step-N-1`, so that no complete folder is ever replaced in place."""
    candidate, revision = parent / f"step-{step}", 0
    while candidate.exists():
        revision += 1
        candidate = parent / f"step-{step}-{revision}"
    return candidate


def _write_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """One safetensors file: 8 bytes of header length, JSON header, the data in header order."""
    header: dict[str, Any] = {}
    offset = 0
    for key, tensor in sorted(tensors.items()):
        size = tensor.numel() * tensor.element_size()
        entry = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        header[key] = entry
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _HashedFile(folder / f"{name}.safetensors") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in header:
            tensor = tensors[key].detach().cpu().contiguous().reshape(-1)
            file.write(tensor.view(torch.uint8).numpy().data)
    return file.entry


def _write_bytes(folder: Path, name: str, data: bytes) -> dict[str, Any]:
    with _HashedFile(folder / name) as file:
        file.write(data)
    return file.entry


def _render_manifest(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's one spelling, its own hash included: any other byte in the file is damage."""
    return (dump_json({**manifest, "sha256": hash_json(manifest)}, indent=1) + "\n").encode()


class _HashedFile:
    """A file that hashes what it is given and is on the disk when closed."""

    def __init__(self, path: Path) -> None:
        self._path, self._digest, self._size = path, hashlib.sha256(), 0
        # Unbuffered: a failed write raises here, not later in a destructor.
        self._handle = path.open("wb", buffering=0)

    def __enter__(self) -> _HashedFile:
        return self

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self._digest.update(view)
        self._size += len(view)
        while len(view):
            _reach(f"in write of {self._path.name}")
            view = view[self._handle.write(view) or 0 :]

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                _reach(f"before fsync of {self._path.name}")
                os.fsync(self._handle.fileno())
                _reach(f"after fsync of {self._path.name}")
        finally:
            self._handle.close()

    @property
    def entry(self) -> dict[str, Any]:
        return {"sha256": self._digest.hexdigest(), "bytes": self._size}


def list_checkpoints(parent: Path) -> list[Path]:
    """Complete checkpoint folders, newest step first. By step number, never by file times."""
    found = []
    for path in parent.iterdir() if parent.is_dir() else ():
        if match := _NAME.fullmatch(path.name):
            found.append((int(match[1]), int(match[2] or 0), path))
    return [path for *_, path in sorted(found, reverse=True)]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check every hash, then read the state. Raises DamagedCheckpoint saying which file is wrong and how."""
    try:
        raw = (folder / "manifest.json").read_bytes()
        manifest = json.loads(raw)
        del manifest["sha256"]
        spelling = _render_manifest(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"manifest.json can't be read ({type(error).__name__})") from None
    if raw != spelling:
        raise DamagedCheckpoint("manifest.json has changed since it was written")
    files, schema = manifest["files"], manifest["schema"]
    if schema != CHECKPOINT_SCHEMA:
        raise RunDirError(
            str(folder), f"checkpoint schema {schema!r}", rule=f"this version reads schema {CHECKPOINT_SCHEMA}",
            cure="Continue with the version that wrote it",
        )  # fmt: skip
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise DamagedCheckpoint(f"{name} has {size} bytes, not {expected['bytes']}")
            if hash_file(path) != expected["sha256"]:
                raise DamagedCheckpoint(f"{name} has changed since it was written")
        except OSError as error:
            raise DamagedCheckpoint(f"{name}: {error.strerror}") from None
    return Checkpoint(folder, json.loads((folder / "state.json").read_bytes()))


def open_newest(parent: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a warning for each damaged one that was moved aside.

    None only if there never was a checkpoint. Raises RunDirError if all are damaged: starting again at step 0 is
    something a person decides.
    """
    warnings: list[str] = []
    for folder in list_checkpoints(parent):
        try:
            return read_checkpoint(folder), warnings
        except DamagedCheckpoint as damage:
            aside = _set_aside(folder)
            warnings.append(f"checkpoint {folder.name} is damaged: {damage}; moved to {aside.name}")
    aside_before = sorted(parent.glob(f"{_DAMAGED}*")) if parent.is_dir() else []
    if aside_before:
        raise RunDirError(
            str(parent),
            f"no checkpoint is intact, {len(aside_before)} damaged"
            + (f" ({warnings[0]})" if warnings else ""),
            rule="a run never restarts at step 0 by itself",
            cure="Restore a checkpoint folder, or start anew with another --out",
        )
    return None, warnings


def _set_aside(folder: Path) -> Path:
    target, number = folder.with_name(f"{_DAMAGED}{folder.name}"), 0
    while target.exists():
        number += 1
        target = folder.with_name(f"{_DAMAGED}{folder.name}.{number}")
    try:
        os.rename(folder, target)
        fsync_folder(folder.parent)
    except OSError as error:
        raise as_rundir_error(error, folder) from None
    return target


def delete_old_checkpoints(parent: Path, *, keep: int) -> None:
    """Keep the newest `keep` checkpoints. Nothing is deleted unless the newest verifies.

    Raises RunDirError if it doesn't: what was just written can't be read back.
    """
    folders = list_checkpoints(parent)
    if len(folders) <= keep:
        return
    try:
        read_checkpoint(folders[0])
    except DamagedCheckpoint as damage:
        raise RunDirError(
            str(folders[0]), f"can't be read back: {damage}", rule="checkpoints are verified before older ones go",
            cure="Check the disk",
        ) from None  # fmt: skip
    try:
        for folder in folders[keep:]:
            doomed = folder.with_name(f".{folder.name}.deleted")
            # Renamed first: a crash while deleting must not leave half a folder under a name that counts.
            _reach("before delete")
            os.rename(folder, doomed)
            _reach("in delete")
            shutil.rmtree(doomed)
            _reach("after delete")
    except OSError as error:
        raise as_rundir_error(error, parent) from None


def _delete_leftovers(parent: Path) -> None:
    """Remove what a crash left behind: unfinished and half-deleted folders."""
    for pattern in (".step-*.tmp", ".step-*.deleted"):
        for path in parent.glob(pattern):
            shutil.rmtree(path)

"""Weights in and out of Hugging Face folders: safetensors only, checked before anything is built.

The header of a safetensors file (8 bytes of length, then JSON with dtype, shape and byte range of every tensor) is
read by ourselves first, so a truncated file or a wrong shape is told by name before any tensor is touched.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.core.errors import ModelError
from tunesmith.core.jsonl import fsync_folder, write_json
from tunesmith.core.rundir import as_rundir_error
from tunesmith.models.config import DecoderConfig, read_config_json

if TYPE_CHECKING:
    from tunesmith.models.causal_lm import CausalLM

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_DTYPE_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
# Buffers that old versions of transformers wrote and every reader recomputes.
_IGNORED = ("rotary_emb.inv_freq", "attention.masked_bias", "attn.bias", "attn.masked_bias")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: file, dtype as safetensors names it, shape."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file. Raises ModelError if the file is cut off or not of that format."""
    cure = "Download or copy the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, 100_000_000):
                raise ModelError(str(path), f"is not a whole safetensors file ({size} bytes)", cure=cure)
            header = json.loads(handle.read(length))
            if not isinstance(header, dict):
                raise ValueError("not a JSON object")
    except OSError as error:
        raise ModelError(str(path), error.strerror or str(error), cure="Check the path") from None
    except ValueError:
        raise ModelError(str(path), "has no readable safetensors header", cure=cure) from None
    stored, end = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
            count = _DTYPE_BYTES[entry["dtype"]]
        except (KeyError, TypeError, ValueError):
            raise ModelError(str(path), f"header entry of {name} is not understood", cure=cure) from None
        for extent in shape:
            count *= extent
        if last - first != count:
            raise ModelError(
                str(path),
                f"{name} takes {last - first} bytes, its shape {list(shape)} needs {count}",
                cure=cure,
            )
        stored[name] = StoredTensor(path, entry["dtype"], shape)
        end = max(end, last)
    if size != 8 + length + end:
        raise ModelError(
            str(path),
            f"is cut off or damaged: {size} bytes, its header promises {8 + length + end}",
            cure=cure,
        )
    return stored


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every stored tensor of a model folder, single file or sharded. Raises ModelError, also for pickle weights."""
    index = folder / INDEX
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if not index.exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise ModelError(
                str(folder / pickles[0]),
                "is a pickle file, which can run code when it is read",
                rule="weights are safetensors",
                cure="Convert the model to safetensors first",
            )
        raise ModelError(
            str(folder),
            f"has no {SINGLE}",
            rule="weights are safetensors",
            cure="Give the folder that holds the weights",
        )
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(
            str(index), "is not a safetensors index", rule="it maps tensor names to files"
        ) from None
    stored: dict[str, StoredTensor] = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file:
            raise ModelError(str(index), f"names a file outside the folder: {file}")
        stored |= read_header(folder / file)
    if missing := sorted(set(files) - set(stored)):
        raise ModelError(
            str(index), f"promises {missing[0]}, which no file holds", cure="Download the model again"
        )
    return stored


def check_tensors(
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    config: DecoderConfig,
    *,
    place: str,
) -> dict[str, str]:
    """Expected name -> stored name. Raises ModelError naming the tensor, and both shapes where they differ.

    A tied matrix may be stored under either of its two names.
    """
    chosen = {name: name for name in expected}
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if config.tied and embed not in stored and head in stored:
        chosen[embed] = head
    for name, source in chosen.items():
        if source not in stored:
            raise ModelError(
                place, f"tensor {name} {list(expected[name])} is missing", cure="Give a complete checkpoint"
            )
        if stored[source].shape != expected[name]:
            raise ModelError(
                place,
                f"tensor {source} has shape {list(stored[source].shape)}, config.json asks for {list(expected[name])}",
                rule="weights and config.json describe one model",
            )
        if not stored[source].dtype.startswith(("F", "BF")) or stored[source].dtype.startswith("F8"):
            raise ModelError(
                place,
                f"tensor {source} is {stored[source].dtype}",
                rule="weights are 16-, 32- or 64-bit floats",
                cure="Give the unquantised model",
            )
    known = set(chosen.values()) | ({head} if config.tied else set())
    for name in stored:
        if name not in known and not name.endswith(_IGNORED):
            raise ModelError(
                place,
                f"tensor {name} {list(stored[name].shape)} has no place in this architecture",
                rule="nothing of a checkpoint is dropped silently",
            )
    return chosen


def read_tensors(stored: Mapping[str, StoredTensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors in their stored dtype, on the CPU."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(stored[name].path, []).append(name)
    for path, members in by_file.items():
        with safe_open(path, framework="pt") as file:
            for name in members:
                found[name] = file.get_tensor(name)
    return found


def check_tied(tensors: Mapping[str, Tensor], *, place: str) -> None:
    """Raise ModelError if both names of a tied matrix are stored with different values."""
    embed, head = tensors.get("model.embed_tokens.weight"), tensors.get("lm_head.weight")
    if embed is not None and head is not None and not torch.equal(embed, head):
        raise ModelError(
            place,
            "config.json ties lm_head to embed_tokens, but the file stores two different matrices",
            cure="Set tie_word_embeddings to false in config.json, or remove the wrong tensor",
        )


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """One safetensors file, atomically. Raises RunDirError if the disk refuses."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            {"format": "pt"},
        )
        with temporary.open("rb") as handle:
            # safetensors makes files that only their owner reads; a model folder is for sharing.
            os.fchmod(handle.fileno(), 0o644)
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise as_rundir_error(error, path) from None
    finally:
        temporary.unlink(missing_ok=True)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, template and generation files unchanged: every small file that is neither weights nor config."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md") or path.name in (
            "LICENSE",
            "NOTICE",
        )
        skipped = path.name in ("config.json", INDEX) or path.name.startswith(("adapter_", "README", "."))
        if path.is_file() and wanted and not skipped:
            shutil.copyfile(path, folder / path.name)


def save_model(
    model: CausalLM, folder: Path, *, source_folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write the model without adapters (see lora.merge) as an ordinary Hugging Face folder.

    dtype: of the stored weights; default: what the source's config.json says.
    """
    stored = dtype or getattr(torch, "float32" if model.config.dtype == "auto" else model.config.dtype)
    write_model(
        model.weights(),
        folder,
        source_folder=source_folder,
        dtype=stored,
        config_changes={"vocab_size": model.config.vocab_size, "tie_word_embeddings": model.config.tied},
    )


def write_model(
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    *,
    source_folder: Path,
    dtype: torch.dtype,
    config_changes: Mapping[str, Any] | None = None,
) -> None:
    """An ordinary Hugging Face folder: weights in `dtype`, sharded above 5 GB, the source's other files unchanged.

    config.json is written last: a folder without it was interrupted and is refused by every reader.
    """
    config = read_config_json(source_folder) | dict(config_changes or {})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        _write_shards(tensors, folder, dtype)
        if source_folder.resolve() != folder.resolve():
            copy_companions(source_folder, folder)
        name = str(dtype).removeprefix("torch.")
        config["dtype"] = name
        if "torch_dtype" in config:
            config["torch_dtype"] = name
        write_json(folder / "config.json", config)
    except OSError as error:
        raise as_rundir_error(error, folder) from None


def _write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors:
        tensor = tensor.to(dtype)
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_tensors(shards[0], folder / SINGLE)
        (folder / INDEX).unlink(missing_ok=True)
        return
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    (folder / SINGLE).unlink(missing_ok=True)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

"""Weights in and out of Hugging Face folders: safetensors only, checked (`headers.py`) before anything is built."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.core.errors import ModelError
from tunesmith.core.jsonl import fsync_folder, write_json
from tunesmith.core.rundir import as_rundir_error
from tunesmith.models.config import CLASSIFIER, read_config_json
from tunesmith.models.headers import INDEX, SINGLE, StoredTensor

if TYPE_CHECKING:
    from tunesmith.models.causal_lm import CausalLM

SHARD_BYTES = 5 * 10**9


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
    from safetensors import SafetensorError
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
    except SafetensorError as error:
        raise as_rundir_error(_as_os_error(error), path) from None
    finally:
        temporary.unlink(missing_ok=True)


def _as_os_error(error: Exception) -> OSError:
    """safetensors tells a refused write in words only: `I/O error: No space left on device (os error 28)`."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number))


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


def save_classifier(model: CausalLM, folder: Path, *, source_folder: Path, pad_id: int | None) -> None:
    """Write a model with a score, adapters merged, as a Hugging Face folder for sequence classification.

    pad_id: by which readers find a padded row's last token.
    """
    assert model.score is not None
    score, head = model.score.weight.detach(), f"{model.head_name}.weight"
    architecture = next(iter(read_config_json(source_folder).get("architectures") or ()), "ForCausalLM")
    write_model(
        (*((name, tensor) for name, tensor in model.weights() if name != head), ("score.weight", score)),
        folder,
        source_folder=source_folder,
        dtype=getattr(torch, "float32" if model.config.dtype == "auto" else model.config.dtype),
        config_changes={
            "architectures": [architecture.replace("ForCausalLM", CLASSIFIER)],
            "vocab_size": model.config.vocab_size,
            "id2label": {"0": "score"},
            "label2id": {"score": 0},
            "pad_token_id": pad_id,
        },
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

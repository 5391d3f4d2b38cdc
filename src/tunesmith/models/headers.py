"""What a model folder holds, from its JSON and headers alone: without torch, so that it is looked at first.

The header of a safetensors file (8 bytes of length, then JSON with dtype, shape and byte range of every tensor) is
read by ourselves, so a truncated file or a wrong shape is told by name before any tensor is touched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.errors import ModelError
from tunesmith.models.config import DecoderConfig, load_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
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
_AGAIN = "Download or copy the file again"
# Buffers that old versions of transformers wrote and every reader recomputes.
_IGNORED = ("rotary_emb.inv_freq", "attention.masked_bias", "attn.bias", "attn.masked_bias")


# What other architectures call their embedding.
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: file, dtype as safetensors names it, shape."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def check_model(folder: Path) -> DecoderConfig:
    """Raise ModelError for what `load_model` would refuse, in milliseconds; values of tensors are not read.

    Of a model that only the fallback runs, sizes and the embedding are checked; transformers knows the rest.
    """
    config = load_config(folder)
    stored = find_tensors(folder)
    if config.own:
        check_tensors(stored, list_expected(config), config, place=str(folder))
        return config
    _check_known_type(config, folder)
    for name, tensor in stored.items():
        if name.endswith(EMBEDDINGS) and config.vocab_size and tensor.shape[:1] != (config.vocab_size,):
            asked = [config.vocab_size, *tensor.shape[1:]]
            raise ModelError(
                str(folder),
                f"tensor {name} has shape {list(tensor.shape)}, config.json asks for {asked}",
                rule="weights and config.json describe one model",
                cure="Give the config.json that came with the weights",
            )
    return config


def _check_known_type(config: DecoderConfig, folder: Path) -> None:
    from transformers import CONFIG_MAPPING

    if config.model_type not in CONFIG_MAPPING:
        raise ModelError(
            str(folder / "config.json"),
            f"model_type {config.model_type!r} is known neither here nor to transformers",
            rule="models run without code of their own",
            cure="Use a supported architecture",
        )


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file. Raises ModelError if the file is cut off or not of that format."""
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, 100_000_000):
                raise ModelError(str(path), f"is not a whole safetensors file ({size} bytes)", cure=_AGAIN)
            header = json.loads(handle.read(length))
            if not isinstance(header, dict):
                raise ValueError("not a JSON object")
    except OSError as error:
        raise ModelError(str(path), error.strerror or str(error), cure="Check the path") from None
    except ValueError:
        raise ModelError(str(path), "has no readable safetensors header", cure=_AGAIN) from None
    stored: dict[str, StoredTensor] = {}
    extents: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor, first, last = _read_entry(path, name, entry)
        stored[name] = tensor
        extents.append((first, last, name))
    end = 0
    for first, last, name in sorted(extents):
        if first != end:
            raise ModelError(
                str(path), f"{name} begins at byte {first}, the tensor before it ends at {end}", cure=_AGAIN
            )
        end = last
    if size != 8 + length + end:
        raise ModelError(
            str(path),
            f"is cut off or damaged: {size} bytes, its header promises {8 + length + end}",
            rule="the file holds every tensor of its header",
            cure=_AGAIN,
        )
    return stored


def _read_entry(path: Path, name: str, entry: Any) -> tuple[StoredTensor, int, int]:
    """One tensor of a header, and its byte range."""
    try:
        shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
        count = _DTYPE_BYTES[entry["dtype"]]
        if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
            raise ValueError("sizes are whole numbers")
    except (KeyError, TypeError, ValueError):
        raise ModelError(str(path), f"header entry of {name} is not understood", cure=_AGAIN) from None
    num_bytes = count * math.prod(shape)
    if last - first != num_bytes:
        raise ModelError(
            str(path),
            f"{name} takes {last - first} bytes, its shape {list(shape)} needs {num_bytes}",
            cure=_AGAIN,
        )
    return StoredTensor(path, entry["dtype"], shape), first, last


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
            str(index), "is not a safetensors index", rule="it maps tensor names to files", cure=_AGAIN
        ) from None
    stored: dict[str, StoredTensor] = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file:
            raise ModelError(
                str(index), f"names a file outside the folder: {file}", cure="Download the model again"
            )
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
                cure="Give the config.json that came with the weights",
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
                cure="Give the config.json that came with the weights",
            )
    return chosen


def list_expected(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a checkpoint of this config holds; a tied head is not among them."""
    d, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    ff = config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, d),
        "model.norm.weight": (d,),
    }
    qkv = {"qkv": q + 2 * kv} if config.fused else {"q": q, "k": kv, "v": kv}
    gate_up = {"gate_up": 2 * ff} if config.fused else {"gate": ff, "up": ff}
    linears = {f"self_attn.{name}_proj": (rows, d, config.qkv_bias) for name, rows in qkv.items()}
    linears["self_attn.o_proj"] = (d, q, config.o_bias)
    linears |= {f"mlp.{name}_proj": (rows, d, config.mlp_bias) for name, rows in gate_up.items()}
    linears["mlp.down_proj"] = (d, ff, config.mlp_bias)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}."
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{at}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{at}{name}.bias"] = (rows,)
        shapes |= {f"{at}{name}.weight": (d,) for name in norms}
        if config.qk_norm:
            shapes[f"{at}self_attn.q_norm.weight"] = shapes[f"{at}self_attn.k_norm.weight"] = (
                config.head_dim,
            )
    if config.is_classifier:
        shapes["score.weight"] = (1, d)
    elif not config.tied:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes

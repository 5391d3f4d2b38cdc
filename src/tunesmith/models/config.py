"""What a model folder's `config.json` says, read strictly, and whether our own decoder can run it.

Two generations of files are understood: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.errors import ModelError
from tunesmith.core.jsonl import read_settings

# Dense decoders whose weights `decoder.py` maps. Everything else runs through `fallback.py`.
OWN_DECODER = ("llama", "mistral", "qwen2", "qwen3")
_CURE = "Give the config.json that came with the weights"
_ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. kind: default | linear | llama3; the last four belong to llama3 (`factor` also to linear)."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shape of a decoder. `own` is False where only the fallback can run it; `why_not` then says which key decides."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope: RopeConfig
    max_positions: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]  # attention window per layer, tokens; 0 sees everything
    dtype: str
    bos_id: int | None
    eos_ids: tuple[int, ...]
    own: bool
    why_not: str = ""

    @property
    def rotary_scale(self) -> float:
        """Softmax scale of attention scores."""
        return self.head_dim**-0.5


class _Fields:
    """Typed reads of one JSON object; a wrong type is a fault of the file, told with its key."""

    def __init__(self, value: Mapping[str, Any], place: str) -> None:
        self.value, self.place = value, place

    def read(self, key: str, kind: type, default: Any = ...) -> Any:
        found = self.value.get(key)
        if found is None:
            if default is ...:
                raise ModelError(self.place, f"has no {key!r}", cure="Give a complete model folder")
            return default
        if kind is float and isinstance(found, int) and not isinstance(found, bool):
            found = float(found)
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            raise ModelError(self.place, f"{key} is {found!r}", rule=f"it is a {kind.__name__}", cure=_CURE)
        if (
            kind is int
            and key.startswith(("num_", "vocab", "hidden_size", "interm", "head_dim"))
            and found <= 0
        ):
            raise ModelError(self.place, f"{key} is {found}", rule="sizes are positive", cure=_CURE)
        return found


def read_config_json(folder: Path) -> dict[str, Any]:
    """The raw `config.json`. Raises ModelError if the folder is no model folder."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError(
            str(folder), "is not a folder", cure="Give a model folder, a hub id or a bundled name"
        )
    if not path.is_file():
        raise ModelError(
            str(folder),
            "has no config.json",
            rule="a model folder is in Hugging Face format",
            cure="Give the folder that holds config.json and model.safetensors",
        )
    return read_settings(path)


def parse_config(raw: Mapping[str, Any], *, place: str) -> DecoderConfig:
    """DecoderConfig of a `config.json`. Raises ModelError naming `place` and the key.

    For a model that our decoder does not run (`own` False) the shape keys are filled as far as they are there.
    """
    fields = _Fields(raw, place)
    model_type = fields.read("model_type", str)
    if raw.get("quantization_config"):
        raise ModelError(
            place,
            "weights are already quantised (quantization_config)",
            rule="the base is quantised here, with base: nf4 or int8",
            cure="Give the unquantised model",
        )
    why_not = _why_not_own(raw, model_type)
    strict = {} if not why_not else {"default": 0}
    hidden = fields.read("hidden_size", int, **(strict and {"default": raw.get("n_embd") or 0}))
    heads = fields.read("num_attention_heads", int, **(strict and {"default": raw.get("n_head") or 1}))
    layers = fields.read("num_hidden_layers", int, **(strict and {"default": raw.get("n_layer") or 0}))
    head_dim = fields.read("head_dim", int, hidden // heads)
    kv_heads = fields.read("num_key_value_heads", int, heads)
    if not why_not and heads % kv_heads:
        raise ModelError(
            place,
            f"{heads} attention heads on {kv_heads} key/value heads",
            rule="the first divides by the second",
            cure=_CURE,
        )
    return DecoderConfig(
        model_type=model_type,
        vocab_size=fields.read("vocab_size", int, **strict),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.read("intermediate_size", int, **strict),
        norm_eps=fields.read("rms_norm_eps", float, 1e-6),
        rope=_parse_rope(raw, fields) if not why_not else RopeConfig(10000.0),
        max_positions=fields.read("max_position_embeddings", int, raw.get("n_positions") or 2048),
        tied=fields.read("tie_word_embeddings", bool, _default_tied(model_type)),
        # Qwen2 has them without saying so; Llama and Qwen3 say attention_bias and mean all four projections.
        qkv_bias=model_type == "qwen2" or fields.read("attention_bias", bool, False),
        o_bias=model_type != "qwen2" and fields.read("attention_bias", bool, False),
        mlp_bias=model_type == "llama" and fields.read("mlp_bias", bool, False),
        qk_norm=model_type == "qwen3",
        windows=_parse_windows(raw, fields, model_type, layers),
        dtype=_parse_dtype(raw, place),
        bos_id=next(iter(_read_ids(raw, "bos_token_id", place)), None),
        eos_ids=_read_ids(raw, "eos_token_id", place),
        own=not why_not,
        why_not=why_not,
    )


def load_config(folder: Path) -> DecoderConfig:
    return parse_config(read_config_json(folder), place=str(folder / "config.json"))


def _why_not_own(raw: Mapping[str, Any], model_type: str) -> str:
    if model_type not in OWN_DECODER:
        return f"model_type {model_type!r}"
    if raw.get("hidden_act", "silu") != "silu":
        return f"hidden_act {raw['hidden_act']!r}"
    kind = _rope_fields(raw)[1]
    if kind not in _ROPE_KINDS:
        return f"rope type {kind!r}"
    if raw.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        return "partial_rotary_factor"
    if raw.get("pretraining_tp", 1) not in (None, 1):
        return "pretraining_tp"
    return ""


def _rope_fields(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """(the object that holds the scaling, its kind), for both generations of files."""
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    scaling = new if isinstance(new, Mapping) else old if isinstance(old, Mapping) else {}
    return scaling, str(scaling.get("rope_type") or scaling.get("type") or "default")


def _parse_rope(raw: Mapping[str, Any], fields: _Fields) -> RopeConfig:
    scaling, kind = _rope_fields(raw)
    inner = _Fields(scaling, f"{fields.place}: rope scaling")
    theta = inner.read("rope_theta", float, None) or fields.read("rope_theta", float, 10000.0)
    if kind == "default":
        return RopeConfig(theta)
    factor = inner.read("factor", float)
    if kind == "linear":
        return RopeConfig(theta, kind, factor)
    return RopeConfig(
        theta,
        kind,
        factor,
        inner.read("low_freq_factor", float),
        inner.read("high_freq_factor", float),
        inner.read("original_max_position_embeddings", int),
    )


def _parse_windows(raw: Mapping[str, Any], fields: _Fields, model_type: str, layers: int) -> tuple[int, ...]:
    window = fields.read("sliding_window", int, 0)
    if model_type == "mistral":
        return (window,) * layers
    if model_type not in ("qwen2", "qwen3") or not raw.get("use_sliding_window", False):
        return (0,) * layers
    kinds = raw.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    first = fields.read("max_window_layers", int, 28)
    return tuple(window if layer >= first else 0 for layer in range(layers))


def _default_tied(model_type: str) -> bool:
    # transformers leaves the key out when it has the class's default: untied for these families.
    return model_type not in OWN_DECODER


def _parse_dtype(raw: Mapping[str, Any], place: str) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16", "float64", "auto"):
        raise ModelError(
            place, f"dtype is {name!r}", rule="weights are float32, bfloat16 or float16", cure=_CURE
        )
    return name


def _read_ids(raw: Mapping[str, Any], key: str, place: str) -> tuple[int, ...]:
    value = raw.get(key)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) for item in ids):
        raise ModelError(place, f"{key} is {value!r}", rule="it is a token id, or a list of them", cure=_CURE)
    return tuple(ids)

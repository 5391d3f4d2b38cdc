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
from tunesmith.models.families import FAMILIES, GATES, Family

_CURE = "Give the config.json that came with the weights"
_ROPE_KINDS = ("default", "linear", "llama3")
_LAYER_KINDS = ("full_attention", "sliding_attention")
_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
# Every layer is listed before the weights are looked at; the deepest models have a few hundred.
_MAX_LAYERS = 10_000


# How the architecture of a model with a score in place of a language-model head ends.
CLASSIFIER = "ForSequenceClassification"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. kind: default | linear | llama3 | none (no rotation at all).

    factor belongs to linear and llama3, the three below it to llama3. share: of a head's channels, the first ones.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shape of a decoder. `own` is False where only the fallback can run it; `why_not` then says which key decides.

    ropes, windows:  per layer; a window counts tokens, 0 sees everything.
    gate:            activation of the feed-forward gate, silu | gelu_tanh.
    fused:           the checkpoint stores one qkv_proj and one gate_up_proj.
    norm_offset:     norms multiply by this plus their weight.
    post_norms:      what a block's halves add is normalised, too.
    embedding_scale: factor of the embeddings.
    score_scale:     factor of attention scores before the softmax.
    score_cap, logit_cap: scores and logits become cap * tanh(x / cap); 0 leaves them alone.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    ropes: tuple[RopeConfig, ...]
    max_positions: int
    tied: bool
    is_classifier: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    gate: str
    fused: bool
    norm_offset: float
    post_norms: bool
    embedding_scale: float
    score_scale: float
    score_cap: float
    logit_cap: float
    dtype: str
    bos_id: int | None
    eos_ids: tuple[int, ...]
    own: bool
    why_not: str = ""


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
            raise ModelError(self.place, f"{key} is {found!r}", rule=f"it is {_KINDS[kind]}", cure=_CURE)
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
    family = FAMILIES.get(model_type, Family(tied=True))
    why_not = _why_not_own(raw, model_type, family)
    strict = {} if not why_not else {"default": 0}
    hidden = fields.read("hidden_size", int, **(strict and {"default": raw.get("n_embd") or 0}))
    heads = fields.read("num_attention_heads", int, **(strict and {"default": raw.get("n_head") or 1}))
    layers = fields.read("num_hidden_layers", int, **(strict and {"default": raw.get("n_layer") or 0}))
    if layers > _MAX_LAYERS:
        raise ModelError(
            place,
            f"num_hidden_layers is {layers}",
            rule=f"a model has at most {_MAX_LAYERS} layers",
            cure=_CURE,
        )
    head_dim = fields.read("head_dim", int, 256 if family.gemma else hidden // heads)
    kv_heads = fields.read("num_key_value_heads", int, heads)
    if not why_not and heads % kv_heads:
        raise ModelError(
            place,
            f"{heads} attention heads on {kv_heads} key/value heads",
            rule="the first divides by the second",
            cure=_CURE,
        )
    max_positions = fields.read("max_position_embeddings", int, raw.get("n_positions") or 2048)
    windows = (0,) * layers if why_not else _parse_windows(raw, fields, family, layers)
    pre_scale = fields.read("query_pre_attn_scalar", float, 256.0) if family.gemma else head_dim
    is_classifier = any(
        isinstance(name, str) and name.endswith(CLASSIFIER) for name in raw.get("architectures") or ()
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
        norm_eps=fields.read("rms_norm_eps", float, family.norm_eps),
        ropes=() if why_not else _parse_ropes(raw, fields, family, windows, max_positions),
        max_positions=max_positions,
        # Without a head of its own, the embedding stands for it; nobody asks a classifier for tokens.
        tied=is_classifier or fields.read("tie_word_embeddings", bool, family.tied),
        is_classifier=is_classifier,
        qkv_bias=family.qkv_bias or fields.read("attention_bias", bool, False),
        o_bias=not family.qkv_bias and fields.read("attention_bias", bool, False),
        mlp_bias=family.mlp_bias and fields.read("mlp_bias", bool, False),
        qk_norm=family.qk_norm,
        windows=windows,
        gate="" if why_not else GATES[str(raw.get(family.gate_key, family.gate))],
        fused=family.fused,
        norm_offset=1.0 if family.gemma else 0.0,
        post_norms=family.gemma,
        embedding_scale=hidden**0.5 if family.gemma else 1.0,
        score_scale=1.0 if why_not else pre_scale**-0.5,
        score_cap=_parse_cap(raw, fields, "attn_logit_softcapping", family.score_cap or 0.0),
        logit_cap=_parse_cap(raw, fields, "final_logit_softcapping", family.logit_cap)
        if family.gemma
        else 0.0,
        dtype=_parse_dtype(raw, place),
        bos_id=next(iter(_read_ids(raw, "bos_token_id", place)), None),
        eos_ids=_read_ids(raw, "eos_token_id", place),
        own=not why_not,
        why_not=why_not,
    )


def load_config(folder: Path) -> DecoderConfig:
    return parse_config(read_config_json(folder), place=str(folder / "config.json"))


def _why_not_own(raw: Mapping[str, Any], model_type: str, family: Family) -> str:
    """Which key our decoder does not understand; empty if it runs the model."""
    if model_type not in FAMILIES:
        return f"model_type {model_type!r}"
    gate = raw.get(family.gate_key, family.gate)
    if str(gate) not in GATES:
        return f"{family.gate_key} {gate!r}"
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    if new and old and new != old:
        return "rope_parameters beside rope_scaling"
    nested = isinstance(new, Mapping) and any(isinstance(value, Mapping) for value in new.values())
    if new and nested != (family.local_theta is not None):
        return "rope_parameters by layer type" if nested else "rope_parameters of all layer types"
    for scaling in _find_ropes(raw, family):
        kind = _name_rope(scaling)
        if kind not in _ROPE_KINDS:
            return f"rope type {kind!r}"
        share = scaling.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
        if share != 1.0 and (not family.partial_rotary or kind != "default"):
            return "partial_rotary_factor"
    kinds = raw.get("layer_types")
    if (
        family.window in ("optional", "typed")
        and isinstance(kinds, list)
        and not set(kinds) <= set(_LAYER_KINDS)
    ):
        return "layer_types of another kind than full_attention and sliding_attention"
    if family.pattern and raw.get("sliding_window", 4096) is None:
        return "sliding_window null"
    if family.score_cap is None and raw.get("attn_logit_softcapping"):
        return "attn_logit_softcapping"
    if raw.get("use_bidirectional_attention"):
        return "use_bidirectional_attention"
    return ""


def _find_ropes(raw: Mapping[str, Any], family: Family) -> list[Mapping[str, Any]]:
    """The object that holds the scaling, for both generations of files; then that of layers with a window, if those
    have one of their own."""
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    if family.local_theta is None:
        found = [new if isinstance(new, Mapping) and new else old]
    elif isinstance(new, Mapping) and new:
        found = [new.get("full_attention"), new.get("sliding_attention")]
    else:
        found = [old, None]
    return [scaling if isinstance(scaling, Mapping) else {} for scaling in found]


def _name_rope(scaling: Mapping[str, Any]) -> str:
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _parse_ropes(
    raw: Mapping[str, Any], fields: _Fields, family: Family, windows: tuple[int, ...], max_positions: int
) -> tuple[RopeConfig, ...]:
    """Rotary embedding of each layer."""
    scalings = _find_ropes(raw, family)
    thetas = [fields.read("rope_theta", float, family.theta)]
    if family.local_theta is not None:
        thetas.append(fields.read("rope_local_base_freq", float, family.local_theta))
    pairs = zip(scalings, thetas, strict=True)
    everywhere, *local = [_parse_rope(scaling, theta, fields, max_positions) for scaling, theta in pairs]
    ropes = [local[0] if window and local else everywhere for window in windows]
    if family.nope:
        for layer, rotates in enumerate(_parse_rotating(raw, fields, len(windows))):
            ropes[layer] = ropes[layer] if rotates else RopeConfig(0.0, "none")
    return tuple(ropes)


def _parse_rope(scaling: Mapping[str, Any], theta: float, fields: _Fields, max_positions: int) -> RopeConfig:
    inner = _Fields(scaling, f"{fields.place}: rope scaling")
    kind, theta = _name_rope(scaling), inner.read("rope_theta", float, theta)
    share = inner.read("partial_rotary_factor", float, fields.read("partial_rotary_factor", float, 1.0))
    if kind == "default":
        return RopeConfig(theta, share=share)
    factor = inner.read("factor", float)
    if kind == "linear":
        return RopeConfig(theta, kind, factor)
    trained = inner.read("original_max_position_embeddings", int, max_positions)
    return RopeConfig(
        theta,
        kind,
        factor,
        inner.read("low_freq_factor", float),
        inner.read("high_freq_factor", float),
        fields.read("original_max_position_embeddings", int, trained),
    )


def _parse_rotating(raw: Mapping[str, Any], fields: _Fields, layers: int) -> list[bool]:
    """Which layers rotate. The key's name says the opposite of its numbers: 1 rotates."""
    given = raw.get("no_rope_layers")
    if given is None:
        interval = fields.read("no_rope_layer_interval", int, 4)
        return [(layer + 1) % interval != 0 for layer in range(layers)]
    return [bool(rotates) for rotates in _read_layers(given, layers, fields, "no_rope_layers")]


def _parse_windows(raw: Mapping[str, Any], fields: _Fields, family: Family, layers: int) -> tuple[int, ...]:
    """Attention window of each layer, tokens; 0 sees everything."""
    window = fields.read("sliding_window", int, 4096 if family.pattern else 0)
    asked = bool(raw.get("use_sliding_window", False))
    if family.window == "all":
        return (window,) * layers
    if family.window == "none" or (family.window == "optional" and not asked):
        return (0,) * layers
    kinds = raw.get("layer_types")
    if kinds is not None:
        kinds = _read_layers(kinds, layers, fields, "layer_types")
        narrow = [kind == "sliding_attention" for kind in kinds]
    elif family.window == "optional":
        first = fields.read("max_window_layers", int, 28)
        narrow = [layer >= first for layer in range(layers)]
    elif family.pattern:
        pattern = family.pattern
        if family.local_theta is not None:
            pattern = fields.read("sliding_window_pattern", int, pattern)
        narrow = [(layer + 1) % pattern != 0 for layer in range(layers)]
    else:
        narrow = [asked and not rotates for rotates in _parse_rotating(raw, fields, layers)]
    return tuple(window if is_narrow else 0 for is_narrow in narrow)


def _read_layers(value: Any, layers: int, fields: _Fields, key: str) -> list[Any]:
    if not isinstance(value, list) or len(value) < layers:
        raise ModelError(
            fields.place, f"{key} is {value!r}", rule="it has an entry for each layer", cure=_CURE
        )
    return value[:layers]


def _parse_cap(raw: Mapping[str, Any], fields: _Fields, key: str, default: float) -> float:
    """A softcap; null switches it off, and only a missing key means the family's own."""
    return fields.read(key, float, 0.0) if key in raw else default


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

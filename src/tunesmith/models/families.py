"""What a `model_type` means that its config.json does not say: the dense decoders that `decoder.py` runs.

A family is data. What its keys mean together becomes a `DecoderConfig` in config.py; the decoder never asks which
family it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Family:
    """Defaults are Llama's.

    tied, norm_eps, theta: where config.json is silent.
    local_theta:    rotary base of layers with a window, where they have one of their own.
    partial_rotary: `partial_rotary_factor` says which share of a head is rotated.
    nope:           `no_rope_layers` names layers without rotation.
    gate_key, gate: the key of the gate's activation, and its value where config.json is silent.
    qkv_bias:       queries, keys and values have biases and the output has none; else `attention_bias` says for all.
    mlp_bias:       `mlp_bias` is read.
    fused:          the checkpoint stores one qkv_proj and one gate_up_proj.
    qk_norm:        queries and keys are normalised per head.
    gemma:          norms multiply by 1 + weight, blocks norm what they add, embeddings are scaled by sqrt(D), and
                    query_pre_attn_scalar sets the scale of scores.
    window:         which layers have one: none | all | optional (use_sliding_window) | typed (layer_types).
    pattern:        with `typed`, every so many layers one sees everything, where layer_types is not given.
    score_cap, logit_cap: tanh softcaps where config.json is silent; None: never of scores.
    """

    tied: bool = False
    norm_eps: float = 1e-6
    theta: float = 10_000.0
    local_theta: float | None = None
    partial_rotary: bool = False
    nope: bool = False
    gate_key: str = "hidden_act"
    gate: str = "silu"
    qkv_bias: bool = False
    mlp_bias: bool = False
    fused: bool = False
    qk_norm: bool = False
    gemma: bool = False
    window: Literal["none", "all", "optional", "typed"] = "none"
    pattern: int = 0
    score_cap: float | None = None
    logit_cap: float = 0.0


FAMILIES = {
    "llama": Family(mlp_bias=True),  # and SmolLM 1 and 2
    "mistral": Family(window="all"),
    "qwen2": Family(qkv_bias=True, window="optional"),
    "qwen3": Family(qk_norm=True, window="optional"),
    "smollm3": Family(tied=True, theta=2_000_000.0, nope=True, mlp_bias=True, window="typed"),
    "phi3": Family(norm_eps=1e-5, partial_rotary=True, fused=True, window="all"),  # and Phi-4
    "gemma2": Family(
        tied=True,
        gate_key="hidden_activation",
        gate="gelu_pytorch_tanh",
        gemma=True,
        window="typed",
        pattern=2,
        score_cap=50.0,
        logit_cap=30.0,
    ),
    "gemma3_text": Family(
        tied=True,
        theta=1_000_000.0,
        local_theta=10_000.0,
        gate_key="hidden_activation",
        gate="gelu_pytorch_tanh",
        qk_norm=True,
        gemma=True,
        window="typed",
        pattern=6,
    ),
}
# transformers' name of a gate's activation -> ours (elementwise.py).
GATES = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

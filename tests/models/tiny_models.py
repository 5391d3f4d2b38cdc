"""Tiny random Hugging Face models of each family, and rows to run through them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from tunesmith.core.fingerprint import hash_row
from tunesmith.core.types import Origin, TokenRow

VOCAB = 96
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": (
        "Llama",
        {"tie_word_embeddings": True, "head_dim": 32, "attention_bias": True, "mlp_bias": True},
    ),
    "llama3-rope": ("Llama", {"tie_word_embeddings": True, "rope_parameters": _LLAMA3}),
    "linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": 12, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}
# Every family with each variation in play: windows shorter than the rows, softcaps low enough to bend scores, rotary
# bases that differ between layers.
WINDOW = 12
_SMOLLM3 = {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}
_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": WINDOW, "layer_types": _TYPES}
VARIATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("Llama", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-geglu": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("Mistral", {"sliding_window": WINDOW, "head_dim": 32}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _TYPES}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True, "attention_bias": True}),
    "smollm3": ("SmolLM3", _SMOLLM3),
    "smollm3-window": (
        "SmolLM3",
        _SMOLLM3 | {"use_sliding_window": True, "sliding_window": WINDOW, "mlp_bias": True},
    ),
    "phi3": ("Phi3", {"sliding_window": WINDOW, "head_dim": 16}),
    "phi3-partial": ("Phi3", {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-uncapped": (
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    "gemma2-global": (
        "Gemma2",
        {"head_dim": 16, "layer_types": ["full_attention"] * 3, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": ("Gemma3Text", _GEMMA | {"attention_bias": True}),
    "gemma3-linear": (
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": WINDOW, "num_hidden_layers": 7}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
}
OTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2",
        {
            "n_embd": 64,
            "n_head": 4,
            "n_layer": 2,
            "n_positions": 512,
            "vocab_size": VOCAB,
            "initializer_range": 0.15,
            "eos_token_id": 1,
            "bos_token_id": 0,
        },
    ),
    "gemma2": (
        "Gemma2",
        _COMMON
        | {
            "num_hidden_layers": 2,
            "head_dim": 16,
            "sliding_window": 12,
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 5.0,
            "pad_token_id": 0,
        },
    ),
    "phi": ("Phi", _COMMON | {"num_hidden_layers": 2, "num_key_value_heads": 4, "pad_token_id": 0}),
}


def make_hf(name: str) -> Any:
    """The random transformers model `name`, fp32, evaluation mode; biases and norms are random too."""
    import transformers

    family, changes = OWN.get(name) or OTHER[name]
    fields = changes if name in OTHER else _COMMON | changes
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key or "ln_" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make_variation(name: str) -> Any:
    """The random transformers model of VARIATIONS, fp32, evaluation mode; biases and norms are random too."""
    import transformers

    family, changes = VARIATIONS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**_COMMON | {"pad_token_id": 0} | changes)
    # The only kernel that knows softcaps.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save_hf(name: str, folder: Path) -> Any:
    model = make_hf(name)
    model.save_pretrained(folder)
    return model


def make_row(ids: list[int], mask: list[int]) -> TokenRow:
    return TokenRow(ids, mask, Origin("rows:1", "rows", 0), hash_row(ids, mask))


def make_rows(lengths: list[int], *, seed: int = 0, vocab: int = VOCAB) -> list[TokenRow]:
    """Random rows; about the second half of each is trained."""
    draw = random.Random(seed)
    rows = []
    for length in lengths:
        ids = [draw.randrange(2, vocab) for _ in range(length)]
        rows.append(make_row(ids, [0] * (length // 2) + [1] * (length - length // 2)))
    return rows


def hf_loss(model: Any, rows: list[TokenRow]) -> torch.Tensor:
    """Sum of target losses row by row, each alone, through transformers."""
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for row in rows:
        ids = torch.tensor([list(row.ids)], device=device)
        logits = model(ids).logits[0].double()
        log_probs = logits[:-1].log_softmax(-1)
        picked = log_probs[torch.arange(len(row.ids) - 1, device=device), ids[0, 1:]]
        total = total - (picked * torch.tensor(list(row.mask)[1:], device=device)).sum()
    return total


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))

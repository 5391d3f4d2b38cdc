"""Write a pre-trained decoder and its tokenizer as an ordinary Hugging Face model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from tunesmith.demo.pretrain_model import Decoder, Shape
from tunesmith.demo.pretrain_text import BOS, END, PAD, ROLES

CHAT_TEMPLATE = (
    "{{- bos_token -}}\n"
    "{%- for message in messages -%}\n"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}\n"
    "{{- raise_exception('unknown role: ' + message['role']) -}}\n"
    "{%- endif -%}\n"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '<|assistant|>' -}}\n"
    "{%- endif -%}\n"
)


def describe_model(shape: Shape, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json; old and new names of the dtype and rope settings, so that every transformers since 4.4x reads it."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden, "intermediate_size": shape.feed_forward, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_size,
        "max_position_embeddings": shape.context, "hidden_act": "silu", "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_theta, "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "tie_word_embeddings": True,
        "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True,
        "dtype": "bfloat16", "torch_dtype": "bfloat16",
        "bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(PAD),
    }  # fmt: skip


def describe_tokenizer(tokenizer: Tokenizer, shape: Shape) -> dict[str, Any]:
    """tokenizer_config.json."""
    names = [PAD, BOS, END, *ROLES.values()]
    added = {
        str(tokenizer.token_to_id(name)): {
            "content": name, "special": True, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False,
        }
        for name in names
    }  # fmt: skip
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape.context,
        "bos_token": BOS, "eos_token": END, "pad_token": PAD, "added_tokens_decoder": added,
        "additional_special_tokens": list(ROLES.values()),
        "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE, "padding_side": "right",
    }  # fmt: skip


def write_model_folder(folder: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """Write config, bf16 weights, tokenizer, template and generation settings into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = describe_model(model.shape, tokenizer)
    special = {
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": list(ROLES.values()),
    }
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} | {
        "do_sample": False
    }
    for name, content in (
        ("config.json", config), ("generation_config.json", generation), ("special_tokens_map.json", special),
        ("tokenizer_config.json", describe_tokenizer(tokenizer, model.shape)),
    ):  # fmt: skip
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")

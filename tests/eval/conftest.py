"""Small real things: a byte-level tokenizer with a chat template, a tiny Llama folder, ticket-like rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tunesmith.data.render import Renderer
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.models.causal_lm import CausalLM

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer: one token per byte, three special tokens. Returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE({c: n for n, c in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(names)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(letters) + len(names)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights, far enough from uniform that scores differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    vocab_size = write_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.25,
        bos_token_id=vocab_size - 3,
        eos_token_id=vocab_size - 1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Renderer(load_tokenizer(folder))


@pytest.fixture(scope="session")
def model(folder: Path) -> CausalLM:
    from tunesmith.models.load import load_model

    return load_model(folder, device="cpu", dtype=torch.float32)

"""The bundled model is an ordinary folder that plain transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.demo import make_tickets

FOLDER = Path(make_tickets.__file__).with_name("tiny")
TICKETS = FOLDER.with_name("tickets")


def test_the_folder_is_at_most_ten_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 10_000_000


def test_the_config_carries_old_and_new_names() -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["pad_token_id"] != config["eos_token_id"]
    assert all(config[key] % 64 == 0 for key in ("hidden_size", "intermediate_size", "vocab_size"))


def test_the_tokenizer_round_trips_any_text_and_splits_digits() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    messages = [
        json.loads(line)["messages"]
        for line in (TICKETS / "test.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    odd = ["", " ", "\n\t x", "€ £ ° – 你好 🙂", '{"a":[1,2.50]}', "A-48213", "\x00\x7f"]
    for text in odd + [turn["content"] for turns in messages[:50] for turn in turns]:
        assert (
            tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
            == text
        )
    assert tokenizer.encode("48213", add_special_tokens=False).tokens == list("48213")


def test_transformers_loads_the_model_and_the_template_ends_turns_with_eos() -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)
    assert model.config.vocab_size == len(tokenizer)
    turns = [
        {"role": "user", "content": "Repeat: the old man"},
        {"role": "assistant", "content": "the old man"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|bos|><|user|>Repeat: the old man<|end|><|assistant|>the old man<|end|>"
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    assert (ids == tokenizer.bos_token_id).sum() == 1
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=12)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "the old man<|end|>"
    assert answer[-1] == tokenizer.eos_token_id

"""A small byte-level chat tokenizer made on the spot, and the real ones from the shared test data where it is there."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tunesmith.core.types import Conversation, Message, Origin
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.job.spec import DataSpec

REAL_TOKENIZERS = ("gpt2", "llama2", "llama3", "mistral-v3", "qwen2")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def real_tokenizers(shared, tmp_path_factory):
    """The real tokenizers by name, each with BOS and EOS."""
    from conversions import write_tokenizer_folder

    root = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for name in REAL_TOKENIZERS:
        folder = write_tokenizer_folder(shared / "tokenizers" / name, root / name)
        found[name] = load_tokenizer(folder)
    return found


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory) -> Path:
    """A model folder with a 400-token byte-level tokenizer and a ChatML template."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(name, normalized=False, special=True) for name in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [
        "the cat sat on the mat and the dog sat on the log",
        "what is two plus two? it is four, of course.",
    ]
    tokenizer.train_from_iterator(text * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": None, "eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def chat_tokenizer(chat_folder):
    return load_tokenizer(chat_folder)


@pytest.fixture
def write_lines(tmp_path):
    """Writes raw lines (str or bytes) to a file and gives its path."""

    def write(*lines, name: str = "train.jsonl", end: bytes = b"\n") -> Path:
        raw = [line.encode() if isinstance(line, str) else line for line in lines]
        path = tmp_path / name
        path.write_bytes(b"\n".join(raw) + end)
        return path

    return write


@pytest.fixture
def make_job():
    """A job as far as data reads it."""
    return lambda **data: SimpleNamespace(data=DataSpec.model_validate(data))


@pytest.fixture(scope="session")
def chat():
    """Makes a conversation from (role, content) or Message."""

    def make(*turns, tools=(), place="train.jsonl:1", kind="chat", **extra) -> Conversation:
        messages = tuple(turn if isinstance(turn, Message) else Message(*turn) for turn in turns)
        return Conversation(
            messages, Origin(place, "train.jsonl", 1), kind=kind, tools=tuple(tools), extra=extra
        )

    return make

"""Texts, tokenizer and task rows for pre-training `tunesmith/tiny`."""

from __future__ import annotations

import collections
import hashlib
import json
import lzma
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tunesmith.demo.instruction_tasks import Message, load_concepts, make_conversation
from tunesmith.demo.instruction_values import Stock

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIALS = [PAD, BOS, END, *ROLES.values()]
HELD_OUT_SHARE = 40  # one document in 40 is kept for evaluation
NOUN = r"\b(?:a|an|my|his|her) ([a-z]{3,12})(?=[,.;]| (?:and|of|was|is|in|on|to|with) )"
ADJECTIVE = r"\b(?:a|an|my|his|her|the) ([a-z]{3,12}) [a-z]{3,12}[,.;]"


@dataclass(frozen=True)
class Document:
    """One text with a name that is stable across runs."""

    name: str
    text: str

    @property
    def is_held_out(self) -> bool:
        """Fixed rule, independent of file order: a hash of the name decides."""
        return int(hashlib.sha256(self.name.encode()).hexdigest()[:8], 16) % HELD_OUT_SHARE == 0


def read_documents(folder: Path) -> Iterator[Document]:
    """Documents of a folder: `.jsonl` and `.jsonl.xz` rows with a `text`, and whole `.txt` files."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".txt":
            yield Document(path.stem, path.read_text(encoding="utf-8"))
        elif path.name.endswith((".jsonl", ".jsonl.xz")):
            with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as lines:
                for line in lines:
                    row = json.loads(line)
                    name = " | ".join(str(row[key]) for key in ("author", "title", "file") if key in row)
                    yield Document(name, row["text"])


def gather_topics(sentences: list[str], words: list[str], draw: random.Random) -> list[list[str]]:
    """For each of `words`, up to ten fragments of four to eight words that hold it, or none."""
    found: dict[str, list[str]] = {word: [] for word in words}
    for sentence in sentences:
        parts = sentence.rstrip(".!?").split()
        for at, part in enumerate(parts):
            fragments = found.get(part)
            if fragments is not None and len(fragments) < 10:
                start = max(0, at - draw.randint(1, 4))
                fragments.append(" ".join(parts[start : start + draw.randint(4, 8)]).strip(" ,';").lower())
    return [fragments for fragments in found.values() if len(fragments) >= 4]


def gather_stock(texts: list[str], *, seed: int = 0) -> Stock:
    """Frequent words, nouns, adjectives, sentences and topics of the texts, for the instruction tasks."""
    draw = random.Random(seed)
    counts: collections.Counter[str] = collections.Counter()
    nouns: collections.Counter[str] = collections.Counter()
    adjectives: collections.Counter[str] = collections.Counter()
    sentences: list[str] = []
    for text in draw.sample(texts, min(400, len(texts))):
        piece = text[:80000]
        counts.update(re.findall(r"(?<= )[a-z]{3,12}(?= )", piece))
        nouns.update(re.findall(NOUN, piece))
        adjectives.update(re.findall(ADJECTIVE, piece))
        found = re.findall(r"(?<=[.!?] )[A-Z][a-z ,']{20,110}[.!?](?= )", piece.replace("\n", " "))
        sentences += draw.sample(found, min(250, len(found)))
    words = [word for word, _ in counts.most_common(9000)][60:]
    things = [noun for noun, count in nouns.most_common(3000) if count > 2]
    kinds = [
        adjective
        for adjective, count in adjectives.most_common(2500)
        if count > 2 and adjective not in things[:300]
    ]
    topics = gather_topics(sentences, words[200:4000], draw)
    return Stock(
        words, draw.sample(sentences, min(8000, len(sentences))), load_concepts(), things, kinds, topics
    )


def train_tokenizer(texts: list[str], stock: Stock, *, vocab_size: int, seed: int = 0) -> Tokenizer:
    """Byte-level BPE with single digits, trained on slices of the texts and on instruction tasks."""
    draw = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    slices = [text[at : at + 15000] for text in texts for at in (len(text) // 4, len(text) // 2)]
    notes = ["\n".join(m["content"] for m in make_conversation(draw, stock)) for _ in range(4000)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(slices + notes, trainer)
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one uint16 array, each starting with BOS."""
    bos = find_token(tokenizer, BOS)
    parts: list[np.ndarray] = []
    for text in texts:
        # Encoding is superlinear in memory for whole books: cut at line ends, and let the threads share the pieces.
        pieces = re.findall(r"(?s).{1,20000}(?:\n|\Z)|.{1,20000}", text)
        parts.append(np.array([bos], dtype=np.uint16))
        parts += [
            np.array(one.ids, dtype=np.uint16)
            for one in tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        ]
    return np.concatenate(parts)


def find_token(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token, which is there."""
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def encode_conversation(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """(token ids in the chat template, whether each token is part of an answer or its end)."""
    end = find_token(tokenizer, END)
    ids, is_answer = [find_token(tokenizer, BOS)], [False]
    contents = tokenizer.encode_batch_fast(
        [message["content"] for message in messages], add_special_tokens=False
    )
    for message, content in zip(messages, contents, strict=True):
        ids += [find_token(tokenizer, ROLES[message["role"]]), *content.ids, end]
        is_answer += [False] + [message["role"] == "assistant"] * (len(content.ids) + 1)
    return ids, is_answer


def pack_task_rows(
    tokenizer: Tokenizer, stock: Stock, *, seed: int, num_rows: int, row_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, is_answer), each (num_rows, row_tokens): whole conversations packed first-fit, padded at the end."""
    draw = random.Random(seed)
    ids = np.full((num_rows, row_tokens), find_token(tokenizer, PAD), dtype=np.uint16)
    answers = np.zeros((num_rows, row_tokens), dtype=bool)
    filled = [0] * num_rows
    misses = 0
    while misses < 12:
        doc, flags = encode_conversation(tokenizer, make_conversation(draw, stock))
        row = next((at for at in range(num_rows) if filled[at] + len(doc) <= row_tokens), None)
        if row is None:
            misses += 1
            continue
        ids[row, filled[row] : filled[row] + len(doc)] = doc
        answers[row, filled[row] : filled[row] + len(doc)] = flags
        filled[row] += len(doc)
    return ids, answers


@dataclass(frozen=True)
class Prepared:
    """What training reads: the tokenizer, the tokens of all texts (uint16, flat), and the stock for the tasks."""

    tokenizer: Tokenizer
    text: np.ndarray
    stock: Stock


def prepare(folder: Path, *, vocab_size: int, start: Path | None = None) -> Prepared:
    """Read the texts of `folder` without the held-out ones, train the tokenizer (or take that of `start`), encode."""
    texts = [document.text for document in read_documents(folder) if not document.is_held_out]
    stock = gather_stock(texts)
    if start:
        tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(texts, stock, vocab_size=vocab_size)
    return Prepared(tokenizer, encode_texts(tokenizer, texts), stock)


def save_prepared(prepared: Prepared, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    prepared.tokenizer.save(str(folder / "tokenizer.json"))
    np.save(folder / "text.npy", prepared.text)
    (folder / "stock.json").write_text(json.dumps(asdict(prepared.stock)), encoding="utf-8")


def load_prepared(folder: Path) -> Prepared:
    """What `save_prepared` wrote."""
    stock = Stock(**json.loads((folder / "stock.json").read_text(encoding="utf-8")))
    return Prepared(
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        np.load(folder / "text.npy"),
        stock,
    )

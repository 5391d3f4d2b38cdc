"""Builds `tokenizer.json` folders for real vocabularies that come as sentencepiece, tiktoken or GPT-2 files."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = _WORDS + r"\p{N}{1,3}" + _OTHERS
QWEN2_PATTERN = _WORDS + r"\p{N}" + _OTHERS
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)


def find_merges(ranks: dict[Any, float], *, highest_first: bool) -> list[tuple[Any, Any]]:
    """Every way to build a token from two others, in the order in which its result is preferred."""
    found: list[tuple[float, float, float, Any, Any]] = []
    sign = -1.0 if highest_first else 1.0
    for order, (piece, rank) in enumerate(ranks.items()):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ranks and right in ranks:
                found.append(
                    (sign * rank, sign * ranks[left], sign * ranks[right], (order, left), (order, right))
                )
    found.sort(key=lambda item: (item[0], item[3][0], item[1], item[2]))
    return [(left[1], right[1]) for *_, left, right in found]


def build_sentencepiece(path: Path) -> Tokenizer:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    names = [pieces.id_to_piece(n) for n in range(pieces.get_piece_size())]
    controls = [n for n in range(len(names)) if pieces.is_control(n) or pieces.is_unknown(n)]
    scores = {
        name: pieces.get_score(n)
        for n, name in enumerate(names)
        if n not in set(controls) and not pieces.is_byte(n) and not pieces.is_unused(n)
    }
    model = models.BPE(
        vocab={name: n for n, name in enumerate(names)},
        merges=find_merges(scores, highest_first=True),
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(names[n], special=True, normalized=False) for n in controls])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def build_tiktoken(path: Path) -> Tokenizer:
    to_text = _byte_characters()
    ranks: dict[str, float] = {}
    for line in path.read_bytes().splitlines():
        token, _, rank = line.partition(b" ")
        ranks["".join(to_text[b] for b in base64.b64decode(token))] = int(rank)
    model = models.BPE(
        vocab={name: int(rank) for name, rank in ranks.items()},
        merges=find_merges(ranks, highest_first=False),
        ignore_merges=True,
    )
    tokenizer = _byte_level(model, LLAMA3_PATTERN)
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in LLAMA3_SPECIAL]
    )
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
            ),
        ]
    )
    return tokenizer


def _byte_characters() -> list[str]:
    """The printable stand-ins that byte-level vocabularies use, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _byte_level(model: models.BPE, pattern: str | None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def build_gpt2(folder: Path, *, pattern: str | None, special: list[str]) -> Tokenizer:
    model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = _byte_level(model, pattern)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer


def write_tokenizer_folder(source: Path, target: Path) -> Path:
    """A folder with tokenizer.json and settings for one of the real vocabularies, by its folder's name."""
    target.mkdir(parents=True, exist_ok=True)
    name = source.name
    settings: dict[str, Any]
    if name == "gpt2":
        tokenizer = build_gpt2(source, pattern=None, special=["<|endoftext|>"])
        settings = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    elif name == "qwen2":
        tokenizer = build_gpt2(
            source, pattern=QWEN2_PATTERN, special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        )
        tokenizer.normalizer = normalizers.NFC()
        settings = json.loads((source / "tokenizer_config.json").read_text())
        settings = {key: settings[key] for key in ("bos_token", "eos_token", "pad_token", "chat_template")}
    elif name == "llama3":
        tokenizer = build_tiktoken(source / "tokenizer.model")
        settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    else:
        tokenizer = build_sentencepiece(source / "tokenizer.model")
        settings = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer.save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return target

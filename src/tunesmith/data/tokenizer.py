"""A tokenizer that adds nothing by itself: rendering decides every special token.

`tokenizer.json` is read by the `tokenizers` library; other vocabularies (`tokenizer.model`, `vocab.json` and
`merges.txt`) go once through transformers, which is imported only then.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from tunesmith.core.errors import DataError, ModelError, SetupError
from tunesmith.core.jsonl import read_settings

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
# Tried in turn to tokenise a text as the continuation of another; none of them merges with what follows in practice.
_ANCHORS = ("\n", ".", "a", ":", "1")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text and its ids."""

    text: str
    ids: list[int]


class Tokenizer:
    """Text to ids and back, with what the folder says about special tokens.

    eos_ids: every id that stops generation, from tokenizer_config, config.json and generation_config.json.
    pad_id:  for other software only. Padding here is never told from the id but from the mask, so a pad equal to EOS
             cannot remove a trained EOS.
    adds_bos: the tokenizer puts BOS before plain text; chat templates write their own.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        folder: Path | None = None,
        settings: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        eos_ids: Sequence[int] = (),
    ) -> None:
        self._backend = backend
        self.folder = folder
        self.settings = dict(settings or {})
        self.chat_template = chat_template
        self.bos_token = _name_token(self.settings.get("bos_token"))
        self.eos_token = _name_token(self.settings.get("eos_token"))
        self.bos_id = self._id_of(self.bos_token)
        self.eos_id = self._id_of(self.eos_token)
        self.eos_ids: tuple[int, ...] = tuple(
            dict.fromkeys([*([] if self.eos_id is None else [self.eos_id]), *eos_ids])
        )
        self.pad_id = self._id_of(_name_token(self.settings.get("pad_token")))
        self.adds_bos = self.bos_id is not None and backend.encode("a").ids[:1] == [self.bos_id]
        # Byte-level post-processors trim spaces from offsets, which would hide a token that straddles a boundary;
        # BOS is added by rendering.
        self._post_processor: Any = backend.post_processor
        self._has_new_tokens = False
        backend.post_processor = None
        backend.no_padding()
        backend.no_truncation()

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`: special tokens written in it are recognised, none is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def bos_before(self, text: str) -> list[int]:
        """The id that stands before a plain text by the tokenizer's own rule; none if the text begins with it.

        An id and not text: behind written BOS, sentencepiece-like tokenizers may leave out the space of a beginning.
        """
        written = self.bos_token is not None and text.startswith(self.bos_token)
        return [self.bos_id] if self.adds_bos and self.bos_id is not None and not written else []

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of `text` as it follows other text: without the space that sentencepiece-like tokenizers put first."""
        return self.encode_pieces([text], [True])[0].ids

    def encode_pieces(self, texts: Sequence[str], follows: Sequence[bool]) -> list[Piece]:
        """Tokenise texts at once; `follows` says which of them continue another text."""
        anchor = _ANCHORS[0] if self._prefixes_space else ""
        prefixes = [anchor if after and text else "" for text, after in zip(texts, follows, strict=True)]
        joined = [prefix + text for prefix, text in zip(prefixes, texts, strict=True)]
        # Without offsets, which take as long as the rest.
        encodings = self._backend.encode_batch_fast(joined, add_special_tokens=False)
        return [
            Piece(text, self._cut_prefix(text, prefix, encoding.ids) if prefix else encoding.ids)
            for text, prefix, encoding in zip(texts, prefixes, encodings, strict=True)
        ]

    def _cut_prefix(self, text: str, prefix: str, ids: list[int]) -> list[int]:
        """Ids after those of the prefix; another prefix is tried where a token covers both."""
        for other in (prefix, *(anchor for anchor in _ANCHORS if anchor != prefix)):
            if other != prefix:
                ids = self.encode(other + text)
            head = self._anchor_ids[other]
            if ids[: len(head)] == head:
                return ids[len(head) :]
        raise DataError(
            "tokenizer", f"cannot continue a text with {text[:20]!r}", rule="a boundary needs a token edge"
        )

    @cached_property
    def _anchor_ids(self) -> dict[str, list[int]]:
        return {anchor: self.encode(anchor) for anchor in _ANCHORS}

    def divide(self, piece: Piece, num_chars: int) -> tuple[list[int], list[int]] | None:
        """Ids of a continuing piece's first characters and of the rest, or None if a token straddles the cut."""
        anchor = _ANCHORS[0] if self._prefixes_space else ""
        encoding = self._backend.encode(anchor + piece.text, add_special_tokens=False)
        token = encoding.char_to_token(len(anchor) + num_chars)
        num_before = len(self._anchor_ids[anchor]) if anchor else 0
        if token is None or encoding.ids[num_before:] != piece.ids:
            return None
        start, _ = encoding.token_to_chars(token) or (-1, -1)
        return (
            (piece.ids[: token - num_before], piece.ids[token - num_before :])
            if start == len(anchor) + num_chars
            else None
        )

    @cached_property
    def _prefixes_space(self) -> bool:
        """Whether a text on its own starts with a space it does not have."""
        tokens = self._backend.encode("a", add_special_tokens=False).tokens
        return bool(tokens) and tokens[0].startswith("▁")

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of an id."""
        return self._backend.id_to_token(token_id) or ""

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    @cached_property
    def vocab_size(self) -> int:
        """Rows that an embedding needs: the largest id plus one."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """Tokens that are recognised as a whole wherever their text stands, by text."""
        return {token.content: number for number, token in self._backend.get_added_tokens_decoder().items()}

    def add_tokens(self, tokens: Sequence[str]) -> list[int]:
        """Make each text one token and give its id; a text that is a token already keeps its id.

        Raises ModelError for an empty or blank text.
        """
        if any(not token.strip() for token in tokens):
            raise ModelError("method.new_tokens", "an empty token", rule="a token has text", cure="Remove it")
        backend: Any = self._backend
        backend.add_tokens([AddedToken(token, normalized=False) for token in tokens])
        self._has_new_tokens = True
        for name in ("vocab_size", "added_tokens", "sha256", "vocabulary_sha256"):
            self.__dict__.pop(name, None)
        return [int(backend.token_to_id(token)) for token in tokens]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over vocabulary, settings and template: equal when equal text gives equal ids."""
        digest = hashlib.sha256(self._backend.to_str().encode())
        for value in (self.bos_token, self.eos_token, self.chat_template, *map(str, self.eos_ids)):
            digest.update(b"\x00" + (value or "").encode())
        return digest.hexdigest()

    @cached_property
    def vocabulary_sha256(self) -> str:
        """SHA-256 over tokens and their ids: equal when equal ids are equal tokens."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return hashlib.sha256(repr(sorted(vocabulary.items())).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the tokenizer as the base model has it, so that other software reads what it knows."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.folder is not None:
            for name in _FILES:
                source, target = self.folder / name, folder / name
                if source.is_file() and source.resolve() != target.resolve():
                    shutil.copyfile(source, target)
        if self._has_new_tokens or not (folder / "tokenizer.json").exists():
            self._backend.post_processor = self._post_processor
            text = self._backend.to_str()
            self._backend.post_processor = None
            (folder / "tokenizer.json").write_text(text, encoding="utf-8")

    def __len__(self) -> int:
        return self.vocab_size


def load_tokenizer(folder: str | Path, *, embedding_rows: int | None = None) -> Tokenizer:
    """Read a model folder's tokenizer.

    embedding_rows: rows of the model's embedding; default: `vocab_size` of the folder's config.json, when there is one.
    Raises ModelError if files are missing or damaged, or if the vocabulary is larger than the embedding.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ModelError(
            str(root), "no such folder", rule="a tokenizer is a folder of files", cure="Check the path"
        )
    settings = _read_settings(root)
    config = _read_optional(root / "config.json")
    generation = _read_optional(root / "generation_config.json")
    tokenizer = Tokenizer(
        _load_backend(root),
        folder=root,
        settings=settings,
        chat_template=_read_template(root, settings),
        eos_ids=_collect_eos(config, generation),
    )
    text_config: Mapping[str, Any] = config.get("text_config") or config
    rows = embedding_rows if embedding_rows is not None else text_config.get("vocab_size")
    if isinstance(rows, int) and tokenizer.vocab_size > rows:
        raise ModelError(
            str(root),
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the embedding {rows} rows",
            rule="every token needs an embedding",
            cure="Use the tokenizer that came with the model, or resize the embedding",
        )
    return tokenizer


def _load_backend(root: Path) -> Backend:
    path = root / "tokenizer.json"
    if path.is_file():
        try:
            return Backend.from_file(str(path))
        except Exception as error:
            # The library raises bare Exception for damaged files.
            raise ModelError(str(path), f"cannot be read ({error})", cure="Fetch the file again") from None
    if not any((root / name).is_file() for name in ("tokenizer.model", "vocab.json", "spiece.model")):
        raise ModelError(
            str(root),
            "no tokenizer",
            rule="a model folder holds tokenizer.json (or tokenizer.model, or vocab.json and merges.txt)",
            cure="Copy the tokenizer files of the base model into it",
        )
    return _convert_with_transformers(root)


def _convert_with_transformers(root: Path) -> Backend:
    try:
        converted: Any = import_module("transformers").AutoTokenizer.from_pretrained(str(root))
    except Exception as error:
        raise SetupError(
            str(root),
            f"tokenizer.json is missing and the older files cannot be converted ({type(error).__name__})",
            rule="older tokenizer files need sentencepiece and protobuf",
            cure="Run: pip install 'tunesmith[sentencepiece]', or add a tokenizer.json",
        ) from None
    backend: Any = getattr(converted, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise ModelError(
            str(root), "a tokenizer without a fast form", cure="Add a tokenizer.json to the folder"
        )
    return Backend.from_str(backend.to_str())


def _read_optional(path: Path) -> dict[str, Any]:
    return read_settings(path) if path.is_file() else {}


def _read_settings(root: Path) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json for what it leaves out."""
    settings = _read_optional(root / "tokenizer_config.json")
    for key, value in _read_optional(root / "special_tokens_map.json").items():
        if settings.get(key) is None:
            settings[key] = value
    return settings


def _name_token(value: Any) -> str | None:
    """A special token's text: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = cast("dict[str, Any]", value).get("content")
    return value if isinstance(value, str) and value else None


def _collect_eos(*configs: Mapping[str, Any]) -> list[int]:
    found: list[int] = []
    for config in configs:
        value = config.get("eos_token_id")
        values = cast("list[Any]", value) if isinstance(value, list) else [value]
        found += [item for item in values if isinstance(item, int)]
    return found


def _read_template(root: Path, settings: Mapping[str, Any]) -> str | None:
    """The folder's chat template: its own file first, then tokenizer_config (of several named ones, `default`)."""
    path = root / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise DataError(str(path), "is not UTF-8", rule="a template is UTF-8 text") from None
    value: Any = settings.get("chat_template") or _read_optional(root / "chat_template.json").get(
        "chat_template"
    )
    if isinstance(value, list):
        named = {str(item.get("name")): item.get("template") for item in cast("list[dict[str, Any]]", value)}
        value = named.get("default") or next(iter(named.values()), None)
    if isinstance(value, dict):
        value = cast("dict[str, Any]", value).get("default")
    return value if isinstance(value, str) and value else None

"""BM25 over training rows or a folder of documents: the same query gives the same hits on every machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tunesmith.core.errors import DataError, JobError, SetupError

_WORD = re.compile(r"\w+")
_PARAGRAPH = re.compile(r"\n\s*\n")
CHUNK_WORDS = 120


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document; `place` is `folder/file.md` relative to the documents folder."""

    text: str
    place: str


class Retriever:
    """An index over texts. Only what is handed in can be found, so a test row is never among the hits."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Raises ValueError if there is no text, SetupError if bm25s is missing."""
        if not texts:
            raise ValueError("nothing to search in")
        try:
            import bm25s
        except ImportError:
            raise SetupError("retrieval", "bm25s is not installed", cure="pip install bm25s") from None
        words = [_split_words(text) for text in texts]
        self._size = len(texts)
        # A corpus without a single word cannot be indexed; every score is then 0.
        self._index = bm25s.BM25(k1=1.5, b=0.75, method="lucene") if any(words) else None
        if self._index is not None:
            self._index.index(words, show_progress=False)

    def find(self, query: str, count: int) -> list[int]:
        """Positions of the `count` most similar texts, most similar first; of equals, the earlier text."""
        scores = np.zeros(self._size, dtype=np.float32)
        known = [] if self._index is None else [w for w in _split_words(query) if w in self._index.vocab_dict]
        if self._index is not None and known:
            scores = self._index.get_scores(known)
        # float32 sums may differ in the last bits with the order of words; rounding keeps such equals equal.
        order = np.lexsort((np.arange(self._size), -np.round(scores, 4)))
        return [int(position) for position in order[:count]]


def _split_words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def read_passages(folder: Path, *, chunk_words: int = CHUNK_WORDS) -> list[Passage]:
    """Chunks of all .txt and .md files below `folder`, in the order of their paths.

    Paragraphs are joined up to `chunk_words` words; a longer paragraph is cut; no chunk spans two files.
    Raises JobError if the folder is missing or holds no text, DataError if a file is not UTF-8.
    """
    if not folder.is_dir():
        raise JobError(str(folder), "no such folder", cure="Check evaluate.documents")
    paths = sorted(
        (path for path in folder.rglob("*") if path.suffix.lower() in {".txt", ".md"} and path.is_file()),
        key=lambda path: path.relative_to(folder).as_posix(),
    )
    passages: list[Passage] = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                str(path),
                f"byte {error.start} is not UTF-8",
                rule="documents are UTF-8",
                cure="Convert the file",
            ) from None
        place = path.relative_to(folder).as_posix()
        passages.extend(Passage(chunk, place) for chunk in chunk_text(text, chunk_words=chunk_words))
    if not passages:
        raise JobError(
            str(folder),
            "no text in .txt or .md files",
            rule="retrieval needs documents",
            cure="Check evaluate.documents",
        )
    return passages


def chunk_text(text: str, *, chunk_words: int) -> list[str]:
    """Paragraphs joined while they hold at most `chunk_words` words together; a longer one is cut."""
    chunks: list[str] = []
    held: list[str] = []
    num_words = 0
    for paragraph in _PARAGRAPH.split(text):
        for piece in _cut_paragraph(paragraph.strip(), chunk_words):
            length = len(piece.split())
            if held and num_words + length > chunk_words:
                chunks.append("\n\n".join(held))
                held, num_words = [], 0
            held.append(piece)
            num_words += length
    return [*chunks, "\n\n".join(held)] if held else chunks


def _cut_paragraph(paragraph: str, chunk_words: int) -> list[str]:
    words = paragraph.split()
    if len(words) <= chunk_words:
        return [paragraph] if words else []
    return [" ".join(words[start : start + chunk_words]) for start in range(0, len(words), chunk_words)]

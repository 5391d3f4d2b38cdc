"""Clusters of near-duplicates, and splits that keep a cluster on one side.

Near means a Jaccard similarity of at least 0.8 over word trigrams (character 4-grams for short texts) of everything but
the system message, both answers of a pair among it. Candidates come from MinHash, and each is checked exactly. Of
preferences, rows with one prompt are a cluster, too: a trained answer gives the others away.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from tunesmith.core.fingerprint import hash_json
from tunesmith.core.types import Conversation, Message
from tunesmith.data.transcript import text_of

THRESHOLD = 0.8
_NUM_PERMUTATIONS = 128
_NUM_BANDS = 16
_WORD = re.compile(r"\w+")
_FEW_WORDS = 8


def hash_conversation(conversation: Conversation) -> str:
    """16 hex digits over what a row says: equal for equal rows wherever they stand. Of a prompt, over what it asks."""
    said: list[Any] = [
        conversation.kind,
        _list_turns(conversation.messages),
        [dict(tool) for tool in conversation.tools],
    ]
    if conversation.rejected:
        said.append(_list_turns(conversation.rejected))
    if conversation.label is not None:
        said.append(conversation.label)
    return hash_json(said)[:16]


def _list_turns(messages: Sequence[Message]) -> list[list[Any]]:
    return [[m.role, m.content, m.weight, dict(m.extra)] for m in messages]


def split_words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def shingle(conversation: Conversation) -> set[str]:
    """The pieces whose overlap measures similarity."""
    text = text_of(message for message in conversation.all_messages if message.role != "system")
    words = split_words(text)
    if len(words) >= _FEW_WORDS:
        return {f"{a} {b} {c}" for a, b, c in zip(words, words[1:], words[2:], strict=False)}
    joined = " ".join(words) or text.strip()
    return {joined[start : start + 4] for start in range(max(1, len(joined) - 3))}


def find_near_pairs(shingles: Sequence[set[str]]) -> list[tuple[int, int]]:
    """Pairs (i < j) of near-duplicates, enough to connect each cluster (not every pair of a cluster)."""
    rensa: Any = import_module("rensa")
    index = rensa.RMinHashLSH(THRESHOLD, _NUM_PERMUTATIONS, _NUM_BANDS)
    joined = _Union(len(shingles))
    pairs: list[tuple[int, int]] = []
    for number, pieces in enumerate(shingles):
        sketch = _sketch(pieces)
        found: list[int] = sorted(index.query(sketch))
        for other in found:
            if joined.root(other) == joined.root(number):
                continue
            if _jaccard(shingles[other], pieces) >= THRESHOLD:
                joined.join(other, number)
                pairs.append((other, number))
        index.insert(number, sketch)
    return pairs


class NearIndex:
    """Conversations held in memory, to be asked which of them another one is near to."""

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        rensa: Any = import_module("rensa")
        self._index = rensa.RMinHashLSH(THRESHOLD, _NUM_PERMUTATIONS, _NUM_BANDS)
        self._shingles = [shingle(conversation) for conversation in conversations]
        for number, pieces in enumerate(self._shingles):
            self._index.insert(number, _sketch(pieces))

    def find(self, conversation: Conversation) -> list[int]:
        """Numbers of the conversations at or above THRESHOLD."""
        pieces = shingle(conversation)
        found: list[int] = self._index.query(_sketch(pieces))
        return [number for number in found if _jaccard(self._shingles[number], pieces) >= THRESHOLD]


def _sketch(pieces: set[str]) -> Any:
    sketch: Any = import_module("rensa").RMinHash(_NUM_PERMUTATIONS, 42)
    sketch.update(sorted(pieces))
    return sketch


def _jaccard(left: set[str], right: set[str]) -> float:
    small, large = sorted((len(left), len(right)))
    if not large:
        return 1.0
    if small < THRESHOLD * large:
        return 0.0
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)


class _Union:
    """Disjoint sets over 0..n-1."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def root(self, item: int) -> int:
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def join(self, left: int, right: int) -> None:
        left, right = sorted((self.root(left), self.root(right)))
        self._parent[right] = left

    def name_each(self, names: Sequence[str]) -> list[str]:
        """For each item the least of the names in its set: the same whatever the order of the items."""
        least: dict[int, str] = {}
        for number, name in enumerate(names):
            root = self.root(number)
            least[root] = min(least.get(root, name), name)
        return [least[self.root(number)] for number in range(len(names))]


class Likeness:
    """Hashes and near-duplicate groups of a set of conversations, worked out once and asked about often.

    Ids of groups do not depend on the order of the rows. Conversations are known by identity: ask only about those
    given.
    """

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        # Kept, so that an id stands for the same conversation as long as this object lives.
        self._conversations = list(conversations)
        self._hash = {id(c): hash_conversation(c) for c in self._conversations}
        unique = {self._hash[id(c)]: c for c in self._conversations}
        union = _Union(len(unique))
        for left, right in find_near_pairs([shingle(c) for c in unique.values()]):
            union.join(left, right)
        self._group = dict(zip(unique, union.name_each(list(unique)), strict=True))
        first: dict[str, int] = {}
        for number, conversation in enumerate(unique.values()):
            if conversation.rejected or conversation.label is not None:
                prompt = text_of(message for message in conversation.prompt if message.role != "system")
                union.join(first.setdefault(" ".join(prompt.lower().split()), number), number)
        self._family = dict(zip(unique, union.name_each(list(unique)), strict=True))

    def hash_of(self, conversation: Conversation) -> str:
        return self._hash[id(conversation)]

    def near_group(self, conversation: Conversation) -> str:
        """Id of the near-duplicates that a conversation belongs to; its own hash if it has none."""
        return self._group[self.hash_of(conversation)]

    def cluster_of(self, conversation: Conversation) -> str:
        """Cluster id: the one given with the row (`cluster`, `family`), else its near-duplicates', which of a
        preference are joined by those of the same prompt."""
        return str(conversation.extra.get("cluster", self._family[self.hash_of(conversation)]))

    def find_split_groups(self, conversations: Sequence[Conversation]) -> list[str]:
        """Group of each conversation for splitting: rows of a given cluster, near-duplicates and preferences of one
        prompt stay together."""
        union = _Union(len(conversations))
        first: dict[tuple[str, str], int] = {}
        for number, conversation in enumerate(conversations):
            union.join(first.setdefault(("near", self._family[self.hash_of(conversation)]), number), number)
            if (name := conversation.extra.get("cluster")) is not None:
                union.join(first.setdefault(("given", str(name)), number), number)
        names = [self.hash_of(conversation) for conversation in conversations]
        return union.name_each(names)


def assign_splits(groups: Sequence[str], *, shares: dict[str, float], seed: int) -> list[str]:
    """Split name of each row: whole groups, drawn by the hash of (seed, group) until a share of the rows is reached.

    shares: rows of each held-out split as a share of all; the rest is "train". Each held-out split gets at least one
    group where there are enough. The result does not depend on the order of the rows.
    """
    sizes: dict[str, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    order = sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    chosen: dict[str, str] = {}
    for name, share in shares.items():
        target = round(share * len(groups)) or (1 if share > 0 else 0)
        free = [group for group in order if group not in chosen]
        taken = 0
        for group in free:
            if taken + sizes[group] <= target:
                chosen[group] = name
                taken += sizes[group]
        if target and not taken and len(free) > 1:
            chosen[min(free, key=lambda group: sizes[group])] = name
    return [chosen.get(group, "train") for group in groups]

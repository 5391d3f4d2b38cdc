"""Training rows from data larger than memory, in constant memory, resumable exactly.

The split files are named, not cut; rows are shuffled within a window; exact repeats are dropped by hash (8 bytes each).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from tunesmith.core.errors import DataError
from tunesmith.core.types import Conversation, TokenRow
from tunesmith.data.checks import SourceFacts, SplitFacts
from tunesmith.data.collect import Rejects, check_stream_splits, read_conversations
from tunesmith.data.conversation_json import describe_conversation
from tunesmith.data.fitting import fit_row
from tunesmith.data.render import Renderer
from tunesmith.data.sources import Source, find_sources
from tunesmith.data.split import hash_conversation
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.job.spec import DataSpec, as_source_specs

_BATCH = 64


class HashSet:
    """A set of 64-bit hashes in one open-addressed array: 8 bytes each at a load of at most 2/3.

    Memory is 12 to 24 bytes an entry while it grows by doubling; 100 million rows need about 2.4 GB.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, value: int) -> bool:
        """Put a value in; False if it was there already."""
        # 0 marks an empty slot.
        value = value or 1
        position = self._find(self._slots, value)
        if self._slots[position] == value:
            return False
        self._slots[position] = value
        self._size += 1
        if self._size * 3 > len(self._slots) * 2:
            self._grow()
        return True

    @staticmethod
    def _find(slots: array[int], value: int) -> int:
        mask = len(slots) - 1
        position = value & mask
        while slots[position] not in (0, value):
            position = (position + 1) & mask
        return position

    def _grow(self) -> None:
        larger = array("Q", bytes(8 * 2 * len(self._slots)))
        for value in self._slots:
            if value:
                larger[self._find(larger, value)] = value
        self._slots = larger


@dataclass(slots=True)
class RowStream:
    """An endless or one-pass iterator over training rows.

    num_taken: rows given out so far. A new stream over the same files with `skip=num_taken` goes on with the same rows.
    facts:     what was dropped or cut so far; lengths: tokens of the rows before that, counted.
    sources:   what was read of each, so far.
    look:      is shown every conversation before it is rendered.
    """

    data: DataSpec
    renderer: Renderer
    seed: int = 0
    rejects: Rejects = field(default_factory=lambda: Rejects(None))
    facts: SplitFacts = field(default_factory=SplitFacts)
    num_taken: int = 0
    lengths: Counter[int] = field(default_factory=Counter[int])
    sources: list[SourceFacts] = field(default_factory=list[SourceFacts])
    look: Callable[[Conversation], None] | None = None

    def rows(self, *, epoch: int = 0, skip: int = 0) -> Iterator[TokenRow]:
        """Rows of one pass, shuffled in windows by (seed, epoch).

        skip: rows of this pass that were consumed before; they are read and rendered again, not given out.
        """
        rng = np.random.default_rng([self.seed, epoch])
        window: list[TokenRow] = []
        given = 0
        for row in self._render_all():
            if len(window) < self.data.shuffle_window:
                window.append(row)
                continue
            place = int(rng.integers(len(window)))
            taken, window[place] = window[place], row
            given += 1
            if given > skip:
                self.num_taken += 1
                yield taken
        for place in rng.permutation(len(window)).tolist():
            given += 1
            if given > skip:
                self.num_taken += 1
                yield window[place]

    def _render_all(self) -> Iterator[TokenRow]:
        batch: list[Conversation] = []
        for conversation in self._read_all():
            batch.append(conversation)
            if len(batch) == _BATCH:
                yield from self._render(batch)
                batch = []
        yield from self._render(batch)

    def _render(self, batch: list[Conversation]) -> Iterator[TokenRow]:
        try:
            rendered = self.renderer.render_conversations(batch)
        except DataError:
            if not self.rejects.collect:
                raise
            rendered = [self._render_or_reject(conversation) for conversation in batch]
        for rows in rendered:
            self.lengths.update(len(row.ids) for row in rows)
            fitting = [
                row for row in (fit_row(row, self.data, self.facts) for row in rows) if row is not None
            ]
            self.facts.num_conversations += bool(fitting)
            yield from fitting

    def _render_or_reject(self, conversation: Conversation) -> list[TokenRow]:
        try:
            return self.renderer.render_conversation(conversation)
        except DataError as error:
            self.rejects.add(conversation.origin, describe_conversation(conversation), error)
            return []

    def _read_all(self) -> Iterator[Conversation]:
        seen = HashSet()
        for source, fmt in find_stream_sources(self.data):
            facts = SourceFacts(name=source.name, split="train", format=fmt, revision=source.revision)
            self.sources.append(facts)
            for conversation in read_conversations(source, self.rejects, facts, fmt=fmt):
                if self.data.deduplicate == "exact" and not seen.add(
                    int(hash_conversation(conversation), 16)
                ):
                    self.facts.num_exact_duplicates += 1
                    continue
                if self.look is not None:
                    self.look(conversation)
                yield conversation


def find_stream_sources(data: DataSpec) -> list[tuple[Source, str]]:
    """The train splits that a streaming job reads, in order, with the format of each."""
    found: list[tuple[Source, str]] = []
    for spec in as_source_specs(data.train):
        if spec.weight != 1.0:
            raise DataError(
                spec.path,
                f"weight {spec.weight}",
                rule="streaming reads every row once",
                cure="Leave the weight out",
            )
        sources = find_sources(spec)
        if any(file.suffix.lower() == ".json" for file in sources["train"].files):
            raise DataError(
                spec.path,
                "a .json file cannot be streamed",
                rule="it is one value and read as a whole",
                cure="Convert it to .jsonl",
            )
        found.append((sources["train"], spec.format))
    return found


def open_stream(
    data: DataSpec, *, tokenizer: Tokenizer, seed: int = 0, rejects: Rejects | None = None
) -> RowStream:
    """A stream of a job's training rows. Raises DataError where the job asks for what streaming cannot do."""
    check_stream_splits(data)
    find_stream_sources(data)
    return RowStream(data, Renderer(tokenizer, data), seed=seed, rejects=rejects or Rejects(None))

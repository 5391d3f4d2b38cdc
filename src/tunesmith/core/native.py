"""What a framework's own preprocessing made of the rows that it was given raw, held against the rows that we train on:
`arms/NAME/native.json`, and a part of `comparison.json`."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class NativeExample:
    """One row that differs. place: `train.jsonl:17`. at: number of the token in our row where it begins.

    ours, theirs: the text from there on, shortened; "" where a side has none.
    """

    place: str
    at: int
    ours: str
    theirs: str


@dataclass(frozen=True, slots=True)
class NativeKind:
    """One way in which rows differ; a row may differ in several. name: of `comparing.native.KINDS`.

    rows: that have it. tokens: in all of these rows. examples: at most five.
    """

    name: str
    title: str
    rows: int
    tokens: int
    examples: list[NativeExample]


@dataclass(frozen=True, slots=True)
class NativeTokens:
    """Our rows and what a framework made of the same conversations by itself.

    same_rows: rows whose tokens and labels are ours. What follows a row's last trained token is not looked at.
    tokens, targets: of all rows, ours; their_tokens, their_targets: the framework's, as its collator gives them.
    says: the finding in a sentence.
    """

    framework: str
    rows: int
    same_rows: int
    tokens: int
    their_tokens: int
    targets: int
    their_targets: int
    kinds: list[NativeKind]
    says: str

    def without_examples(self) -> NativeTokens:
        """The same counts, without any row's text."""
        return replace(self, kinds=[replace(kind, examples=[]) for kind in self.kinds])

"""What is in the data, as data: counts, lengths, losses by truncation, duplicates, overlap, stop tokens; and findings.

Every repair, drop and surprise becomes a `Finding`; nothing here changes a row.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tunesmith.core.quantities import format_number
from tunesmith.core.types import Conversation, TokenRow
from tunesmith.data.render import Renderer
from tunesmith.data.split import Likeness, split_words
from tunesmith.data.transcript import text_of
from tunesmith.job.objective import RowKind

NGRAM_WORDS = 13
_PERCENTILES = (5, 25, 50, 75, 95, 99, 100)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know. level "error" stops a run, "warning" is shown, "note" is kept."""

    level: Literal["error", "warning", "note"]
    code: str
    message: str
    count: int = 0
    split: str = ""


@dataclass(slots=True)
class SourceFacts:
    """One source of one split: what was read, as which shape, and what was not taken."""

    name: str
    split: str
    format: str
    num_rows: int = 0
    num_rejected: int = 0
    revision: str | None = None


@dataclass(slots=True)
class SplitFacts:
    """One split after rendering. Lengths and targets are in tokens.

    num_lost_targets: answer tokens in rows that were dropped or cut for length.
    length_percentiles: of the rows before dropping or cutting, by percentile ("50", "95", "100" ...).
    """

    num_conversations: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    num_answer_bytes: int = 0
    length_percentiles: dict[str, int] = field(default_factory=dict[str, int])
    num_dropped: int = 0
    num_truncated: int = 0
    num_lost_targets: int = 0
    num_without_targets: int = 0
    num_without_stop: int = 0
    num_exact_duplicates: int = 0
    num_near_duplicates: int = 0
    num_clusters: int = 0


@dataclass(slots=True)
class Overlap:
    """How many rows of a held-out split stand in train, too: equal, near (Jaccard >= 0.8), or 13 words in a row."""

    num_rows: int = 0
    num_exact: int = 0
    num_same_question: int = 0
    num_near: int = 0
    num_shared_13grams: int = 0


@dataclass(slots=True)
class PreferenceFacts:
    """The pairs or labelled rows of one split. Sides are chosen and rejected, or desirable and undesirable.

    answer_tokens: of each side, trained tokens of an answer by percentile ("50", "95", "100" ...).
    num_chosen_longer, num_chosen_shorter: pairs by the tokens of their answers.
    num_conflicts: pairs that also stand there the other way round; labelled answers that also have the other label.
    """

    kind: RowKind
    num_examples: int = 0
    num_prompts: int = 0
    num_answers: dict[str, int] = field(default_factory=dict[str, int])
    answer_tokens: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    num_chosen_longer: int = 0
    num_chosen_shorter: int = 0
    num_conflicts: int = 0


@dataclass(slots=True)
class CheckReport:
    """The answer of `tunesmith check`, and `checks.json` of a prepared folder."""

    sources: list[SourceFacts] = field(default_factory=list[SourceFacts])
    splits: dict[str, SplitFacts] = field(default_factory=dict[str, SplitFacts])
    overlap: dict[str, Overlap] = field(default_factory=dict[str, Overlap])
    counts: dict[str, int] = field(default_factory=dict[str, int])
    findings: list[Finding] = field(default_factory=list[Finding])
    preferences: dict[str, PreferenceFacts] = field(default_factory=dict[str, PreferenceFacts])

    @property
    def warnings(self) -> list[str]:
        """Messages of findings that a person should see."""
        return [item.message for item in self.findings if item.level != "note"]

    @property
    def errors(self) -> list[str]:
        return [item.message for item in self.findings if item.level == "error"]

    def to_json(self) -> dict[str, Any]:
        value = {"schema": 1, **dataclasses.asdict(self)}
        if not self.preferences:
            del value["preferences"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CheckReport:
        return cls(
            sources=[SourceFacts(**item) for item in value["sources"]],
            splits={name: SplitFacts(**item) for name, item in value["splits"].items()},
            overlap={name: Overlap(**item) for name, item in value["overlap"].items()},
            counts=dict(value["counts"]),
            findings=[Finding(**item) for item in value["findings"]],
            preferences={n: PreferenceFacts(**item) for n, item in value.get("preferences", {}).items()},
        )


def measure_lengths(lengths: Mapping[int, int]) -> dict[str, int]:
    """Length percentiles in tokens, each a length that occurs. lengths: how many rows have each."""
    if not lengths:
        return {}
    values = np.array(sorted(lengths))
    below = np.cumsum([lengths[int(value)] for value in values])
    ranks = np.ceil(np.array(_PERCENTILES) / 100 * below[-1])
    found = values[np.searchsorted(below, ranks)]
    return {str(p): int(v) for p, v in zip(_PERCENTILES, found.tolist(), strict=True)}


def count_rows(facts: SplitFacts, rows: Iterable[TokenRow], *, stop_ids: Sequence[int]) -> None:
    """Add the kept rows' tokens, targets and missing stop tokens to a split's facts."""
    stops = set(stop_ids)
    for row in rows:
        facts.num_rows += 1
        facts.num_tokens += len(row.ids)
        facts.num_targets += row.num_targets
        facts.num_answer_bytes += row.num_answer_bytes
        if any(row.mask) and not (row.mask[-1] and row.ids[-1] in stops):
            facts.num_without_stop += 1


def measure_overlaps(
    train: Sequence[Conversation], held_out: Mapping[str, Sequence[Conversation]], likeness: Likeness
) -> dict[str, Overlap]:
    """Compare held-out splits with train, reading the words of train once."""
    hashes = {likeness.hash_of(c) for c in train}
    groups = {likeness.near_group(c) for c in train}
    questions = {question_of(c) for c in train}
    grams = {name: [ngrams_of(c) for c in rows] for name, rows in held_out.items()}
    wanted = frozenset(itertools.chain.from_iterable(itertools.chain.from_iterable(grams.values())))
    seen: set[int] = set()
    for conversation in train if wanted else ():
        seen |= wanted & ngrams_of(conversation)
    return {
        name: Overlap(
            num_rows=len(rows),
            num_exact=sum(likeness.hash_of(c) in hashes for c in rows),
            num_same_question=sum(question_of(c) in questions for c in rows),
            num_near=sum(likeness.near_group(c) in groups for c in rows),
            num_shared_13grams=sum(not gram.isdisjoint(seen) for gram in grams[name]),
        )
        for name, rows in held_out.items()
    }


def question_of(conversation: Conversation) -> str:
    """What a row asks: equal questions in train and test are a leak, whatever the answers."""
    return text_of(m for m in conversation.prompt if m.role != "system") or conversation.answer


def ngrams_of(conversation: Conversation) -> frozenset[int]:
    """Hashes of every `NGRAM_WORDS` words in a row."""
    words = split_words(text_of(m for m in conversation.all_messages if m.role != "system"))
    return frozenset(hash(tuple(words[n : n + NGRAM_WORDS])) for n in range(len(words) - NGRAM_WORDS + 1))


def find_special_tokens(conversations: Iterable[Conversation], renderer: Renderer) -> int:
    """Rows whose own text spells a special token: it becomes that token, and may end a turn early."""
    specials = [token for token in renderer.tokenizer.added_tokens if len(token) > 2 and not token.isspace()]
    return sum(
        any(token in message.content for message in c.all_messages for token in specials)
        if _may_hold(c)
        else False
        for c in conversations
    )


def _may_hold(conversation: Conversation) -> bool:
    return any("<" in message.content or "[" in message.content for message in conversation.all_messages)


_KEPT = " (rejected_rows.jsonl of the --out folder, if there is one, holds them)"
# What rendering counts, and how it is told. (level, message with {n})
_RENDER_FINDINGS: dict[str, tuple[Literal["error", "warning", "note"], str]] = {
    "rows_with_bos_twice": (
        "warning",
        "{n} rows began with BOS twice, and the second was dropped: the template writes it, and so does the row or the "
        "template again. Other software may not drop it",
    ),
    "rows_without_bos": ("warning", "{n} rows have no BOS, though the tokenizer puts one before plain text"),
    "rows_refused_by_template": (
        "warning",
        "{n} rows do not fit the chat template and were skipped" + _KEPT,
    ),
    "pairs_equal_once_cut": (
        "warning",
        "{n} pairs are the same tokens once cut to max_tokens and were left out",
    ),
    "prompts_without_truth": (
        "note",
        "{n} prompts have no truth: no answer, solution or ground_truth that is text or a number",
    ),
    "eos_added_after_answer": (
        "note",
        "{n} rows got the tokenizer's EOS after the last answer: the template ends answers without a stop token",
    ),
    "empty_reasoning_added": (
        "warning",
        "{n} answers without reasoning were given an empty block: the template's prompt opens one",
    ),
    "conversations_as_one_row_per_turn": (
        "note",
        "{n} conversations became one row per assistant turn: the template rewrites earlier turns",
    ),
    "answers_rewritten_by_template": (
        "warning",
        "{n} answers are changed by the template; the changed text is trained",
    ),
    "prompts_unlike_rendered_turns": (
        "note",
        "{n} answers follow the generation prompt, which the template writes differently in rendered turns",
    ),
    "end_markers_cut_from_a_token": (
        "note",
        "{n} end markers are plain text to the tokenizer and were cut from a token that also held what follows",
    ),
}


def find_findings(report: CheckReport, renderer: Renderer) -> list[Finding]:
    """Everything in a report worth a sentence, worst first."""
    found: list[Finding] = []
    for code, count in report.counts.items():
        if count and code in _RENDER_FINDINGS:
            level, message = _RENDER_FINDINGS[code]
            found.append(Finding(level, code, message.format(n=count), count))
    if n := report.counts.get("rows_with_special_tokens", 0):
        text = f"{n} rows spell a special token in their own text; it is read as that token"
        found.append(Finding("warning", "rows_with_special_tokens", text, n))
    for source in report.sources:
        if source.num_rejected:
            text = f"{source.name}: {format_number(source.num_rejected, 'bad row')} skipped{_KEPT}"
            found.append(Finding("warning", "rejected_rows", text, source.num_rejected, source.split))
    for name, facts in report.splits.items():
        found += _find_in_split(
            name, facts, in_pairs=name in report.preferences and report.preferences[name].kind == "pairs"
        )
    for name, overlap in report.overlap.items():
        found += _find_in_overlap(name, overlap)
    if (token := _unlisted_end(renderer)) is not None:
        text = (
            f"the template ends answers with {token!r}, which is not among the tokenizer's or model's stop tokens; "
            "we stop on it, other software needs it in generation_config.json"
        )
        found.append(Finding("warning", "end_token_not_listed", text))
    return sort_findings(found)


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Worst first."""
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(findings, key=lambda item: order[item.level])


def _unlisted_end(renderer: Renderer) -> str | None:
    listed = set(renderer.tokenizer.eos_ids)
    return next((renderer.tokenizer.token(i) for i in renderer.stop_ids if i not in listed), None)


def _find_in_split(name: str, facts: SplitFacts, *, in_pairs: bool) -> list[Finding]:
    found: list[Finding] = []

    def add(level: Literal["error", "warning", "note"], code: str, count: int, text: str) -> None:
        if count:
            found.append(Finding(level, code, f"{name}: {count} {text}", count, name))

    lost = f"which loses {facts.num_lost_targets} answer tokens"
    or_other = ", or the other of their pair is," if in_pairs else ""
    add(
        "warning",
        "dropped_rows",
        facts.num_dropped,
        f"rows are longer than max_tokens{or_other} and were dropped, {lost}",
    )
    add(
        "warning",
        "truncated_rows",
        facts.num_truncated,
        f"rows are longer than max_tokens and were cut, {lost}",
    )
    add(
        "warning",
        "rows_without_targets",
        facts.num_without_targets,
        "rows have no trained token and were left out",
    )
    add(
        "warning",
        "rows_without_stop",
        facts.num_without_stop,
        "rows do not train a stop token; answers may not end",
    )
    add("note", "exact_duplicates", facts.num_exact_duplicates, "rows repeat an earlier row exactly")
    add("note", "near_duplicates", facts.num_near_duplicates, "rows are near-duplicates of another row")
    return found


def _find_in_overlap(name: str, overlap: Overlap) -> list[Finding]:
    found: list[Finding] = []
    for code, count, text in (
        ("overlap_exact", overlap.num_exact, "also stand in train"),
        ("overlap_near", overlap.num_near, "are near-duplicates of train rows"),
        ("overlap_13grams", overlap.num_shared_13grams, f"share {NGRAM_WORDS} words in a row with train"),
    ):
        if count:
            level: Literal["warning", "note"] = "note" if code == "overlap_13grams" else "warning"
            text = f"{name}: {count} of {overlap.num_rows} rows {text}"
            found.append(Finding(level, code, text, count, name))
    return found

"""Test rows side by side: who got which row right, what each arm said, and where it left the truth."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from tunesmith.core.comparison import ArmResult, Comparison
from tunesmith.core.records import AnswerRecord, read_answers
from tunesmith.core.rundir import RunDir

MAX_ROWS = 300
MAX_CHARACTERS = 1200
_MAX_DIFF_TOKENS = 400
_TOKEN = re.compile(r"\s+|\w+|[^\w\s]")

Answers = dict[str, dict[int, list[AnswerRecord]]]
"""Arm -> seed -> answers in row order."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of an answer: kind "same", "extra" (not in the truth) or "missing" (in the truth only)."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Said:
    """One distinct answer to a row and the arms that gave it. right: equal to the truth."""

    arms: list[int]
    pieces: list[Piece]
    right: bool
    cut: str = ""


@dataclass(frozen=True, slots=True)
class RowView:
    """A test row as shown. scores: per arm, mean over seeds, None where the arm has no such row."""

    number: int
    place: str
    question: str
    truth: str
    scores: list[float | None]
    said: list[Said]


@dataclass(frozen=True, slots=True)
class Tally:
    """Rows that an arm does better or worse than the base, and alike."""

    arm: int
    wins: int
    losses: int
    same: int


@dataclass(frozen=True, slots=True)
class FieldShares:
    """Per field of JSON answers: the share of rows with the truth's value, per arm; None without such rows."""

    name: str
    num_rows: int
    shares: list[float | None]


def read_all_answers(run_dir: RunDir, comparison: Comparison) -> Answers:
    """The answers of every ranked arm and seed."""
    return {
        arm.name: {seed: read_answers(run_dir.arm(arm.name, seed).answers) for seed in arm.seeds}
        for arm in comparison.arms
        if arm.seeds and not arm.not_comparable
    }


def choose_row_metric(comparison: Comparison, answers: Answers) -> str:
    """The metric that says who won a row: the declared one, exact match where NLL was declared, else NLL."""
    scored = {name for seeds in answers.values() for rows in seeds.values() for name in rows[0].scores}
    for name in (comparison.metric, "exact_match", *sorted(scored)):
        if name in scored:
            return name
    return "nll"


def view_rows(comparison: Comparison, answers: Answers, metric: str) -> list[RowView]:
    """Rows in test order; at most MAX_ROWS, those on which arms disagree first in line for a place."""
    first = next(iter(next(iter(answers.values())).values()))
    scores = [_score_row(comparison.arms, answers, metric, row) for row in range(len(first))]
    spread = [
        max(known) - min(known) if (known := [s for s in row if s is not None]) else 0.0 for row in scores
    ]
    order = sorted(range(len(first)), key=lambda row: (-spread[row], row))
    chosen = sorted(order[:MAX_ROWS])
    return [
        RowView(first[row].row, first[row].place, _shorten(first[row].question), _shorten(first[row].truth),
                scores[row], _group_answers(comparison.arms, answers, row))
        for row in chosen
    ]  # fmt: skip


def _score_row(arms: Sequence[ArmResult], answers: Answers, metric: str, row: int) -> list[float | None]:
    """Mean over seeds, higher is better; NLL counts negated, in nats per token."""
    means: list[float | None] = []
    for arm in arms:
        values: list[float] = []
        for rows in answers.get(arm.name, {}).values():
            answer = rows[row]
            if metric == "nll" and answer.nll is not None and answer.num_target_tokens:
                values.append(-answer.nll / answer.num_target_tokens)
            elif metric in answer.scores:
                values.append(answer.scores[metric])
        means.append(sum(values) / len(values) if values else None)
    return means


def _group_answers(arms: Sequence[ArmResult], answers: Answers, row: int) -> list[Said]:
    """Distinct answers of each arm's first seed, in the order of arms; equal answers share a card."""
    by_text: dict[str, list[int]] = {}
    truth = ""
    for number, arm in enumerate(arms):
        seeds = answers.get(arm.name)
        if not seeds:
            continue
        answer = next(iter(seeds.values()))[row]
        truth = answer.truth
        if answer.answer is not None:
            by_text.setdefault(answer.answer, []).append(number)
    groups: list[Said] = []
    for text, numbers in by_text.items():
        right = text.strip() == truth.strip()
        short = text[:MAX_CHARACTERS]
        cut = f"{len(text) - len(short):,} more characters" if len(short) < len(text) else ""
        groups.append(Said(numbers, [] if right else compare_texts(truth, short), right, cut))
    return groups


def compare_texts(truth: str, answer: str) -> list[Piece]:
    """Word-level difference of an answer from the truth, as pieces in the answer's order."""
    a, b = _TOKEN.findall(truth), _TOKEN.findall(answer)
    if max(len(a), len(b)) > _MAX_DIFF_TOKENS:
        # Comparing costs the product of both lengths; a very long answer is shown as it is.
        return [Piece("same", answer)]
    pieces: list[Piece] = []
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    if matcher.ratio() < 0.25:
        return [Piece("extra", answer)] if answer else []
    for kind, a0, a1, b0, b1 in matcher.get_opcodes():
        if kind == "equal":
            pieces.append(Piece("same", "".join(b[b0:b1])))
            continue
        if a1 > a0:
            pieces.append(Piece("missing", "".join(a[a0:a1])))
        if b1 > b0:
            pieces.append(Piece("extra", "".join(b[b0:b1])))
    return pieces


def _shorten(text: str) -> str:
    if len(text) <= 2 * MAX_CHARACTERS:
        return text
    return f"{text[: 2 * MAX_CHARACTERS]} … ({len(text) - 2 * MAX_CHARACTERS:,} more characters)"


def tally_rows(comparison: Comparison, answers: Answers, metric: str) -> list[Tally]:
    """Wins and losses of every arm against the base, over all rows; scores are means over seeds."""
    names = [arm.name for arm in comparison.arms]
    if comparison.base not in answers:
        return []
    base = names.index(comparison.base)
    num_rows = len(next(iter(answers[comparison.base].values())))
    scores = [_score_row(comparison.arms, answers, metric, row) for row in range(num_rows)]
    tallies: list[Tally] = []
    for arm in range(len(names)):
        pairs = [(row[arm], row[base]) for row in scores]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        if arm == base or not known:
            continue
        wins, losses = sum(a > b + 1e-9 for a, b in known), sum(a < b - 1e-9 for a, b in known)
        tallies.append(Tally(arm, wins, losses, len(known) - wins - losses))
    return tallies


def share_fields(comparison: Comparison, answers: Answers) -> list[FieldShares]:
    """Per-field accuracy of JSON answers over all seeds; [] unless nine truths of ten are JSON objects.

    The last entry, "(invented)", is the share of answers with a field that the truth does not have; unparsable answers
    are wrong in every field and invent none.
    """
    first = next(iter(next(iter(answers.values())).values()))
    truths = [_parse_object(answer.truth) for answer in first]
    if sum(truth is not None for truth in truths) < 0.9 * len(truths):
        return []
    fields = list(dict.fromkeys(key for truth in truths if truth for key in truth))[:24]
    counts = {field: sum(field in truth for truth in truths if truth) for field in fields}
    right = {field: list[float | None]() for field in fields}
    invented: list[float | None] = []
    for arm in comparison.arms:
        given = [
            (truth, _parse_object(answer.answer))
            for rows in answers.get(arm.name, {}).values()
            for truth, answer in zip(truths, rows, strict=True)
            if truth is not None and answer.answer is not None
        ]
        for field in fields:
            hits = [_same(answer, truth, field) for truth, answer in given if field in truth]
            right[field].append(sum(hits) / len(hits) if hits else None)
        more = [answer is not None and bool(answer.keys() - truth.keys()) for truth, answer in given]
        invented.append(sum(more) / len(more) if more else None)
    shares = [FieldShares(field, counts[field], right[field]) for field in fields]
    return [*shares, FieldShares("(invented)", len(truths), invented)]


def _same(answer: Mapping[str, Any] | None, truth: Mapping[str, Any], field: str) -> bool:
    return answer is not None and field in answer and answer[field] == truth[field]


def _parse_object(text: str | None) -> dict[str, Any] | None:
    """The JSON object in a text; None if it is none. An answer is data: whatever it holds, it parses or it does not."""
    try:
        value = json.loads(text or "")
    except (ValueError, RecursionError):
        return None
    return cast(dict[str, Any], value) if isinstance(value, dict) else None

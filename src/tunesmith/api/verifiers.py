"""Rewards that come with us: what an answer is worth by rules, most of them metrics of the judge, too."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from tunesmith.core.errors import DataError, JobError
from tunesmith.data.prompts import Answer
from tunesmith.eval.metrics import (
    METRICS,
    MetricContext,
    cut_reasoning,
    json_schema,
    json_valid,
    load_schema,
)
from tunesmith.job.objective import VERIFIERS, RewardTerm

Verify = Callable[[Answer], float | None]
# Metrics that hold an answer against the prompt's truth, and what such a truth is.
AGAINST_TRUTH = {"exact_match": "a truth", "json_fields": "a truth that is a JSON object or list"}


def open_verifier(term: RewardTerm, place: str) -> Verify:
    """What is asked of one answer after the other; `regex` is not among them. None where it cannot tell."""
    return _OPEN[term.source](term, place)


def can_verify(source: str, truth: str | None) -> bool:
    """Whether a verifier that holds answers against truths could tell of this one; the others need none."""
    if source not in AGAINST_TRUTH:
        return True
    return truth is not None and METRICS[source].applies(truth, MetricContext())


def _verify_truth(term: RewardTerm, place: str) -> Verify:
    metric = METRICS[term.source]

    def verify(answer: Answer) -> float | None:
        truth = answer.prompt.truth
        if truth is None or not can_verify(term.source, truth):
            return None
        return metric(_said(answer), truth, MetricContext())

    return verify


def _verify_json(term: RewardTerm, place: str) -> Verify:
    return lambda answer: json_valid(_said(answer), "")


def _verify_schema(term: RewardTerm, place: str) -> Verify:
    context = MetricContext(validator=open_schema(cast("str", term.schema_file), place))
    return lambda answer: json_schema(_said(answer), "", context)


def _verify_length(term: RewardTerm, place: str) -> Verify:
    wanted = cast("int", term.characters)
    return lambda answer: max(0.0, 1.0 - abs(len(answer.text) - wanted) / wanted)


_OPEN: dict[str, Callable[[RewardTerm, str], Verify]] = {
    "exact_match": _verify_truth,
    "json_fields": _verify_truth,
    "json_valid": _verify_json,
    "json_schema": _verify_schema,
    "length": _verify_length,
}


def _said(answer: Answer) -> str:
    return cut_reasoning(answer.text, answer.prompt.truth or "")


def open_schema(path: str, place: str) -> Any:
    """A validator for a schema file. Raises JobError if there is none, or no schema in it."""
    try:
        return load_schema(Path(path))
    except (DataError, JobError) as error:
        raise JobError(
            place, f"{error.place}: {error.finding}", rule=error.rule, cure="Check schema_file"
        ) from None


def check_pattern(pattern: str, place: str) -> None:
    """Raise JobError for a pattern that does not compile."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise JobError(
            place,
            f"pattern {pattern[:60]!r} does not compile: {error}",
            cure="Mend the pattern; YAML wants it in single quotes",
        ) from None


def check_settings(term: RewardTerm, place: str) -> None:
    """Raise JobError for a verifier without the setting that it needs, or a reward with one of another."""
    needed = VERIFIERS.get(term.source)
    for name in ("pattern", "schema_file", "characters"):
        value = getattr(term, name)
        if name == needed and value is None:
            raise JobError(place, f"no {name}", rule=f"{term.source} needs it", cure=f"Add {name}: ...")
        if name != needed and value is not None:
            owner = next(verifier for verifier, setting in VERIFIERS.items() if setting == name)
            raise JobError(
                place, f"has {name}", rule=f"{name} is of {owner}", cure=f"Remove it, or use {owner}"
            )

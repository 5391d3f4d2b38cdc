"""What is in preference data: lengths of both sides, balance of labels, preferences that contradict each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tunesmith.core.quantities import format_number
from tunesmith.core.types import Conversation, Message, TokenRow
from tunesmith.data.checks import CheckReport, Finding, PreferenceFacts, measure_lengths
from tunesmith.data.preferences import rows_of_shape
from tunesmith.job.objective import RowKind

# Chosen answers longer more often than this are told as a warning: length is then the easiest thing to learn.
LENGTH_BIAS = 2 / 3
_ENOUGH_PAIRS = 30
# Labels up to 1 to 4 are left alone.
_BALANCE = 4


def measure_preferences(
    kind: RowKind, rows: Sequence[TokenRow], conversations: Sequence[Conversation]
) -> PreferenceFacts:
    """Facts of a split. rows: as kept; of pairs chosen and rejected in turn."""
    if kind == "pairs":
        sides = {"chosen": list(rows[::2]), "rejected": list(rows[1::2])}
    else:
        sides = {
            name: [row for row in rows if row.numbers["desirable"] == value]
            for name, value in (("desirable", 1.0), ("undesirable", 0.0))
        }
    lengths = {name: [row.num_targets for row in side] for name, side in sides.items()}
    facts = PreferenceFacts(
        kind=kind,
        num_examples=len(conversations),
        num_prompts=len({_say(c.prompt) for c in conversations}),
        num_answers={name: len(side) for name, side in sides.items()},
        answer_tokens={name: measure_lengths(Counter(found)) for name, found in lengths.items()},
        num_conflicts=_count_conflicts(conversations),
    )
    if kind == "pairs":
        both = list(zip(lengths["chosen"], lengths["rejected"], strict=True))
        facts.num_chosen_longer = sum(a > b for a, b in both)
        facts.num_chosen_shorter = sum(a < b for a, b in both)
    return facts


def _count_conflicts(conversations: Sequence[Conversation]) -> int:
    """Pairs that also stand there the other way round; labelled answers that also have the other label."""
    said, other = list[tuple[object, ...]](), list[tuple[object, ...]]()
    for c in conversations:
        start = len(c.prompt)
        prompt, answer = _say(c.prompt), _say(c.messages[start:])
        if c.rejected:
            rejected = _say(c.rejected[start:])
            said.append((prompt, answer, rejected))
            other.append((prompt, rejected, answer))
        else:
            said.append((prompt, answer, c.label))
            other.append((prompt, answer, not c.label))
    there = set(said)
    return sum(key in there for key in other)


def _say(messages: Sequence[Message]) -> tuple[tuple[str, str, str], ...]:
    return tuple((m.role, m.content, str(m.extra or "")) for m in messages)


def find_in_preferences(report: CheckReport) -> list[Finding]:
    """Everything about a report's preferences worth a sentence."""
    found: list[Finding] = []
    for source in report.sources:
        kinds = {facts.kind for facts in report.preferences.values()}
        if kinds == {"labelled"} and rows_of_shape(source.format) == "pairs":
            text = (
                f"{source.name}: {format_number(source.num_rows, 'pair')} taken apart into labelled rows, the chosen "
                "answer good and the rejected one bad"
            )
            found.append(Finding("note", "unpaired", text, source.num_rows, source.split))
    for name, facts in report.preferences.items():
        found += _find_in_split(name, facts)
        # Splits that are cut never share a prompt; those that are given may.
        if (overlap := report.overlap.get(name)) and overlap.num_same_question:
            text = f"{name}: {overlap.num_same_question} of {overlap.num_rows} rows have a prompt that train has, too"
            found.append(Finding("warning", "overlap_prompt", text, overlap.num_same_question, name))
    return found


def _find_in_split(name: str, facts: PreferenceFacts) -> list[Finding]:
    found: list[Finding] = []
    if facts.num_conflicts:
        what = (
            "pairs also stand there the other way round"
            if facts.kind == "pairs"
            else "rows give one answer to one prompt both labels"
        )
        text = f"{name}: {facts.num_conflicts} {what}"
        found.append(Finding("warning", "conflicting_preferences", text, facts.num_conflicts, name))
    longer, pairs = facts.num_chosen_longer, facts.num_examples
    if facts.kind == "pairs" and pairs >= _ENOUGH_PAIRS and longer > LENGTH_BIAS * pairs:
        text = (
            f"{name}: the chosen answer is longer in {longer / pairs:.0%} of pairs, so length alone tells most of them "
            "apart; a model may learn to write more"
        )
        found.append(Finding("warning", "length_bias", text, longer, name))
    if facts.kind == "labelled":
        found += _find_balance(name, facts.num_answers["desirable"], facts.num_answers["undesirable"])
    return found


def _find_balance(name: str, good: int, bad: int) -> list[Finding]:
    if not good or not bad:
        label = "true" if good else "false"
        text = f"{name}: all {good + bad} answers have the label {label}; there is nothing to tell apart"
        return [Finding("warning", "one_label", text, good + bad, name)]
    if max(good, bad) > _BALANCE * min(good, bad):
        text = (
            f"{name}: {good} good and {bad} bad answers; weigh them with objective.desirable_weight and "
            "undesirable_weight"
        )
        return [Finding("warning", "unbalanced_labels", text, min(good, bad), name)]
    return []

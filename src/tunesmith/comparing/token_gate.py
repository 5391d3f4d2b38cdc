"""The first parity gate: which rows and labels reached the model, in which step; and in words what differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tunesmith.core.comparison import Gate
from tunesmith.core.parity import Example, ParityRecord

Rows = Sequence[Example]


def judge_tokens(ours: ParityRecord, theirs: ParityRecord) -> Gate:
    """Digests step by step, in any order within a step: micro-batches may be sorted by length, steps may not be mixed.

    figure: rows of theirs that ours has not in the same step, or the other way round, and labels on padding.
    """
    name = theirs.framework
    seen = [
        (number, a.examples, b.examples)
        for number, (a, b) in enumerate(zip(ours.steps, theirs.steps, strict=False), 1)
        if a.examples is not None and b.examples is not None
    ]
    if not seen:
        return _gate("UNVERIFIED", None, f"the rows that reached {name}'s model could not be seen")
    pads = sum(row.labelled_pads for _, _, rows in seen for row in rows)
    differing = [(number, a, b) for number, a, b in seen if _digests(a) != _digests(b)]
    if differing or pads:
        count = sum(_count_differing(a, b) for _, a, b in differing) + pads
        return _gate("FAIL", count, f"{name}: {_explain(seen, differing, pads)}")
    if len(ours.steps) != len(theirs.steps):
        gap = abs(len(ours.steps) - len(theirs.steps))
        return _gate("FAIL", gap, f"{name} made {len(theirs.steps)} optimizer steps, ours {len(ours.steps)}")
    if len(seen) < len(ours.steps):
        missing = len(ours.steps) - len(seen)
        return _gate(
            "UNVERIFIED", 0, f"{name}: the rows of {missing} of {len(ours.steps)} steps could not be seen"
        )
    rows = sum(len(b) for _, _, b in seen)
    return _gate("PASS", 0, f"the same {rows:,} rows and labels, step by step, in {len(seen)} steps")


def hold_trainings(
    gate: Gate, framework: str, wanted: Mapping[int, Sequence[int]], trained: Mapping[int, Sequence[int]]
) -> Gate:
    """The tokens gate, after the trainings themselves were held against the job: each step's target tokens, by seed.

    The record that the gate was judged by is of the first seed's first steps. Sums of tokens are less than digests, but
    another order, a lost or a repeated row shows in them, and a training's own log has them for nothing.
    """
    if gate.word == "FAIL" or not trained:
        return gate
    wrong = [
        (seed, step, theirs, ours)
        for seed, counts in trained.items()
        for step, (theirs, ours) in enumerate(zip(counts, wanted[seed], strict=True), 1)
        if theirs != ours
    ]
    if wrong:
        seed, step, theirs, ours = wrong[0]
        more = f" (and so in {len(wrong) - 1:,} more steps)" if len(wrong) > 1 else ""
        says = f"{framework}: with seed {seed}, step {step} trained {theirs:,} tokens, its rows have {ours:,}{more}"
        return Gate("tokens", "FAIL", len(wrong), 0, "steps", says)
    steps, seeds = sum(map(len, trained.values())), len(trained)
    says = f"{gate.says}; as many target tokens in all {steps:,} steps of {seeds} training{'s'[: seeds > 1]}"
    return replace(gate, says=says)


def _gate(word: str, figure: int | None, says: str) -> Gate:
    return Gate("tokens", word, figure, 0, "rows", says)


def _digests(rows: Rows) -> Counter[str]:
    return Counter(row.digest for row in rows)


def _count_differing(ours: Rows, theirs: Rows) -> int:
    a, b = _digests(ours), _digests(theirs)
    return max((a - b).total(), (b - a).total())


def _explain(
    seen: Sequence[tuple[int, Rows, Rows]], differing: Sequence[tuple[int, Rows, Rows]], pads: int
) -> str:
    """Sentences without a full stop: the count that users pay for, then the likeliest cause."""
    parts = [f"{pads:,} labels on padding carry loss"] if pads else []
    if not differing:
        return parts[0]
    extra = sum(row.num_target_tokens for _, _, rows in seen for row in rows)
    extra -= sum(row.num_target_tokens for _, rows, _ in seen for row in rows)
    if extra:
        parts.append(
            f"it trained {abs(extra):,} {'more' if extra > 0 else 'fewer'} tokens in the first {len(seen)} steps"
        )
    number, a, b = differing[0]
    parts.append(_name_movement(seen, number) or f"in step {number}, {_name_change(a, b)}")
    return "; ".join(parts)


def _name_movement(seen: Sequence[tuple[int, Rows, Rows]], first: int) -> str:
    """What happened if all of its rows are rows of ours; "" if some are not."""
    ours = sum((_digests(a) for _, a, _ in seen), Counter[str]())
    theirs = sum((_digests(b) for _, _, b in seen), Counter[str]())
    if theirs.keys() - ours.keys():
        return ""
    again, left = (theirs - ours).total(), (ours - theirs).total()
    if not again and not left:
        return f"the order of rows differs from step {first} on: the same rows, in other steps"
    if not again:
        return f"{left} of our rows are missing, from step {first} on"
    return f"from step {first} on, {again} rows come again" + (
        f" and {left} of ours are missing" if left else ""
    )


def _name_change(ours: Rows, theirs: Rows) -> str:
    """Guess from counts what happened to the rows of one step. Sorted by length, changed rows pair with their
    originals as long as every row changed alike."""
    if len(ours) != len(theirs):
        return f"it has {len(theirs)} rows, ours {len(ours)}"
    pairs = list(zip(_sort_without(ours, theirs), _sort_without(theirs, ours), strict=True))
    tokens = {y.num_tokens - x.num_tokens for x, y in pairs}
    labels = {y.num_target_tokens - x.num_target_tokens for x, y in pairs}
    of = f"{len(pairs)} of {len(ours)} rows"
    if tokens == {0} and min(labels) > 0 and all(y.num_target_tokens >= y.num_tokens - 1 for _, y in pairs):
        return f"labels of {of} include the prompt"
    if tokens == {0} and labels == {0}:
        return f"{of} have as many tokens and labels as ours, but not the same: labels moved, or other rows"
    if tokens == {0} and len(labels) == 1:
        change = labels.pop()
        return f"{of} have {abs(change)} label{'s' * (abs(change) > 1)} {'more' if change > 0 else 'fewer'} than ours"
    if tokens == {1} and labels == {0}:
        return f"{of} have one token more that is not trained: a second BOS?"
    if tokens == {1}:
        return f"{of} have one token more, which is trained: a second EOS?"
    if tokens == {-1} and labels == {-1}:
        return f"{of} lack a token that ours trains: the EOS?"
    if tokens == {-1} and labels == {0}:
        return f"{of} lack a token that is not trained: the BOS?"
    if max(tokens) <= 0 and min(tokens) < -1:
        return f"{of} are shorter than ours: truncated?"
    return f"{of} are not ours"


def _sort_without(rows: Rows, others: Rows) -> list[Example]:
    """Rows that the others lack, counted with repetition, shortest first."""
    left, kept = _digests(others), list[Example]()
    for row in rows:
        if left[row.digest]:
            left[row.digest] -= 1
        else:
            kept.append(row)
    return sorted(kept, key=lambda row: (row.num_tokens, row.num_target_tokens))

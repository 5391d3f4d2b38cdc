"""The sixth parity gate: what the optimizer does to each parameter, and with which learning rate, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tunesmith.core.comparison import Gate
from tunesmith.core.parity import ParityRecord, ParityStep

_SAME = 1e-6
_CLIPPED = 1e-2
"""Clipping in bfloat16 rounds its factor, and so the norm, by up to 0.4%."""


def judge_optimizer(ours: ParityRecord, theirs: ParityRecord) -> Gate:
    """Settings are compared parameter by parameter, so that groups that differ in name or cut only are alike, and
    an empty group, or decay at a rate of zero, counts for nothing. Clipping is compared as asked and as done.

    figure: kinds of settings that differ.
    """
    name = theirs.framework
    found, unseen = list[str](), list[str]()
    for check in (_check_groups, _check_states, _check_rates, _check_clipping):
        differs, hidden = check(ours, theirs)
        found += differs
        unseen += hidden
    if len(theirs.steps) < len(ours.steps):
        unseen.append(f"{len(ours.steps) - len(theirs.steps)} of {len(ours.steps)} steps")
    if found:
        return _gate("FAIL", len(found), f"{name}: {'; '.join(found)}")
    if unseen:
        return _gate("UNVERIFIED", 0, f"could not be seen: {', '.join(unseen)}")
    return _gate("PASS", 0, f"the same settings and states, and the same rates in {len(ours.steps)} steps")


def _gate(word: str, figure: int, says: str) -> Gate:
    return Gate("optimizer", word, figure, 0, "settings", says)


Found = tuple[list[str], list[str]]
"""Sentences on what differs, and names of what could not be seen."""


def _check_groups(ours: ParityRecord, theirs: ParityRecord) -> Found:
    if ours.groups is None or theirs.groups is None:
        return [], ["parameter groups"]
    a, b = _read_settings(ours), _read_settings(theirs)
    both = [n for n in a if n in b]
    if not both or (theirs.parameters is None and len(both) < len(a)):
        return [], [f"the settings of {len(a) - len(both)} tensors that ours trains"]
    found = list[str]()
    if lost := [p.name for p in theirs.parameters or () if p.name not in b]:
        found.append(f"{len(lost)} trained tensors are in no optimizer group ({lost[0]})")
    for number, word in enumerate(("the optimizer", "beta1", "beta2", "epsilon", "weight decay")):
        other = [n for n in both if a[n][number] != b[n][number]]
        if other:
            of = "" if len(other) == len(both) else f" for {len(other)} of {len(both)} tensors"
            theirs_is, ours_is = (
                s if isinstance(s, str) else f"{s:g}" for s in (b[other[0]][number], a[other[0]][number])
            )
            found.append(f"{word} is {theirs_is}, ours {ours_is}{of}")
    return found, []


def _read_settings(record: ParityRecord) -> dict[str, tuple[str | float, ...]]:
    """Parameter -> (kind, beta1, beta2, epsilon, weight decay), as far as it has an effect."""
    settings: dict[str, tuple[str | float, ...]] = {}
    for number, group in enumerate(record.groups or ()):
        rates = [_pick(step, number, len(record.groups or ())) for step in record.steps]
        idle = bool(rates) and all(rate == 0 for rate in rates)
        decay = 0.0 if idle else group.weight_decay
        # Adam and AdamW differ in where they add weight decay, and in nothing else.
        kind = "adamw" if group.kind == "adam" and decay == 0 else group.kind
        for name in group.names:
            settings[name] = (kind, group.beta1, group.beta2, group.epsilon, decay)
    return settings


def _pick(step: ParityStep, group: int, num_groups: int) -> float | None:
    rates = step.learning_rates
    if not rates:
        return None
    if len(rates) == num_groups:
        return rates[group]
    return rates[0] if len(set(rates)) == 1 else None


def _check_states(ours: ParityRecord, theirs: ParityRecord) -> Found:
    if ours.state_dtypes is None or theirs.state_dtypes is None:
        return [], ["dtypes of optimizer states"]
    a, b = sorted(set(ours.state_dtypes)), sorted(set(theirs.state_dtypes))
    return ([f"optimizer states are {' and '.join(b)}, ours {' and '.join(a)}"] if a != b else []), []


def _check_rates(ours: ParityRecord, theirs: ParityRecord) -> Found:
    if not theirs.steps:
        return [], ["learning rates"]
    peak = max((rate for step in ours.steps for rate in step.learning_rates or ()), default=0.0)
    wrong, unseen = list[tuple[int, float, float]](), 0
    for number, (a, b) in enumerate(zip(ours.steps, theirs.steps, strict=False), 1):
        pairs = _pair_rates(ours, a, theirs, b)
        unseen += pairs is None
        other = [(x, y) for x, y in pairs or () if not abs(x - y) <= _SAME * max(peak, abs(x))]
        wrong += [(number, *other[0])] if other else []
    found = list[str]()
    if wrong:
        number, x, y = wrong[0]
        text = f"the learning rate of step {number} is {y:.4g}, ours {x:.4g}"
        ratios = {round(y / x, 4) if x else math.inf for _, x, y in wrong}
        if len(wrong) > 1:
            same = f", {ratios.pop():.4g} times ours as in {len(wrong) - 1} more steps"
            text += f"; {len(wrong)} steps differ" if ratios else same
        found.append(text)
    return found, ["learning rates"] if unseen else []


def _pair_rates(
    ours: ParityRecord, a: ParityStep, theirs: ParityRecord, b: ParityStep
) -> Sequence[tuple[float, float]] | None:
    """(our rate, theirs) of each parameter; of the step as a whole where both have one rate for everything."""
    if not a.learning_rates or not b.learning_rates:
        return None
    if len(set(a.learning_rates)) == len(set(b.learning_rates)) == 1:
        return [(a.learning_rates[0], b.learning_rates[0])]
    if ours.groups is None or theirs.groups is None:
        return None
    mine, other = _name_rates(ours, a), _name_rates(theirs, b)
    pairs = [(mine[n], other[n]) for n in mine if n in other]
    seen = [(x, y) for x, y in pairs if x is not None and y is not None]
    return seen if seen and len(seen) == len(pairs) else None


def _name_rates(record: ParityRecord, step: ParityStep) -> dict[str, float | None]:
    groups = record.groups or ()
    return {n: _pick(step, number, len(groups)) for number, g in enumerate(groups) for n in g.names}


def _check_clipping(ours: ParityRecord, theirs: ParityRecord) -> Found:
    """As asked, against ours; as done, against what they asked: a norm of 3 to be clipped to 1 arrives as 1."""
    found, unseen = list[str](), set[str]()
    for number, (a, b) in enumerate(zip(ours.steps, theirs.steps, strict=False), 1):
        if a.clip_norm is None or b.clip_norm is None:
            unseen.add("clipping")
        elif not abs(a.clip_norm - b.clip_norm) <= _SAME * a.clip_norm:
            said, wanted = (f"at {s.clip_norm:g}" if s.clip_norm else "not at all" for s in (b, a))
            found.append(f"gradients of step {number} are clipped {said}, ours {wanted}")
            break
        if b.clip_norm is None or b.grad_norm is None or b.applied_norm is None:
            unseen.add("the gradient after clipping")
            continue
        right = min(b.grad_norm, b.clip_norm or math.inf)
        if not abs(b.applied_norm - right) <= _CLIPPED * right:
            found.append(
                f"gradients of step {number}, of norm {b.grad_norm:.4g}, reach the optimizer with {b.applied_norm:.4g} "
                f"instead of {right:.4g}"
            )
            break
    return found, sorted(unseen)

"""Six gates between another framework's first steps and ours: an arm that fails one did other work, and is not ranked.

Each sees what others miss (docs/decisions/013): tokens say nothing of the loss's arithmetic, a first loss nothing of
scales while B is zero, a first gradient nothing of learning rates. A record can lie; losses that follow from other rows
or other updates than it tells of cannot be made up without training on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from tunesmith.comparing.noise import (
    NoiseFloor,
    pair_losses,
    relate,
    shift_of,
    tolerate,
)
from tunesmith.comparing.optimizer_gate import judge_optimizer
from tunesmith.comparing.token_gate import judge_tokens
from tunesmith.core.comparison import Gate, Parity
from tunesmith.core.parity import Parameter, ParityRecord

GATES = ("tokens", "parameters", "loss", "gradient", "curve", "optimizer")
_BLIND = {"loss": 0.005, "gradient": 0.04, "curve": 0.02, "shift": 0.005}
"""Tolerances above which a gate would miss what it is there for, so that agreement says nothing: packed rows that see
each other (0.5% of the loss), dropout (4.5% of the gradient), a learning rate 10% too high (0.5% of the curve)."""
_OTHER_BASE = 5e-4
"""What a frozen matrix's values may differ by. Whether scales of NF4 blocks are quantised is 0.15%, the least of all
other ways to store a base."""


def judge_parity(ours: ParityRecord, theirs: ParityRecord, noise: NoiseFloor) -> Parity:
    """Judge `theirs` against our record of the same job. Words: FAIL if anything seen differs beyond noise, else
    UNVERIFIED if something could not be seen or noise is too loud, else PASS."""
    gates = [
        judge_tokens(ours, theirs),
        judge_parameters(ours, theirs),
        judge_loss(ours, theirs, noise),
        judge_gradient(ours, theirs, noise),
        judge_curve(ours, theirs, noise),
        judge_optimizer(ours, theirs),
    ]
    return Parity(theirs.framework, dict(theirs.versions), gates)


def allow_other_tokens(parity: Parity) -> Parity:
    """In the native track other tokens are the finding, not a fault: the word is DIFFERS, and what follows from them in
    losses and gradients cannot be told from what does not."""
    words = {gate.name: gate.word for gate in parity.gates}
    if words["tokens"] != "FAIL":
        return parity
    gates = list[Gate]()
    for gate in parity.gates:
        if gate.name == "tokens":
            gate = replace(gate, word="DIFFERS")
        elif gate.name in ("loss", "gradient", "curve") and gate.word != "UNVERIFIED":
            gate = replace(gate, word="UNVERIFIED", says=f"{gate.says}; other tokens were trained")
        gates.append(gate)
    return replace(parity, gates=gates)


# --- trained parameters -----------------------------------------------------------------------------------------------


def judge_parameters(ours: ParityRecord, theirs: ParityRecord) -> Gate:
    """Names, shapes, dtypes and initial spread of what is trained, values of what is not, precision of products.

    figure: tensors that differ. Initial values are drawn from other generators, so spreads agree only within what
    a draw of that size varies by.
    """
    name = theirs.framework
    if ours.parameters is None or theirs.parameters is None:
        return Gate("parameters", "UNVERIFIED", None, 0, "tensors", f"what {name} trains could not be seen")
    a, b = ({p.name: p for p in record.parameters or ()} for record in (ours, theirs))
    missing, more = [n for n in a if n not in b], [n for n in b if n not in a]
    both = [(a[n], b[n]) for n in a if n in b]
    shapes = [(x, y) for x, y in both if tuple(x.shape) != tuple(y.shape)]
    dtypes = [(x, y) for x, y in both if x.dtype != y.dtype]
    spreads = _find_spreads(both)
    parts = [f"does not train {_list(missing)}"] if missing else []
    parts += [f"also trains {_list(more)}"] if more else []
    if shapes:
        x, y = shapes[0]
        parts.append(f"{_count(shapes)} of another shape ({x.name} is {list(y.shape)}, ours {list(x.shape)})")
    if dtypes:
        found, wanted = (sorted({p[side].dtype for p in dtypes}) for side in (1, 0))
        parts.append(f"{_count(dtypes)} in {' and '.join(found)}, ours {' and '.join(wanted)}")
    if theirs.precision != ours.precision:
        parts.append(f"products are computed in {theirs.precision}, ours in {ours.precision}")
    if spreads:
        x, y = spreads[0]
        parts.append(f"{_count(spreads)} of another initial spread ({x.name}: {y.std:.3g}, ours {x.std:.3g})")
    frozen = compare_base(ours, theirs)
    if others := {matrix: gap for matrix, gap in frozen.items() if gap > _OTHER_BASE}:
        worst = max(others, key=lambda matrix: others[matrix])
        parts.append(
            f"{len(others)} of {len(frozen)} frozen matrices have other values ({worst}: by {others[worst]:.2%})"
        )
    differing = (
        len(missing) + len(more) + len({x.name for x, _ in [*shapes, *dtypes, *spreads]}) + len(others)
    )
    if parts:
        return Gate("parameters", "FAIL", differing, 0, "tensors", f"{name}: {'; '.join(parts)}")
    if any(x.std is None or y.std is None for x, y in both):
        return Gate("parameters", "UNVERIFIED", 0, 0, "tensors", f"{name}'s initial values could not be seen")
    if theirs.base is None or ours.base is None or len(frozen) < len(ours.base):
        return Gate("parameters", "UNVERIFIED", 0, 0, "tensors", f"{name}'s frozen base could not be seen")
    return Gate(
        "parameters", "PASS", 0, 0, "tensors", f"the same {len(a)} tensors of {_count_values(a)} values"
    )


def compare_base(ours: ParityRecord, theirs: ParityRecord) -> dict[str, float]:
    """For each frozen matrix that both saw: the median of its values' relative differences.

    Not the largest: of doubly quantised scales a GPU may round one in some hundreds otherwise.
    """
    gaps = dict[str, float]()
    for name, values in (ours.base or {}).items():
        found = (theirs.base or {}).get(name, ())
        if len(found) == len(values):
            pairs = [(a, b) for a, b in zip(values, found, strict=True) if a or b]
            gaps[name] = median([abs(a - b) / max(abs(a), abs(b)) for a, b in pairs] or [0.0])
    return gaps


def _find_spreads(both: Sequence[tuple[Parameter, Parameter]]) -> list[tuple[Parameter, Parameter]]:
    """Tensors drawn from another distribution. The standard deviation of n drawn values varies by at most 1/sqrt(2n),
    two of them by 1/sqrt(n): five times that, for each tensor alone and for all together."""
    drawn, odd = list[tuple[Parameter, Parameter, float]](), list[tuple[Parameter, Parameter]]()
    for x, y in both:
        if x.std is None or y.std is None or tuple(x.shape) != tuple(y.shape):
            continue
        if x.std <= 0 or y.std <= 0 or not math.isfinite(y.std):
            odd += [(x, y)] if x.std != y.std else []
        else:
            drawn.append((x, y, math.log(y.std / x.std)))
    odd += [(x, y) for x, y, ratio in drawn if abs(ratio) > 5 / math.sqrt(math.prod(x.shape))]
    total = sum(math.prod(x.shape) for x, _, _ in drawn)
    if not odd and total:
        mean = sum(math.prod(x.shape) * ratio for x, _, ratio in drawn) / total
        if abs(mean) > max(5 / math.sqrt(total), 1e-3):
            odd = [(x, y) for x, y, _ in drawn]
    return odd


def _list(names: Sequence[str]) -> str:
    return f"{names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _count(items: Sequence[object]) -> str:
    return "1 tensor" if len(items) == 1 else f"{len(items)} tensors"


def _count_values(parameters: dict[str, Parameter]) -> str:
    return f"{sum(math.prod(p.shape) for p in parameters.values()):,}"


# --- what the first step shows ----------------------------------------------------------------------------------------


def judge_loss(ours: ParityRecord, theirs: ParityRecord, noise: NoiseFloor) -> Gate:
    """The loss before any update: token weights, shift, masks between packed rows, positions, the base's precision."""
    return _judge_first("loss", "loss", ours, theirs, noise.loss)


def judge_gradient(ours: ParityRecord, theirs: ParityRecord, noise: NoiseFloor) -> Gate:
    """The gradient's norm before clipping, from adapters that both were given: scale, dropout, accumulation."""
    return _judge_first("gradient", "grad_norm", ours, theirs, noise.grad_norm)


def _judge_first(
    gate: str, field: str, ours: ParityRecord, theirs: ParityRecord, floor: float | None
) -> Gate:
    name, what = theirs.framework, "first loss" if gate == "loss" else "first gradient"
    value = getattr(theirs.steps[0], field) if theirs.steps else None
    reference = getattr(ours.steps[0], field) if ours.steps else None
    tolerance = None if floor is None else tolerate(floor)
    if value is None or reference is None:
        return Gate(gate, "UNVERIFIED", None, tolerance, "relative", f"{name}'s {what} could not be seen")
    deviation = relate(value, reference)
    if tolerance is None:
        return Gate(
            gate, "UNVERIFIED", deviation, None, "relative", f"the noise of our own {what} is unknown"
        )
    if not deviation <= tolerance:
        ratio = value / reference if reference else math.inf
        says = f"{name}'s {what} is {_name_ratio(ratio)}{_suspect(gate, ratio, ours)}"
        return Gate(gate, "FAIL", deviation, tolerance, "relative", says)
    if tolerance > _BLIND[gate]:
        return _too_loud(gate, deviation, tolerance, _BLIND[gate])
    return Gate(gate, "PASS", deviation, tolerance, "relative", f"the {what} is ours within noise")


def _too_loud(gate: str, deviation: float, tolerance: float, needed: float) -> Gate:
    says = f"agrees, but noise hides differences up to {tolerance:.1%}, and {needed:.1%} would matter"
    return Gate(gate, "UNVERIFIED", deviation, tolerance, "relative", says)


def _name_ratio(ratio: float) -> str:
    """`2.00 times ours`, `3.1% above ours`, `0.02% below ours`."""
    if not math.isfinite(ratio):
        return "not finite, or ours is not"
    if not 0.67 < ratio < 1.5:
        return f"{ratio:.2f} times ours"
    return f"{100 * abs(ratio - 1):.2g}% {'above' if ratio > 1 else 'below'} ours"


def _suspect(gate: str, ratio: float, ours: ParityRecord) -> str:
    """The usual cause of a ratio, as a question; other causes are possible."""
    if not math.isfinite(ratio):
        return ""
    if gate == "loss":
        whole = ratio > 1.5 and abs(ratio - round(ratio)) < 0.05
        return ": summed over micro-batches?" if whole else ""
    ranks = {p.shape[0] for p in ours.parameters or () if "lora_A" in p.name}
    if len(ranks) == 1 and abs(ratio / math.sqrt(ranks.pop()) - 1) < 0.02:
        return ": rsLoRA's scale, alpha / sqrt(rank)?"
    if abs(ratio - 2) < 0.02 or abs(ratio - 0.5) < 0.01:
        return ": alpha / rank?"
    return ""


# --- the curve --------------------------------------------------------------------------------------------------------


def judge_curve(ours: ParityRecord, theirs: ParityRecord, noise: NoiseFloor) -> Gate:
    """Losses of all steps: learning rates, clipping, states, rows, from the first step to the last.

    Judged twice, and the worse counts: every step against the noise up to it, which one wrong step cannot hide from;
    and the mean over all, where noise of both signs cancels and a slightly higher rate does not.
    """
    name, pairs = theirs.framework, pair_losses(theirs, ours)
    if not pairs:
        return Gate("curve", "UNVERIFIED", None, None, "relative", f"{name}'s losses could not be seen")
    steps, shift = {i: relate(loss, right) for i, loss, right in pairs}, shift_of(pairs)
    if noise.curve is None or noise.shift is None or len(noise.curve) <= pairs[-1][0]:
        largest = max(steps.values())
        return Gate("curve", "UNVERIFIED", largest, None, "relative", "the noise of our own curve is unknown")
    tolerances = [tolerate(floor) for floor in noise.curve]
    # The largest of n deviations is about twice a usual one, and their mean is 1/sqrt(n) of that; what cancelled better
    # than so in all of our own pairs was luck.
    lucky = noise.curve[pairs[-1][0]] / (2 * math.sqrt(len(pairs)))
    mean_tolerance = tolerate(max(noise.shift, lucky))
    worst = max(steps, key=lambda i: steps[i] / tolerances[i])
    figure, tolerance = max(
        (steps[worst], tolerances[worst]), (shift, mean_tolerance), key=lambda two: two[0] / two[1]
    )
    if figure > tolerance:
        return Gate(
            "curve", "FAIL", figure, tolerance, "relative", _tell_curve(name, pairs, steps, tolerances)
        )
    if missing := len(ours.steps) - len(pairs):
        says = f"{name}: the losses of {missing} of {len(ours.steps)} steps could not be seen"
        return Gate("curve", "UNVERIFIED", figure, tolerance, "relative", says)
    if mean_tolerance > _BLIND["shift"]:
        return _too_loud("curve", figure, mean_tolerance, _BLIND["shift"])
    if tolerances[-1] > _BLIND["curve"]:
        return _too_loud("curve", figure, tolerances[-1], _BLIND["curve"])
    return Gate("curve", "PASS", figure, tolerance, "relative", f"{len(pairs)} losses are ours within noise")


def _tell_curve(
    name: str, pairs: Sequence[tuple[int, float, float]], steps: dict[int, float], tolerances: Sequence[float]
) -> str:
    left = next((i + 1 for i, deviation in steps.items() if deviation > tolerances[i]), None)
    where = "losses drift from ours"
    if left is not None:
        where = f"loss leaves ours at step {left}, by up to {100 * max(steps.values()):.2g}%"
    ratio = sum(loss for _, loss, _ in pairs) / sum(right for _, _, right in pairs)
    return f"{name}'s {where}, and is {_name_ratio(ratio)} over {len(pairs)} steps"

"""The finding in a sentence, and a sentence each for what supports it. Says no more than the intervals do."""

from __future__ import annotations

from tunesmith.comparing.measures import NEUTRAL, describe_metric, format_difference, format_gap, format_value
from tunesmith.comparing.stats import MARGIN
from tunesmith.core.comparison import ArmResult, Comparison, Difference
from tunesmith.core.quantities import format_bytes, format_seconds

_NOTABLE_FORGETTING = 0.05


def write_verdict(comparison: Comparison) -> tuple[str, list[str]]:
    """(verdict, details). Compares the best trained with the best prompted arm; under nll, with the base."""
    metric = comparison.metric
    ranked = [arm for arm in comparison.arms if metric in arm.metrics and not arm.not_comparable]
    trained = _sort_best_first([arm for arm in ranked if arm.kind == "trained"], metric)
    prompted = _sort_best_first([arm for arm in ranked if arm.kind == "prompted"], metric)
    if metric == "nll":
        prompted = [arm for arm in prompted if arm.name == comparison.base]
    if trained and prompted:
        headline = _weigh_training(trained[0], prompted[0], comparison)
    elif trained and (moved := trained[0].from_start.get(metric)):
        headline = _weigh_start(trained[0], moved)
    elif trained:
        best = f"{_state(trained[0], metric)} is the best of the trained arms"
        headline = f"{_say_absent('prompted', comparison)}: {best}."
    else:
        best = f"{_state(prompted[0], metric)} is the best way of prompting"
        headline = f"{_say_absent('trained', comparison)}: {best}."
    details = [
        *_tell_failed(comparison),
        *_tell_native(comparison),
        *_rank_trained(trained, comparison),
        *_rank_prompted(prompted, comparison),
        *_tell_starts(comparison),
    ]
    if trained:
        details += [_tell_cost(trained[0]), *_tell_forgetting(trained)]
    if metric == "nll":
        details.append(
            "NLL ranks trained arms only: against prompting it would reward learning the answers' format."
        )
    details.append(_tell_basis(comparison))
    return headline, details


def _say_absent(kind: str, comparison: Comparison) -> str:
    """Why no arm of a kind is ranked: `No trained arm has a result (lora failed)`."""
    word = "trained" if kind == "trained" else "prompting"
    wanted = [arm for arm in comparison.arms if arm.kind == kind]
    if kind == "prompted" and comparison.metric == "nll":
        # Other prompted arms are not ranked by it.
        wanted, word = [arm for arm in wanted if arm.prompting == "zero-shot"], "zero-shot"
    if not wanted:
        return f"No {word} arm was run"
    failed = [arm.name for arm in wanted if arm.status == "missing"]
    apart = [arm.name for arm in wanted if arm.not_comparable]
    bare = [arm.name for arm in wanted if arm.name not in failed + apart]
    parts = [f"{_join(failed)} failed"] if failed else []
    parts += [f"{_join(apart)} cannot be compared"] if apart else []
    parts += [f"{_join(bare)} without {comparison.metric}"] if bare else []
    return f"No {word} arm has a result ({'; '.join(parts)})"


def _tell_failed(comparison: Comparison) -> list[str]:
    failed = [arm.name for arm in comparison.arms if arm.status == "missing"]
    return [f"Failed, and in no ranking: {_join(failed)}. The warnings say why."] if failed else []


def _tell_native(comparison: Comparison) -> list[str]:
    """That arms saw other tokens, before anything is said of which is better."""
    unlike = [name for name, found in comparison.native.items() if found.same_rows < found.rows]
    if not unlike:
        return []
    return [
        f"Native track: frameworks saw other tokens ({_join(unlike)}); what separates their arms from ours may be "
        "preprocessing."
    ]


def find_difference(comparison: Comparison, arm: str, other: str) -> Difference | None:
    """The judged difference of two arms on the declared metric, seen from `arm`; None if they were not ranked."""
    for pair in comparison.pairs:
        if (pair.arm, pair.other) == (arm, other):
            return pair
        if (pair.arm, pair.other) == (other, arm):
            return pair.flip()
    return None


def _sort_best_first(arms: list[ArmResult], metric: str) -> list[ArmResult]:
    sign = -1 if describe_metric(metric).higher_is_better else 1
    return sorted(arms, key=lambda arm: sign * arm.metrics[metric].value)


def _state(arm: ArmResult, metric: str) -> str:
    """`lora (84.3% exact match)`."""
    info = describe_metric(metric)
    return f"{arm.name} ({format_value(arm.metrics[metric].value, info)} {_say_title(info.title)})"


def _say_title(title: str) -> str:
    """Inside a sentence: `exact match`, but `NLL`, `ROUGE-L` and `JSON fields` as they are."""
    return title if title[:2].isupper() else title[0].lower() + title[1:]


def _weigh_training(trained: ArmResult, prompted: ArmResult, comparison: Comparison) -> str:
    info = describe_metric(comparison.metric)
    pair = find_difference(comparison, trained.name, prompted.name)
    value = format_value(trained.metrics[comparison.metric].value, info)
    reached = f"{trained.name} reaches {value} {_say_title(info.title)}"
    score = format_value(prompted.metrics[comparison.metric].value, info)
    other = (
        f"{prompted.name}, the base model as it is ({score})"
        if prompted.name == comparison.base
        else f"{prompted.name}, the best prompting arm ({score})"
    )
    if pair is None:
        return f"No verdict: {reached}, and could not be compared with {other}."
    above, below = ("above", "below") if info.higher_is_better else ("below", "above")
    gap, difference = format_gap(pair.delta, info), format_difference(pair.delta, info)
    cost = (
        f", for {format_seconds(trained.train_wall_seconds)} of training"
        if trained.train_wall_seconds
        else ""
    )
    if pair.verdict == "better":
        return f"Fine-tuning won: {reached}, {gap}{_say_interval(pair, signed=False)} {above} {other}{cost}."
    if pair.verdict == "worse":
        sure = _say_interval(pair, signed=False)
        return f"Prompting won: {reached}, {gap}{sure} {below} {other}. Fine-tuning did not pay here."
    if pair.verdict == "tie":
        return f"A tie: {reached}, within {format_gap(MARGIN, info)} of {other}{cost}."
    if pair.verdict == "exploratory":
        return (
            f"Exploratory, one seed: {reached}, {difference}{_say_interval(pair)} from {other}. "
            "No winner is declared; run three seeds or more."
        )
    advice = f": {pair.advice}" if pair.advice else ""
    return f"Inconclusive: {reached}, {difference}{_say_interval(pair)} from {other}{advice}."


def _weigh_start(arm: ArmResult, moved: Difference) -> str:
    """The best arm against the one it starts from."""
    info = describe_metric(moved.metric)
    reached = (
        f"{arm.name} reaches {format_value(arm.metrics[moved.metric].value, info)} {_say_title(info.title)}"
    )
    start = f"{arm.starts_from}, which it starts from"
    above, below = ("above", "below") if info.higher_is_better else ("below", "above")
    gap, sure = format_gap(moved.delta, info), _say_interval(moved, signed=False)
    if moved.verdict == "better":
        return f"Going on won: {reached}, {gap}{sure} {above} {start}."
    if moved.verdict == "worse":
        return f"Going on did not pay: {reached}, the best, {gap}{sure} {below} {start}."
    if moved.verdict == "tie":
        return f"A tie: {reached}, within {format_gap(MARGIN, info)} of {start}."
    found = f"{reached}, {format_difference(moved.delta, info)}{_say_interval(moved)} from {start}"
    if moved.verdict == "exploratory":
        return f"Exploratory, one seed: {found}. No winner is declared; run three seeds or more."
    return f"Inconclusive: {found}{f': {moved.advice}' if moved.advice else ''}."


def _say_interval(pair: Difference, *, signed: bool = True) -> str:
    """` (95% interval +55.2 to +66.8)`; unsigned for a gap whose direction the sentence has said."""
    if pair.low is None or pair.high is None:
        return ""
    info = describe_metric(pair.metric)
    if signed:
        bounds = [format_difference(bound, info) for bound in (pair.low, pair.high)]
    else:
        bounds = [format_gap(size, info) for size in sorted((abs(pair.low), abs(pair.high)))]
    low, high = (bound.split(" ")[0] for bound in bounds)
    return f" (95% interval {low} to {high})"


def _rank_trained(trained: list[ArmResult], comparison: Comparison) -> list[str]:
    """The best trained arm against each other one, grouped by verdict word."""
    return _rank(trained, comparison, "trained arms")


def _rank_prompted(prompted: list[ArmResult], comparison: Comparison) -> list[str]:
    return _rank(prompted, comparison, "prompting arms")


def _rank(arms: list[ArmResult], comparison: Comparison, group: str) -> list[str]:
    if len(arms) < 2:
        return []
    best, info = arms[0], describe_metric(comparison.metric)
    said: dict[str, list[str]] = {}
    advice = ""
    for other in arms[1:]:
        pair = find_difference(comparison, best.name, other.name)
        if pair is None:
            continue
        open_still = pair.verdict in ("inconclusive", "exploratory")
        word = "level" if open_still and abs(pair.delta) < MARGIN else pair.verdict
        said.setdefault(word, []).append(f"{other.name} ({format_difference(pair.delta, info)})")
        # The nearest rival's is enough: what separates it, separates the others.
        advice = advice or (
            f"To separate {best.name} and {other.name}: {pair.advice}." if pair.advice else ""
        )
    words = {
        "better": "clearly ahead of",
        "worse": "clearly behind",
        "tie": "tied with",
        "inconclusive": "not clearly ahead of",
        "exploratory": "ahead, on one seed, of",
        "level": "level, as far as can be seen, with",
    }
    clauses = [f"{words[verdict]} {', '.join(names)}" for verdict, names in said.items()]
    if not clauses:
        return []
    text = f"Among {group}, {best.name} scores best: {'; '.join(clauses)}."
    return [text, advice] if advice else [text]


def _tell_starts(comparison: Comparison) -> list[str]:
    """What arms that go on from another one moved, measure by measure; divergence and length beside it."""
    told: list[str] = []
    for arm in comparison.arms:
        if not arm.starts_from or not arm.from_start:
            continue
        names = [comparison.metric, "preference_accuracy", "reward", "answer_tokens"]
        parts = [
            f"{describe_metric(name).title.lower()} {format_difference(change.delta, describe_metric(name))}"
            f"{'' if name in NEUTRAL else f' ({change.verdict})'}"
            for name in dict.fromkeys(names)
            if (change := arm.from_start.get(name))
        ]
        if kl := arm.metrics.get("kl_from_start"):
            parts.append(f"KL {kl.value:.3f} nats an answer")
        told.append(f"{arm.name}, from {arm.starts_from}: {', '.join(parts)}.")
    return told


def _tell_cost(arm: ArmResult) -> str:
    parts = [f"{format_seconds(arm.train_wall_seconds)} of training per seed"]
    if arm.tune_wall_seconds:
        parts.append(f"{format_seconds(arm.tune_wall_seconds)} of learning-rate trials")
    if arm.peak_bytes:
        parts.append(f"{format_bytes(arm.peak_bytes)} of memory at its peak")
    if arm.size_bytes:
        parts.append(f"{format_bytes(arm.size_bytes)} on disk")
    return f"Cost of {arm.name}: {', '.join(parts)}."


def _tell_forgetting(trained: list[ArmResult]) -> list[str]:
    """How much worse each trained arm reads general text than the base did."""
    lost = {
        arm.name: arm.forgetting["general_nll"] - arm.forgetting["general_nll_base"]
        for arm in trained
        if arm.forgetting
        and {"general_nll", "general_nll_base"} <= arm.forgetting.keys()
        and arm.prompting != "rag"
    }
    if not lost:
        return []
    notable = {name: change for name, change in lost.items() if change > _NOTABLE_FORGETTING}
    if not notable:
        return [
            f"Nothing notable was forgotten: loss on general text rose by less than {_NOTABLE_FORGETTING} nats."
        ]
    listed = ", ".join(f"{name} +{change:.2f}" for name, change in notable.items())
    return [f"Forgetting: loss on general text rose, in nats per token: {listed}."]


def _tell_basis(comparison: Comparison) -> str:
    rows = f"{comparison.num_rows:,} sealed test rows"
    if comparison.num_clusters != comparison.num_rows:
        rows += f" in {comparison.num_clusters:,} clusters"
    if comparison.num_pairs:
        rows += f", {comparison.num_pairs:,} held-out pairs"
    seeds = f"{len(comparison.seeds)} seeds" if len(comparison.seeds) > 1 else "one seed"
    single = [arm.name for arm in comparison.arms if arm.deterministic]
    note = f"; {_join(single)} {'do' if len(single) > 1 else 'does'} not depend on the seed" if single else ""
    return f"Judged on {rows} and {seeds}{note}."


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

"""The one table: the same words for terminal, Markdown and HTML. `report.tables` lays them out."""

from __future__ import annotations

from tunesmith.comparing.measures import (
    AGAINST_START,
    NEUTRAL,
    describe_metric,
    format_bounds,
    format_difference,
    format_value,
)
from tunesmith.core.comparison import ArmResult, Cell, Column, Comparison, Table
from tunesmith.core.quantities import format_bytes, format_count, format_seconds

_LIKELIHOODS = ("nll", "perplexity", "bits_per_byte")
_COSTS = (
    Column("trained_parameters", "Trained", "Parameters that training changes"),
    Column("train_tokens", "Tokens", "Tokens seen in one training; below: those the loss counts"),
    Column("train_wall_seconds", "Training", "Wall time of one training; below: CPU or GPU time"),
    Column(
        "eval_wall_seconds", "Scoring", "Wall time to score and answer all test rows once; below: CPU time"
    ),
    Column("peak_bytes", "Peak memory", "Largest memory in use, training or scoring"),
    Column(
        "size_bytes",
        "Size",
        "What has to be kept on disk beside the base model; of a quantised arm the whole model",
    ),
)


_UNITS = {"nats": "nats per target token", "bits": "bits per byte", "%": "share of test rows"}
_HINTS = {
    "reward": "mean over test rows of what evaluate.rewards says of the answer",
    "win_rate": "share of answers that the judge prefers over those of the arm it starts from, else zero-shot's",
    "preference_accuracy": "share of held-out pairs whose chosen answer is likelier per token than the rejected one",
    "preference_margin": "by how many nats more than its start the arm prefers the chosen answer, mean over pairs",
    "kl_from_start": "nats per sampled answer, from the arm that it starts from",
    "answer_tokens": "mean tokens of a generated answer",
}


def build_table(comparison: Comparison) -> Table:
    """Rows in the job's order. Columns that no arm fills are left out."""
    task_metrics = [m for m in comparison.metrics if m not in (comparison.metric, "finished", *_LIKELIHOODS)]
    metrics = [
        comparison.metric,
        *(["nll"] if comparison.metric != "nll" and "nll" in comparison.metrics else []),
    ]
    metrics += [m for m in ("perplexity",) if m in comparison.metrics] + task_metrics
    columns = [Column("name", "Arm", "", numeric=False), _metric_column(metrics[0], comparison)]
    columns.append(Column("versus_base", "Versus base", "Verdict against zero-shot on the declared metric"))
    columns += [_metric_column(metric, comparison) for metric in metrics[1:]]
    columns += [column for column in _COSTS if any(getattr(arm, column.key) for arm in comparison.arms)]
    if comparison.base is None:
        columns = [column for column in columns if column.key != "versus_base"]
    best = {metric: _find_best(comparison, metric) for metric in metrics}
    rows = [[_make_cell(column.key, arm, comparison, best) for column in columns] for arm in comparison.arms]
    return Table(columns, [arm.name for arm in comparison.arms], rows)


def _metric_column(metric: str, comparison: Comparison) -> Column:
    info = describe_metric(metric)
    unit = _HINTS.get(metric) or _UNITS.get(info.unit, "")
    declared = "declared metric; " if metric == comparison.metric else ""
    arrow = "higher is better" if info.higher_is_better else "lower is better"
    said = "" if metric in NEUTRAL else f"{arrow}; "
    return Column(metric, info.title, f"{declared}{unit + '; ' if unit else ''}{said}below: 95% interval")


def _find_best(comparison: Comparison, metric: str) -> float | None:
    """The best value of a column; None where likelihoods of different prompts would be ranked against each other."""
    if metric in (*NEUTRAL, *AGAINST_START):
        return None
    info = describe_metric(metric)
    arms = [arm for arm in comparison.arms if metric in arm.metrics and not arm.not_comparable]
    if metric in _LIKELIHOODS:
        arms = [arm for arm in arms if arm.kind == "trained"]
    values = [arm.metrics[metric].value for arm in arms]
    if len(values) < 2:
        return None
    best = max(values) if info.higher_is_better else min(values)
    shown = [format_value(value, info) for value in values]
    # A best value that others share to the last digit shown distinguishes nothing.
    return best if shown.count(format_value(best, info)) == 1 else None


def _make_cell(key: str, arm: ArmResult, comparison: Comparison, best: dict[str, float | None]) -> Cell:
    if key == "name":
        return Cell(arm.name, _describe_kind(arm))
    if key == "versus_base":
        return _versus_base(arm, comparison)
    if key in best:
        interval = arm.metrics.get(key)
        if interval is None:
            return Cell("–", tone="muted")
        info = describe_metric(key)
        tone = "best" if interval.value == best[key] and not arm.not_comparable else ""
        return Cell(format_value(interval.value, info), format_bounds(interval, info), tone)
    return _cost_cell(key, arm)


def _describe_kind(arm: ArmResult) -> str:
    parts = [] if arm.framework == "tunesmith" else [arm.framework]
    if arm.status == "missing":
        parts.append("no result")
    elif arm.deterministic:
        parts.append("scored once")
    else:
        parts.append(f"{len(arm.seeds)} seeds" if len(arm.seeds) != 1 else "1 seed")
    if arm.trained_by not in (None, arm.name):
        parts.append(f"{arm.trained_by}'s weights")
    elif arm.starts_from:
        parts.append(f"from {arm.starts_from}")
    return ", ".join(parts)


def _versus_base(arm: ArmResult, comparison: Comparison) -> Cell:
    if arm.not_comparable:
        return Cell("not comparable", arm.not_comparable, "worse")
    if arm.name == comparison.base:
        return Cell("base", tone="muted")
    difference = arm.differences.get(comparison.metric)
    if difference is None or arm.versus_base is None:
        return Cell("–", tone="muted")
    info = describe_metric(comparison.metric)
    tone = arm.versus_base if arm.versus_base in ("better", "worse") else "muted"
    return Cell(arm.versus_base, format_difference(difference.delta, info), tone)


def _cost_cell(key: str, arm: ArmResult) -> Cell:
    value = getattr(arm, key)
    if not value:
        return Cell("–", tone="muted")
    if key == "size_bytes" and arm.quantize:
        return Cell(format_bytes(value), f"{arm.quantize}, whole model")
    if key == "trained_parameters":
        share = 100 * arm.trained_parameters / arm.total_parameters if arm.total_parameters else 0
        return Cell(format_count(value), f"{share:.3g}%" if share else "")
    if key == "train_tokens":
        return Cell(
            format_count(value), f"{format_count(arm.target_tokens)} targets" if arm.target_tokens else ""
        )
    if key == "train_wall_seconds":
        used = (
            f"{format_seconds(arm.gpu_seconds)} GPU"
            if arm.gpu_seconds
            else f"{format_seconds(arm.train_cpu_seconds)} CPU"
        )
        return Cell(format_seconds(value), used)
    if key == "eval_wall_seconds":
        return Cell(
            format_seconds(value),
            f"{format_seconds(arm.eval_cpu_seconds)} CPU" if arm.eval_cpu_seconds else "",
        )
    return Cell(format_bytes(value))


# --- what changed from the start --------------------------------------------------------------------------------------

# Said by another measure already.
_NOT_FROM_START = ("bits_per_byte", "finished", "perplexity")


def build_starts(comparison: Comparison) -> Table:
    """Arms that go on from another one, each measure against it. Empty where none does."""
    arms = [arm for arm in comparison.arms if arm.starts_from and arm.from_start]
    changed = {name for arm in arms for name in arm.from_start if "." not in name}
    own = {name for arm in arms for name in AGAINST_START if name in arm.metrics}
    names = [name for name in comparison.metrics if name in changed | own and name not in _NOT_FROM_START]
    columns = [Column("name", "Arm", "", numeric=False), *(_metric_column(n, comparison) for n in names)]
    rows = [
        [Cell(arm.name, f"{arm.objective}, from {arm.starts_from}"), *(_start_cell(arm, n) for n in names)]
        for arm in arms
    ]
    return Table(columns, [arm.name for arm in arms], rows)


def _start_cell(arm: ArmResult, metric: str) -> Cell:
    info = describe_metric(metric)
    if metric not in arm.from_start:
        interval = arm.metrics.get(metric)
        if interval is None:
            return Cell("–", tone="muted")
        return Cell(format_value(interval.value, info), format_bounds(interval, info))
    change = arm.from_start[metric]
    text = format_difference(change.delta, info)
    if change.low is None or change.high is None:
        return Cell(text)
    low, high = (format_difference(bound, info).split(" ")[0] for bound in (change.low, change.high))
    if metric in NEUTRAL:
        return Cell(text, f"{low} to {high}")
    tone = change.verdict if change.verdict in ("better", "worse") else ""
    return Cell(text, f"{low} to {high}, {change.verdict}", tone)

"""What arms that go on from another one changed: each measure against their start."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.comparing.measures import (
    NEUTRAL,
    describe_metric,
    format_bounds,
    format_difference,
    format_value,
)
from tunesmith.core.comparison import ArmResult, Cell, Column, Comparison, Difference

# Said by another measure already.
_LEFT_OUT = ("bits_per_byte", "finished", "perplexity")


@dataclass(frozen=True, slots=True)
class StartsView:
    """A table: arms in the job's order, by their number there. columns: measures."""

    columns: list[Column]
    rows: list[tuple[int, ArmResult, list[Cell]]]


def view_starts(comparison: Comparison) -> StartsView | None:
    """None where no arm starts from another."""
    arms = [(number, arm) for number, arm in enumerate(comparison.arms) if arm.starts_from and arm.from_start]
    if not arms:
        return None
    changed = {name for _, arm in arms for name in arm.from_start if "." not in name}
    own = {name for _, arm in arms for name in ("preference_margin", "kl_from_start") if name in arm.metrics}
    names = [name for name in comparison.metrics if name in changed | own and name not in _LEFT_OUT]
    hints = {column.key: column.hint for column in comparison.table.columns}
    columns = [Column(name, describe_metric(name).title, hints.get(name, "")) for name in names]
    return StartsView(
        columns, [(number, arm, [_make_cell(arm, name) for name in names]) for number, arm in arms]
    )


def _make_cell(arm: ArmResult, metric: str) -> Cell:
    info = describe_metric(metric)
    if metric in arm.from_start:
        return _show_change(arm.from_start[metric], metric)
    if metric not in arm.metrics:
        return Cell("–", tone="muted")
    interval = arm.metrics[metric]
    return Cell(format_value(interval.value, info), format_bounds(interval, info))


def _show_change(change: Difference, metric: str) -> Cell:
    info = describe_metric(metric)
    text = format_difference(change.delta, info)
    if change.low is None or change.high is None:
        return Cell(text)
    low, high = (format_difference(bound, info).split(" ")[0] for bound in (change.low, change.high))
    tone = "muted" if metric in NEUTRAL or change.verdict not in ("better", "worse") else change.verdict
    word = "" if metric in NEUTRAL else f", {change.verdict}"
    return Cell(text, f"{low} to {high}{word}", tone)

"""Frameworks side by side: what the same training costs in each.

Medians over seeds, which are processes of their own, with their spread; ratios to our own engine on the same job.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tunesmith.core.comparison import ArmResult, Comparison
from tunesmith.core.quantities import format_bytes, format_seconds
from tunesmith.core.rundir import RunDir
from tunesmith.report.trainings import OWN, Training, find_ours, read_trainings

_STARTING = ("starting", "importing", "loading", "building")
# Fewer processes have a spread, but show too little of it to call one arm the best.
_ENOUGH = 3


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure of one arm. values: of each seed that has it.   text: as it is shown."""

    values: tuple[float, ...]
    show: Callable[[float], str]
    lower_is_better: bool = True
    is_ratio: bool = True
    ours: float | None = None
    best: bool = False

    @property
    def median(self) -> float | None:
        return statistics.median(self.values) if self.values else None

    @property
    def text(self) -> str:
        return "–" if self.median is None else self.show(self.median)

    @property
    def spread(self) -> str:
        """`10.9 s to 11.2 s`, or "" where it would say nothing."""
        low, high = (self.show(edge(self.values)) if self.values else "" for edge in (min, max))
        return f"{low} to {high}" if low != high else ""

    @property
    def against_ours(self) -> str:
        if self.median is None or self.ours is None or (self.is_ratio and not self.ours):
            return ""
        if not self.is_ratio:
            return f"{self.median - self.ours:+.4f}".replace("-", "−")
        return f"{self.median / self.ours:.2f} × ours"


@dataclass(frozen=True, slots=True)
class FrameworkRow:
    """One arm. number: of the arm in the comparison. blocked: why it is in no ranking, or ""."""

    number: int
    arm: str
    made_with: str
    num_processes: int
    blocked: str
    cells: list[Measured]


@dataclass(frozen=True, slots=True)
class FrameworkTable:
    """columns: title and hint. groups: arms of one job each, our own engine first. alone: one training at a time."""

    columns: list[tuple[str, str]]
    groups: list[list[FrameworkRow]]
    alone: bool


_FIGURES: tuple[tuple[str, str, Callable[[Training], float | None], Callable[[float], str], bool], ...] = (
    ("Trained tokens/s", "Tokens that the loss counts, a second of training steps; without start-up, the first steps, "
     "validation and saving", lambda t: t.rates and t.rates[0], lambda v: f"{v:,.0f}", False),
    ("Tokens/s", "All tokens but padding, a second of the same steps", lambda t: t.rates and t.rates[1],
     lambda v: f"{v:,.0f}", False),
    ("Start-up", "Imports, loading and building, before the first step", lambda t: t.phase(*_STARTING),
     format_seconds, True),
    ("First step", "The first optimizer step, with whatever is compiled or allocated for it",
     lambda t: t.phase("first step"), format_seconds, True),
    ("Whole training", "Wall time of the process, measured from outside", lambda t: t.record.wall_seconds or None,
     format_seconds, True),
    ("Allocated", "Peak of GPU memory in tensors", lambda t: t.bytes("allocated"), format_bytes, True),
    ("Reserved", "Peak of GPU memory that torch had taken", lambda t: t.bytes("reserved"), format_bytes, True),
    ("Resident", "Peak of the process's memory on the host", lambda t: t.bytes("resident"), format_bytes, True),
)  # fmt: skip


def view_frameworks(folder: RunDir, comparison: Comparison) -> FrameworkTable | None:
    """Every arm that a framework trained, beside our own engine's of the same job; None where all arms are ours."""
    trainings = read_trainings(folder, comparison)
    foreign = [arm for arm in comparison.arms if arm.framework != OWN and arm.trained_by == arm.name]
    if not foreign:
        return None
    groups: dict[str, list[ArmResult]] = {}
    for arm in foreign:
        ours = find_ours(arm, comparison, trainings)
        groups.setdefault(ours.name if ours else f"/{arm.name}", [ours] if ours else []).append(arm)
    rows = [[_view_row(arm, comparison, trainings[arm.name]) for arm in arms] for arms in groups.values()]
    rows = [_hold_against_ours(group) for group in rows]
    filled = [
        number
        for number in range(len(_FIGURES) + 1)
        if any(row.cells[number].values for group in rows for row in group)
    ]
    titles = [(title, hint) for title, hint, *_ in _FIGURES]
    titles.append(("Test NLL", "Nats per target token on the sealed test rows, by one judge"))
    return FrameworkTable(
        [titles[number] for number in filled],
        [[replace(row, cells=[row.cells[number] for number in filled]) for row in group] for group in rows],
        alone=comparison.record["job"]["compare"].get("parallel") == 1,
    )


def _view_row(arm: ArmResult, comparison: Comparison, trainings: Sequence[Training]) -> FrameworkRow:
    cells = [
        Measured(tuple(v for t in trainings if (v := read(t)) is not None), show, lower)
        for _, _, read, show, lower in _FIGURES
    ]
    nll = tuple(arm.per_seed.get("nll", ()))
    cells.append(Measured(nll, lambda v: f"{v:.4f}", is_ratio=False))
    versions = trainings[0].record.versions if trainings else {}
    blocked = arm.not_comparable or ("" if trainings else "no result")
    number = comparison.arms.index(arm)
    made_with = f"{arm.framework} {versions.get(arm.framework, '')}".strip()
    return FrameworkRow(number, arm.name, made_with, len(trainings), blocked, cells)


def _hold_against_ours(group: list[FrameworkRow]) -> list[FrameworkRow]:
    """Ratios to the first row if it is ours, and the best of each column where its spread is apart from all others'."""
    if group[0].made_with.split()[0] == OWN:
        ours = [cell.median for cell in group[0].cells]
        group = [group[0]] + [
            replace(row, cells=[replace(c, ours=o) for c, o in zip(row.cells, ours, strict=True)])
            for row in group[1:]
        ]
    ranked = [row for row in group if not row.blocked]
    for number in range(len(group[0].cells)):
        if (best := _find_best([row.cells[number] for row in ranked])) is not None:
            row = ranked[best]
            row.cells[number] = replace(row.cells[number], best=True)
    return group


def _find_best(cells: Sequence[Measured]) -> int | None:
    """Whose worst process is ahead of everybody else's best; None without enough processes to say so, and for losses,
    which have verdicts of their own."""
    if len(cells) < 2 or not cells[0].is_ratio or any(len(cell.values) < _ENOUGH for cell in cells):
        return None
    sign = 1 if cells[0].lower_is_better else -1
    spans = [(min(sign * v for v in cell.values), max(sign * v for v in cell.values)) for cell in cells]
    best = min(range(len(spans)), key=lambda i: spans[i][1])
    return best if all(spans[best][1] < low for i, (low, _) in enumerate(spans) if i != best) else None

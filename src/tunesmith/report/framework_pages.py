"""A page for each framework: versions, what it cannot express, and each arm: times, memory, what it was told."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from tunesmith.core.comparison import ArmResult, Comparison
from tunesmith.core.frameworks import Feature, FrameworkPage, FrameworkPages, Matrix
from tunesmith.core.jsonl import read_json
from tunesmith.core.quantities import format_bytes, format_seconds
from tunesmith.core.rundir import RunDir
from tunesmith.report.trainings import Training, find_ours, read_trainings

_PHASES = ("importing", "loading", "building", "first step", "steps", "validating", "saving")


@dataclass(frozen=True, slots=True)
class ArmView:
    """One arm's part of a page. phases, memory: (name, its own, our engine's)."""

    page: FrameworkPage
    phases: list[tuple[str, str, str]]
    memory: list[tuple[str, str, str]]
    has_ours: bool


@dataclass(frozen=True, slots=True)
class FrameworkView:
    """A framework's page. missing: finding and cure -> features that it stands behind."""

    title: str
    versions: dict[str, str]
    num_features: int
    missing: list[tuple[str, str, list[str]]]
    arms: list[ArmView]

    @property
    def num_missing(self) -> int:
        return sum(len(titles) for _, _, titles in self.missing)


def read_pages(folder: RunDir) -> FrameworkPages | None:
    """`frameworks.json`, or None where no other framework was compared. Raises DataError."""
    path = folder.frameworks
    return FrameworkPages.from_json(read_json(path), place=str(path)) if path.is_file() else None


def view_pages(folder: RunDir, comparison: Comparison, pages: FrameworkPages) -> list[FrameworkView]:
    """A page for each framework, in the order of the arms."""
    trainings = read_trainings(folder, comparison)
    arms = {arm.name: arm for arm in comparison.arms}
    views: dict[str, list[FrameworkPage]] = {}
    for page in pages.pages:
        if page.arm in arms:
            views.setdefault(page.framework, []).append(page)
    return [
        FrameworkView(
            title=shown[0].title,
            versions=shown[0].versions,
            num_features=len(pages.matrix.features),
            missing=_group_missing(pages.matrix, name),
            arms=[_view_arm(page, arms[page.arm], comparison, trainings) for page in shown],
        )
        for name, shown in views.items()
    ]


def _group_missing(matrix: Matrix, framework: str) -> list[tuple[str, str, list[str]]]:
    found: dict[tuple[str, str], list[str]] = {}
    for row in matrix.missing(framework):
        answer = row.answers[framework]
        found.setdefault((answer.finding, answer.cure), []).append(row.title)
    return [(finding, cure, titles) for (finding, cure), titles in found.items()]


def _view_arm(
    page: FrameworkPage, arm: ArmResult, comparison: Comparison, trainings: dict[str, list[Training]]
) -> ArmView:
    ours = find_ours(arm, comparison, trainings)
    theirs, own = trainings[arm.name], trainings[ours.name] if ours else []
    known = {name for t in (*theirs, *own) for name in t.record.phases or {}}
    names = [name for name in _PHASES if name in known]
    phases = [
        (name.capitalize(), *_both(theirs, own, lambda t, n=name: t.phase(n), format_seconds))
        for name in names
    ]
    phases.append(
        ("Whole process", *_both(theirs, own, lambda t: t.record.wall_seconds or None, format_seconds))
    )
    memory = [
        (name.capitalize(), *_both(theirs, own, lambda t, n=name: t.bytes(n), format_bytes))
        for name in ("allocated", "reserved", "resident")
    ]
    return ArmView(page, phases if theirs else [], memory if theirs else [], bool(own))


def _both(
    theirs: Sequence[Training],
    own: Sequence[Training],
    read: Callable[[Training], float | None],
    show: Callable[[float], str],
) -> tuple[str, str]:
    def median(trainings: Sequence[Training]) -> str:
        values = [value for training in trainings if (value := read(training)) is not None]
        return show(statistics.median(values)) if values else "–"

    return median(theirs), median(own)


def group_features(matrix: Matrix) -> list[tuple[str, list[Feature]]]:
    """The matrix's rows by their group."""
    return [(group, list(rows)) for group, rows in groupby(matrix.features, key=lambda row: row.group)]

"""Which arms are not worth their cost: another is better and cheaper, both beyond noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tunesmith.core.comparison import ArmResult, Difference

COSTS: dict[str, Callable[[ArmResult], float]] = {
    "train_wall_seconds": lambda arm: arm.train_wall_seconds,
    "peak_bytes": lambda arm: float(arm.peak_bytes),
    "size_bytes": lambda arm: float(arm.size_bytes),
}
COST_NOISE = 0.10
"""Costs closer than this share are alike: repeated trainings on one machine differ by several percent."""


def find_dominated(arms: Sequence[ArmResult], pairs: Sequence[Difference], metric: str) -> list[ArmResult]:
    """Fill `dominated_by`: per cost, the first arm with a *better* verdict that is also cheaper by more than noise.

    A free arm (nothing trained, nothing stored) can be dominated by none, and a tie in quality dominates nothing.
    """
    beaten_by: dict[str, list[str]] = {arm.name: [] for arm in arms}
    for pair in pairs:
        if pair.metric != metric:
            continue
        if pair.verdict == "better":
            beaten_by[pair.other].append(pair.arm)
        elif pair.verdict == "worse":
            beaten_by[pair.arm].append(pair.other)
    by_name = {arm.name: arm for arm in arms}
    judged: list[ArmResult] = []
    for arm in arms:
        dominated: dict[str, str] = {}
        for cost, read in COSTS.items():
            cheaper = [n for n in beaten_by[arm.name] if read(by_name[n]) < (1 - COST_NOISE) * read(arm)]
            if cheaper:
                dominated[cost] = cheaper[0]
        judged.append(replace(arm, dominated_by=dominated))
    return judged

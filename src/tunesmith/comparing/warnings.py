"""What a careful reader would object to: each finding in a sentence that starts with the arms it concerns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from tunesmith.comparing.arms import ArmFiles
from tunesmith.comparing.plan import choose_rate
from tunesmith.comparing.stats import FEW_CLUSTERS
from tunesmith.core.comparison import Comparison

_SUSPICIOUS_DROP = 0.2
"""Nats by which honest test loss is hardly ever below training loss; training on test rows shows as about 0.3."""
_FIGURES = re.compile(r"\d[\d.,]*")


def list_warnings(comparison: Comparison, arms: Sequence[ArmFiles], failures: Mapping[str, str]) -> list[str]:
    """All objections, gravest first: missing results, unfair comparison, suspicious numbers, remarks of the runs."""
    found: list[tuple[str, str]] = [("", text) for text in _check_design(comparison)]
    found += _check_parity(comparison)
    for check in (_check_missing, _check_equality, _check_tuning, _check_numbers):
        found += check(arms)
    found += _repeat_remarks(arms)
    reasons = [f"{name}: ended without a result: {reason}" for name, reason in failures.items()]
    return [*reasons, *_merge_arms(found)]


def _merge_arms(found: Iterable[tuple[str, str]]) -> list[str]:
    """[("lora", x), ("full", x)] -> ["lora, full: x"]."""
    arms_of: dict[str, list[str]] = {}
    for arm, text in found:
        names = arms_of.setdefault(text, [])
        if arm and arm not in names:
            names.append(arm)
    return [f"{', '.join(names)}: {text}" if names else text for text, names in arms_of.items()]


def _check_design(comparison: Comparison) -> list[str]:
    found: list[str] = []
    if len(comparison.seeds) == 1 and any(not arm.deterministic for arm in comparison.arms):
        found.append("one seed: intervals cover the test rows only, and no winner is declared (exploratory)")
    if len(comparison.seeds) == 2:
        found.append("two seeds say little about a third: intervals are wide; three seeds or more are wanted")
    if comparison.num_clusters < 2:
        found.append("all test rows are one cluster: no interval can be given")
    elif comparison.num_clusters < FEW_CLUSTERS:
        found.append(
            f"only {comparison.num_clusters} clusters of test rows: intervals are rough below {FEW_CLUSTERS}"
        )
    if comparison.base is None and not any(arm.starts_from for arm in comparison.arms):
        found.append("no zero-shot arm: nothing says what training gained over the base model")
    return found


def _check_missing(arms: Sequence[ArmFiles]) -> Iterable[tuple[str, str]]:
    for arm in arms:
        if not arm.seeds:
            yield arm.plan.name, "not scored"
        elif missing := [seed for seed in arm.plan.seeds if seed not in arm.seeds]:
            yield (
                arm.plan.name,
                f"seed {', '.join(map(str, missing))} missing; arms are compared on the seeds they share",
            )
        if arm.not_comparable:
            yield arm.plan.name, f"not comparable: {arm.not_comparable}"


def _check_parity(comparison: Comparison) -> Iterable[tuple[str, str]]:
    """What keeps an arm of another framework out of the ranking, and what could not be made sure of."""
    for arm in comparison.arms:
        parity = comparison.parity.get(arm.name)
        if parity is None:
            if arm.trained_by == arm.name and arm.framework != "tunesmith":
                yield arm.name, f"nobody looked whether {arm.framework} does the work of the other arms"
            continue
        native = comparison.native.get(arm.name)
        if native and native.same_rows < native.rows:
            yield arm.name, f"native track: {native.says}"
        # The first gate that fails is the nearest to the cause; the report says what the others saw.
        yield from [(arm.name, f"did other work: {g.says}") for g in parity.gates if g.word == "FAIL"][:1]
        if parity.unverified:
            yield arm.name, f"parity is unverified: {', '.join(parity.unverified)}"


def _check_equality(arms: Sequence[ArmFiles]) -> Iterable[tuple[str, str]]:
    """Steps, hardware and code that differ between trained arms; bf16 masters; selection on the report split."""
    trained = [arm for arm in arms if arm.runs and arm.plan.trains]
    runs = {arm.plan.name: next(iter(arm.runs.values())) for arm in trained}
    # Arms that learn something else, or go on from another one, have no step in common.
    alike: dict[str, dict[str, int]] = {}
    for arm in trained:
        kind = f"{arm.plan.objective.name} {arm.plan.starts_from}"
        alike.setdefault(kind, {})[arm.plan.name] = runs[arm.plan.name].steps
    for steps in alike.values():
        if len(set(steps.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in steps.items())
            yield "", f"unequal training: optimizer steps differ ({listed})"
    if len({json.dumps(run.hardware, sort_keys=True, default=str) for run in runs.values()}) > 1:
        yield "", "arms ran on different hardware: their times and memory do not compare"
    codes = {run.fingerprints.get("code") for arm in trained for run in arm.runs.values()}
    if len(codes - {None}) > 1:
        yield "", "the package's code changed between trainings of this comparison"
    for name, run in runs.items():
        if run.config.get("train", {}).get("optimizer") == "adamw-bf16":
            yield (
                name,
                "pure bf16 full fine-tuning (adamw-bf16): it may fall short of fp32 masters; compare with adamw",
            )
        validation = {value for key, value in run.fingerprints.items() if "validation" in key}
        tests = {value for key, value in run.fingerprints.items() if "test" in key}
        if validation & tests:
            yield name, "the split that selected the checkpoint is the split that is reported"
        if run.status != "done":
            yield name, f"training is {run.status}"


def _check_tuning(arms: Sequence[ArmFiles]) -> Iterable[tuple[str, str]]:
    trained = [arm for arm in arms if arm.runs and arm.plan.trains]
    counts = {arm.plan.name: len(arm.trials) for arm in trained}
    if len(set(counts.values())) > 1:
        yield (
            "",
            f"unequal tuning: learning-rate trials differ ({', '.join(f'{n} {c}' for n, c in counts.items())})",
        )
    for arm in trained:
        if arm.trials:
            losses = [trial.validation_loss for trial in arm.trials]
            if all(loss is None for loss in losses):
                yield arm.plan.name, "every learning-rate trial diverged"
            elif (chosen := choose_rate([trial.learning_rate for trial in arm.trials], losses)).at_edge:
                rate = f"{chosen.learning_rate:.2g}"
                yield (
                    arm.plan.name,
                    f"the best learning rate, {rate}, is at the edge of the grid: a better one may lie beyond",
                )
        elif arm.plan.learning_rate == "auto":
            yield (
                arm.plan.name,
                "the learning rate follows a formula and was not tuned; compare.tune.trials searches it",
            )
    full = {arm.plan.learning_rate for arm in trained if arm.plan.method and arm.plan.method.name == "full"}
    adapters = {
        arm.plan.learning_rate for arm in trained if arm.plan.method and arm.plan.method.name != "full"
    }
    if not any(counts.values()) and (full & adapters) - {"auto"}:
        yield (
            "",
            "full and adapter arms share one learning rate, though adapters want about ten times as much",
        )


def _check_numbers(arms: Sequence[ArmFiles]) -> Iterable[tuple[str, str]]:
    """Test loss that is too good for the training loss; what one arm's numbers show alone, the judge has said."""
    for arm in arms:
        for seed in arm.seeds:
            nll, train_loss = arm.evals[seed].metrics.get("nll"), arm.train_losses.get(seed)
            if nll is not None and train_loss is not None and nll < train_loss - _SUSPICIOUS_DROP:
                yield (
                    arm.plan.name,
                    "test loss is far below training loss: test rows may be in the training data",
                )


def _repeat_remarks(arms: Sequence[ArmFiles]) -> Iterable[tuple[str, str]]:
    """What the trainings and the judge warned of, truncated and dropped rows among it; once per arm, not per seed."""
    for arm in arms:
        said: set[str] = set()
        for record in (*(arm.runs.values() if arm.plan.trains else ()), *arm.evals.values()):
            for text in record.warnings:
                # Seeds differ in the figures only: "3 of 300 answers were cut", "4 of 300 answers were cut".
                if (pattern := _FIGURES.sub("#", text)) not in said:
                    said.add(pattern)
                    yield arm.plan.name, text

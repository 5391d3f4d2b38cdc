"""From arms' records to samples that are resampled together: one set of draws for test rows, one for held-out pairs.

Shapes as in `stats`: `S` seeds, `R` test rows, `P` pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.comparing.arms import ArmFiles
from tunesmith.comparing.stats import Bootstrap, RatioSample, paired_bootstrap
from tunesmith.core.errors import ArmFailed
from tunesmith.core.records import AnswerRecord


@dataclass(frozen=True, slots=True)
class Pool:
    """All arms and metrics under the same draws.

    index: (arm, metric) -> the bootstrap that holds it, and its number there.
    num_clusters: of test rows. num_pairs: held-out pairs, if all arms were scored on them.
    """

    seeds: list[int]
    index: dict[tuple[str, str], tuple[Bootstrap, int]]
    num_clusters: int
    num_pairs: int = 0


def pair_seeds(arms: Sequence[ArmFiles]) -> list[int]:
    """Seeds that every arm that depends on one has; [] is no choice, so then those of the first such arm."""
    dependent = [arm for arm in arms if not arm.plan.deterministic]
    if not dependent:
        return arms[0].seeds
    common = [seed for seed in dependent[0].seeds if all(seed in arm.seeds for arm in dependent)]
    if not common:
        raise ArmFailed(
            "compare",
            "the arms share no finished seed",
            rule="seeds are paired",
            cure="Run the command again",
        )
    return common


def pool_samples(arms: Sequence[ArmFiles], seeds: list[int]) -> Pool:
    """Samples of all arms on all metrics. Lengths of answers are among them where an arm starts from another."""
    lengths = any(arm.plan.starts_from for arm in arms)
    rows = {arm.plan.name: make_samples(_of_seeds(arm, seeds), lengths=lengths) for arm in arms}
    first = arms[0].answers[arms[0].seeds[0]]
    over_rows = _resample(rows, [answer.cluster for answer in first])
    index, num_pairs = dict(over_rows[1]), 0
    if all(set(arm.seeds) <= arm.pairs.keys() for arm in arms):
        pairs = {arm.plan.name: _sample_pairs(arm, arms, seeds) for arm in arms}
        clusters = [pair.cluster for pair in arms[0].pairs[arms[0].seeds[0]]]
        index |= _resample(pairs, clusters)[1]
        num_pairs = len(clusters)
    return Pool(seeds, index, over_rows[0].num_clusters, num_pairs)


def _of_seeds(arm: ArmFiles, seeds: Sequence[int]) -> list[list[AnswerRecord]]:
    return [arm.answers[arm.seed_or_only(seed)] for seed in seeds]


def _resample(
    samples: dict[str, dict[str, RatioSample]], clusters: Sequence[str]
) -> tuple[Bootstrap, dict[tuple[str, str], tuple[Bootstrap, int]]]:
    """samples: arm -> metric -> sample."""
    flat = {(arm, metric): sample for arm, own in samples.items() for metric, sample in own.items()}
    bootstrap = paired_bootstrap(list(flat.values()), clusters)
    return bootstrap, {key: (bootstrap, number) for number, key in enumerate(flat)}


def make_samples(
    answers: Sequence[Sequence[AnswerRecord]], *, lengths: bool = False
) -> dict[str, RatioSample]:
    """Metric -> sample of one arm; answers: S lists of R rows. A metric without a value in any seed is left out.

    lengths: tokens of answers, too."""
    names = list(dict.fromkeys(name for rows in answers for answer in rows for name in answer.scores))
    samples: dict[str, RatioSample] = {}
    for name in names:
        given = np.array([[float(name in a.scores) for a in rows] for rows in answers])
        # Rows without this score (a field metric on a plain answer) count in neither sum.
        if np.all(given.sum(axis=1) > 0):
            values = np.array([[a.scores.get(name, 0.0) for a in rows] for rows in answers])
            samples[name] = RatioSample(values, given, is_share=_is_share(name, values))
    if all(a.answer is not None for rows in answers for a in rows):
        finished = np.array([[float(a.finished) for a in rows] for rows in answers])
        samples["finished"] = RatioSample(finished, np.ones_like(finished), is_share=True)
        if lengths:
            new_tokens = np.array([[float(a.num_new_tokens) for a in rows] for rows in answers])
            samples["answer_tokens"] = RatioSample(new_tokens, np.ones_like(new_tokens))
    if all(a.nll is not None for rows in answers for a in rows):
        nll = np.array([[a.nll or 0.0 for a in rows] for rows in answers])
        tokens = np.array([[float(a.num_target_tokens) for a in rows] for rows in answers])
        num_bytes = np.array([[float(a.num_bytes) for a in rows] for rows in answers])
        if np.all(tokens.sum(axis=1) > 0):
            samples["nll"] = RatioSample(nll, tokens)
        if np.all(num_bytes.sum(axis=1) > 0):
            samples["bits_per_byte"] = RatioSample(nll / math.log(2), num_bytes)
    return samples


def _is_share(name: str, values: np.ndarray) -> bool:
    """Rewards and divergences may lie between 0 and 1 and need not."""
    return name not in ("reward", "kl_from_start") and bool(values.min() >= 0 and values.max() <= 1)


def _sample_pairs(arm: ArmFiles, arms: Sequence[ArmFiles], seeds: Sequence[int]) -> dict[str, RatioSample]:
    """Accuracy on pairs, and the margin against the arm that this one starts from, where that was scored."""
    scored = [arm.pairs[arm.seed_or_only(seed)] for seed in seeds]
    right = np.array([[pair.is_right for pair in pairs] for pairs in scored])
    ones = np.ones_like(right)
    samples = {"preference_accuracy": RatioSample(right, ones, is_share=True)}
    start = next((other for other in arms if other.plan.name == arm.plan.starts_from), None)
    if start is not None:
        before = [start.pairs[start.seed_or_only(seed)] for seed in seeds]
        margins = [
            [pair.margin - old.margin for pair, old in zip(now, then, strict=True)]
            for now, then in zip(scored, before, strict=True)
        ]
        samples["preference_margin"] = RatioSample(np.array(margins), ones)
    return samples

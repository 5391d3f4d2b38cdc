"""Intervals, differences and verdicts by paired bootstrap over clusters of test rows and over seeds.

Shapes: `M` samples (one arm and metric each), `S` seeds, `R` test rows, `C` clusters, `B` replicates.

Two things vary between one run and the next: which rows were in the test set, and which seed trained the model.
Rows of one cluster (near-duplicates, one template family) are resampled together: they do not say the same thing twice.
Every arm sees the same draws, so what is hard for all arms cancels out of a difference.

Resampling three seeds gives ten different means and no tails, and its variance is a third too small. So a replicate
moves by the standard error over seeds times Student's t with S - 1 degrees of freedom, which is what three runs
support: the resolvable gap comes out at 2.5 standard deviations for 3 seeds. Clusters are resampled for real, with the
same small-sample widening, t instead of normal, on C - 1 degrees of freedom. What varies by row *and* seed (one
run gets a row right, the next does not) is already in the spread over seeds, so it is taken out of the spread over
rows: counted twice it would hide differences that are there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

REPLICATES = 10_000
MARGIN = 0.01
"""Smallest difference that matters: 0.01 nats, or one point of a hundred."""
FEW_CLUSTERS = 30
_CHUNK_CELLS = 4_000_000


@dataclass(frozen=True, slots=True)
class RatioSample:
    """One arm on one metric: its value is sum(numerator) / sum(denominator).

    numerator, denominator: (S, R). Mean NLL: nats and target tokens; a mean over rows: the scores and ones.
    is_share: rows lie in [0, 1], and so do the interval's bounds.
    """

    numerator: Floats
    denominator: Floats
    is_share: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with intervals; NaN bounds where there are fewer than two clusters. p: two-sided, against 0."""

    value: float
    low: float
    high: float
    low90: float
    high90: float
    p: float = 1.0


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Replicates of M samples under shared draws. Make it with `paired_bootstrap`.

    point (M,), per_seed (M, S), replicates (M, B): the value averaged over seeds with clusters resampled.
    widen (B,): turns normal spread into Student's t with C - 1 degrees; seed_t (B,): Student's t with S - 1.
    influence (M, S, C): how far one cluster moves the value, times C; linear, so that differences are differences.
    effective_rows: independent rows that the clusters are worth, from C (rows of a cluster alike) to R (unrelated).
    """

    samples: Sequence[RatioSample]
    num_clusters: int
    point: Floats
    per_seed: Floats
    replicates: Floats
    widen: Floats
    seed_t: Floats
    influence: Floats
    effective_rows: float

    def estimate(self, index: int) -> Estimate:
        """One arm on one metric, with 95% and 90% intervals."""
        sample = self.samples[index]
        value = float(self.point[index])
        if self.num_clusters < 2:
            return Estimate(value, math.nan, math.nan, math.nan, math.nan)
        draws = self._spread(value, self.replicates[index], self.per_seed[index], self.influence[index])
        bounds = _percentiles(draws)
        if sample.is_share:
            if value in (0.0, 1.0):
                # All rows alike: resampling them shows no spread, yet n rows without a hit leave room for about 3/n.
                bounds = [
                    v
                    for level in (0.025, 0.05)
                    for v in _bounds_of_all_alike(value, level, self.effective_rows)
                ]
            bounds = [min(max(bound, 0.0), 1.0) for bound in bounds]
        return _estimate(value, bounds)

    def difference(self, index: int, other: int) -> Estimate:
        """Sample `index` minus sample `other`, paired by row and seed."""
        delta = float(self.point[index] - self.point[other])
        if self.num_clusters < 2:
            return Estimate(delta, math.nan, math.nan, math.nan, math.nan)
        if self.samples[index].is_share and np.array_equal(
            self.samples[index].numerator, self.samples[other].numerator
        ):
            room95, room90 = (_room(level, self.effective_rows) for level in (0.025, 0.05))
            return Estimate(delta, delta - room95, delta + room95, delta - room90, delta + room90)
        draws = self._spread(
            delta,
            self.replicates[index] - self.replicates[other],
            self.per_seed[index] - self.per_seed[other],
            self.influence[index] - self.influence[other],
        )
        tail = min(int(np.count_nonzero(draws <= 0)), int(np.count_nonzero(draws >= 0)))
        p = min(1.0, 2 * (tail + 1) / (len(draws) + 1))
        return _estimate(delta, _percentiles(draws), p)

    def difference_errors(self, index: int, other: int) -> tuple[float, float]:
        """Standard errors of a difference from (test rows, seeds): what more of either would shrink."""
        influence = self.influence[index] - self.influence[other]
        rows = float(np.std(self.replicates[index] - self.replicates[other])) * _share_of_rows(influence)
        gaps = self.per_seed[index] - self.per_seed[other]
        seeds = float(np.std(gaps, ddof=1) / math.sqrt(len(gaps))) if len(gaps) > 1 else 0.0
        return rows, seeds

    def _spread(self, value: float, replicates: Floats, per_seed: Floats, influence: Floats) -> Floats:
        """Replicates of the value, (B,), with the spread over clusters and over seeds."""
        draws = value + (replicates - value) * (self.widen * _share_of_rows(influence))
        if len(per_seed) > 1:
            draws = draws + np.std(per_seed, ddof=1) / math.sqrt(len(per_seed)) * self.seed_t
        return draws


def _share_of_rows(influence: Floats) -> float:
    """The part of the spread over clusters, as a standard deviation, that is the rows' own and not row by seed.

    influence: (S, C). With u_sc = a_c + b_s + e_sc, the mean over seeds varies over clusters by var(a) + var(e) / S.
    Two-way analysis of variance gives var(e) from (S - 1)(C - 1) degrees of freedom; the share is what var(a) leaves.
    """
    num_seeds, num_clusters = influence.shape
    of_rows = float(np.var(influence.mean(axis=0), ddof=1))
    if num_seeds < 2 or of_rows == 0:
        return 1.0
    rest = influence - influence.mean(axis=0) - influence.mean(axis=1, keepdims=True) + influence.mean()
    of_both = float(np.square(rest).sum()) / ((num_seeds - 1) * (num_clusters - 1)) / num_seeds
    return math.sqrt(max(0.0, 1 - of_both / of_rows))


def paired_bootstrap(
    samples: Sequence[RatioSample], clusters: Sequence[str], *, replicates: int = REPLICATES, seed: int = 0
) -> Bootstrap:
    """Draw clusters `replicates` times, the same draws for every sample.

    clusters: the cluster of each row, (R,).
    Raises ValueError if shapes differ or a denominator sums to zero.
    """
    names, cluster_of_row = np.unique(np.asarray(clusters), return_inverse=True)
    num_clusters = len(names)
    shape = samples[0].numerator.shape
    if any(s.numerator.shape != shape or s.denominator.shape != shape for s in samples) or shape[1] != len(
        clusters
    ):
        raise ValueError("samples are paired: all (S, R), with one cluster per row")
    numerators = np.stack([s.numerator for s in samples])
    denominators = np.stack([s.denominator for s in samples])
    if np.any(denominators.sum(axis=(1, 2)) <= 0):
        raise ValueError("a denominator sums to zero")
    per_seed = numerators.sum(axis=2) / np.maximum(denominators.sum(axis=2), 1e-300)
    point = numerators.sum(axis=(1, 2)) / denominators.sum(axis=(1, 2))
    # Sums of each cluster, (M, S, C).
    top = _sum_by_cluster(numerators, cluster_of_row, num_clusters)
    bottom = _sum_by_cluster(denominators, cluster_of_row, num_clusters)

    random = np.random.default_rng(seed)
    values = _resample_clusters(top.sum(axis=1), bottom.sum(axis=1), point, replicates, random)
    degrees = max(num_clusters - 1, 1)
    # sqrt(C / (C - 1)): resampling C values understates their variance by that factor.
    widen = np.sqrt(num_clusters / degrees) * np.sqrt(degrees / random.chisquare(degrees, replicates))
    seed_t = random.standard_t(max(shape[0] - 1, 1), replicates)
    mean_bottom = np.maximum(bottom.mean(axis=2, keepdims=True), 1e-300)
    influence = (top - per_seed[:, :, None] * bottom) / mean_bottom
    worth = _count_effective_rows(samples, point, values, num_clusters)
    return Bootstrap(samples, num_clusters, point, per_seed, values, widen, seed_t, influence, worth)


def _count_effective_rows(
    samples: Sequence[RatioSample], point: Floats, values: Floats, num_clusters: int
) -> float:
    """R divided by the largest design effect seen: how much more a share varies over clusters than over single rows.

    Where nothing varies nothing shows how alike the rows of a cluster are; then each cluster counts as one row.
    """
    num_rows = samples[0].numerator.shape[1]
    effects = [
        float(np.var(values[i])) * num_rows / (point[i] * (1 - point[i]))
        for i, sample in enumerate(samples)
        if sample.is_share and 0.02 < point[i] < 0.98
    ]
    if not effects or max(effects) == 0:
        return float(num_clusters)
    return min(max(num_rows / max(effects), num_clusters), num_rows)


def _sum_by_cluster(values: Floats, cluster_of_row: NDArray[np.intp], num_clusters: int) -> Floats:
    """(M, S, R) -> (M, S, C), summed over the rows of each cluster."""
    sums = np.zeros((num_clusters, *values.shape[:2]))
    np.add.at(sums, cluster_of_row, np.moveaxis(values, 2, 0))
    return np.moveaxis(sums, 0, 2)


def _resample_clusters(
    numerators: Floats, denominators: Floats, point: Floats, replicates: int, random: np.random.Generator
) -> Floats:
    """Ratios under resampled clusters, (M, B). In chunks, so that memory stays flat for large test sets."""
    num_samples, num_clusters = numerators.shape
    values = np.empty((num_samples, replicates))
    chunk = max(1, _CHUNK_CELLS // num_clusters)
    for start in range(0, replicates, chunk):
        stop = min(start + chunk, replicates)
        # How often each cluster is drawn, (stop - start, C).
        counts = random.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=stop - start)
        weights = counts.astype(np.float64)
        top, bottom = weights @ numerators.T, weights @ denominators.T
        # A draw that misses every row with a denominator says nothing: it repeats the point value.
        ratios = np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), point)
        values[:, start:stop] = ratios.T
    return values


def _percentiles(draws: Floats) -> list[float]:
    """[2.5, 97.5, 5, 95]th percentiles."""
    return [float(bound) for bound in np.percentile(draws, [2.5, 97.5, 5.0, 95.0])]


def _estimate(value: float, bounds: Sequence[float], p: float = 1.0) -> Estimate:
    low, high, low90, high90 = bounds
    return Estimate(value, low, high, low90, high90, p)


def _room(tail: float, num_rows: float) -> float:
    """Largest share that n rows without a hit leave possible: (1 - share)^n = tail. Clopper and Pearson 1934."""
    return 1 - tail ** (1 / num_rows)


def _bounds_of_all_alike(value: float, tail: float, num_rows: float) -> tuple[float, float]:
    room = _room(tail, num_rows)
    return (0.0, room) if value == 0.0 else (1 - room, 1.0)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the given order.

    [0.01, 0.04, 0.03] -> 0.01 * 3, then 0.03 * 2, then 0.04 * 1 raised to the one before -> [0.03, 0.06, 0.06].
    Source: Holm 1979.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


def judge_difference(
    estimate: Estimate,
    *,
    p_adjusted: float,
    higher_is_better: bool,
    margin: float = MARGIN,
    one_seed: bool = False,
) -> str:
    """better | worse | tie | inconclusive | exploratory, seen from the first arm.

    better, worse: the 95% interval excludes 0, |delta| > margin, and Holm's p < 0.05.
    tie:           the 90% interval lies inside +- margin: two one-sided tests at 5% (Schuirmann 1987).
    exploratory:   an arm that depends on the seed ran with one: no winner is declared.
    """
    if one_seed:
        return "exploratory"
    if math.isnan(estimate.low):
        return "inconclusive"
    excludes_zero = estimate.low > 0 or estimate.high < 0
    if excludes_zero and abs(estimate.value) > margin and p_adjusted < 0.05:
        return "better" if (estimate.value > 0) == higher_is_better else "worse"
    if -margin < estimate.low90 and estimate.high90 < margin:
        return "tie"
    return "inconclusive"


def find_t_quantile(alpha: float, degrees: int) -> float:
    """Two-sided point of Student's t: exact for 1 and 2 degrees of freedom, an expansion in 1 / degrees above.

    Within 2% of the true value for alpha of 0.01 or more. Source: Fisher and Cornish 1960.
    """
    if degrees == 1:
        return 1 / math.tan(math.pi * alpha / 2)
    if degrees == 2:
        return math.sqrt(2 / (alpha * (2 - alpha)) - 2)
    z = NormalDist().inv_cdf(1 - alpha / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def advise_resolution(
    delta: float, *, row_error: float, seed_error: float, num_seeds: int, num_rows: int, alpha: float = 0.05
) -> str:
    """What would make a difference of this size clear of zero: more seeds, more test rows, or neither within reason.

    row_error, seed_error: standard errors now. Seeds shrink theirs by 1/sqrt(S) and gain degrees of freedom.
    alpha: the level it has to pass, 0.05 divided by Holm's factor.
    """
    gap = abs(delta)
    if gap <= MARGIN:
        return "the difference seen is within the margin, so more runs would more likely show a tie than a winner"
    z = NormalDist().inv_cdf(1 - alpha / 2)
    spread_over_seeds = seed_error * math.sqrt(num_seeds)
    for seeds in range(num_seeds + 1, 21):
        half = math.hypot(
            z * row_error, find_t_quantile(alpha, seeds - 1) * spread_over_seeds / math.sqrt(seeds)
        )
        if seed_error > 0 and half < gap:
            return f"about {_count(seeds - num_seeds, 'more seed')} would resolve a difference of this size"
    seed_half = find_t_quantile(alpha, num_seeds - 1) * seed_error if num_seeds > 1 else 0.0
    if seed_half < gap:
        needed = math.ceil(num_rows * (z * row_error) ** 2 / (gap**2 - seed_half**2))
        if num_rows < needed <= 100 * num_rows:
            return f"about {_round_up(needed - num_rows):,} more test rows would resolve a difference of this size"
    return "more seeds and more test rows are both needed to resolve a difference of this size"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _round_up(number: int) -> int:
    """To two significant digits: 1,234 -> 1,300. More would pretend to know."""
    step = 10 ** max(0, len(str(number)) - 2)
    return -(-number // step) * step

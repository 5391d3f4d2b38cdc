"""Intervals against values worked by hand and by scipy; error rates against simulated truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tunesmith.comparing.stats import (
    Estimate,
    RatioSample,
    adjust_holm,
    advise_resolution,
    find_t_quantile,
    judge_difference,
    paired_bootstrap,
)


def share(values: list[list[float]]) -> RatioSample:
    array = np.array(values)
    return RatioSample(array, np.ones_like(array), is_share=True)


def mean(values: np.ndarray) -> RatioSample:
    return RatioSample(values, np.ones_like(values))


def rows(count: int) -> list[str]:
    return [str(row) for row in range(count)]


# --- point values -----------------------------------------------------------------------------------------------------


def test_the_value_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    # Row losses 2 / 1 token and 3 / 9 tokens: 5 / 10, not (2 + 1/3) / 2.
    sample = RatioSample(np.array([[2.0, 3.0]]), np.array([[1.0, 9.0]]))
    assert paired_bootstrap([sample], rows(2)).estimate(0).value == 0.5


def test_two_rows_resample_to_three_values() -> None:
    # Draws of two rows with values 0 and 1: both first, one each, both second: 0, 1/2, 1 with chances 1/4, 1/2, 1/4.
    boot = paired_bootstrap([mean(np.array([[0.0, 1.0]]))], rows(2))
    values, counts = np.unique(boot.replicates[0], return_counts=True)
    assert values.tolist() == [0.0, 0.5, 1.0]
    assert counts / 10_000 == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_rows_of_one_cluster_are_drawn_together() -> None:
    # Rows 1-2 are always 1 and rows 3-4 always 0: as clusters there are two things to draw, so never a quarter.
    sample = mean(np.array([[1.0, 1.0, 0.0, 0.0]]))
    clustered = paired_bootstrap([sample], ["a", "a", "b", "b"])
    assert set(np.unique(clustered.replicates[0])) == {0.0, 0.5, 1.0}
    assert clustered.num_clusters == 2


def test_the_same_seed_gives_the_same_interval() -> None:
    sample = mean(np.random.default_rng(1).normal(size=(3, 50)))
    first, again = (paired_bootstrap([sample], rows(50), seed=4).estimate(0) for _ in range(2))
    other = paired_bootstrap([sample], rows(50), seed=5).estimate(0)
    assert first == again
    assert first.low != other.low


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = mean(np.random.default_rng(1).normal(size=(2, 30)))
    whole = paired_bootstrap([sample], rows(30), replicates=500)
    monkeypatch.setattr("tunesmith.comparing.stats._CHUNK_CELLS", 700)
    chunked = paired_bootstrap([sample], rows(30), replicates=500)
    # Matrix products of another height round differently in the last digit.
    np.testing.assert_allclose(whole.replicates, chunked.replicates, atol=1e-12)


def test_unpaired_samples_are_a_broken_contract() -> None:
    with pytest.raises(ValueError, match="paired"):
        paired_bootstrap([share([[1.0, 0.0]]), share([[1.0, 0.0, 1.0]])], rows(2))


# --- intervals against scipy ------------------------------------------------------------------------------------------


def test_one_seed_over_many_rows_agrees_with_the_t_interval() -> None:
    # scipy 1.x: x = default_rng(0).normal(.3, 1, 40); stats.t.interval(.95, 39, x.mean(), x.std(ddof=1) / sqrt(40))
    # -> (-0.01539, 0.49450); stats.ttest_1samp(x, 0).pvalue -> 0.0648
    values = np.random.default_rng(0).normal(0.3, 1, 40)[None, :]
    boot = paired_bootstrap([mean(values), mean(np.zeros_like(values))], rows(40), replicates=40_000)
    estimate = boot.difference(0, 1)
    assert estimate.value == pytest.approx(0.23956, abs=1e-5)
    assert estimate.low == pytest.approx(-0.0154, abs=0.012)
    assert estimate.high == pytest.approx(0.4945, abs=0.012)
    assert estimate.p == pytest.approx(0.0648, abs=0.01)


def test_spread_between_three_seeds_alone_gives_students_t() -> None:
    # All rows of a seed are alike, so only seeds vary: .80, .83, .79.
    # scipy: stats.t.interval(.95, 2, .80667, std(ddof=1) / sqrt(3)) -> (0.75496, 0.85838)
    values = np.repeat([[0.80], [0.83], [0.79]], 60, axis=1)
    estimate = paired_bootstrap([mean(values)], rows(60), replicates=60_000).estimate(0)
    assert estimate.low == pytest.approx(0.75496, abs=0.002)
    assert estimate.high == pytest.approx(0.85838, abs=0.002)


def test_no_hit_in_sixty_clusters_leaves_room_for_six_percent() -> None:
    # scipy: stats.binomtest(0, 60).proportion_ci(.95, method="exact") -> (0, 0.0596295); mirrored for 60 of 60.
    none, every = share([[0.0] * 60]), share([[1.0] * 60])
    boot = paired_bootstrap([none, every], rows(60))
    assert boot.estimate(0).low == 0.0
    assert boot.estimate(0).high == pytest.approx(0.0596295, abs=1e-6)
    assert boot.estimate(1).low == pytest.approx(1 - 0.0596295, abs=1e-6)


def test_clusters_are_worth_as_many_rows_as_their_rows_differ() -> None:
    # 300 rows in 60 clusters of five. One arm has no hit; the other's rows are alike within a cluster, or unrelated.
    clusters = [str(row // 5) for row in range(300)]
    alike = [[float(row // 5 % 2) for row in range(300)]]
    unrelated = np.random.default_rng(2).integers(0, 2, (1, 300)).astype(float).tolist()
    none = share([[0.0] * 300])
    assert paired_bootstrap([none, share(alike)], clusters).effective_rows == pytest.approx(60, rel=0.05)
    assert paired_bootstrap([none, share(unrelated)], clusters).effective_rows > 200
    assert paired_bootstrap([none], clusters).effective_rows == 60


def test_arms_alike_on_every_row_are_as_sure_as_the_rows_are_many() -> None:
    few, many = ([[float(i % 2) for i in range(count)]] for count in (40, 400))
    for values, verdict in ((few, "inconclusive"), (many, "tie")):
        estimate = paired_bootstrap([share(values), share(values)], rows(len(values[0]))).difference(0, 1)
        assert estimate.value == 0
        assert estimate.p == 1
        assert judge_difference(estimate, p_adjusted=1, higher_is_better=True) == verdict


def test_shares_stay_between_zero_and_one() -> None:
    values = [[1.0] * 28 + [0.0] * 2, [1.0] * 30, [1.0] * 25 + [0.0] * 5]
    estimate = paired_bootstrap([share(values)], rows(30)).estimate(0)
    assert 0 <= estimate.low < estimate.value < estimate.high <= 1


def test_one_cluster_has_no_interval() -> None:
    estimate = paired_bootstrap([share([[0.0, 1.0]]), share([[1.0, 1.0]])], ["a", "a"]).difference(1, 0)
    assert estimate.value == 0.5
    assert math.isnan(estimate.low)
    assert judge_difference(estimate, p_adjusted=1, higher_is_better=True) == "inconclusive"


def test_what_is_hard_for_both_cancels_in_a_paired_difference() -> None:
    random = np.random.default_rng(3)
    difficulty = random.normal(0, 5, 100)
    a, b = (difficulty + random.normal(0, 0.1, (3, 100)) + shift for shift in (0.2, 0.0))
    boot = paired_bootstrap([mean(a), mean(b)], rows(100))
    assert boot.estimate(0).high - boot.estimate(0).low > 1.5
    paired = boot.difference(0, 1)
    assert paired.high - paired.low < 0.2
    assert paired.low > 0


@pytest.mark.parametrize(
    ("alpha", "degrees", "expected"),
    # scipy: stats.t.ppf(1 - alpha / 2, degrees)
    [(0.05, 1, 12.7062), (0.05, 2, 4.30265), (0.05, 3, 3.18245), (0.05, 9, 2.26216), (0.01, 4, 4.60409)],
)
def test_quantiles_of_students_t(alpha: float, degrees: int, expected: float) -> None:
    assert find_t_quantile(alpha, degrees) == pytest.approx(expected, rel=0.02)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_holm_worked_by_hand() -> None:
    # sorted .01 .03 .04 -> .01*3, .03*2, .04*1 -> .03, .06, and .04 raised to .06
    assert adjust_holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjust_holm([0.9, 0.8]) == [1.0, 1.0]
    assert adjust_holm([]) == []


def estimate(value: float, half95: float, half90: float, p: float = 0.001) -> Estimate:
    return Estimate(value, value - half95, value + half95, value - half90, value + half90, p)


@pytest.mark.parametrize(
    ("case", "p", "verdict"),
    [
        (estimate(0.05, 0.03, 0.025), 0.001, "better"),
        (estimate(-0.05, 0.03, 0.025), 0.001, "worse"),
        (estimate(0.05, 0.03, 0.025), 0.2, "inconclusive"),  # clear by itself, not after Holm's correction
        (estimate(0.05, 0.06, 0.05), 0.1, "inconclusive"),  # the interval holds 0
        (estimate(0.002, 0.009, 0.007), 0.7, "tie"),
        (estimate(0.006, 0.004, 0.0035), 0.001, "tie"),  # not 0, but smaller than what matters
        (estimate(0.009, 0.008, 0.007), 0.03, "inconclusive"),  # not 0, and may be larger than what matters
    ],
)
def test_verdict_words(case: Estimate, p: float, verdict: str) -> None:
    assert judge_difference(case, p_adjusted=p, higher_is_better=True) == verdict


def test_less_is_better_where_it_is() -> None:
    assert judge_difference(estimate(-0.05, 0.03, 0.025), p_adjusted=0.01, higher_is_better=False) == "better"


def test_one_seed_declares_no_winner() -> None:
    case = estimate(0.5, 0.01, 0.01)
    assert judge_difference(case, p_adjusted=0.001, higher_is_better=True, one_seed=True) == "exploratory"


def test_advice_names_what_is_missing() -> None:
    # Rows contribute almost nothing: seeds decide. Half width at 4 seeds: 3.18 * .02 * sqrt(3) / 2 = .055 > .05;
    # at 5: 2.78 * .0346 / sqrt(5) = .043 < .05, so two more than three.
    seeds = advise_resolution(0.05, row_error=0.001, seed_error=0.02, num_seeds=3, num_rows=300)
    assert seeds == "about 2 more seeds would resolve a difference of this size"
    # No seed spread: half width 1.96 * .04 = .078 must fall to .05: 300 * (.0784 / .05)^2 = 738 rows, 438 more.
    more = advise_resolution(0.05, row_error=0.04, seed_error=0.0, num_seeds=1, num_rows=300)
    assert more == "about 440 more test rows would resolve a difference of this size"
    assert "tie" in advise_resolution(0.005, row_error=0.04, seed_error=0.0, num_seeds=3, num_rows=300)


# --- error rates over simulated data ----------------------------------------------------------------------------------

SIMULATIONS = 300
# 300 simulations of a 95% interval: coverage is measured to +- 1.3 points (one standard error); the bounds allow 2.5.
LEAST_COVERAGE = 0.92


@pytest.mark.parametrize(
    ("seeds", "clusters", "per_cluster", "by_cluster", "by_seed", "by_both"),
    [
        (3, 60, 1, 0.3, 0.0, 0.5),  # rows and noise, seeds alike
        (3, 60, 1, 0.3, 0.1, 0.5),  # seeds differ
        (3, 60, 1, 0.0, 0.1, 0.0),  # seeds alone
        (3, 60, 1, 0.0, 0.0, 1.0),  # noise alone
        (3, 30, 5, 0.3, 0.05, 0.5),  # five rows a cluster
        (3, 12, 5, 0.3, 0.0, 0.5),  # few clusters
        (1, 60, 1, 0.3, 0.0, 0.5),  # one seed: rows alone are covered
        (8, 60, 1, 0.1, 0.05, 0.5),  # many seeds
    ],
)
def test_intervals_cover_the_truth_and_equal_arms_are_not_told_apart(
    seeds: int, clusters: int, per_cluster: int, by_cluster: float, by_seed: float, by_both: float
) -> None:
    """A/A: two arms from one distribution. At most 5% false winners, within simulation error."""
    random = np.random.default_rng(20)
    names = [str(row // per_cluster) for row in range(clusters * per_cluster)]
    covered = winners = 0
    for simulation in range(SIMULATIONS):
        common = random.normal(0, 1, len(names))
        arms = [
            mean(
                common
                + np.repeat(random.normal(0, by_cluster, clusters), per_cluster)
                + random.normal(0, by_seed, (seeds, 1))
                + random.normal(0, by_both, (seeds, len(names)))
            )
            for _ in range(2)
        ]
        result = paired_bootstrap(arms, names, replicates=600, seed=simulation).difference(0, 1)
        covered += result.low <= 0 <= result.high
        winners += judge_difference(result, p_adjusted=result.p, higher_is_better=True) in ("better", "worse")
    assert covered / SIMULATIONS >= LEAST_COVERAGE
    assert winners / SIMULATIONS <= 1 - LEAST_COVERAGE


def test_coverage_of_a_token_weighted_ratio() -> None:
    """Rows of unequal length whose loss depends on their length: the ratio of sums, not the mean, is covered."""
    random, covered = np.random.default_rng(5), 0
    # E[NLL] / E[tokens] with tokens 5..60 and loss per token 1 + tokens / 100: (E[t] + E[t^2] / 100) / E[t].
    lengths = np.arange(5, 61)
    truth = 1 + float(np.mean(lengths**2)) / 100 / float(np.mean(lengths))
    for simulation in range(SIMULATIONS):
        tokens = random.integers(5, 61, (1, 80)).astype(float)
        nll = tokens * (1 + tokens / 100) * random.gamma(4, 0.25, (1, 80))
        result = paired_bootstrap(
            [RatioSample(nll, tokens)], rows(80), replicates=600, seed=simulation
        ).estimate(0)
        covered += result.low <= truth <= result.high
    assert LEAST_COVERAGE <= covered / SIMULATIONS <= 0.98


def test_a_real_difference_is_found() -> None:
    random = np.random.default_rng(9)
    found = 0
    for simulation in range(60):
        difficulty = random.random(200)
        arms = [
            share((random.random((3, 200)) < np.clip(difficulty + gain, 0, 1)).astype(float).tolist())
            for gain in (0.2, 0.0)
        ]
        result = paired_bootstrap(arms, rows(200), replicates=600, seed=simulation).difference(0, 1)
        found += judge_difference(result, p_adjusted=result.p, higher_is_better=True) == "better"
    assert found >= 54

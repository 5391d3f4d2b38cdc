"""From run folders to a judged `Comparison`: the step between the arms' records and everything a person reads.

Shapes as in `stats`: `M` samples, `S` seeds, `R` test rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from tunesmith.comparing.arms import ArmFiles, block_unlike, check_comparable, read_arm
from tunesmith.comparing.costs import describe_arm
from tunesmith.comparing.measures import AGAINST_START, describe_metric
from tunesmith.comparing.pareto import find_dominated
from tunesmith.comparing.plan import order_trainings, plan_arms
from tunesmith.comparing.samples import Pool, pair_seeds, pool_samples
from tunesmith.comparing.stats import (
    FEW_CLUSTERS,
    MARGIN,
    REPLICATES,
    Bootstrap,
    Estimate,
    adjust_holm,
    advise_resolution,
    judge_difference,
)
from tunesmith.comparing.table import build_starts, build_table
from tunesmith.comparing.verdict import write_verdict
from tunesmith.comparing.warnings import list_warnings
from tunesmith.core.comparison import (
    ArmResult,
    Comparison,
    Difference,
    Interval,
    MetricInfo,
    Parity,
    Table,
    native_from_json,
    parity_from_json,
    parity_to_json,
)
from tunesmith.core.errors import ArmFailed
from tunesmith.core.jsonl import read_json, write_json
from tunesmith.core.native import NativeTokens
from tunesmith.core.rundir import RunDir
from tunesmith.job.spec import Job

BASE_ARM = "zero-shot"


def compare_run(
    run_dir: RunDir,
    job: Job,
    *,
    failures: Mapping[str, str] | None = None,
    parity: Mapping[str, Parity] | None = None,
) -> Comparison:
    """Judge the arms in `run_dir` and write `comparison.json`. From files alone: it can be repeated at any time.

    failures: arm name -> reason, of arms that ended without a result; they appear in the warnings.
    parity:   arm that another framework trained -> whether it did our work; kept as `gates.json`, which is read where
              none is given.
    Raises ArmFailed if no arm was scored, DataError on a damaged file.
    """
    arms = [read_arm(run_dir, plan, num_trials=job.compare.tune.trials) for plan in plan_arms(job)]
    if parity is not None:
        write_json(run_dir.gates, parity_to_json(parity))
    elif run_dir.gates.is_file():
        parity = parity_from_json(read_json(run_dir.gates), place=str(run_dir.gates))
    parity = parity or {}
    native = _read_native(run_dir, parity) if job.compare.track == "native" else {}
    if failures and not job.compare.samples:
        # What a framework or a parser ended with may quote the row that it ended at.
        failures = dict.fromkeys(failures, "its log says why")
    comparison = judge_arms(arms, job, failures=failures or {}, parity=parity, native=native)
    write_json(run_dir.comparison, comparison.to_json())
    return comparison


def _read_native(run_dir: RunDir, arms: Iterable[str]) -> dict[str, NativeTokens]:
    """What frameworks made of the rows by themselves. arms: whose first steps were looked at."""
    paths = {arm: run_dir.native(arm) for arm in arms}
    return {
        arm: native_from_json(read_json(path), place=str(path))
        for arm, path in paths.items()
        if path.is_file()
    }


def judge_arms(
    arms: Sequence[ArmFiles],
    job: Job,
    *,
    failures: Mapping[str, str],
    parity: Mapping[str, Parity],
    native: Mapping[str, NativeTokens] | None = None,
) -> Comparison:
    """Everything a report says, worked out from the arms' records."""
    check_comparable(arms)
    unlike = block_unlike(arms, parity)
    ranked = [arm for arm in arms if arm.seeds and not arm.not_comparable]
    if not ranked:
        reasons = [*failures.items(), *((arm.plan.name, arm.not_comparable) for arm in unlike)]
        first = "".join(f"; {name}: {reason}" for name, reason in reasons[:1])
        raise ArmFailed(
            "compare", f"no arm was scored{first}", cure="See the logs in arms/, then run the command again"
        )
    metric = job.compare.metric
    pool = pool_samples(ranked, pair_seeds(ranked))
    if not any((arm.plan.name, metric) in pool.index for arm in ranked):
        raise ArmFailed(
            "compare.metric",
            f"no arm has {metric!r}",
            rule="the declared metric decides",
            cure="Add it to evaluate.metrics",
        )
    # An arm that did other work is shown with its own figures, and takes no part in anybody else's.
    results = [_summarise_arm(a, pool_samples([a], a.seeds) if a in unlike else pool) for a in arms]
    results, pairs = _judge_all(results, pool, metric)
    infos = {name: describe_metric(name) for arm in results for name in arm.metrics}
    results = find_dominated(results, pairs, metric)
    some = ranked[0].answers[ranked[0].seeds[0]]
    comparison = Comparison(
        metric=metric,
        verdict="",
        details=[],
        base=BASE_ARM if any(arm.plan.name == BASE_ARM for arm in ranked) else None,
        seeds=pool.seeds,
        num_rows=len(some),
        num_clusters=pool.num_clusters,
        num_target_tokens=sum(answer.num_target_tokens for answer in some),
        arms=results,
        pairs=pairs,
        metrics={name: infos[name] for name in _order_metrics(infos, metric)},
        table=Table([], [], []),
        warnings=[],
        method=_describe_method(metric, arms),
        record=_collect_record(arms, job),
        parity={arm.plan.name: parity[arm.plan.name] for arm in arms if arm.plan.name in parity},
        native=dict(native or {}),
        num_pairs=pool.num_pairs,
    )
    comparison = replace(
        comparison,
        table=build_table(comparison),
        starts=build_starts(comparison),
        warnings=list_warnings(comparison, arms, failures),
    )
    verdict, details = write_verdict(comparison)
    return replace(comparison, verdict=verdict, details=details)


def _summarise_arm(arm: ArmFiles, pool: Pool) -> ArmResult:
    """An arm's costs, and its metrics with intervals if it is ranked."""
    result = describe_arm(arm)
    metrics: dict[str, Interval] = {}
    per_seed: dict[str, list[float]] = {}
    for (name, metric), (bootstrap, sample) in pool.index.items():
        if name != arm.plan.name:
            continue
        metrics[metric] = _as_interval(bootstrap.estimate(sample))
        values = [float(value) for value in bootstrap.per_seed[sample]]
        per_seed[metric] = values[:1] if arm.plan.deterministic else values
    if "nll" in metrics and metrics["nll"].value < 700:
        metrics["perplexity"] = _exponentiate(metrics["nll"])
        per_seed["perplexity"] = [math.exp(min(value, 700.0)) for value in per_seed["nll"]]
    # Seeds that other arms lack take no part in any figure.
    seeds = [seed for seed in arm.seeds if arm.plan.deterministic or arm.not_comparable or seed in pool.seeds]
    return replace(result, metrics=metrics, per_seed=per_seed, seeds=seeds, not_comparable=arm.not_comparable)


def _as_interval(estimate: Estimate) -> Interval:
    if math.isnan(estimate.low):
        return Interval(estimate.value)
    return Interval(estimate.value, estimate.low, estimate.high)


def _exponentiate(nll: Interval) -> Interval:
    low, high = (None if bound is None else math.exp(min(bound, 700.0)) for bound in (nll.low, nll.high))
    return Interval(math.exp(nll.value), low, high)


# --- differences ------------------------------------------------------------------------------------------------------


def _judge_all(arms: list[ArmResult], pool: Pool, metric: str) -> tuple[list[ArmResult], list[Difference]]:
    """Differences from the base on every metric, and between all other arms on the declared one.

    Holm's correction runs within each question, on the declared metric: every arm versus the base; trained versus
    prompted arms; trained arms among themselves; prompted arms among themselves. Other metrics are exploratory: their
    differences carry intervals, but no corrected verdict.
    """
    by_name = {arm.name: arm for arm in arms}
    base = by_name.get(BASE_ARM)
    rankable = [
        arm for arm in arms if (arm.name, metric) in pool.index and (metric != "nll" or arm.kind == "trained")
    ]
    versus_base: list[Difference] = []
    if base is not None and (base.name, metric) in pool.index:
        others = [arm for arm in rankable if arm is not base]
        versus_base = _judge_family([(arm, base) for arm in others], metric, pool)
    others = [arm for arm in rankable if arm is not base]
    trained = [arm for arm in others if arm.kind == "trained"]
    prompted = [arm for arm in others if arm.kind == "prompted"]
    pairs = _judge_family([(a, b) for a in trained for b in prompted], metric, pool)
    pairs += _judge_family(list(combinations(trained, 2)), metric, pool)
    pairs += _judge_family(list(combinations(prompted, 2)), metric, pool)

    declared = {difference.arm: difference for difference in versus_base}
    judged: list[ArmResult] = []
    for arm in arms:
        differences = {metric: declared[arm.name]} if arm.name in declared else {}
        if base is not None and arm is not base:
            for name in (name for name in arm.metrics if name not in AGAINST_START):
                if name != metric and (arm.name, name) in pool.index and (base.name, name) in pool.index:
                    differences[name] = _judge_family([(arm, base)], name, pool)[0]
        word = declared[arm.name].verdict if arm.name in declared else None
        moved = _from_start(arm, by_name, pairs, metric, pool)
        judged.append(replace(arm, differences=differences, versus_base=word, from_start=moved))
    return judged, versus_base + pairs


def _from_start(
    arm: ArmResult, arms: Mapping[str, ArmResult], pairs: Sequence[Difference], metric: str, pool: Pool
) -> dict[str, Difference]:
    """What changed from the arm that this one starts from: on the declared metric as it was judged among all pairs."""
    start = arms.get(arm.starts_from or "")
    if start is None:
        return {}
    moved: dict[str, Difference] = {}
    for name in (name for name in arm.metrics if name not in AGAINST_START):
        if (arm.name, name) in pool.index and (start.name, name) in pool.index:
            moved[name] = _judge_family([(arm, start)], name, pool)[0]
    for pair in pairs:
        if pair.metric == metric and {pair.arm, pair.other} == {arm.name, start.name}:
            moved[metric] = pair if pair.arm == arm.name else pair.flip()
    return moved


def _judge_family(pairs: Sequence[tuple[ArmResult, ArmResult]], metric: str, pool: Pool) -> list[Difference]:
    """One family of tests: Holm's correction runs over exactly these pairs."""
    info = describe_metric(metric)
    samples = [(pool.index[a.name, metric], pool.index[b.name, metric]) for a, b in pairs]
    # One metric is of one kind of rows, so that both are of one bootstrap.
    estimates = [bootstrap.difference(i, j) for (bootstrap, i), (_, j) in samples]
    adjusted = adjust_holm([estimate.p for estimate in estimates])
    return [
        _judge_pair(a, b, metric, info, estimate, p, pool.seeds, bootstrap, (i, j))
        for (a, b), estimate, p, ((bootstrap, i), (_, j)) in zip(
            pairs, estimates, adjusted, samples, strict=True
        )
    ]


def _judge_pair(
    arm: ArmResult,
    other: ArmResult,
    metric: str,
    info: MetricInfo,
    estimate: Estimate,
    p_adjusted: float,
    seeds: Sequence[int],
    bootstrap: Bootstrap,
    sample: tuple[int, int],
) -> Difference:
    # A seed that changes neither arm is no source of doubt.
    one_seed = len(seeds) == 1 and not (arm.deterministic and other.deterministic)
    verdict = judge_difference(
        estimate, p_adjusted=p_adjusted, higher_is_better=info.higher_is_better, one_seed=one_seed
    )
    advice = ""
    if verdict == "inconclusive" and bootstrap.num_clusters > 1:
        row_error, seed_error = bootstrap.difference_errors(*sample)
        num_rows = bootstrap.samples[0].numerator.shape[1]
        advice = advise_resolution(
            estimate.value,
            row_error=row_error,
            seed_error=seed_error,
            num_seeds=len(seeds),
            num_rows=num_rows,
            alpha=0.05 * min(1.0, estimate.p / p_adjusted),
        )
    bounds = [
        None if math.isnan(b) else b for b in (estimate.low, estimate.high, estimate.low90, estimate.high90)
    ]
    return Difference(
        arm.name, other.name, metric, estimate.value, *bounds, p=estimate.p, p_adjusted=p_adjusted, verdict=verdict,
        advice=advice,
    )  # fmt: skip


# --- the rest of the record -------------------------------------------------------------------------------------------


def _order_metrics(infos: Mapping[str, MetricInfo], metric: str) -> list[str]:
    """The declared metric, task metrics as they came, then likelihoods."""
    late = ("finished", "nll", "perplexity", "bits_per_byte")
    names = [name for name in infos if name != metric and name not in late]
    return [metric, *names, *(name for name in late if name in infos and name != metric)]


def _describe_method(metric: str, arms: Sequence[ArmFiles]) -> dict[str, Any]:
    return {
        "declared_metric": metric,
        "interval": "95%, paired bootstrap over clusters of test rows, plus Student's t over seeds",
        "replicates": REPLICATES,
        "bootstrap_seed": 0,
        "margin": MARGIN,
        "few_clusters": FEW_CLUSTERS,
        "tie": "90% interval inside the margin (two one-sided tests)",
        "correction": "Holm within each question (arms versus base, trained versus prompted, trained, prompted), "
        "on the declared metric only",
        "order": "a round for each seed, the arms of a round in an order drawn from that seed",
        "trainings": [f"{arm.name} seed {seed}" for arm, seed in order_trainings([a.plan for a in arms])],
    }


def _collect_record(arms: Sequence[ArmFiles], job: Job) -> dict[str, Any]:
    """What running this again would take: the resolved job, and each training's hashes, versions and hardware."""
    runs = {arm.plan.name: next(iter(arm.runs.values())) for arm in arms if arm.runs and arm.plan.trains}
    record: dict[str, Any] = {"job": job.model_dump(mode="json")}
    record["data_sha256"] = next((e.data_sha256 for arm in arms for e in arm.evals.values()), "")
    record["trainings"] = {
        name: {
            "config": run.config,
            "fingerprints": run.fingerprints,
            "versions": run.versions,
            "hardware": run.hardware,
            "learning_rate": run.learning_rate,
            "steps": run.steps,
        }
        for name, run in runs.items()
    }
    return record

"""Held-out pairs and what changed from the start, from records: values worked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.comparing.result import compare_run
from tunesmith.core.jsonl import write_json, write_jsonl
from tunesmith.core.records import AnswerRecord, EvalRecord, PreferenceRecord
from tunesmith.core.rundir import RunDir
from tunesmith.job.spec import ArmSpec, Job

ARMS = [
    "zero-shot",
    {"name": "sft", "method": "lora"},
    {"name": "dpo", "method": "lora", "objective": "dpo", "starts_from": "sft", "data": {"train": "p"}},
]


def make_job(metric: str) -> Job:
    compare = {"arms": ARMS, "seeds": [0], "metric": metric}
    said = {"preferences": "pairs.jsonl", "rewards": ["exact_match"]}
    return Job.model_validate({"model": "m", "data": {"train": "d"}, "evaluate": said, "compare": compare})


def write_arm(
    root: RunDir, name: str, pairs: list[list[float]], *, rewards: list[float], tokens: int
) -> None:
    """One arm's scoring; pairs: log-probabilities of two answers of 2 and 4 tokens."""
    folder = root.arm(name, 0).create()
    answers = [
        AnswerRecord(
            row=i, row_id=str(i), place=f"t:{i}", cluster=f"c{i}", question="q", truth="t", answer="a",
            nll=1.0, num_target_tokens=1, num_bytes=1, num_new_tokens=tokens, scores={"exact_match": 0.0, "reward": r},
        )
        for i, r in enumerate(rewards)
    ]  # fmt: skip
    write_jsonl(folder.answers, [answer.to_json() for answer in answers])
    scored = [
        PreferenceRecord(row=i, row_id=str(i), place=f"p:{i}", cluster=f"p{i}", logps=logps, tokens=[2, 4])
        for i, logps in enumerate(pairs)
    ]
    write_jsonl(folder.pair_scores, [pair.to_json() for pair in scored])
    record = EvalRecord(
        model="m", adapter=None, prompting=name, metrics={}, num_rows=len(rewards), num_target_tokens=1,
        data_sha256="d", wall_seconds=0.0, cpu_seconds=0.0, peak_bytes=0,
    )  # fmt: skip
    write_json(folder.evaluation, record.to_json())


def test_pairs_are_won_per_token_and_margins_are_from_the_start(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    # Per token: -1 against -1 is a tie, -1 against -2 right, -3 against -1 wrong.
    write_arm(run, "zero-shot", [[-2, -4], [-2, -8], [-6, -4]], rewards=[0.0, 3.0], tokens=10)
    write_arm(run, "sft", [[-2, -4], [-2, -8], [-6, -4]], rewards=[1.0, 3.0], tokens=10)
    write_arm(run, "dpo", [[-1, -4], [-2, -9], [-1, -4]], rewards=[2.0, 5.0], tokens=12)
    comparison = compare_run(run, make_job("preference_accuracy"))
    _, sft, dpo = comparison.arms
    assert comparison.num_pairs == 3
    assert sft.metrics["preference_accuracy"].value == pytest.approx((0.5 + 1 + 0) / 3)
    assert dpo.metrics["preference_accuracy"].value == 1.0
    # Margins 2, 6, -2 before; 3, 7, 3 after.
    assert dpo.metrics["preference_margin"].value == pytest.approx((1 + 1 + 5) / 3)
    assert "preference_margin" not in sft.metrics
    assert (dpo.starts_from, dpo.objective) == ("sft", "dpo")


def test_what_changed_is_told_against_the_start(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    even = [[-2.0, -4.0]] * 2
    write_arm(run, "zero-shot", even, rewards=[0.0, 3.0], tokens=10)
    write_arm(run, "sft", even, rewards=[1.0, 3.0], tokens=10)
    write_arm(run, "dpo", even, rewards=[2.0, 5.0], tokens=12)
    comparison = compare_run(run, make_job("reward"))
    dpo = comparison.arms[2]
    # Rewards are no shares: 3.5 - 2 is not cut at 1.
    assert dpo.from_start["reward"].delta == pytest.approx(1.5)
    assert dpo.from_start["reward"].verdict == "exploratory"
    assert dpo.from_start["answer_tokens"].delta == pytest.approx(2.0)
    assert comparison.arms[1].from_start == {}
    assert any(detail.startswith("dpo, from sft: reward +1.500") for detail in comparison.details)


def test_an_arm_scored_on_other_pairs_is_not_ranked(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for name in ("zero-shot", "sft"):
        write_arm(run, name, [[-2.0, -4.0]] * 2, rewards=[1.0, 1.0], tokens=1)
    write_arm(run, "dpo", [[-2.0, -4.0]] * 3, rewards=[1.0, 1.0], tokens=1)
    comparison = compare_run(run, make_job("reward"))
    assert comparison.arms[2].not_comparable == "scored on other pairs than zero-shot"


def test_what_is_measured_against_a_start_is_not_compared_between_starts(tmp_path: Path) -> None:
    run, even = RunDir(tmp_path), [[-2.0, -4.0]] * 2
    for name in ("zero-shot", "sft", "dpo"):
        write_arm(run, name, even, rewards=[1.0, 3.0], tokens=10)
    chain = {
        "name": "more",
        "method": "lora",
        "objective": "dpo",
        "starts_from": "dpo",
        "data": {"train": "p"},
    }
    write_arm(run, "more", [[-1.0, -4.0]] * 2, rewards=[1.0, 3.0], tokens=10)
    job = make_job("reward")
    job = job.model_copy(
        update={"compare": job.compare.model_copy(update={"arms": [*job.compare.arms, ArmSpec(**chain)]})}
    )
    arms = compare_run(run, job).arms
    assert arms[3].metrics["preference_margin"].value == pytest.approx(1.0)
    assert "preference_margin" not in arms[3].from_start
    assert "preference_margin" not in arms[2].differences


def test_the_headline_is_what_going_on_was_worth(tmp_path: Path) -> None:
    run, even = RunDir(tmp_path), [[-2.0, -4.0]] * 2
    write_arm(run, "sft", even, rewards=[1.0, 3.0], tokens=10)
    write_arm(run, "dpo", even, rewards=[2.0, 5.0], tokens=12)
    job = make_job("reward")
    job = job.model_copy(update={"compare": job.compare.model_copy(update={"arms": job.compare.arms[1:]})})
    comparison = compare_run(run, job)
    assert comparison.verdict.startswith("Exploratory, one seed: dpo reaches 3.50 reward, +1.500")
    assert "from sft, which it starts from" in comparison.verdict
    assert not any("zero-shot" in warning for warning in comparison.warnings)

"""Arms with an objective, rows of their own, and a training that goes on from another arm's."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.comparing.plan import job_of_arm, plan_arms
from tunesmith.comparing.starts import check_comparison
from tunesmith.core.errors import JobError
from tunesmith.job.load import job_from
from tunesmith.job.spec import Job

DPO = {"method": "lora", "objective": "dpo", "data": {"train": "pairs.jsonl"}}
GRPO = {"method": "lora", "objective": {"name": "grpo", "rewards": ["exact_match"]}}


def job(arms: list[Any], **more: Any) -> Job:
    return job_from(
        {"model": "m", "data": {"train": "d", "max_tokens": 99}, "compare": {"arms": arms}, **more}
    )


def test_an_arm_keeps_the_method_of_its_start() -> None:
    first = {"name": "sft", "method": {"name": "lora", "rank": 4}}
    sft, dpo = plan_arms(job([first, DPO | {"starts_from": "sft"}]))
    assert (dpo.name, dpo.starts_from, dpo.objective.name) == ("lora-dpo-r4", "sft", "dpo")
    assert dpo.method == sft.method
    assert dpo.trains


def test_a_start_is_the_arm_that_trains_for_it() -> None:
    arms = plan_arms(job(["lora", "lora+rag", DPO | {"starts_from": "lora+rag"}]))
    assert arms[2].starts_from == "lora"


def test_arms_that_differ_in_what_they_learn_share_no_training() -> None:
    rag = GRPO | {"starts_from": "lora", "rag": True}
    arms = plan_arms(job(["lora", "lora+rag", rag, GRPO | {"starts_from": "lora"}]))
    assert [arm.trained_by for arm in arms] == ["lora", "lora", "lora-grpo", "lora-grpo"]


def test_the_job_of_an_arm_has_its_rows_objective_and_steps() -> None:
    given = DPO | {"steps": 7, "batch_rows": 3}
    (arm,) = plan_arms(job([given], train={"epochs": 2}))
    own = job_of_arm(job([given], train={"epochs": 2}), arm, seed=5)
    assert (own.objective_spec.name, own.train.steps, own.train.batch_rows) == ("dpo", 7, 3)
    assert (own.data.train, own.data.max_tokens, own.data.split.test) == ("pairs.jsonl", 99, 0.0)
    assert own.train.seed == 5


def test_an_arm_that_counts_epochs_does_so_in_a_job_that_counts_steps() -> None:
    given = DPO | {"epochs": 2.0}
    (arm,) = plan_arms(job([given], train={"steps": 100}))
    own = job_of_arm(job([given], train={"steps": 100}), arm, seed=0)
    assert (own.train.steps, own.train.epochs) == (None, 2.0)


@pytest.mark.parametrize(
    ("arms", "finding"),
    [
        ([DPO | {"starts_from": "sft"}], "'sft' is no arm before this one"),
        ([DPO | {"starts_from": "lora"}, "lora"], "'lora' is no arm before this one"),
        (["rag", DPO | {"starts_from": "rag"}], "'rag' does not train"),
        (["lora", DPO | {"starts_from": "lora", "method": "full"}], "differs from that of lora"),
        ([{"method": "lora", "objective": "kto"}], "kto without rows of its own"),
        ([DPO | {"objective": "reward"}], "is reward"),
        ([{"method": "rag", "objective": "dpo"}], "rag has objective"),
        ([DPO | {"framework": "trl"}], "is given, and the framework is trl"),
    ],
)
def test_arms_that_cannot_be_are_refused(arms: list[Any], finding: str) -> None:
    with pytest.raises(JobError) as caught:
        plan_arms(job(arms))
    assert finding in str(caught.value)


@pytest.mark.parametrize(
    ("more", "finding"),
    [
        ({"objective": "dpo"}, "is dpo"),
        ({"compare": {"metric": "reward"}}, "is reward, and evaluate.rewards names nothing"),
        ({"compare": {"metric": "preference_accuracy"}}, "evaluate.preferences names nothing"),
    ],
)
def test_what_cannot_be_judged_is_refused(more: dict[str, Any], finding: str) -> None:
    given = job_from({"model": "m", "data": {"train": "d"}, **more})
    with pytest.raises(JobError) as caught:
        check_comparison(given)
    assert finding in str(caught.value)

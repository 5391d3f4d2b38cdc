"""Arms from names and mappings, shared trainings, learning-rate trials."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.comparing.plan import (
    ChosenRate,
    choose_rate,
    order_trainings,
    plan_arms,
    plan_trials,
    share_references,
)
from tunesmith.core.errors import JobError
from tunesmith.job.load import job_from
from tunesmith.job.spec import Job, LoraSpec, TuneSpec


def job(arms: list[Any], **more: Any) -> Job:
    compare = {"arms": arms, "seeds": more.pop("seeds", [0, 1, 2]), "tune": more.pop("tune", {})}
    return job_from({"model": "m", "data": {"train": "d"}, "compare": compare, **more})


def test_names_expand_in_order_with_their_kinds() -> None:
    arms = plan_arms(job(["zero-shot", "few-shot", "rag", "lora", "qlora", "full"]))
    assert [(arm.name, arm.kind, arm.prompting) for arm in arms] == [
        ("zero-shot", "prompted", "zero-shot"),
        ("few-shot", "prompted", "few-shot"),
        ("rag", "prompted", "rag"),
        ("lora", "trained", "zero-shot"),
        ("qlora", "trained", "zero-shot"),
        ("full", "trained", "zero-shot"),
    ]


def test_arms_that_no_seed_changes_are_scored_once() -> None:
    arms = {arm.name: arm for arm in plan_arms(job(["zero-shot", "few-shot", "rag", "lora"]))}
    assert arms["zero-shot"].seeds == arms["rag"].seeds == (0,)
    assert arms["few-shot"].seeds == arms["lora"].seeds == (0, 1, 2)


def test_sampled_answers_depend_on_the_seed() -> None:
    arms = plan_arms(job(["zero-shot"], evaluate={"sampling": {"temperature": 0.7}}))
    assert arms[0].seeds == (0, 1, 2)
    assert not arms[0].deterministic


def test_retrieval_shares_the_training_of_the_same_settings() -> None:
    arms = {arm.name: arm for arm in plan_arms(job(["lora+rag", "lora", "full"]))}
    assert arms["lora+rag"].trained_by == "lora"
    assert not arms["lora+rag"].trains
    assert arms["lora"].trains
    assert arms["full"].trained_by == "full"


def test_retrieval_alone_trains_itself() -> None:
    (arm,) = plan_arms(job(["lora+rag"]))
    assert arm.trains


def test_other_settings_are_another_training() -> None:
    other = {"method": {"name": "lora", "rank": 8}, "rag": True}
    arms = plan_arms(job(["lora", other]))
    assert arms[1].name == "lora-r8+rag"
    assert arms[1].trained_by == "lora-r8+rag"


def test_equal_arms_with_names_both_train() -> None:
    arms = plan_arms(job([{"name": "a", "method": "lora"}, {"name": "b", "method": "lora"}]))
    assert [arm.trains for arm in arms] == [True, True]


def test_a_named_method_takes_the_jobs_adapter_settings() -> None:
    arms = plan_arms(job(["lora", "qlora"], method={"name": "lora", "rank": 64}))
    for arm in arms:
        assert isinstance(arm.method, LoraSpec)
        assert arm.method.rank == 64
    assert isinstance(arms[1].method, LoraSpec)
    assert arms[1].method.storage == "nf4"


def test_mappings_are_named_after_what_differs() -> None:
    arms = plan_arms(
        job(
            [
                "lora",
                {
                    "method": {"name": "lora", "rank": 64, "base": "int8"},
                    "learning_rate": 3e-4,
                    "epochs": 1.0,
                },
            ]
        )
    )
    assert arms[1].name == "lora-r64-int8-lr0.0003-e1"
    assert arms[1].learning_rate == 3e-4


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("loar", "lora"), ("zeroshot", "zero-shot"), ("few_shot", "few-shot"), ("lora+rga", "lora+rag")],
)
def test_an_unknown_arm_is_refused_with_the_nearest_name(wrong: str, meant: str) -> None:
    with pytest.raises(JobError) as caught:
        plan_arms(job(["zero-shot", wrong]))
    assert str(caught.value).startswith(f"job: compare.arms.1: unknown arm {wrong!r}")
    assert str(caught.value).endswith(f"Did you mean {meant!r}?")


@pytest.mark.parametrize(
    ("arms", "finding"),
    [
        (["lora", "lora"], "second arm called 'lora'"),
        ([{"name": "../x", "method": "lora"}], "name '../x'"),
        ([{"name": "A", "method": "lora"}, {"name": "a", "method": "full"}], "second arm called 'a'"),
        ([{"method": "rag", "learning_rate": 1e-3}], "rag has learning_rate"),
        ([{"method": "few-shot", "rag": True}], "few-shot with"),
    ],
)
def test_arms_that_cannot_be_are_refused(arms: list[Any], finding: str) -> None:
    with pytest.raises(JobError) as caught:
        plan_arms(job(arms))
    assert finding in str(caught.value)


def test_a_repeated_seed_is_refused() -> None:
    with pytest.raises(JobError, match="seed 1 appears twice"):
        plan_arms(job(["lora"], seeds=[0, 1, 1]))


def test_trials_surround_the_prior() -> None:
    assert plan_trials(1e-3, TuneSpec(trials=5)) == pytest.approx([2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3])
    assert plan_trials(1e-3, TuneSpec(trials=4, factor=3.0)) == pytest.approx(
        [1e-3 / 9, 1e-3 / 3, 1e-3, 3e-3]
    )
    assert plan_trials(1e-3, TuneSpec(trials=0)) == []


def test_the_lowest_validation_loss_wins_and_an_edge_is_flagged() -> None:
    rates = [1e-4, 2e-4, 4e-4]
    assert choose_rate(rates, [1.2, 1.0, 1.1]) == ChosenRate(2e-4, 1, at_edge=False)
    assert choose_rate(rates, [0.9, 1.0, 1.1]) == ChosenRate(1e-4, 0, at_edge=True)
    assert choose_rate(rates, [1.2, 1.1, float("nan")]) == ChosenRate(2e-4, 1, at_edge=False)
    assert choose_rate([4e-4, 1e-4], [None, 1.0]) == ChosenRate(1e-4, 0, at_edge=True)
    assert not choose_rate([1e-4], [1.0]).at_edge


def test_trials_that_all_diverge_choose_nothing() -> None:
    with pytest.raises(ValueError, match="every learning-rate trial diverged"):
        choose_rate([1e-4, 2e-4], [None, float("inf")])


def test_arms_that_need_rows_at_hand_are_refused_for_a_stream() -> None:
    data = {"train": "train.jsonl", "streaming": True}
    for arm, cure in (
        ("few-shot", "read train without"),
        ("rag", r"evaluate\.documents"),
        ("lora+rag", "documents"),
    ):
        job = Job.model_validate({"model": "m", "data": data, "compare": {"arms": ["zero-shot", arm]}})
        with pytest.raises(JobError, match=rf"compare\.arms\[1\]: .*data\.streaming is on.*{cure}"):
            plan_arms(job)
    values = {"model": "m", "data": data, "evaluate": {"documents": "docs"}}
    job = Job.model_validate(values | {"compare": {"arms": ["zero-shot", "rag", "lora"]}})
    assert [arm.name for arm in plan_arms(job)] == ["zero-shot", "rag", "lora"]


def test_new_tokens_are_those_of_every_arm_or_refused() -> None:
    method = {"name": "lora", "new_tokens": ["<ticket>"]}

    def plan(*arms: object, method: object = method) -> list[str]:
        values = {
            "model": "m",
            "data": {"train": "train.jsonl"},
            "method": method,
            "compare": {"arms": list(arms)},
        }
        return [arm.name for arm in plan_arms(Job.model_validate(values))]

    assert plan("lora", "qlora", "lora+rag") == ["lora", "qlora", "lora+rag"]
    for arm, finding in (("zero-shot", "answers with the base"), ("full", "trains no new embedding")):
        with pytest.raises(JobError, match=rf"compare\.arms\[1\]: {arm} {finding}.*'<ticket>'.*Compare lora"):
            plan("lora", arm)
    with pytest.raises(
        JobError, match=r"new_tokens \['<done>'\], the job's method \[\].*Give method\.new_tokens once"
    ):
        plan({"method": {"name": "lora", "new_tokens": ["<done>"]}}, method="lora")


def test_an_arm_that_the_jobs_optimizer_cannot_train_is_refused() -> None:
    muon = {"method": "full", "train": {"optimizer": "muon"}}
    assert len(plan_arms(job(["zero-shot", "full"], **muon))) == 2
    with pytest.raises(
        JobError, match=r"compare\.arms\[1\]: train\.optimizer is muon, and the method is lora"
    ):
        plan_arms(job(["full", "lora"], **muon))


def test_a_quantised_arm_shares_the_training_of_the_same_arm_without() -> None:
    listed = [
        {"method": "lora", "quantize": "int4"},
        "lora",
        {"method": "zero-shot", "quantize": "int8"},
        {"method": {"name": "lora", "qat": "int4"}},
        {"method": "lora", "quantize": {"scheme": "int4", "group_size": 128}, "rag": True},
    ]
    arms = plan_arms(job(listed))
    assert [(arm.name, arm.trained_by, arm.quantize and arm.quantize.label) for arm in arms] == [
        ("lora-int4", "lora", "int4"),
        ("lora", "lora", None),
        ("zero-shot-int8", None, "int8"),
        ("lora-qat-int4", "lora-qat-int4", "int4"),
        ("lora-int4-g128+rag", "lora", "int4-g128"),
    ]
    assert arms[2].seeds == (0,)


def test_quantised_arms_alone_share_one_training_and_equal_ones_do_not() -> None:
    arms = plan_arms(job([{"method": "lora", "quantize": "int4"}, {"method": "lora", "quantize": "int8"}]))
    assert [arm.trained_by for arm in arms] == ["lora-int4", "lora-int4"]
    twice = [{"name": name, "method": "lora", "quantize": "int4"} for name in ("a", "b")]
    assert [arm.trained_by for arm in plan_arms(job(twice))] == ["a", "b"]


def test_a_default_group_written_out_is_the_default() -> None:
    qat = {"name": "lora", "qat": {"scheme": "int4", "group_size": 32}}
    (arm,) = plan_arms(job([{"method": qat, "quantize": "int4"}]))
    assert arm.name == "lora-qat-int4"
    assert arm.trains


def test_a_method_by_name_keeps_qat_only_where_it_can_be() -> None:
    arms = plan_arms(job(["full", "lora"], method={"name": "full", "qat": "int4"}))
    assert [arm.name for arm in arms] == ["full-qat-int4", "lora"]
    arms = plan_arms(job(["lora", "qlora"], method={"name": "lora", "qat": "int8-int4"}))
    assert [arm.name for arm in arms] == ["lora-qat-int8-int4", "qlora"]


@pytest.mark.parametrize(
    ("arm", "finding"),
    [
        (
            {"method": {"name": "lora", "qat": "int4"}, "quantize": "int8"},
            "quantize is int8, and qat is int4",
        ),
        (
            {"name": "zero-shot", "method": "zero-shot", "quantize": "int8"},
            "a quantised arm called 'zero-shot'",
        ),
    ],
)
def test_quantised_arms_that_would_mislead_are_refused(arm: Any, finding: str) -> None:
    with pytest.raises(JobError, match=rf"^compare\.arms\[0\]: {finding}"):
        plan_arms(job([arm]))


def test_every_seed_is_a_round_whose_order_is_drawn_from_it() -> None:
    names = [f"arm{number}" for number in range(6)]
    arms = plan_arms(job([{"method": "lora", "name": name, "epochs": i + 1} for i, name in enumerate(names)]))
    order = [(arm.name, seed) for arm, seed in order_trainings(arms)]

    rounds = [[name for name, seed in order if seed == wanted] for wanted in (0, 1, 2)]
    assert [seed for _, seed in order] == [0] * 6 + [1] * 6 + [2] * 6
    assert all(sorted(each) == names for each in rounds)
    assert len(set(map(tuple, rounds))) == 3
    assert names not in rounds


def test_an_arm_keeps_its_place_when_others_join_and_only_trainings_have_one() -> None:
    few = ["lora", "full", "zero-shot"]
    wide = [*few, "rag", "lora+rag", {"method": "lora", "framework": "trl"}]
    orders = [
        [(arm.name, seed) for arm, seed in order_trainings(plan_arms(job(arms)))] for arms in (few, wide)
    ]
    assert sorted({name for name, _ in orders[1]}) == ["full", "lora", "lora-trl"]
    assert [place for place in orders[1] if place in orders[0]] == orders[0]


def test_frameworks_that_train_alike_share_the_run_that_they_are_held_against() -> None:
    trl = {"name": "a", "method": "lora", "framework": "trl"}
    unsloth = {"name": "b", "method": "lora", "framework": "unsloth"}
    slower = {"name": "c", "method": "lora", "framework": "trl", "learning_rate": 1e-5}
    full = {"name": "d", "method": "full", "framework": "trl"}
    given = job(["lora", trl, unsloth, slower, full])
    assert share_references(given, plan_arms(given)) == {"a": "a", "b": "a", "c": "c", "d": "d"}
    searched = job(["lora", trl, unsloth], tune={"trials": 3})
    assert share_references(searched, plan_arms(searched)) == {"a": "a", "b": "b"}

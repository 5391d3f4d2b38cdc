"""The gates' arithmetic on records written by hand, and what a failed gate does to a comparison."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunesmith.comparing.noise import NoiseFloor, measure_noise
from tunesmith.comparing.parity import judge_parity
from tunesmith.comparing.result import compare_run
from tunesmith.comparing.token_gate import hold_trainings
from tunesmith.comparing.warnings import list_warnings
from tunesmith.core.comparison import Comparison, Gate, Parity
from tunesmith.core.errors import ArmFailed, DataError
from tunesmith.core.parity import Example, Parameter, ParameterGroup, ParityRecord, ParityStep
from tunesmith.core.rundir import RunDir
from tunesmith.job.spec import Job

Written = tuple[RunDir, Job, Comparison]
QUIET = NoiseFloor(2, 0.0, 0.0, (0.0,) * 4, 0.0)


def write_record(
    losses: tuple[float, ...] = (2.0, 1.9, 1.8, 1.7),
    *,
    grad_norms: tuple[float, ...] = (0.5, 0.5, 0.5, 3.0),
    groups: tuple[ParameterGroup, ...] = (ParameterGroup("adamw", ("a", "b"), 0.0, 0.9, 0.999, 1e-8),),
    rates: tuple[float, ...] = (1e-3,),
) -> ParityRecord:
    """Four steps of two rows; gradients are clipped to 1."""
    steps = tuple(
        ParityStep((Example(f"{i}x", 5, 2), Example(f"{i}y", 7, 3)), loss, norm, rates, 1.0, min(norm, 1.0))
        for i, (loss, norm) in enumerate(zip(losses, grad_norms, strict=True))
    )
    parameters = (
        Parameter("a", (8, 100), "float32", 0.1),
        Parameter("b", (100, 8), "float32", 0.0),
    )
    return ParityRecord("x", {"x": "1.0"}, "float32", steps, parameters, groups, ("float32",), {})


def find(parity: Parity, name: str) -> Gate:
    return next(gate for gate in parity.gates if gate.name == name)


def judge(theirs: ParityRecord, noise: NoiseFloor = QUIET) -> Parity:
    return judge_parity(write_record(), theirs, noise)


def test_a_record_is_at_par_with_itself() -> None:
    parity = judge(write_record())
    assert [gate.word for gate in parity.gates] == ["PASS"] * 6
    assert parity.failed == parity.unverified == []


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_is_the_largest_deviation_between_any_two() -> None:
    # Losses of step 1: 2.00, 2.02, 1.98: the last two differ by 2%, of the one that came first. The curve never falls.
    records = [
        write_record((2.0, 2.0, 2.0, 1.0)),
        write_record((2.02, 2.0, 2.0, 1.03)),
        write_record((1.98, 2.0, 2.0, 1.0)),
    ]
    noise = measure_noise(records)
    assert noise.num_records == 3
    assert noise.loss == pytest.approx(0.04 / 2.02)
    assert noise.grad_norm == 0
    assert noise.curve == pytest.approx((0.04 / 2.02, 0.04 / 2.02, 0.04 / 2.02, 0.03))
    assert noise.shift == pytest.approx((7.05 - 6.98) / 7.05)


def test_what_agrees_by_chance_in_the_first_step_is_no_proof_of_silence() -> None:
    loud = measure_noise([write_record(), write_record((2.0, 1.9, 1.8 * 1.001, 1.7))])
    assert loud.loss == pytest.approx(0.001)
    assert loud.curve is not None
    assert loud.curve[0] == loud.loss


def test_noise_needs_two_records_of_one_job() -> None:
    alone = measure_noise([write_record()])
    assert (alone.loss, alone.curve) == (None, None)
    other = write_record()
    moved = replace(other, steps=(other.steps[1], other.steps[0], *other.steps[2:]))
    with pytest.raises(ValueError, match="not regroupings"):
        measure_noise([other, moved])
    with pytest.raises(ValueError, match="not regroupings"):
        measure_noise([other, replace(other, steps=other.steps[:3])])


def test_rows_may_come_in_any_order_within_a_step() -> None:
    ours = write_record()
    turned = replace(ours, steps=tuple(replace(s, examples=(s.examples or ())[::-1]) for s in ours.steps))
    assert measure_noise([ours, turned]).loss == 0
    assert find(judge(turned), "tokens").word == "PASS"


def test_noise_that_was_not_seen_leaves_gates_unverified() -> None:
    hidden = replace(
        write_record(), steps=tuple(replace(s, loss=None, grad_norm=None) for s in write_record().steps)
    )
    noise = measure_noise([write_record(), hidden])
    assert noise == NoiseFloor(2, None, None, None, None)
    assert judge(write_record(), noise).unverified == ["loss", "gradient", "curve"]


def test_rows_that_are_right_are_not_counted_among_the_wrong() -> None:
    # The second row of step 3 lost its last token and label, and is now shorter than the first.
    ours = write_record()
    first, _ = ours.steps[2].examples or ()
    steps = (*ours.steps[:2], replace(ours.steps[2], examples=(first, Example("z", 4, 2))), ours.steps[3])
    gate = find(judge(replace(ours, steps=steps)), "tokens")
    assert gate.figure == 1
    assert gate.says == (
        "x: it trained 1 fewer tokens in the first 4 steps; in step 3, 1 of 2 rows are shorter than ours: truncated?"
    )


def test_the_tolerance_is_three_times_the_noise_and_a_millionth_at_least() -> None:
    noise = NoiseFloor(5, 1e-4, 1e-4, (1e-4,) * 4, 1e-4)
    above, below = (write_record((2.0 * (1 + d), 1.9, 1.8, 1.7)) for d in (3.1e-4, 2.9e-4))
    assert find(judge(above, noise), "loss").word == "FAIL"
    assert find(judge(below, noise), "loss").word == "PASS"
    assert find(judge(below, noise), "loss").tolerance == pytest.approx(3e-4)
    barely, hardly = (write_record((2.0 * (1 + d), 1.9, 1.8, 1.7)) for d in (1.1e-6, 0.9e-6))
    assert find(judge(barely), "loss").word == "FAIL"
    assert find(judge(hardly), "loss").word == "PASS"


@pytest.mark.parametrize(
    ("noise", "gates"),
    [
        (NoiseFloor(5, 0.002, 0.0, (0.0,) * 4, 0.0), ["loss"]),
        (NoiseFloor(5, 0.0, 0.02, (0.0,) * 4, 0.0), ["gradient"]),
        (NoiseFloor(5, 0.0, 0.0, (0.0, 0.0, 0.0, 0.01), 0.0), ["curve"]),
        (NoiseFloor(5, 0.0, 0.0, (0.0,) * 4, 0.002), ["curve"]),
    ],
)
def test_a_gate_that_noise_has_blinded_does_not_pass(noise: NoiseFloor, gates: list[str]) -> None:
    parity = judge(write_record(), noise)
    assert parity.unverified == gates
    assert "noise hides differences up to" in find(parity, gates[0]).says


def test_a_small_constant_shift_is_seen_below_the_noise_of_single_steps() -> None:
    # 20 steps that scatter by 1% hide 0.9% in each, and not in their mean.
    noise = NoiseFloor(5, 0.001, 0.0, (0.006,) * 4, 0.0005)
    theirs = write_record((2.0, 1.9 * 1.016, 1.8 * 1.016, 1.7 * 1.016))
    gate = find(judge(theirs, noise), "curve")
    assert gate.word == "FAIL"
    assert "losses drift from ours" in gate.says


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_fails(loss: float) -> None:
    assert {"loss", "curve"} <= set(judge(write_record((loss, 1.9, 1.8, 1.7))).failed)


# --- settings that differ in form only --------------------------------------------------------------------------------


def test_groups_count_by_what_they_do() -> None:
    split = (
        ParameterGroup("adamw", ("b",), 0.0, 0.9, 0.999, 1e-8),
        ParameterGroup("adamw", ("a",), 0.0, 0.9, 0.999, 1e-8),
        ParameterGroup("adamw", (), 0.1, 0.5, 0.9, 1e-6),
    )
    assert judge(write_record(groups=split, rates=(1e-3, 1e-3, 1e-3))).failed == []
    # Rates by group: the third group is empty, so its rate counts for nothing; the second's does.
    assert judge(write_record(groups=split, rates=(1e-3, 1e-3, 5.0))).failed == []
    assert judge(write_record(groups=split, rates=(1e-3, 2e-3, 1e-3))).failed == ["optimizer"]


def test_adam_is_adamw_where_nothing_decays() -> None:
    plain = ParameterGroup("adam", ("a", "b"), 0.0, 0.9, 0.999, 1e-8)
    assert judge(write_record(groups=(plain,))).failed == []
    assert judge(write_record(groups=(replace(plain, weight_decay=0.01),))).failed == ["optimizer"]


def test_a_trained_tensor_without_an_optimizer_fails() -> None:
    gate = find(judge(write_record(groups=(replace(write_record().groups[0], names=("a",)),))), "optimizer")
    assert gate.word == "FAIL"
    assert "1 trained tensors are in no optimizer group (b)" in gate.says


def test_several_rates_without_groups_are_unverified() -> None:
    theirs = replace(write_record(rates=(1e-3, 2e-3)), groups=None)
    assert judge(theirs).unverified == ["optimizer"]


def test_spread_of_drawn_values_may_vary_as_draws_do() -> None:
    # 800 values: two draws differ by 3.5% once in three times, by 18% never.
    def drawn(std: float) -> ParityRecord:
        first, second = write_record().parameters or ()
        return replace(write_record(), parameters=(replace(first, std=std), second))

    assert judge(drawn(0.104)).failed == []
    assert judge(drawn(0.12)).failed == ["parameters"]


# --- in a comparison --------------------------------------------------------------------------------------------------


def made_up(word: str) -> Parity:
    gates = [gate for gate in judge(write_record()).gates if gate.name != "tokens"]
    told = Gate("tokens", word, 8.0, 0.0, "rows", "x: it trained 812 more tokens in the first 20 steps")
    return Parity("x", {"x": "1.0"}, [told, *gates])


@pytest.fixture
def copied(example: Written, tmp_path: Path) -> tuple[RunDir, Job]:
    shutil.copytree(example[0].root, tmp_path / "copy")
    return RunDir(tmp_path / "copy"), example[1]


def test_an_arm_that_fails_a_gate_is_shown_and_not_ranked(
    copied: tuple[RunDir, Job], example: Written
) -> None:
    comparison = compare_run(*copied, parity={"lora": made_up("FAIL")})
    lora, before = comparison.find_arm("lora"), example[2].find_arm("lora")
    assert lora.not_comparable == "parity failed: tokens"
    assert lora.versus_base is None
    assert lora.differences == {}
    assert lora.metrics["exact_match"].value == pytest.approx(before.metrics["exact_match"].value)
    # What was trained by it did other work as well.
    assert comparison.find_arm("lora+rag").not_comparable == "parity failed: tokens"
    assert not [
        pair for pair in comparison.pairs if pair.arm.startswith("lora") or pair.other.startswith("lora")
    ]
    assert "lora: did other work: x: it trained 812 more tokens in the first 20 steps" in comparison.warnings
    row = comparison.table.rows[[arm.name for arm in comparison.arms].index("lora")]
    assert any(cell.text == "not comparable" and cell.detail == "parity failed: tokens" for cell in row)
    assert comparison.public_json()["arms"][3]["parity"]["tokens"] == "FAIL"


def test_the_other_arms_figures_do_not_change_when_one_is_blocked(copied: tuple[RunDir, Job]) -> None:
    blocked = compare_run(*copied, parity={"qlora": made_up("FAIL")})
    shutil.rmtree(copied[0].root / "arms" / "qlora")
    absent = compare_run(*copied, parity={})
    for name in ("zero-shot", "rag", "lora", "full"):
        assert blocked.find_arm(name).metrics == absent.find_arm(name).metrics
    assert blocked.pairs == absent.pairs


@pytest.mark.parametrize("word", ["PASS", "UNVERIFIED"])
def test_without_a_failure_an_arm_is_ranked(copied: tuple[RunDir, Job], example: Written, word: str) -> None:
    comparison = compare_run(*copied, parity={"lora": made_up(word)})
    assert comparison.pairs == example[2].pairs
    doubt = "lora: parity is unverified: tokens"
    assert (doubt in comparison.warnings) == (word == "UNVERIFIED")


def test_judging_again_from_files_keeps_what_was_found(copied: tuple[RunDir, Job]) -> None:
    first = compare_run(*copied, parity={"lora": made_up("FAIL")})
    assert compare_run(*copied) == first
    assert compare_run(*copied, parity={}).find_arm("lora").versus_base == "better"


def test_a_damaged_parity_file_is_refused(copied: tuple[RunDir, Job]) -> None:
    copied[0].gates.write_text('{"schema": 1, "arms": {"lora": {"framework": "x"}}}')
    with pytest.raises(DataError, match="gates"):
        compare_run(*copied)
    copied[0].gates.write_text('{"schema": 2, "arms": {}}')
    with pytest.raises(DataError, match="schema"):
        compare_run(*copied)


def test_a_foreign_arm_that_nobody_looked_at_is_pointed_out(
    example: Written,
) -> None:
    arms = [replace(arm, framework="trl") if arm.name == "lora" else arm for arm in example[2].arms]
    comparison = replace(example[2], arms=arms)
    expected = "lora: nobody looked whether trl does the work of the other arms"
    assert expected in list_warnings(comparison, [], {})
    looked_at = replace(comparison, parity={"lora": made_up("PASS")})
    assert expected not in list_warnings(looked_at, [], {})


def test_when_every_arm_did_other_work_the_reason_is_told(
    tmp_path: Path, write_example: Callable[..., Any]
) -> None:
    run_dir, job = write_example(tmp_path, num_rows=60, num_clusters=30, arms=["lora"])
    with pytest.raises(ArmFailed, match="parity failed: tokens"):
        compare_run(run_dir, job, parity={"lora": made_up("FAIL")})


# --- the trainings themselves -----------------------------------------------------------------------------------------


def test_target_tokens_of_every_step_and_seed_are_held_against_the_jobs() -> None:
    gate = find(judge(write_record()), "tokens")
    wanted = {0: [5, 7, 5], 1: [7, 5, 5]}

    right = hold_trainings(gate, "x", wanted, wanted)
    assert right.word == "PASS"
    assert right.says == f"{gate.says}; as many target tokens in all 6 steps of 2 trainings"

    other_order = hold_trainings(gate, "x", wanted, {0: [5, 7, 5], 1: [5, 7, 5]})
    assert (other_order.word, other_order.figure, other_order.unit) == ("FAIL", 2, "steps")
    assert other_order.says == (
        "x: with seed 1, step 1 trained 5 tokens, its rows have 7 (and so in 1 more steps)"
    )


def test_what_failed_before_says_what_it_said() -> None:
    failed = Gate("tokens", "FAIL", 3, 0, "rows", "x trained 3 more tokens")
    assert hold_trainings(failed, "x", {0: [5]}, {0: [4]}) == failed


@pytest.mark.parametrize("extreme", [-1, 0, 2**62, 1e308, -1e308, 5e-324])
def test_no_number_in_a_record_makes_the_judge_stumble(extreme: float) -> None:
    honest = json.loads(json.dumps(write_record().to_json()))
    places = list(list_numbers(honest))
    assert len(places) > 40
    for path in places:
        changed = json.loads(json.dumps(honest))
        *way, last = path
        item = changed
        for key in way:
            item = item[key]
        item[last] = type(item[last])(extreme)
        with contextlib.suppress(DataError):
            parity = judge(ParityRecord.from_json(changed))
            assert len(parity.gates) == 6


def list_numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the numbers are in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if type(item) in (int, float):
            yield (*path, key)
        else:
            yield from list_numbers(item, (*path, key))

"""Every planted fault is caught by the gates named for it; what is only done differently raises no alarm.

The training is real (tests/frameworks/cheating_framework.py): twenty steps of a random model with adapters, in a fifth
of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cheating_framework import Ways, forge, train
from faults import BASE_FAULTS, BENIGN, FAULTS, HIDDEN, Fault, store_as

from tunesmith.comparing.noise import NoiseFloor, measure_noise
from tunesmith.comparing.parity import GATES, judge_parity
from tunesmith.core.comparison import Parity
from tunesmith.core.parity import ParityRecord

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]
Honest = tuple[ParityRecord, NoiseFloor]


def do_honestly(*, bf16: bool, **job: Any) -> Honest:
    """Our record, and the noise between honest ways of doing the job. A job in 16 bits also runs with products in 32
    and with another attention: what the precision itself costs does not show between regroupings of one kernel."""
    ours = train(Ways(autocast=bf16, **job))
    others: list[dict[str, Any]] = [
        {"micro_rows": 1, "left": True, "multiple": 64},
        {"micro_rows": 8},
        {"micro_rows": 8, "packed": True},
        {"attention": "eager"},
    ]
    records = [ours, *(train(Ways(autocast=bf16, **job, **ways)) for ways in others)]
    if bf16:
        records.append(train(Ways(autocast=False, **job)))
    return ours, measure_noise(records)


@pytest.fixture(scope="module")
def honest() -> Honest:
    return do_honestly(bf16=False)


@pytest.fixture(scope="module")
def honest_bf16() -> Honest:
    return do_honestly(bf16=True)


@pytest.fixture(scope="module")
def honest_nf4() -> Honest:
    return do_honestly(bf16=False, store=store_as())


@pytest.fixture(scope="module")
def honest_nf4_bf16() -> Honest:
    return do_honestly(bf16=True, store=store_as())


def judge(honest: Honest, ways: dict[str, Any], *, bf16: bool = False) -> Parity:
    ours, noise = honest
    return judge_parity(ours, train(Ways(**{"autocast": bf16, **ways})), noise)


def catch(fault: Fault, honest: Honest, *, bf16: bool = False) -> Parity:
    ours, noise = honest
    theirs = train(Ways(**{"autocast": bf16, **fault.ways}))
    return judge_parity(ours, forge(theirs, ours, fault.lies.split()), noise)


def list_verdicts(parity: Parity) -> str:
    return "\n".join(f"{g.name}: {g.word} {g.figure} of {g.tolerance}: {g.says}" for g in parity.gates)


WORDS = {
    "padding is in the loss": "labels on padding carry loss",
    "mask begins one token early": "156 more tokens in the first 20 steps; in step 1, 8 of 8 rows have 1 label more",
    "mask is shifted as a whole": "as many tokens and labels as ours, but not the same",
    "BOS twice": "one token more that is not trained: a second BOS?",
    "EOS is missing": "lack a token that ours trains: the EOS?",
    "prompt is in the loss": "labels of 8 of 8 rows include the prompt",
    "long rows are truncated": "rows are shorter than ours: truncated?",
    "trains on the test rows": "in step 1, 8 of 8 rows are not ours",
    "order is shuffled": "the order of rows differs from step 1 on: the same rows, in other steps",
    "two rows are in each other's step": "the order of rows differs from step 9 on",
    "last batch is dropped": "made 19 optimizer steps, ours 20",
    "a batch is repeated": "from step 6 on, 8 rows come again and 4 of ours are missing",
    "attention targets only": "does not train model.layers.0.self_attn.k_proj.lora_A.weight and 19 more",
    "norms are trained": "also trains model.layers.0.input_layernorm.weight",
    "other rank": "28 tensors of another shape (model.layers.0.self_attn.q_proj.lora_A.weight is [4, 32], ours",
    "adapters are bfloat16": "28 tensors in bfloat16, ours float32",
    "products are in bfloat16": "products are computed in bfloat16, ours in float32",
    "loss grows with accumulation": "summed over micro-batches?",
    "alpha is doubled": "is 2.00 times ours: alpha / rank?",
    "scale is rsLoRA's": "is 2.83 times ours: rsLoRA's scale, alpha / sqrt(rank)?",
    "lies about its rows in one step": "loss leaves ours at step 13, by up to",
    "weight decay": "weight decay is 0.1, ours 0",
    "learning rate is 10% higher": "is 0.0009167, ours 0.0008333, 1.1 times ours as in 19 more steps",
    "B learns faster": "4 times ours",
    "no clipping": "gradients of step 1 are clipped not at all, ours at 0.5",
    "clips each parameter": "reach the optimizer with",
    "optimizer states are kept in bfloat16": "optimizer states are bfloat16, ours float32",
}
"""What the named gate says of some of them."""


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_by_its_gates_and_told_in_words(name: str, honest: Honest) -> None:
    fault = FAULTS[name]
    parity = catch(fault, honest)
    assert set(fault.gates.split()) <= set(parity.failed), list_verdicts(parity)
    said = [gate.says for gate in parity.gates if gate.name in fault.gates.split()]
    assert any(WORDS.get(name, "") in sentence for sentence in said), said


@pytest.mark.parametrize("name", BASE_FAULTS)
def test_a_base_that_is_stored_otherwise_is_caught(name: str, honest_nf4: Honest) -> None:
    fault = BASE_FAULTS[name]
    parity = catch(fault, honest_nf4)
    assert set(fault.gates.split()) <= set(parity.failed), list_verdicts(parity)
    if name == "scales are quantised, too":
        said = next(gate.says for gate in parity.gates if gate.name == "parameters")
        assert "of 14 frozen matrices have other values (model.layers." in said


@pytest.mark.parametrize("name", [name for name, fault in BASE_FAULTS.items() if "parameters" in fault.gates])
def test_nor_does_the_noise_of_bfloat16_hide_a_base(name: str, honest_nf4_bf16: Honest) -> None:
    """A first loss in bf16 does not tell whether scales are quantised; the base's own values do."""
    parity = catch(BASE_FAULTS[name], honest_nf4_bf16, bf16=True)
    assert "parameters" in parity.failed, list_verdicts(parity)


def test_the_same_base_in_nf4_raises_no_alarm(honest_nf4: Honest) -> None:
    parity = judge(honest_nf4, {"store": store_as(), "micro_rows": 3, "own_seed": 1})
    assert [gate.word for gate in parity.gates] == ["PASS"] * len(GATES), list_verdicts(parity)


def test_a_scale_in_a_hundred_that_a_gpu_rounds_otherwise_is_the_same_base(honest_nf4: Honest) -> None:
    ours, noise = honest_nf4
    base = ours.base or {}
    turned = {name: (values[0] * 1.01, *values[1:]) for name, values in base.items()}
    assert judge_parity(ours, replace(ours, base=turned), noise).failed == []


@pytest.mark.parametrize("name", BENIGN)
def test_another_way_to_do_the_same_raises_no_alarm(name: str, honest: Honest) -> None:
    parity = judge(honest, BENIGN[name])
    assert [gate.word for gate in parity.gates] == ["PASS"] * len(GATES), list_verdicts(parity)


# Where bfloat16 rounds otherwise than in our own run; the rest of the list takes half a minute.
ROUNDS_OTHERWISE = (
    "one row at a time",
    "left padding",
    "positions that begin at 100",
    "left padding to 64, one row at a time",
    "packed in pairs",
    "plain attention",
)
SLOWLY = [pytest.param(n, marks=pytest.mark.slow) for n in BENIGN if n not in ROUNDS_OTHERWISE]


@pytest.mark.parametrize("name", [*ROUNDS_OTHERWISE, *SLOWLY])
def test_nor_does_it_in_bfloat16(name: str, honest_bf16: Honest) -> None:
    parity = judge(honest_bf16, BENIGN[name], bf16=True)
    assert parity.failed == [], list_verdicts(parity)


IN_BF16 = (
    "prompt is in the loss",
    "mean of means",
    "packed rows see each other",
    "alpha is doubled",
    "adapters drop out",
    "other initial adapters",
    "last micro-batch alone counts, from step 8 on",
    "learning rate is 10% higher",
    "lies about its rows in one step",
    "lies about learning rates",
    "lies about warm-up",
)


@pytest.mark.parametrize("name", IN_BF16)
def test_the_noise_of_bfloat16_does_not_hide_a_fault(name: str, honest_bf16: Honest) -> None:
    fault = FAULTS[name]
    parity = catch(fault, honest_bf16, bf16=True)
    assert set(fault.gates.split()) <= set(parity.failed), list_verdicts(parity)


@pytest.mark.parametrize("name", HIDDEN)
def test_what_no_gate_can_see_is_known(name: str, honest: Honest) -> None:
    """If one of these is ever caught, docs/decisions/013 has to say so."""
    fault = HIDDEN[name]
    assert catch(fault, honest).failed == []


def test_faults_are_many_and_each_gate_is_needed() -> None:
    assert len(FAULTS) >= 30
    assert len(BENIGN) >= 20
    for gate in GATES:
        assert any(fault.gates == gate for fault in FAULTS.values()), gate


@pytest.mark.parametrize(
    ("hide", "gate"),
    [
        (lambda r: replace(r, steps=tuple(replace(s, examples=None) for s in r.steps)), "tokens"),
        (lambda r: replace(r, steps=(replace(r.steps[0], examples=None), *r.steps[1:])), "tokens"),
        (lambda r: replace(r, parameters=None), "parameters"),
        (lambda r: replace(r, parameters=tuple(replace(p, std=None) for p in r.parameters)), "parameters"),
        (lambda r: replace(r, base=None), "parameters"),
        (lambda r: replace(r, steps=(replace(r.steps[0], loss=None), *r.steps[1:])), "loss"),
        (lambda r: replace(r, steps=(replace(r.steps[0], grad_norm=None), *r.steps[1:])), "gradient"),
        (lambda r: replace(r, steps=(*r.steps[:-1], replace(r.steps[-1], loss=None))), "curve"),
        (lambda r: replace(r, groups=None), "optimizer"),
        (lambda r: replace(r, state_dtypes=None), "optimizer"),
        (lambda r: replace(r, steps=(*r.steps[:-1], replace(r.steps[-1], learning_rates=None))), "optimizer"),
        (lambda r: replace(r, steps=(*r.steps[:-1], replace(r.steps[-1], clip_norm=None))), "optimizer"),
    ],
)
def test_what_was_not_seen_is_unverified_on_either_side(
    hide: Callable[[Any], Any], gate: str, honest: Honest
) -> None:
    ours, noise = honest
    assert gate in judge_parity(ours, hide(ours), noise).unverified
    assert gate in judge_parity(hide(ours), ours, noise).unverified


def test_clipping_that_was_asked_for_and_not_seen_done_is_unverified(honest: Honest) -> None:
    ours, noise = honest
    asked = replace(ours, steps=tuple(replace(step, applied_norm=None) for step in ours.steps))
    assert judge_parity(ours, asked, noise).unverified == ["optimizer"]


def test_a_fault_that_was_seen_fails_although_other_steps_were_not(honest: Honest) -> None:
    ours, noise = honest
    theirs = train(Ways(**FAULTS["trains on test rows in one step"].ways))
    hidden = replace(
        theirs,
        steps=(*theirs.steps[:3], replace(theirs.steps[3], examples=None, loss=None), *theirs.steps[4:]),
    )
    assert judge_parity(ours, hidden, noise).failed == ["tokens", "curve"]


def test_a_record_of_nothing_passes_no_gate(honest: Honest) -> None:
    ours, noise = honest
    empty = ParityRecord("x", {}, "float32", (), None, None, None)
    assert not any(gate.word == "PASS" for gate in judge_parity(ours, empty, noise).gates)
    cut = replace(ours, steps=ours.steps[:1])
    words = {gate.name: gate.word for gate in judge_parity(ours, cut, noise).gates}
    assert words["tokens"] == "FAIL"
    assert words["curve"] == "UNVERIFIED"
    assert words["optimizer"] != "PASS"

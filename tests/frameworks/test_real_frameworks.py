"""LLaMA-Factory, Axolotl and Unsloth for real: from the same rows and adapters they do what our own engine does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from framework_arms import TRAIN, compare_arms, read_gates, read_parity, read_steps

from tunesmith import api
from tunesmith.core.events import Event
from tunesmith.core.jsonl import read_json

pytestmark = [pytest.mark.frameworks, pytest.mark.slow, pytest.mark.timeout(600)]

HOME = Path(__file__).parents[2] / ".frameworks"
METHODS = ["lora", "full"]


def need(framework: str) -> None:
    if not (HOME / "frameworks" / framework / "environment.json").exists():
        pytest.skip(f"{framework} is not installed for tests; run: make test-frameworks")


@pytest.fixture(scope="module", params=["llamafactory", "axolotl", "unsloth"])
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(framework, folder). Axolotl takes each step in one forward pass: only so it has the job's loss."""
    need(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    arms = [
        {"method": method, "framework": name} for method in METHODS for name in ("tunesmith", request.param)
    ]
    budget = "auto" if request.param == "axolotl" else TRAIN["micro_batch_tokens"]
    return request.param, compare_arms(arms, folder, HOME, micro_batch_tokens=budget)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_steps_are_the_same(compared: tuple[str, Path], method: str) -> None:
    name, out = compared
    theirs, ours = read_parity(out, f"{method}-{name}")

    assert len(theirs.steps) == len(ours.steps) == 6
    assert [step.examples for step in theirs.steps] == [step.examples for step in ours.steps]
    for their, our in zip(theirs.steps, ours.steps, strict=True):
        assert their.loss == pytest.approx(our.loss, rel=1e-5)
        assert their.grad_norm == pytest.approx(our.grad_norm, rel=3e-5)
        assert their.learning_rates == pytest.approx(our.learning_rates, rel=1e-12)
        assert their.clip_norm == our.clip_norm == 0.3
    assert {(p.name, p.shape, p.dtype) for p in theirs.parameters or ()} == {
        (p.name, p.shape, p.dtype) for p in ours.parameters or ()
    }
    described: list[list[Any]] = [
        [(g.kind, sorted(g.names), g.weight_decay, g.beta1, g.beta2, g.epsilon) for g in record.groups or ()]
        for record in (theirs, ours)
    ]
    assert described[0] == described[1]
    assert theirs.state_dtypes == ours.state_dtypes == ("float32",)


@pytest.mark.parametrize("method", METHODS)
def test_every_gate_passes(compared: tuple[str, Path], method: str) -> None:
    name, out = compared
    assert read_gates(out, f"{method}-{name}") == ["PASS"] * 6


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_training_is_the_same_and_judged_alike(compared: tuple[str, Path], method: str) -> None:
    name, out = compared
    theirs, ours = read_steps(out, f"{method}-{name}"), read_steps(out, method)

    same = ("step", "epoch", "num_tokens", "num_target_tokens")
    assert [[row[key] for key in same] for row in theirs] == [[row[key] for key in same] for row in ours]
    assert [row["loss"] for row in theirs] == pytest.approx([row["loss"] for row in ours], rel=1e-5)
    arms = {arm["name"]: arm for arm in api.comparison_json(api.report(out), out)["arms"]}
    nlls = [arms[arm]["metrics"]["nll"]["value"] for arm in (f"{method}-{name}", method)]
    assert nlls[0] == pytest.approx(nlls[1], rel=1e-4)
    record = read_json(out / "arms" / f"{method}-{name}" / "seed-0" / "run.json")
    assert record["framework"] == name
    assert name in record["versions"]


def test_axolotl_averages_the_means_of_forward_passes_and_it_is_told(tmp_path: Path) -> None:
    need("axolotl")
    events: list[Event] = []
    arms = [{"method": "lora", "framework": "axolotl"}]
    out = compare_arms(arms, tmp_path, HOME, on_event=events.append, steps=2, evaluate_every="never")
    theirs, ours = read_parity(out, "lora-axolotl")

    assert any("averages the means of a step's 2 forward passes" in event.text for event in events)
    assert theirs.steps[0].examples == ours.steps[0].examples
    assert [gate.split(":")[0] for gate in read_gates(out, "lora-axolotl") if "FAIL" in gate]
    assert theirs.steps[0].loss != pytest.approx(ours.steps[0].loss, rel=1e-3)


def test_a_setting_that_a_framework_alters_is_a_failure_and_not_a_result(tmp_path: Path) -> None:
    need("axolotl")
    events: list[Event] = []
    arms = ["lora", {"method": "lora", "framework": "axolotl"}]
    out = compare_arms(arms, tmp_path, HOME, on_event=events.append, steps=3, evaluate_every="never")

    told = [event.text for event in events if event.kind == "failed"]
    assert any("axolotl failed, building: makes warmup_steps 2 of 1" in text for text in told)
    assert not (out / "arms" / "lora-axolotl" / "seed-0" / "run.json").exists()

"""PPO and GRPO through the public functions: a bandit whose optimum is known, exact resume, what a step begins with."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tunesmith
from tunesmith.api.evaluation import find_target, load_target
from tunesmith.core.errors import Interrupted, TrainingFailed
from tunesmith.core.events import Event
from tunesmith.core.jsonl import read_jsonl
from tunesmith.core.types import Message
from tunesmith.data.prepare import load_prepared
from tunesmith.data.render import Renderer
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.job.resolve import resolve_model
from tunesmith.job.spec import DataSpec, ModelSpec
from tunesmith.models.layout import make_layout
from tunesmith.models.load import load_model

QUESTIONS = [
    "Heads or tails?",
    "Which way shall we go from here?",
    "Is the old mill by the river still running?",
]
REWARDS = """
def winner(completion_ids, winner, **columns):
    return [float(ids[:1] == [wanted]) for ids, wanted in zip(completion_ids, winner)]

def same(completions, **columns):
    return [1.0 for _ in completions]
"""


def write_data(folder: Path) -> Path:
    """Prompts, each with the token that wins if it is an answer's first: the second likeliest of the base."""
    path = folder / "prompts.jsonl"
    base = resolve_model(ModelSpec(name="tunesmith/tiny")).folder
    model, renderer = load_model(base), Renderer(load_tokenizer(base), DataSpec(train="none"))
    rows = []
    for question in QUESTIONS:
        ids = renderer.render_prompt([Message("user", question)])
        winner = first_token(model, ids).argsort(descending=True)[1].item()
        rows.append({"prompt": [{"role": "user", "content": question}], "winner": winner})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    return path


def first_token(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Probabilities of an answer's first token, (V,)."""
    with torch.no_grad():
        logits = model.head(model.hidden(torch.tensor(ids), make_layout([len(ids)])))[-1]
    return logits.double().softmax(-1)


def job(folder: Path, objective: dict[str, Any], method: Any = "lora", **train: Any) -> dict[str, Any]:
    return {
        "model": "tunesmith/tiny",
        "data": {"train": str(write_data(folder)), "split": {"validation": 0.0, "test": 0.0}},
        "method": method,
        "objective": {"rewards": [f"{folder / 'rewards.py'}:winner"], "prompts": 3, **objective},
        "train": {"learning_rate": 2e-3, "precision": "fp32", "save_every": "never", **train},
    }


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [value for _, value in read_jsonl(folder / "steps.jsonl")]


def log_odds(share: float) -> float:
    return math.log(share / (1 - share))


def keep_odds(share: float) -> float:
    """Where reward + KL(policy, reference) is best at a price of 1: the arm's log odds have grown by 1."""
    return share * math.e / (share * math.e + 1 - share)


# GRPO's KL is a loss on sampled tokens, of which each weighs 1 - reference / policy. Its mean is the gradient of the KL
# *of the reference from the policy*, so that the optimum is another one: (1 - p) / (1 - P) - p / P = 1, or P = sqrt(p).
@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "optimum"),
    [
        ({"name": "grpo", "samples": 32, "beta": 1.0, "scale": "none"}, math.sqrt),
        ({"name": "ppo", "samples": 32, "kl_weight": 1.0, "passes": 2}, keep_odds),
    ],
    ids=["grpo", "ppo"],
)
def test_a_bandit_is_played_as_well_as_the_price_of_kl_allows(
    tmp_path: Path, objective: dict[str, Any], optimum: Callable[[float], float]
) -> None:
    train = {"steps": 60, "batch_rows": 96, "schedule": "linear"}
    tunesmith.train(job(tmp_path, {"max_new_tokens": 1, **objective}, **train), out=tmp_path / "run")
    found = find_target(str(tmp_path / "run"))
    base, tuned = load_model(found.model_folder), load_target(found, precision="fp32")
    misses = []
    for prompt in load_prepared(tmp_path / "run" / "prepared").prompts("train"):
        arm = prompt.columns["winner"]
        was, now = (first_token(model, prompt.ids)[arm].item() for model in (base, tuned))
        misses.append(log_odds(now) - log_odds(optimum(was)))
        assert log_odds(optimum(was)) - log_odds(was) > 0.99
    # 32 answers a prompt and step: each arm is seen a few times only.
    assert max(map(abs, misses)) < 0.4
    assert abs(sum(misses) / len(misses)) < 0.2


@pytest.mark.slow
def test_without_a_price_the_better_arm_is_always_played(tmp_path: Path) -> None:
    wanted = job(tmp_path, {"name": "grpo", "samples": 16, "max_new_tokens": 1}, steps=40, batch_rows=48)
    tunesmith.train(wanted, out=tmp_path / "run")
    assert steps_of(tmp_path / "run")[-1]["measures"]["reward"] > 0.97


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_the_better_arm_is_played_in_bf16(tmp_path: Path, name: str) -> None:
    objective = {"name": name, "samples": 16, "max_new_tokens": 1, "passes": 1}
    wanted = job(tmp_path, objective, steps=30, batch_rows=48, precision="bf16")
    tunesmith.train(wanted, out=tmp_path / "run")
    assert steps_of(tmp_path / "run")[-1]["measures"]["reward"] > 0.5


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_ppo_begins_at_the_reference(tmp_path: Path, method: str) -> None:
    objective = {"name": "ppo", "samples": 4, "max_new_tokens": 8, "passes": 1}
    wanted = job(tmp_path, objective, method, steps=2, batch_rows=12, learning_rate=1e-4)
    tunesmith.train(wanted, out=tmp_path / "run")
    first = steps_of(tmp_path / "run")[0]["measures"]
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert first["clipped"] == 0


def test_answers_of_a_single_step_need_not_be_measured_before_it(tmp_path: Path) -> None:
    # A bound on the KL asks for what each token's log-probability was; without one, the step itself knows it.
    found = []
    for name, more in (("asked", {"max_kl": 1e9}), ("known", {})):
        objective = {"name": "grpo", "samples": 4, "max_new_tokens": 4, **more}
        tunesmith.train(job(tmp_path, objective, steps=3, batch_rows=12), out=tmp_path / name)
        steps = steps_of(tmp_path / name)
        found.append([step["loss"] for step in steps] + [step["grad_norm"] for step in steps])
        rewards = [step["measures"]["reward"] for step in steps]
    assert 0 < min(rewards) < max(rewards) < 1
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-7)
    assert max(found[0][3:]) > 0


def test_every_reward_of_several_is_logged(tmp_path: Path) -> None:
    wanted = job(tmp_path, {"name": "grpo", "samples": 4, "max_new_tokens": 4}, steps=1, batch_rows=12)
    functions = [f"{tmp_path / 'rewards.py'}:{name}" for name in ("winner", "same")]
    wanted["objective"]["rewards"] = [functions[0], {"source": functions[1], "weight": 0.5}]
    tunesmith.train(wanted, out=tmp_path / "run")
    measures = steps_of(tmp_path / "run")[0]["measures"]
    terms = [measures[name] for name in measures if name.startswith("reward/")]
    assert terms[1] == 1
    assert measures["reward"] == pytest.approx(terms[0] + 0.5)


def test_equal_rewards_teach_nothing(tmp_path: Path) -> None:
    wanted = job(tmp_path, {"name": "grpo", "samples": 4, "max_new_tokens": 4}, steps=3, batch_rows=12)
    wanted["objective"]["rewards"] = [f"{tmp_path / 'rewards.py'}:same"]
    record = tunesmith.train(wanted, out=tmp_path / "run")
    assert [step["grad_norm"] for step in steps_of(tmp_path / "run")] == [0, 0, 0]
    assert any("were worth the same in 9 of 9 groups" in text for text in record.warnings)


@pytest.mark.parametrize(("center", "expected"), [(False, 0.5), (True, 0.0)])
def test_centered_rewards_are_what_values_begin_with(tmp_path: Path, center: bool, expected: float) -> None:
    """All rewards are 1 and all values 0: half of 1 squared, or nothing to learn."""
    objective = {"name": "ppo", "samples": 2, "max_new_tokens": 4, "kl_weight": 0, "gae_lambda": 1}
    wanted = job(tmp_path, {**objective, "center_rewards": center}, steps=1, batch_rows=6)
    wanted["objective"]["rewards"] = [f"{tmp_path / 'rewards.py'}:same"]
    tunesmith.train(wanted, out=tmp_path / "run")
    measures = steps_of(tmp_path / "run")[0]["measures"]
    assert measures["value_loss"] == pytest.approx(expected)
    assert measures["reward"] == 1


@pytest.mark.parametrize("name", ["grpo", "ppo"])
@pytest.mark.parametrize("cut_after", [3, 4])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path, name: str, cut_after: int) -> None:
    """In the middle of a rollout (3 of its 4 steps) and between two."""
    objective = {"name": name, "samples": 4, "max_new_tokens": 6, "passes": 2}
    wanted = job(tmp_path, objective, {"name": "lora", "rank": 4, "dropout": 0.1}, steps=7, batch_rows=6)
    tunesmith.train(wanted, out=tmp_path / "whole")

    def interrupt(event: Event) -> None:
        if event.kind == "step" and event.done == cut_after:
            os.kill(os.getpid(), 2)

    with pytest.raises(Interrupted):
        tunesmith.train(wanted, out=tmp_path / "cut", on_event=interrupt)
    tunesmith.train(wanted, out=tmp_path / "cut")
    kept = ["step", "loss", "grad_norm", "measures"]
    assert [[s[k] for k in kept] for s in steps_of(tmp_path / "cut")] == [
        [s[k] for k in kept] for s in steps_of(tmp_path / "whole")
    ]
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "cut" / adapter).read_bytes() == (tmp_path / "whole" / adapter).read_bytes()


def measure_adapter(run: Path) -> float:
    """Norm of what the adapters add to begin with nothing."""
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    return math.sqrt(sum(float(t.square().sum()) for name, t in tensors.items() if "lora_B" in name))


def test_a_policy_that_runs_away_is_stopped(tmp_path: Path) -> None:
    objective = {"name": "grpo", "samples": 8, "max_new_tokens": 4, "max_kl": 0.5}
    wanted = job(tmp_path, objective, steps=10, batch_rows=24, learning_rate=4e-2)
    with pytest.raises(TrainingFailed, match=r"nats of KL from the reference; objective\.max_kl is 0\.5"):
        tunesmith.train(wanted, out=tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    # What is saved are the weights whose answers kept within the limit: nearer to the start than where it ran away.
    with_limit = tunesmith.train(
        {**wanted, "objective": {**wanted["objective"], "max_kl": 1e9}}, out=tmp_path / "free"
    )
    assert with_limit.status == "done"
    kept, free = (measure_adapter(tmp_path / name) for name in ("run", "free"))
    assert kept < free

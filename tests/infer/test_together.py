"""Sequences that go on side by side are given the same tokens as by `generate`, recorded or not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_models import VOCAB

from tunesmith.infer.generate import generate
from tunesmith.infer.together import sample_together
from tunesmith.job.spec import LoraSpec, SamplingSpec
from tunesmith.models.load import load_model
from tunesmith.models.lora import add_lora


def make_prompts() -> list[list[int]]:
    """Three prompts of other lengths, four times each."""
    source = random.Random(0)
    return [
        [source.randrange(2, VOCAB) for _ in range(length)] for length in (5, 40, 17) for _ in range(1)
    ] * 4


def open_adapted(folder: Any, **how: Any) -> Any:
    model = load_model(folder, **how)
    add_lora(model, LoraSpec(name="lora", rank=4), seed=0)
    for parameter in model.trainable_parameters():
        parameter.data += 0.1 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        ).to(parameter.device)
    return model.eval()


def run(function: Any, model: Any, sampling: SamplingSpec, *, stops: Sequence[int], **more: Any) -> Any:
    prompts = make_prompts()
    return function(
        model,
        prompts,
        max_new_tokens=40,
        stop_ids=stops,
        sampling=sampling,
        keys=[f"answer {number}" for number in range(len(prompts))],
        **more,
    )


@pytest.mark.parametrize("name", ["llama-tied", "qwen2-window", "gemma2"])
@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSpec(temperature=0),
        SamplingSpec(temperature=1, seed=3),
        SamplingSpec(temperature=0.8, top_k=9),
    ],
    ids=["greedy", "sampled", "top_k"],
)
def test_tokens_are_those_of_generate(
    hf_folders: Any, device: str, name: str, batch_size: int | None, sampling: SamplingSpec
) -> None:
    model = open_adapted(hf_folders(name)[0], device=device)
    expected = run(generate, model, sampling, stops=[5, 9])
    told: list[tuple[int, int]] = []
    found = run(
        sample_together,
        model,
        sampling,
        stops=[5, 9],
        batch_size=batch_size,
        on_progress=lambda *done: told.append(done),
    )
    assert found == expected
    assert told[-1] == (12, 12)
    if sampling.temperature:
        assert len({tuple(one.ids) for one in found}) > 3
        assert {one.finished for one in found} == {True, False}


def test_nothing_stops_at_a_token_that_is_no_stop_and_the_context_ends_all(hf_folders: Any) -> None:
    model = open_adapted(hf_folders("llama")[0])
    limit = model.config.max_positions
    prompts = [[7] * (limit - 3), [7] * (limit - 20)]
    sampling = SamplingSpec(temperature=1)
    found = sample_together(
        model, prompts, max_new_tokens=10, stop_ids=[], sampling=sampling, keys=["one", "two"]
    )
    assert [(len(one.ids), one.finished) for one in found] == [(3, False), (10, False)]


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_replayed_step_is_the_ordinary_one(
    hf_folders: Any, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    from tunesmith.infer import together

    model = open_adapted(hf_folders("llama")[0], device="cuda", dtype=torch.bfloat16)
    recorded: list[bool] = []
    record = together.try_to_record

    def note(function: Any) -> Any:
        graph = record(function)
        recorded.append(graph is not None)
        return graph

    sampling = SamplingSpec(temperature=temperature, seed=3)
    monkeypatch.setattr(together, "try_to_record", note)
    replayed = run(sample_together, model, sampling, stops=[])
    assert recorded == [True]
    monkeypatch.setattr(together, "try_to_record", lambda function: None)
    assert run(sample_together, model, sampling, stops=[]) == replayed
    # The weights change between rollouts, and a recording belongs to one.
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.mul_(3)
    changed = run(sample_together, model, sampling, stops=[])
    monkeypatch.setattr(together, "try_to_record", note)
    assert run(sample_together, model, sampling, stops=[]) == changed != replayed

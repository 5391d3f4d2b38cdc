"""Generation on each device: what a prompt gets does not depend on the batch, nor, in fp32, on the device."""

from __future__ import annotations

import random
from typing import Any

import pytest

pytest.importorskip("pydantic")  # settings of sampling; a bare GPU machine may lack it

import torch
from tiny_models import VOCAB, relative_error

from tunesmith.infer.generate import Generation, generate
from tunesmith.job.spec import SamplingSpec
from tunesmith.models.load import load_model


def make_prompts(count: int) -> list[list[int]]:
    source = random.Random(0)
    return [[source.randrange(2, VOCAB) for _ in range(source.randint(1, 60))] for _ in range(count)]


def answer(model: Any, prompts: list[list[int]], **more: Any) -> list[Generation]:
    return generate(model, prompts, max_new_tokens=12, stop_ids=[5, 9], **more)


@pytest.mark.parametrize("name", ["llama-tied", "mistral", "qwen3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batched_equals_single_on_each_device(
    hf_folders: Any, device: str, name: str, temperature: float
) -> None:
    folder, _ = hf_folders(name)
    model = load_model(folder, device=device)
    prompts = make_prompts(17)
    sampling = SamplingSpec(temperature=temperature, top_p=0.9, top_k=20, seed=7)
    together = answer(model, prompts, sampling=sampling)
    keys = [str(place) for place in range(len(prompts))]
    alone = [
        answer(model, [prompt], sampling=sampling, keys=[key])[0]
        for prompt, key in zip(prompts, keys, strict=True)
    ]
    assert together == alone
    if temperature == 0:
        assert together == answer(load_model(folder), prompts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits_a_batch_moves_hidden_states_by_rounding_only(
    hf_folders: Any, device: str, dtype: torch.dtype
) -> None:
    folder, _ = hf_folders("llama-tied")
    model, exact = load_model(folder, device=device, dtype=dtype), load_model(folder)
    prompts = sorted(make_prompts(9), key=len)
    ids_n = torch.arange(9)
    with torch.no_grad():
        session, wanted = model.open_session(prompts), exact.open_session(prompts)
        pairs = [
            (session.prefill(), wanted.prefill()),
            (session.step(ids_n.to(device)), wanted.step(ids_n)),
        ]
        for slot, prompt in enumerate(prompts):
            single = model.open_session([prompt])
            for (together, expected), alone in zip(
                pairs, (single.prefill(), single.step(torch.tensor([slot], device=device))), strict=True
            ):
                assert relative_error(together[slot], expected[slot]) < 0.05
                assert relative_error(alone[0], together[slot]) < 0.05


def test_a_shared_prefix_changes_no_answer_on_each_device(hf_folders: Any, device: str) -> None:
    model = load_model(hf_folders("llama")[0], device=device)
    start = [7, 3, 50, 21] * 40
    prompts = [start + prompt for prompt in make_prompts(6)]
    assert answer(model, prompts) == [answer(model, [prompt])[0] for prompt in prompts]

"""Generation equals transformers', and no result depends on the batch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tiny_models import VOCAB

from tunesmith.core.errors import DataError
from tunesmith.infer.generate import draw, generate, pick_greedy, shape_distribution
from tunesmith.job.spec import SamplingSpec
from tunesmith.models.load import load_model


def make_prompts(count: int, *, seed: int = 0, most: int = 60) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(2, VOCAB) for _ in range(source.randint(1, most))] for _ in range(count)]


@pytest.mark.parametrize("name", ["llama-tied", "mistral", "qwen2-window", "qwen3"])
def test_greedy_tokens_equal_transformers(hf_folders: Any, name: str) -> None:
    folder, reference = hf_folders(name)
    model = load_model(folder)
    prompts = make_prompts(6)
    found = generate(model, prompts, max_new_tokens=12, stop_ids=[1])
    for prompt, generation in zip(prompts, found, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert generation.finished == (1 in expected)
        assert generation.ids == (expected[: expected.index(1)] if 1 in expected else expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_size_never_changes_a_result(hf_folders: Any, dtype: torch.dtype, temperature: float) -> None:
    model = load_model(hf_folders("llama")[0], dtype=dtype)
    prompts = make_prompts(33)
    sampling = SamplingSpec(temperature=temperature, top_p=0.9, top_k=20, seed=7)

    def run(size: int | None) -> Any:
        return generate(
            model, prompts, max_new_tokens=20, stop_ids=[5, 9], sampling=sampling, batch_size=size
        )

    every = run(None)
    assert any(generation.finished for generation in every)
    assert run(1) == run(8) == run(32) == every


def test_hidden_states_of_a_batch_equal_those_of_one(hf_folders: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(hf_folders("llama-tied")[0], dtype=dtype)
        prompts = sorted(make_prompts(9), key=len)
        with torch.no_grad():
            together = model.open_session(prompts)
            whole = [together.prefill(), together.step(torch.arange(9))]
            for slot, prompt in enumerate(prompts):
                alone = model.open_session([prompt])
                assert torch.equal(alone.prefill()[0], whole[0][slot])
                assert torch.equal(alone.step(torch.tensor([slot]))[0], whole[1][slot])


def test_a_shared_prefix_is_computed_once_and_changes_nothing(hf_folders: Any) -> None:
    model = load_model(hf_folders("llama")[0])
    start = make_prompts(1, seed=5)[0] * 20
    prompts = [start[:150] + prompt for prompt in make_prompts(10, most=20)]
    shared = generate(model, prompts, max_new_tokens=10, stop_ids=[])
    assert shared == [generate(model, [prompt], max_new_tokens=10, stop_ids=[])[0] for prompt in prompts]


def test_long_prompts_run_in_blocks_of_queries(hf_folders: Any) -> None:
    folder, reference = hf_folders("llama")
    prompt = make_prompts(1, seed=3)[0] * 200
    found = generate(load_model(folder), [prompt[:400]], max_new_tokens=4, stop_ids=[])[0].ids
    expected = reference.generate(
        torch.tensor([prompt[:400]]),
        attention_mask=torch.ones(1, 400, dtype=torch.int64),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=[],
        pad_token_id=0,
    )
    assert found == expected[0, 400:].tolist()


def test_the_context_limit_ends_an_answer_and_refuses_a_prompt(hf_folders: Any) -> None:
    model = load_model(hf_folders("llama")[0])
    found = generate(model, [[3] * 509], max_new_tokens=50, stop_ids=[])
    assert len(found[0].ids) == 3
    assert not found[0].finished
    with pytest.raises(DataError, match="prompt 2: has 512 tokens, the model's context 512"):
        generate(model, [[3], [3] * 512], max_new_tokens=5, stop_ids=[])


def test_progress_is_told(hf_folders: Any) -> None:
    seen: list[tuple[int, int]] = []
    generate(
        load_model(hf_folders("llama")[0]),
        make_prompts(5),
        max_new_tokens=3,
        stop_ids=[],
        batch_size=2,
        on_progress=lambda done, of: seen.append((done, of)),
    )
    assert seen[-1] == (5, 5)
    assert seen == sorted(seen)


def test_of_equal_logits_the_lowest_id_wins() -> None:
    assert pick_greedy(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])).tolist() == [1, 0]


def test_sampling_keeps_what_top_k_and_top_p_allow() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    # 0.4 + 0.3 reaches 0.6: tokens 1 and 3 stay.
    kept = shape_distribution(logits, SamplingSpec(temperature=1.0, top_p=0.6))
    assert torch.allclose(kept, torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]]))
    whole = shape_distribution(logits, SamplingSpec(temperature=0.5))
    assert torch.allclose(whole, torch.tensor([[1.0, 16.0, 4.0, 9.0]]) / 30)
    kept = shape_distribution(logits, SamplingSpec(temperature=1.0, top_k=1))
    assert kept.tolist() == [[0.0, 1.0, 0.0, 0.0]]
    probs = torch.tensor([[0.25, 0.0, 0.75]] * 3)
    assert draw(probs, torch.tensor([0.0, 0.2499, 0.25])).tolist() == [0, 0, 2]

"""Log-probabilities of targets are those of the plain softmax, and so are their gradients, whatever the chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import make_row, make_rows, relative_error

from tunesmith.job.spec import LoraSpec
from tunesmith.methods.logprobs import count_row_targets, sum_rows, token_logps
from tunesmith.methods.sft import sft_loss
from tunesmith.models.layout import make_batch
from tunesmith.models.load import load_model
from tunesmith.models.lora import add_lora


def plain_logps(model: Any, batch: Any, temperature: float = 1.0) -> torch.Tensor:
    logits = model.head(model.hidden(batch.ids_T, batch.layout))[batch.sources_K] / temperature
    return logits.double().log_softmax(-1).gather(1, batch.targets_K[:, None]).squeeze(1)


# gemma2 caps its logits: its head is not a plain product.
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2"])
@pytest.mark.parametrize(("chunk", "temperature"), [(5, 1.0), (None, 0.7)])
def test_values_and_gradients_are_those_of_the_plain_softmax(
    hf_folders: Any, name: str, chunk: int | None, temperature: float
) -> None:
    batch = make_batch(make_rows([30, 12, 7]), round_tokens=16)
    weights_K = torch.randn(batch.num_targets, generator=torch.Generator().manual_seed(1))
    results = []
    for plain in (True, False):
        model = load_model(hf_folders(name)[0], trainable=True)
        if plain:
            logps_K = plain_logps(model, batch, temperature)
        else:
            logps_K = token_logps(model, batch, chunk=chunk, temperature=temperature)
        (logps_K * weights_K).sum().backward()
        results.append([logps_K.detach().double()] + [p.grad for p in model.trainable_parameters()])
    for found, expected in zip(*reversed(results), strict=True):
        assert relative_error(found, expected) < 3e-6


def test_their_sum_is_what_sft_minimises(hf_folders: Any) -> None:
    batch = make_batch(make_rows([30, 12, 7]))
    model = load_model(hf_folders("qwen2")[0])
    assert -token_logps(model, batch).sum().item() == pytest.approx(
        sft_loss(model, batch).total.item(), rel=1e-6
    )


def test_a_frozen_head_has_no_gradient_and_what_lies_before_it_has_the_same(hf_folders: Any) -> None:
    batch = make_batch(make_rows([30, 12, 7]))
    gradients = []
    for plain in (True, False):
        model = load_model(hf_folders("llama")[0])
        add_lora(model, LoraSpec(name="lora", rank=4), seed=0)
        (plain_logps if plain else token_logps)(model, batch).square().sum().backward()
        assert model.head_weight.grad is None
        found = [p.grad.flatten() for p in model.trainable_parameters() if p.grad is not None]
        gradients.append(torch.cat(found).double())
    assert relative_error(gradients[1], gradients[0]) < 3e-6


def test_rows_are_summed_by_themselves() -> None:
    # Row 0 has targets 7 and 8, row 1 has target 6; the filler document belongs to none.
    batch = make_batch([make_row([5, 6, 7, 8], [0, 0, 1, 1]), make_row([5, 6], [0, 1])], round_tokens=16)
    assert sum_rows(torch.tensor([1.0, 2.0, 4.0]), batch).tolist() == [3.0, 4.0]
    assert count_row_targets(batch).tolist() == [2.0, 1.0]

"""The loss is the plain cross-entropy of the target tokens, summed, whatever the chunk or the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCAB, make_row, make_rows, relative_error

from tunesmith.job.spec import LoraSpec
from tunesmith.methods.sft import sft_loss
from tunesmith.models.layout import make_batch
from tunesmith.models.load import load_model
from tunesmith.models.lora import add_lora


def test_equal_logits_cost_the_logarithm_of_the_vocabulary(hf_folders: Any) -> None:
    model = load_model(hf_folders("llama")[0])
    assert model.untied_head is not None
    model.untied_head.weight.data.zero_()
    loss = sft_loss(model, make_batch([make_row([5, 6, 7, 8], [0, 0, 1, 1])]))
    assert loss.num_targets == 2
    assert float(loss.total) == pytest.approx(2 * math.log(VOCAB), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_chunked_loss_and_gradients_equal_plain_cross_entropy(hf_folders: Any, name: str) -> None:
    batch = make_batch(make_rows([30, 12, 7]))
    gradients = []
    for chunk in (5, None):
        model = load_model(hf_folders(name)[0], trainable=True)
        if chunk is None:
            logits = model.head(model.hidden(batch.ids_T, batch.layout))
            total = F.cross_entropy(logits[batch.sources_K], batch.targets_K, reduction="sum")
        else:
            total = sft_loss(model, batch, chunk=chunk).total
        (total / 7).backward()
        gradients.append([total.detach()] + [p.grad for p in model.trainable_parameters()])
    for found, expected in zip(*gradients, strict=True):
        assert relative_error(found, expected) < 2e-6


def test_one_batch_of_eight_is_eight_batches_of_one(hf_folders: Any) -> None:
    rows = make_rows([20, 31, 5, 9, 14, 40, 2, 17])
    gradients = []
    for batches in ([rows], [[row] for row in rows]):
        model = load_model(hf_folders("qwen2")[0])
        add_lora(model, LoraSpec(name="lora", rank=4), seed=0)
        targets = sum(row.num_targets for row in rows)
        for part in batches:
            (sft_loss(model, make_batch(part)).total / targets).backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.trainable_parameters() if p.grad is not None])
        )
    assert relative_error(gradients[0], gradients[1]) < 2e-6


def test_a_batch_without_targets_is_a_broken_call(hf_folders: Any) -> None:
    with pytest.raises(ValueError, match="without target tokens"):
        sft_loss(load_model(hf_folders("llama")[0]), make_batch([make_row([5, 6], [0, 0])]))

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


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("full", [True, False])
def test_a_shared_beginning_changes_no_loss_and_no_gradient(hf_folders: Any, name: str, full: bool) -> None:
    begin = list(range(3, 23))
    rows = [
        make_row([*begin, *row.ids], [0] * len(begin) + [0, *row.mask[1:]])
        for row in make_rows([20, 31, 5, 9, 140, 40, 2, 17])
    ]
    losses, gradients = [], []
    for share in (False, True):
        model = load_model(hf_folders(name)[0], trainable=full)
        if not full:
            add_lora(model, LoraSpec(name="lora", rank=4), seed=0)
        batch = make_batch(rows, round_tokens=64, share_prefix=share)
        assert batch.layout.shares(1) == share * len(begin)
        total = sft_loss(model, batch).total
        (total / 7).backward()
        losses.append(total.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.trainable_parameters()]))
    assert losses[0] == losses[1]
    assert relative_error(gradients[1], gradients[0]) < 2e-6


def test_what_rows_share_ends_before_the_first_source() -> None:
    rows = [make_row([*range(3, 23), 30 + number], [0] * 15 + [1] * 6) for number in range(3)]
    batch = make_batch(rows, share_prefix=True)
    assert batch.layout.shares(1) == 14
    assert batch.layout.num_tokens == 14 + 3 * 7
    assert batch.sources_K.tolist()[::6] == [14, 21, 28]
    assert make_batch(rows[:1], share_prefix=True).layout.shared == ()


def test_rows_share_what_all_begin_with_or_more_with_the_row_before() -> None:
    # Eight tokens of all, and of the last two six more than eight: one less than they have in common is too few.
    begin, more = list(range(3, 11)), list(range(20, 29))
    ends = [[30, 31], [*more, 32, 33], [*more, 34, 35], [*more[:7], 36, 37]]
    rows = [make_row([*begin, *end], [0] * (len(begin) + len(end) - 1) + [1]) for end in ends]
    layout = make_batch(rows, share_prefix=True).layout
    assert (layout.shared, layout.hosts) == ((0, 8, 17, 8), (0, 0, 1, 0))
    assert layout.num_tokens == 10 + 11 + 2 + 9
    assert layout.find_tokens()[2].tolist() == [*range(8), *range(10, 19), 21, 22]
    assert layout.positions_T.tolist() == [*range(10), *range(8, 19), 17, 18, *range(8, 17)]

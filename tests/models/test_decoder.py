"""Our decoder is transformers' model: logits, losses, gradients; documents never see each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import OWN, hf_loss, make_row, make_rows, relative_error

from tunesmith.methods.sft import sft_loss
from tunesmith.models.layout import make_batch, make_layout
from tunesmith.models.load import load_model

LENGTHS = [5, 33, 16, 1, 40, 130]


@pytest.mark.parametrize("name", OWN)
def test_logits_of_packed_documents_equal_transformers_on_each_alone(hf_folders: Any, name: str) -> None:
    folder, reference = hf_folders(name)
    model = load_model(folder)
    rows = make_rows(LENGTHS)
    ids = torch.tensor([token for row in rows for token in row.ids])
    layout = make_layout([len(row.ids) for row in rows])
    with torch.no_grad():
        logits = model.head(model.hidden(ids, layout))
        expected = torch.cat([reference(torch.tensor([list(row.ids)])).logits[0] for row in rows])
    assert relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize("name", OWN)
def test_loss_and_gradients_equal_transformers(hf_folders: Any, name: str) -> None:
    folder, reference = hf_folders(name)
    model = load_model(folder, trainable=True)
    rows = make_rows([20, 7, 33])
    loss = sft_loss(model, make_batch(rows), chunk=11)
    loss.total.backward()
    expected = hf_loss(reference, rows)
    reference.zero_grad()
    expected.backward()
    assert relative_error(loss.total, expected) < 1e-6
    theirs = dict(reference.named_parameters())
    for key, parameter in model.named_trainable():
        *parents, leaf = key.rpartition(".")[0].split(".")
        kind = key.rpartition(".")[2]
        names = [".".join([*parents, part, kind]) for part in leaf.split("+")]
        wanted = torch.cat([theirs[part].grad for part in names])
        assert parameter.grad is not None
        # A key bias moves no attention weight: its gradient is rounding only, so it is measured against its block's.
        floor = 1e-6 * float(torch.cat([p.grad.flatten() for p in theirs.values()]).norm())
        assert float((parameter.grad - wanted).norm()) < 1e-5 * float(wanted.norm()) + floor, key


def test_fp64_runs_the_plain_path_and_agrees_with_the_fast_one(hf_folders: Any) -> None:
    rows = make_rows(LENGTHS[:3] + LENGTHS[4:])
    folder, _ = hf_folders("qwen3")
    losses = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = load_model(folder, dtype=dtype)
        losses[dtype] = float(sft_loss(model, make_batch(rows)).total.detach())
    assert losses[torch.float32] == pytest.approx(losses[torch.float64], rel=1e-6)
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float64], rel=2e-2)


def test_a_rows_loss_does_not_change_when_another_row_does(hf_folders: Any) -> None:
    model = load_model(hf_folders("llama")[0])
    first, second, other = make_rows([24, 30, 31])

    def hidden_of_first(*rows: Any) -> torch.Tensor:
        batch = make_batch(rows)
        with torch.no_grad():
            return model.hidden(batch.ids_T, batch.layout)[:24]

    assert torch.equal(hidden_of_first(first, second), hidden_of_first(first, other))
    assert torch.equal(hidden_of_first(first, second), hidden_of_first(first))


def test_kept_rows_are_the_same_rows(hf_folders: Any) -> None:
    model = load_model(hf_folders("qwen2")[0])
    batch = make_batch(make_rows([20, 9]))
    with torch.no_grad():
        whole = model.hidden(batch.ids_T, batch.layout)
        kept = model.hidden(batch.ids_T, batch.layout, batch.sources_K)
    assert torch.equal(kept, whole[batch.sources_K])


def test_bf16_masters_are_cast_again_after_an_optimizer_step(hf_folders: Any) -> None:
    model = load_model(hf_folders("llama-tied")[0], dtype=torch.bfloat16, trainable=True)
    batch = make_batch(make_rows([30, 12]))
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2, fused=True)
    losses = []
    for _ in range(4):
        loss = sft_loss(model, batch)
        (loss.total / loss.num_targets).backward()
        assert all(p.dtype == torch.float32 and p.grad is not None for p in model.trainable_parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.total.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_real_weights_give_the_published_log_probabilities(shared: Path) -> None:
    golden = json.loads((shared / "golden" / "model_reference_shared.json").read_text())["tinystories-656k"]
    model = load_model(shared / "models" / "tinystories-656k")
    for example in golden["examples"]:
        ids = example["ids"]
        batch = make_batch([make_row(ids, [0] + [1] * (len(ids) - 1))])
        with torch.no_grad():
            logits = model.head(model.hidden(batch.ids_T, batch.layout))
        found = logits[:-1].log_softmax(-1).gather(1, batch.targets_K[:, None])[:, 0]
        assert torch.allclose(found, torch.tensor(example["token_logprobs"]), atol=2e-5)
        assert int(logits[-1].argmax()) == example["next_token_argmax"]


def test_layout_pads_by_a_documents_own_length() -> None:
    layout = make_layout([3, 20, 16, 17])
    assert [(bucket.padded_length, bucket.num_documents) for bucket in layout.buckets] == [(16, 2), (32, 2)]
    assert layout.cumulative_N1.tolist() == [0, 3, 23, 39, 56]
    assert layout.positions_T[:5].tolist() == [0, 1, 2, 0, 1]
    with pytest.raises(ValueError, match="at least one token"):
        make_layout([3, 0])


def test_batch_targets_are_predicted_from_the_place_before() -> None:
    batch = make_batch([make_row([5, 6, 7], [0, 1, 1]), make_row([8, 9], [0, 1])])
    assert batch.sources_K.tolist() == [0, 1, 3]
    assert batch.targets_K.tolist() == [6, 7, 9]
    assert batch.row_K.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="first token"):
        make_batch([make_row([5, 6], [1, 1])])

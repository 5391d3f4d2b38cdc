"""Any other architecture runs through transformers' module with our adapters, saves and sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import OTHER, hf_loss, make_rows, relative_error

from tunesmith.infer.generate import generate
from tunesmith.job.spec import LoraSpec
from tunesmith.methods.sft import sft_loss
from tunesmith.models.fallback import Fallback
from tunesmith.models.layout import make_batch
from tunesmith.models.load import load_model
from tunesmith.models.lora import add_lora, load_adapter, merge, save_adapter
from tunesmith.models.weights import save_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore:fan_in_fan_out is set:UserWarning"
)


@pytest.mark.parametrize("name", OTHER)
def test_losses_and_generations_equal_transformers(hf_folders: Any, name: str) -> None:
    folder, reference = hf_folders(name)
    model = load_model(folder, own_decoder=False)
    assert isinstance(model, Fallback)
    rows = make_rows([20, 7, 33])
    with torch.no_grad():
        assert (
            relative_error(sft_loss(model, make_batch(rows), chunk=9).total, hf_loss(reference, rows)) < 1e-5
        )
    prompts = [list(row.ids) for row in rows]
    found = generate(model, prompts, max_new_tokens=8, stop_ids=[])
    for prompt, generation in zip(prompts, found, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=[],
            pad_token_id=0,
        )
        assert generation.ids == expected[0, len(prompt) :].tolist()
    assert found == [generate(model, [prompt], max_new_tokens=8, stop_ids=[])[0] for prompt in prompts]


@pytest.mark.parametrize("name", OTHER)
def test_adapters_and_merged_models_are_what_peft_and_transformers_load(
    hf_folders: Any, tmp_path: Path, name: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _ = hf_folders(name)
    rows = make_rows([20, 7])
    batch = make_batch(rows)
    model = load_model(folder, own_decoder=False)
    before = float(sft_loss(model, batch).total.detach())
    add_lora(model, LoraSpec(name="lora", rank=4), seed=0)
    assert float(sft_loss(model, batch).total.detach()) == pytest.approx(before, rel=1e-6)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    for _ in range(3):
        sft_loss(model, batch).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = float(sft_loss(model, batch).total.detach())
    assert after < before
    save_adapter(model, tmp_path / "adapter", base_name=str(folder))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    with torch.no_grad():
        assert float(hf_loss(theirs, rows)) == pytest.approx(after, rel=1e-5)
    again = load_model(folder, own_decoder=False)
    load_adapter(again, tmp_path / "adapter")
    assert float(sft_loss(again, batch).total.detach()) == after
    merge(model)
    save_model(model, tmp_path / "merged", source_folder=folder)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert float(hf_loss(merged, rows)) == pytest.approx(after, rel=1e-5)


def test_our_decoder_and_the_fallback_agree_also_when_training_whole(hf_folders: Any) -> None:
    folder, _ = hf_folders("qwen2")
    batch = make_batch(make_rows([20, 7]))
    losses = []
    for own in (True, False):
        model = load_model(folder, own_decoder=own, trainable=True)
        optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1e-3)
        for _ in range(3):
            loss = sft_loss(model, batch).total
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_packed_bases_work_in_the_fallback(hf_folders: Any) -> None:
    model = load_model(hf_folders("gemma2")[0], base="nf4", own_decoder=False)
    add_lora(model, LoraSpec(name="qlora", rank=4), seed=0)
    sft_loss(model, make_batch(make_rows([20]))).total.backward()
    assert all(p.grad is not None for p in model.trainable_parameters())

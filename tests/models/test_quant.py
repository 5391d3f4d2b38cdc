"""NF4 is bitsandbytes' NF4, bit for bit; quantised bases train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import make_rows, relative_error

from tunesmith.job.spec import LoraSpec
from tunesmith.methods.sft import sft_loss
from tunesmith.models.layout import make_batch
from tunesmith.models.load import load_model
from tunesmith.models.lora import add_lora, merge
from tunesmith.models.quant import Int8Matrix, Nf4Matrix


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_equals_bitsandbytes_bit_for_bit(dtype: torch.dtype, double_quant: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    for shape in [(172, 64), (640, 256), (96, 1024)]:
        weight = (torch.randn(shape) * 0.05).to(dtype)
        weight[3] = 0
        packed, state = functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4"
        )
        ours = Nf4Matrix(weight, double_quant=double_quant)
        assert torch.equal(ours.packed, packed)
        assert torch.equal(ours.absmax, state.absmax)
        assert torch.equal(ours.dense(dtype), functional.dequantize_4bit(packed, state))


def test_int8_keeps_every_value_within_half_a_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 48)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((Int8Matrix(weight).dense(torch.float32) - weight).abs() <= step / 2 * 1.001).all())


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_adapters_train_on_a_packed_base_as_on_its_dense_values(hf_folders: Any, base: Any) -> None:
    batch = make_batch(make_rows([30, 14]))
    gradients = []
    for storage in (base, "full"):
        model = load_model(hf_folders("llama")[0], base=storage)
        if storage == "full":
            packed = load_model(hf_folders("llama")[0], base=base)
            for target, source in zip(model.projections(), packed.projections(), strict=True):
                assert target.weight is not None
                target.weight.data = source.dense()
        add_lora(model, LoraSpec(name="lora", rank=4, targets=["q_proj", "down_proj"]), seed=0)
        sft_loss(model, batch).total.backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.trainable_parameters() if p.grad is not None])
        )
    assert relative_error(gradients[0], gradients[1]) < 1e-6


def test_packed_models_merge_to_dense(hf_folders: Any) -> None:
    model = load_model(hf_folders("llama")[0], base="nf4")
    assert all(projection.packed is not None for projection in model.projections())
    add_lora(model, LoraSpec(name="qlora", rank=4), seed=0)
    batch = make_batch(make_rows([30]))
    before = float(sft_loss(model, batch).total.detach())
    merge(model)
    assert all(projection.packed is None for projection in model.projections())
    assert float(sft_loss(model, batch).total.detach()) == pytest.approx(before, rel=1e-6)


@pytest.mark.gpu
def test_nf4_on_a_gpu_equals_the_cpu() -> None:
    torch.manual_seed(0)
    weight = torch.randn(640, 256).bfloat16()
    cpu, gpu = Nf4Matrix(weight, double_quant=True), Nf4Matrix(weight.cuda(), double_quant=True)
    assert torch.equal(cpu.packed, gpu.packed.cpu())
    assert torch.equal(cpu.dense(torch.bfloat16), cpu.cuda().dense(torch.bfloat16).cpu())

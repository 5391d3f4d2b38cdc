"""Optimizer steps of every method on each device: the CPU's losses, gradients and weights; fp16 with its loss scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")  # settings of a method; a bare GPU machine may lack it

import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from tunesmith.core.fingerprint import hash_row
from tunesmith.core.types import Origin, TokenRow
from tunesmith.job.spec import LoraSpec, TrainSpec
from tunesmith.methods.sft import sft_loss
from tunesmith.models.config import load_config
from tunesmith.models.headers import list_expected
from tunesmith.models.layout import make_batch
from tunesmith.models.load import load_model
from tunesmith.models.lora import add_lora
from tunesmith.models.segments import Segments
from tunesmith.training.optim import LossScale, MasterAdamW
from tunesmith.training.optimizers import make_optimizer
from tunesmith.training.step import Stepper

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
# Without double quantisation: its one sum rounds differently on a GPU (tests/models/test_devices.py).
METHODS: dict[str, LoraSpec | None] = {
    "full": None,
    "lora": LoraSpec(name="lora", rank=4),
    "dora": LoraSpec(name="lora", rank=4, dora=True),
    "qlora": LoraSpec(name="qlora", rank=4, double_quant=False),
    "int8": LoraSpec(name="lora", base="int8", rank=4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in an ordinary model folder."""
    root = tmp_path_factory.mktemp("llama")
    (root / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in list_expected(load_config(root)).items():
        is_norm = name.endswith("norm.weight")
        tensors[name] = torch.ones(shape) if is_norm else torch.randn(shape, generator=generator) * 0.1
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    return root


def make_counting_rows(count: int) -> list[TokenRow]:
    """Rows of 6 to 20 tokens that count upwards: easily learned. The first two tokens are the prompt."""
    rows = []
    for number in range(count):
        length = 6 + (5 * number) % 15
        ids = [(7 * number + place) % 64 for place in range(length)]
        mask = [0, 0] + [1] * (length - 2)
        rows.append(TokenRow(ids, mask, Origin(f"rows:{number + 1}", "rows", number), hash_row(ids, mask)))
    return rows


def make_stepper(folder: Path, method: str, *, device: str, dtype: torch.dtype, budget: int) -> Stepper:
    lora = METHODS[method]
    if lora is None:
        model = load_model(folder, device=device, dtype=dtype, trainable=True)
    else:
        model = load_model(folder, device=device, dtype=dtype, base=lora.storage, double_quant=False)
        add_lora(model, lora, seed=0)
    return Stepper(
        model.train(),
        MasterAdamW(dict(model.named_trainable())),
        make_batch=lambda rows, where: make_batch(rows, device=where),
        loss=sft_loss,
        device=torch.device(device),
        budget_tokens=budget,
        clip_norm=1.0,
        scale=LossScale(enabled=dtype == torch.float16),
    )


def take_steps(stepper: Stepper, count: int, *, rate: float) -> list[Any]:
    rows = make_counting_rows(8)
    return [stepper.take(rows, step=number + 1, learning_rate=rate) for number in range(count)]


def read_weights(stepper: Stepper) -> dict[str, torch.Tensor]:
    return {name: p.detach().float().cpu() for name, p in stepper.model.named_trainable()}


@pytest.mark.parametrize("budget", [24, 4096], ids=["micro-batches", "one batch"])
@pytest.mark.parametrize("method", METHODS)
def test_steps_in_fp32_equal_the_cpus(folder: Path, device: str, method: str, budget: int) -> None:
    here = make_stepper(folder, method, device="cpu", dtype=torch.float32, budget=4096)
    there = make_stepper(folder, method, device=device, dtype=torch.float32, budget=budget)
    for expected, found in zip(take_steps(here, 3, rate=1e-3), take_steps(there, 3, rate=1e-3), strict=True):
        assert found.loss == pytest.approx(expected.loss, rel=1e-4)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
        assert found.num_target_tokens == expected.num_target_tokens
    weights = read_weights(there)
    assert all(p.device.type == device for _, p in there.model.named_trainable())
    # Adam divides by a gradient's own size: where that is nothing but rounding, a weight may go either way.
    assert_close(weights, read_weights(here), rtol=1e-3, atol=3e-3)
    moved = torch.cat([(weights[n] - w).abs().flatten() for n, w in read_weights(here).items()])
    assert float(moved.mean()) < 2e-5


@pytest.mark.parametrize("method", METHODS)
def test_bf16_learns_on_each_device(folder: Path, device: str, method: str) -> None:
    stepper = make_stepper(folder, method, device=device, dtype=torch.bfloat16, budget=4096)
    steps = take_steps(stepper, 25, rate=0.01)
    assert steps[-1].loss < 0.7 * steps[0].loss
    assert all(p.dtype == torch.float32 for _, p in stepper.model.named_trainable())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "adamw-bf16", "muon"])
def test_full_fine_tuning_in_bf16_learns_with_every_optimizer(
    folder: Path, device: str, optimizer: str
) -> None:
    stored = torch.bfloat16 if optimizer == "adamw-bf16" else torch.float32
    model = load_model(folder, device=device, dtype=torch.bfloat16, trainable=True, master_dtype=stored)
    assert all(p.dtype == stored for p in model.trainable_parameters())
    spec = TrainSpec(optimizer=optimizer)  # type: ignore[arg-type]
    stepper = Stepper(
        model.train(),
        make_optimizer(model, dict(model.named_trainable()), spec),
        make_batch=lambda rows, where: make_batch(rows, device=where),
        loss=sft_loss,
        device=torch.device(device),
        budget_tokens=48,
        clip_norm=1.0,
        scale=LossScale(enabled=False),
    )
    steps = take_steps(stepper, 25, rate=0.01)
    assert steps[-1].loss < 0.7 * steps[0].loss
    assert all(p.dtype == stored for p in model.trainable_parameters())


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_fp16_learns_with_its_loss_scale_on_each_device(folder: Path, device: str, method: str) -> None:
    stepper = make_stepper(folder, method, device=device, dtype=torch.float16, budget=24)
    exact = make_stepper(folder, method, device="cpu", dtype=torch.float32, budget=4096)
    assert stepper.scale.value == 65536
    first, expected = take_steps(stepper, 1, rate=0.01)[0], take_steps(exact, 1, rate=0.01)[0]
    assert first.loss == pytest.approx(expected.loss, rel=1e-2)
    # Unscaled: whatever the scale was, or became, the norm is that of the gradient.
    assert first.grad_norm == pytest.approx(expected.grad_norm, rel=3e-2)
    steps = take_steps(stepper, 24, rate=0.01)
    assert steps[-1].loss < 0.7 * first.loss
    assert stepper.scale.value > 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_host_never_waits_inside_a_step(folder: Path, method: str) -> None:
    """Micro-batches run on while the next is prepared; only the finished step's loss and norm are waited for."""
    stepper = make_stepper(folder, method, device="cuda", dtype=torch.bfloat16, budget=48)
    stepper.model.segments = Segments(compiled=False)
    take_steps(stepper, 2, rate=1e-3)
    rows = make_counting_rows(8)
    plan = [[0, 1, 2], [3, 4], [5, 6, 7]]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = stepper._run_micro_batches(rows, plan, 50)
        norm = stepper.optimizer.gradient_norm()
        stepper.optimizer.update(learning_rate=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert isinstance(total, torch.Tensor)
    assert torch.isfinite(total)
    assert torch.isfinite(norm)

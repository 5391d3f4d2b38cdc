"""The decoder and quantised weights on each device: transformers' logits and gradients, the CPU's codes.

Nothing here needs more than torch and transformers, so that it runs on a bare GPU machine.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import hf_loss, make_rows, relative_error

from tunesmith.methods.sft import sft_loss
from tunesmith.models.layout import make_batch, make_layout
from tunesmith.models.load import load_model
from tunesmith.models.quant import Int8Matrix, Nf4Matrix

# Different head widths, biases, tied and untied heads, a window shorter than the rows, norms of queries and keys.
FAMILIES = ("llama", "llama-tied", "mistral", "qwen2-window", "qwen3")
LENGTHS = [5, 33, 16, 1, 40, 130]
DTYPES = [torch.float32, torch.bfloat16]


def load_reference(folder: Path, *, device: str, dtype: torch.dtype) -> Any:
    """Transformers' own model. Read again: casting a loaded one would round its rotation frequencies, too."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def read_logits(model: Any, rows: Any, *, device: str, packed: bool) -> torch.Tensor:
    """(T, V) of all rows, in one stream or each alone."""
    pieces = []
    with torch.no_grad():
        for group in [rows] if packed else [[row] for row in rows]:
            ids = torch.tensor([token for row in group for token in row.ids], device=device)
            layout = make_layout([len(row.ids) for row in group], device=device)
            pieces.append(model.head(model.hidden(ids, layout)))
    return torch.cat(pieces)


def tolerance(their_error: float, dtype: torch.dtype) -> float:
    """fp32: rounding. bf16: what rounding costs depends on the model, so transformers' own bf16 is the measure."""
    return 2e-5 if dtype == torch.float32 else 2 * their_error


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_on_each_device(
    hf_folders: Any, device: str, name: str, dtype: torch.dtype, packed: bool
) -> None:
    folder, reference = hf_folders(name)
    rows = make_rows(LENGTHS)
    theirs = load_reference(folder, device=device, dtype=dtype)
    with torch.no_grad():
        exact = torch.cat([reference(torch.tensor([list(row.ids)])).logits[0] for row in rows])
        rounded = torch.cat([theirs(torch.tensor([list(row.ids)], device=device)).logits[0] for row in rows])
    found = read_logits(
        load_model(folder, device=device, dtype=dtype), rows, device=device, packed=packed
    )  # fmt: skip
    assert found.device.type == device
    assert relative_error(found, exact) < tolerance(relative_error(rounded, exact), dtype)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_equal_transformers_on_each_device(
    hf_folders: Any, device: str, name: str, dtype: torch.dtype, packed: bool
) -> None:
    folder, _ = hf_folders(name)
    rows = make_rows([20, 7, 33, 64])
    model = load_model(folder, device=device, dtype=dtype, trainable=True)
    losses = [
        sft_loss(model, make_batch(group, device=device)) for group in ([rows] if packed else [[r] for r in rows])
    ]  # fmt: skip
    total = torch.stack([loss.total for loss in losses]).sum()
    total.backward()

    exact = load_reference(folder, device="cpu", dtype=torch.float32)
    theirs = load_reference(folder, device=device, dtype=dtype)
    losses_of = {}
    for key, each in (("exact", exact), ("theirs", theirs)):
        losses_of[key] = hf_loss(each, rows)
        losses_of[key].backward()
    assert relative_error(total, losses_of["exact"]) < (1e-6 if dtype == torch.float32 else 2e-2)

    found, wanted, rounded = (
        torch.cat([gradient.flatten().cpu().float() for gradient in each])
        for each in zip(*_pair_gradients(model, exact, theirs), strict=True)
    )
    assert found.isfinite().all()
    assert relative_error(found, wanted) < tolerance(relative_error(rounded, wanted), dtype)


def _pair_gradients(model: Any, exact: Any, theirs: Any) -> list[tuple[torch.Tensor, ...]]:
    """Our gradient of each weight beside transformers'; ours are merged, as in `q_proj+k_proj+v_proj`."""
    references = [dict(each.named_parameters()) for each in (exact, theirs)]
    pairs = []
    for key, parameter in model.named_trainable():
        path, _, kind = key.rpartition(".")
        parents, _, leaf = path.rpartition(".")
        names = [".".join(filter(None, (parents, part, kind))) for part in leaf.split("+")]
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        pairs.append((parameter.grad, *(torch.cat([each[n].grad for n in names]) for each in references)))
    return pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantised_codes_equal_the_cpus(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in [(172, 64), (640, 256)]:
        weight = (torch.randn(shape) * 0.05).to(dtype)
        weight[3] = 0
        for make in (lambda w: Nf4Matrix(w, double_quant=False), Int8Matrix):
            here, there = make(weight), make(weight.to(device))
            for name, expected in here.named_buffers():
                assert torch.equal(dict(there.named_buffers())[name].cpu(), expected), name
            for out in (torch.float32, torch.bfloat16):
                assert torch.equal(there.dense(out).cpu(), here.dense(out))


def test_doubly_quantised_scales_equal_the_cpus_but_for_the_order_of_one_sum(device: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(640, 256) * 0.05
    here, there = Nf4Matrix(weight, double_quant=True), Nf4Matrix(weight.to(device), double_quant=True)
    assert torch.equal(there.packed.cpu(), here.packed)
    # The mean of the scales is a sum in another order: a scale at the middle between two codes may fall to the other.
    assert (there.absmax.cpu() != here.absmax).float().mean() < 0.01
    assert relative_error(there.dense(torch.float32), here.dense(torch.float32)) < 1e-3
    # What was quantised on the CPU, as `train` does from a folder, is the same bits on every device.
    moved = copy.deepcopy(here).to(device)
    assert torch.equal(moved.dense(torch.bfloat16).cpu(), here.dense(torch.bfloat16))


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_quantised_model_answers_as_on_the_cpu(hf_folders: Any, device: str, base: Any) -> None:
    folder, _ = hf_folders("llama")
    rows = make_rows(LENGTHS)
    here, there = (
        load_model(folder, device=where, base=base, double_quant=False) for where in ("cpu", device)
    )
    expected = read_logits(here, rows, device="cpu", packed=True)
    assert relative_error(read_logits(there, rows, device=device, packed=True), expected) < 2e-5

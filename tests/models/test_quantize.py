"""Quantisation in training and after it: worked by hand, and against torchao's own layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_rows, relative_error
from torch import nn

from tunesmith.core.errors import ModelError, SetupError
from tunesmith.eval.nll import score_rows
from tunesmith.job.spec import LoraSpec, QuantizeSpec
from tunesmith.methods.sft import sft_loss
from tunesmith.models.layout import make_batch
from tunesmith.models.load import load_model
from tunesmith.models.lora import add_lora, set_enabled
from tunesmith.models.projection import LoraPart, Projection
from tunesmith.models.quantize import (
    QuantizedProduct,
    QuantizedRows,
    check_torchao,
    count_stored_bytes,
    fake_quantize_model,
    make_config,
    quantize_model,
    quantize_weight,
)
from tunesmith.models.weights import save_model

pytest.importorskip("torchao", reason="torchao is not installed (extra `quant`)")

SCHEMES = ["int8", "int4", "fp8", "int8-int4"]
INT4 = ["int4", "int8-int4"]


def spec(scheme: Any, **more: Any) -> QuantizeSpec:
    return QuantizeSpec(scheme=scheme, **more)


def make_projection(*, bias: bool = True, device: str = "cpu") -> Projection:
    """Two matrices of 48 and 32 outputs over 64 inputs, merged by rows."""
    torch.manual_seed(0)
    return Projection(
        ["a", "b"],
        [48, 32],
        torch.randn(80, 64) * 0.1,
        torch.randn(80) if bias else None,
        dtype=torch.float32,
    ).to(device)


def add_adapters(projection: Projection, *, dora: bool = False) -> None:
    """Adapters on both parts, with a B that does something."""
    torch.manual_seed(1)
    for number, (_, rows) in enumerate(projection.rows()):
        outputs = rows.stop - rows.start
        lora = LoraPart(
            torch.randn(4, 64) * 0.1,
            torch.randn(outputs, 4) * 0.1,
            scale=2.0,
            alpha=8.0,
            magnitude=torch.rand(outputs) + 0.5 if dora else None,
        )
        projection.adapters[number] = lora.to(projection.weight.device)  # type: ignore[union-attr]


def make_linears(projection: Projection, weight: torch.Tensor) -> list[nn.Sequential]:
    """Plain layers of the parts, each in a container: torchao replaces children."""
    layers = []
    for _, rows in projection.rows():
        layer = nn.Linear(64, rows.stop - rows.start, device=weight.device)
        layer.weight = nn.Parameter(weight[rows].detach().clone())
        layer.bias = nn.Parameter(projection.bias[rows].detach().clone())  # type: ignore[index]
        layers.append(nn.Sequential(layer))
    return layers


def test_int4_rounds_to_sevenths_and_a_half_of_the_largest_weight() -> None:
    # The largest magnitude of a group stands for 7.5, codes are -8..7: here 2.5 a step, so that 18.75 becomes 7 steps,
    # -18.75 eight (-7.5 is rounded to even), 6 two and -1 none. The second group has a scale of its own: 0.1.
    row = torch.zeros(1, 64)
    row[0, :4] = torch.tensor([18.75, -18.75, 6.0, -1.0])
    row[0, 32:34] = torch.tensor([0.75, 0.32])
    quantized = quantize_weight(row, spec("int4"))
    assert quantized.qdata[0, :4].tolist() == [7, -8, 2, 0]
    assert quantized.qdata[0, 32:34].tolist() == [7, 3]
    assert quantized.scale.flatten().tolist() == pytest.approx([2.5, 0.1])
    assert quantized.dequantize()[0, :4].tolist() == pytest.approx([17.5, -20.0, 5.0, 0.0])


def make_quantized(projection: Projection, scheme: str, dtype: torch.dtype) -> QuantizedRows:
    held = quantize_weight(projection.effective(), spec(scheme))
    activation = QuantizedProduct(spec(scheme)).activation if scheme == "int8-int4" else None
    return QuantizedRows(held.dequantize().to(dtype), activation=activation, stored_bytes=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_projection_is_torchaos_quantised_linears(device: str, scheme: str) -> None:
    from torchao.quantization import quantize_

    projection = make_projection(device=device)
    layers = make_linears(projection, projection.effective())
    for layer in layers:
        quantize_(layer, make_config(spec(scheme)))
    x = torch.randn(20, 64, device=device)
    found = make_quantized(projection, scheme, torch.float32).linear(x, projection.bias)
    # The same numbers, multiplied in matrices of other shapes.
    torch.testing.assert_close(found, torch.cat([layer(x) for layer in layers], 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", INT4)
def test_in_bf16_torchaos_kernels_give_the_same_from_our_codes(device: str, scheme: str) -> None:
    projection = make_projection(device=device)
    layers = make_linears(projection, projection.effective())
    for layer in layers:
        held = quantize_weight(layer[0].weight, spec(scheme)).to(torch.bfloat16)  # type: ignore[arg-type]
        layer.to(torch.bfloat16)[0].weight = nn.Parameter(held, requires_grad=False)
    x = torch.randn(20, 64, device=device, dtype=torch.bfloat16)
    bias = projection.bias.to(torch.bfloat16)  # type: ignore[union-attr]
    found = make_quantized(projection, scheme, torch.bfloat16).linear(x, bias)
    expected = torch.cat([layer(x) for layer in layers], 1)
    # torchao rounds scales to bf16 there, we only their products with codes; rounding to int4 costs twenty times more.
    assert relative_error(found, expected) < 3e-3


@pytest.mark.parametrize("scheme", INT4)
def test_a_projection_in_training_is_torchaos_fake_quantised_linear(device: str, scheme: str) -> None:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    projection = make_projection(device=device)
    projection.weight.requires_grad_()  # type: ignore[union-attr]
    layers = make_linears(projection, projection.effective())
    for layer in layers:
        quantize_(layer, QATConfig(make_config(spec(scheme)), step="prepare"))
    projection.quantizer = QuantizedProduct(spec(scheme))
    x = torch.randn(20, 64, device=device, requires_grad=True)
    x_there = x.detach().clone().requires_grad_()
    grad = torch.randn(20, 80, device=device)
    found, expected = projection(x), torch.cat([layer(x_there) for layer in layers], 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, x_there.grad, rtol=1e-5, atol=1e-6)
    there = torch.cat([layer[0].weight.grad for layer in layers])  # type: ignore[misc]
    torch.testing.assert_close(projection.weight.grad, there, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("scheme", INT4)
def test_adapters_get_the_gradient_that_torchao_gives_the_weight_they_are_folded_into(scheme: str) -> None:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    projection = make_projection()
    add_adapters(projection)
    layers = make_linears(projection, projection.effective())
    for layer in layers:
        quantize_(layer, QATConfig(make_config(spec(scheme)), step="prepare"))
    projection.quantizer = QuantizedProduct(spec(scheme))
    x, grad = torch.randn(20, 64), torch.randn(20, 80)
    projection(x).backward(grad)
    torch.cat([layer(x) for layer in layers], 1).backward(grad)
    for (_, _, lora), layer in zip(projection.loras(), layers, strict=True):
        there: Any = layer[0].weight.grad  # type: ignore[union-attr]
        # W + 2 B A: dA = 2 B^T dW, dB = 2 dW A^T.
        torch.testing.assert_close(lora.a.grad, 2 * lora.b.detach().t() @ there, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lora.b.grad, 2 * there @ lora.a.detach().t(), rtol=1e-4, atol=1e-5)


def test_quantisation_after_qat_is_torchaos_own_conversion() -> None:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    projection = make_projection()
    add_adapters(projection)
    config = make_config(spec("int4"))
    layers = make_linears(projection, projection.effective())
    for layer in layers:
        quantize_(layer, QATConfig(config, step="prepare"))
        quantize_(layer, QATConfig(config, step="convert"))
    there = torch.cat([layer[0].weight.dequantize() for layer in layers])  # type: ignore[operator, misc]
    assert torch.equal(quantize_weight(projection.effective(), spec("int4")).dequantize(), there)


def load(folders: Any, name: str, **more: Any) -> Any:
    return load_model(folders(name)[0], **more)


def run(model: Any, lengths: list[int]) -> torch.Tensor:
    batch = make_batch(make_rows(lengths), device=model.device)
    return model.head(model.hidden(batch.ids_T, batch.layout))


@pytest.fixture(params=["llama-tied", "qwen3", "gpt2"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("scheme", INT4)
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_what_is_judged_is_bit_for_bit_what_was_trained(
    hf_folders: Any, name: str, scheme: str, kind: str
) -> None:
    model = load(hf_folders, name, trainable=kind == "full")
    if kind != "full":
        add_lora(model, LoraSpec(name="lora", rank=4, dora=kind == "dora"), seed=0)
        for projection in model.projections():
            for _, _, lora in projection.loras():
                nn.init.normal_(lora.b, std=0.05)
    plain = run(model, [9, 30]).detach()
    fake_quantize_model(model, spec(scheme))
    trained = run(model, [9, 30]).detach()
    quantize_model(model, spec(scheme))
    with torch.no_grad():
        judged = run(model, [9, 30])
    torch.testing.assert_close(judged, trained, rtol=0, atol=2e-6 if name == "gpt2" else 0)
    assert (judged - plain).abs().max() > 1e-3  # it is quantised


def test_in_bf16_what_is_judged_is_what_was_trained_too(hf_folders: Any) -> None:
    model = load(hf_folders, "qwen3", dtype=torch.bfloat16)
    add_lora(model, LoraSpec(name="lora", rank=4), seed=0)
    fake_quantize_model(model, spec("int8-int4"))
    trained = run(model, [9, 30]).detach()
    quantize_model(model, spec("int8-int4"))
    with torch.no_grad():
        assert torch.equal(run(model, [9, 30]), trained)


def test_masters_are_rounded_as_they_are_saved_before_they_are_quantised(
    hf_folders: Any, tmp_path: Path
) -> None:
    folder = hf_folders("qwen3")[0]
    model = load(hf_folders, "qwen3", dtype=torch.bfloat16, trainable=True)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.mul_(1 + 1e-3 * torch.rand_like(parameter))  # no longer numbers that bf16 has
    fake_quantize_model(model, spec("int4"))
    trained = run(model, [9, 30]).detach()
    save_model(model, tmp_path, source_folder=folder, dtype=torch.bfloat16)
    judged = load_model(tmp_path, dtype=torch.bfloat16)
    quantize_model(judged, spec("int4"))
    with torch.no_grad():
        assert torch.equal(run(judged, [9, 30]), trained)


def test_a_step_of_training_moves_what_is_trained(hf_folders: Any, device: str) -> None:
    model = load(hf_folders, "qwen3", device=device)
    add_lora(model, LoraSpec(name="lora", rank=4), seed=0)
    fake_quantize_model(model, spec("int8-int4"))
    model.num_recomputed = 1
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        batch = make_batch(make_rows([20, 33]), device=model.device)
        loss = sft_loss(model.train(), batch)
        (loss.total / batch.num_targets).backward()
        losses.append(loss.total.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.98 * losses[0]


def test_without_its_adapters_a_model_in_training_is_the_base_as_it_is(hf_folders: Any) -> None:
    model = load(hf_folders, "qwen3")
    with torch.no_grad():
        base = run(model, [12])
        add_lora(model, LoraSpec(name="lora", rank=4), seed=0)
        fake_quantize_model(model, spec("int4"))
        assert not torch.equal(run(model, [12]), base)
        set_enabled(model, False)
        assert torch.equal(run(model, [12]), base)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_models_scores_do_not_depend_on_the_batch(hf_folders: Any, scheme: str) -> None:
    model = load(hf_folders, "qwen3")
    quantize_model(model, spec(scheme))
    rows = make_rows([5, 40, 17, 23])
    together = [score.nll for score in score_rows(model, rows)]
    assert together == [score.nll for row in rows for score in score_rows(model, [row])]


def _saved_bytes(projection: Projection, x: torch.Tensor) -> int:
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.data_ptr() != x.data_ptr():
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = projection(x)
    assert output.requires_grad
    return sum(kept.values())


def test_only_the_rounded_weight_is_kept_for_backward() -> None:
    projection = make_projection()
    add_adapters(projection)
    projection.quantizer = QuantizedProduct(spec("int4"))
    # One matrix of 80 x 64 in the compute dtype; torchao's rounding alone would keep several.
    assert _saved_bytes(projection, torch.randn(20, 64, requires_grad=True)) <= 80 * 64 * 4 + 256


@pytest.mark.parametrize(
    ("quantize", "bits", "inputs_per_scale"),
    [(spec("int8"), 8, None), (spec("fp8"), 8, None), (spec("int4"), 4, 32), (spec("int8-int4"), 4, 32),
     (spec("int4", group_size=32), 4, 32)],
)  # fmt: skip
def test_the_size_is_codes_scales_and_the_rest_as_the_checkpoint_stores_it(
    hf_folders: Any, quantize: QuantizeSpec, bits: int, inputs_per_scale: int | None
) -> None:
    model = load(hf_folders, "qwen3")  # stored in fp32
    dense = sum(tensor.numel() for _, tensor in model.weights())
    shapes = [(p.out_features, p.in_features) for p in model.projections()]
    linear = sum(outputs * inputs for outputs, inputs in shapes)
    scales = sum(outputs * (inputs // (inputs_per_scale or inputs)) for outputs, inputs in shapes)
    quantize_model(model, quantize)
    assert count_stored_bytes(model) == 4 * (dense - linear) + linear * bits // 8 + 4 * scales


def test_groups_that_do_not_fit_are_refused_with_one_that_does(hf_folders: Any) -> None:
    model = load(hf_folders, "qwen3")
    with pytest.raises(
        ModelError, match=r"64 inputs, which do not divide into groups of 128. Write group_size: 64"
    ):
        fake_quantize_model(model, spec("int4", group_size=128))
    with pytest.raises(ModelError, match="do not divide into groups of 128"):
        quantize_model(model, spec("int8-int4", group_size=128))


def test_without_torchao_the_cure_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(SetupError, match=r"^method\.qat: needs torchao.*pip install 'tunesmith\[quant\]'$"):
        check_torchao(place="method.qat")

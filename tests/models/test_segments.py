"""What a GPU trains with is the block it stands for: losses and gradients of segments.py, plain and compiled.

Everything here runs on a CPU too, where nothing but these tests asks for segments.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from segment_tools import ROWS, assert_equal, assert_rounds_no_worse, compute_loss, open_model
from tiny_models import VARIATIONS, make_rows, relative_error
from torch import nn

from tunesmith.methods.sft import sft_loss
from tunesmith.models.layout import make_batch
from tunesmith.models.lora import merge, set_enabled
from tunesmith.models.memory import Level
from tunesmith.models.segments import Segments

# Of a bf16 number: how far rounding once may move it.
HALF_STEP = 2**-9
LEAST = {torch.float32: 1e-5, torch.bfloat16: HALF_STEP}


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("name", VARIATIONS)
def test_segments_are_the_block(folders: Any, device: str, name: str, rank: int) -> None:
    folder, _ = folders(name)
    expected = compute_loss(open_model(folder, rank=rank))
    model = open_model(folder, rank=rank, device=device)
    model.segments = Segments(compiled=False)
    assert_equal(compute_loss(model, device=device), expected, 1e-4 if device == "cuda" else 1e-5)


@pytest.mark.parametrize(
    ("base", "compute"), [("nf4", "auto"), ("nf4", "fp8"), ("int8", "auto"), ("fp8", "auto")]
)
def test_packed_bases_give_the_gradients_of_the_block(
    folders: Any, device: str, base: Any, compute: Any
) -> None:
    folder, _ = folders("llama-biases")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    options: dict[str, Any] = {"rank": 4, "base": base, "compute": compute, "device": device, "dtype": dtype}
    model = open_model(folder, **options)
    model.segments = None
    expected = compute_loss(model, device=device)
    model = open_model(folder, **options)
    model.segments = Segments(compiled=False)
    found = compute_loss(model, device=device)
    fp8 = "fp8" in (base, compute)
    if device == "cpu" and not fp8:
        assert_equal(found, expected, 1e-5)
        return
    # Sums in another order are rounded otherwise, and put codes of fp8 on the other side of a boundary: what rounding
    # costs is the measure.
    exact = compute_loss(open_model(folder, rank=4, **({} if fp8 else {"base": base})))
    assert_rounds_no_worse(found, expected, exact, factor=1.5 if fp8 else 1.2, least=HALF_STEP)


@pytest.mark.parametrize(
    "levels",
    [
        ("cheap",) * 3,
        ("recompute",) * 3,
        ("offload",) * 3,
        ("offload", "cheap", "keep"),
        ("recompute", "offload", "cheap"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("options", [{}, {"base": "nf4"}, {"base": "fp8"}, {"rank": 0}], ids=str)
@pytest.mark.parametrize("name", ["gemma3", "llama-biases"])
@pytest.mark.parametrize("segments", [None, Segments(compiled=False)], ids=["block", "segments"])
def test_what_a_block_keeps_changes_no_bit_of_a_gradient(
    folders: Any, segments: Segments | None, name: str, options: dict[str, Any], levels: tuple[Level, ...]
) -> None:
    folder, _ = folders(name)
    model = open_model(folder, **{"rank": 4, **options})
    model.segments = segments
    expected = compute_loss(model)
    model.levels = levels
    found = compute_loss(model)
    assert found.keys() == expected.keys()
    for parameter, tensor in found.items():
        assert torch.equal(tensor, expected[parameter]), parameter


def test_a_block_that_draws_draws_the_same_when_it_is_computed_again(folders: Any) -> None:
    folder, _ = folders("llama-biases")
    model = open_model(folder, rank=4)
    model.segments = Segments(compiled=False)
    for projection in model.projections():
        projection.dropout = 0.3
    found = []
    for levels in (("keep",) * 3, ("recompute",) * 3, ("offload", "cheap", "cheap")):
        model.levels = levels
        torch.manual_seed(3)
        found.append(compute_loss(model))
    for name, tensor in found[0].items():
        assert all(torch.equal(other[name], tensor) for other in found[1:]), name


@pytest.mark.parametrize("num_recomputed", [1, 3])
@pytest.mark.parametrize("segments", [None, Segments(compiled=False)], ids=["block", "segments"])
def test_recomputed_blocks_keep_less(folders: Any, segments: Segments | None, num_recomputed: int) -> None:
    folder, _ = folders("gemma3")
    model = open_model(folder, rank=4)
    model.segments = segments
    saved = [0, 0]

    def count(at: int) -> dict[str, torch.Tensor]:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[at] += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return compute_loss(model)

    expected = count(0)
    model.levels = tuple("recompute" if block < num_recomputed else "keep" for block in range(3))
    found = count(1)
    assert_equal(found, expected, 1e-6)
    # Hooks of the inside of a checkpoint are its own: what it keeps is not seen here, its input excepted.
    assert saved[1] < saved[0] * (1 - 0.25 * num_recomputed)


@pytest.mark.parametrize("targets", [["k_proj", "up_proj"], ["q_proj", "v_proj", "gate_proj", "down_proj"]])
def test_parts_without_an_adapter_get_none(folders: Any, targets: list[str]) -> None:
    folder, _ = folders("llama-biases")
    expected = compute_loss(open_model(folder, rank=4, targets=targets))
    model = open_model(folder, rank=4, targets=targets)
    model.segments = Segments(compiled=False)
    assert_equal(compute_loss(model), expected, 1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize(
    ("device", "rank", "options"),
    [
        ("cpu", 4, {}),
        *(
            pytest.param("cuda", rank, options, marks=pytest.mark.gpu)
            for rank, options in [
                (0, {}),
                (4, {}),
                (4, {"base": "int8"}),
                (4, {"base": "nf4"}),
                (4, {"base": "nf4", "compute": "fp8"}),
                (4, {"base": "fp8"}),
            ]
        ),
    ],
)
def test_the_compiler_sees_each_function_once_and_changes_no_gradient(
    folders: Any, device: str, rank: int, options: dict[str, Any]
) -> None:
    """Torch 2.11 compiles some functions to wrong gradients without a word; this is what would tell."""
    from torch._dynamo.utils import counters

    folder, _ = folders("qwen3")
    dtypes = [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        exact = compute_loss(open_model(folder, rank=rank))
        plain = open_model(folder, rank=rank, device=device, dtype=dtype, **options)
        plain.segments = Segments(compiled=False)
        expected = compute_loss(plain, device=device)
        model = open_model(folder, rank=rank, device=device, dtype=dtype, **options)
        torch._dynamo.reset()
        counters.clear()
        model.segments = Segments(compiled=True)
        found = compute_loss(model, device=device)
        # The block's three parts, and cross-entropy where score_kernel.py does not take it.
        assert counters["stats"]["unique_graphs"] == (4 if device == "cpu" else 3)
        # What is stored in few bits is wrong by itself, and codes of fp8 fall on either side of a boundary.
        factor = 1.5 if "fp8" in options.values() else 1.2
        assert_rounds_no_worse(found, expected, exact, factor=factor, least=LEAST[dtype])
        for lengths in ([25, 40, 3], [90, 18]):  # other lengths: at most one more graph each, for all lengths
            compute_loss(model, lengths, device=device)
        assert counters["stats"]["unique_graphs"] <= 8
    torch._dynamo.reset()


def test_the_joined_weight_follows_its_adapters(folders: Any) -> None:
    folder, _ = folders("qwen2")
    models = [open_model(folder, rank=4) for _ in range(2)]
    models[1].segments = Segments(compiled=False)
    losses: list[list[float]] = [[], []]
    for model, seen in zip(models, losses, strict=True):
        optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=0.02)
        for _ in range(4):
            total = sft_loss(model, make_batch(make_rows(ROWS))).total
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(total.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < 0.9 * losses[0][0]
    # One copy of the weight, and what reads it elsewhere reads the same.
    projection = next(models[1].projections())
    joined = projection.tensors().weight
    assert isinstance(joined, torch.Tensor)
    assert projection.weight is not None
    assert projection.weight.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
    batch = make_batch(make_rows(ROWS))
    for change in (lambda model: set_enabled(model, False), lambda model: set_enabled(model, True), merge):
        hidden = []
        for model in models:
            change(model)
            with torch.no_grad():
                hidden.append(model.hidden(batch.ids_T, batch.layout))
        assert relative_error(hidden[1], hidden[0]) < 1e-4
    for model in models:
        assert all(isinstance(p.weight, nn.Parameter) and not p.loras() for p in model.projections())


def test_refreshing_a_model_is_what_its_passes_would_do(folders: Any) -> None:
    folder, _ = folders("qwen2")
    models = [open_model(folder, rank=3) for _ in range(2)]
    for model in models:
        model.segments = Segments(compiled=False)
        compute_loss(model)
        with torch.no_grad():
            for number, parameter in enumerate(model.trainable_parameters()):
                parameter.add_(0.01 * (number + 1))
    models[1].refresh()
    joined = [part._joined for part in models[1].projections()]
    expected = [part.tensors().weight for part in models[0].projections()]
    for found, wanted in zip(joined, expected, strict=True):
        assert found is not None
        assert isinstance(wanted, torch.Tensor)
        assert torch.equal(found, wanted)

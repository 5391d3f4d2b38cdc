"""Faults of torch's compiler that give wrong gradients without a word: whether this torch has them, and that what we
hand to a compiler is not touched by them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from segment_tools import assert_equal, compute_loss, open_model, relative_errors
from torch import Tensor

from tunesmith.models import segments as ours
from tunesmith.models.elementwise import norm_rms_plain
from tunesmith.models.fused import project_joined
from tunesmith.models.segments import BlockFunctions, Segments, score_chunk

# The compiler's own.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
# pytorch issues 180642 and 184113: right in 2.10, wrong in 2.11, right again in 2.13.
ENDS_IN_PLACE_IS_WRONG = (2, 11) <= VERSION < (2, 12)


class EndsInPlace(torch.autograd.Function):
    """x W^T + inner B^T, the second product added in place at the very end: the natural way to write LoRA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, inner: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(weight, inner, b)
        y = x @ weight.t()
        y.addmm_(inner, b.t())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, inner, b = ctx.saved_tensors
        return grad @ weight, None, grad @ b, grad.t() @ inner


def find_gradients(function: Callable[..., Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    out = function(*leaves)
    generator = torch.Generator(out.device).manual_seed(1)
    (out * torch.randn(out.shape, generator=generator, device=out.device)).sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def make_adapted(device: str) -> tuple[list[Tensor], Tensor]:
    """(x, A, B) and W."""
    generator = torch.Generator().manual_seed(0)
    x, a, b, weight = (
        torch.randn(s, generator=generator).to(device) for s in ((32, 24), (8, 24), (16, 8), (16, 24))
    )
    return [x, a, b], weight


def test_functions_that_end_in_place_are_compiled_wrongly_by_torch_2_11_only(device: str) -> None:
    given, weight = make_adapted(device)

    def adapted(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        out = EndsInPlace.apply(x, weight, x @ a.t(), b)
        assert isinstance(out, Tensor)
        return F.silu(out)

    torch._dynamo.reset()
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    errors = relative_errors(find_gradients(compiled, given), find_gradients(adapted, given))

    if ENDS_IN_PLACE_IS_WRONG:
        assert max(errors) > 0.5, "this torch 2.11 is repaired: tell docs/decisions/008 and fused.py"
    else:
        assert max(errors) < 1e-5, "this torch has the fault of 2.11: extend ENDS_IN_PLACE_IS_WRONG"


def test_our_joined_product_is_compiled_rightly(device: str) -> None:
    given, weight = make_adapted(device)

    def adapted(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.silu(project_joined(x, a, b, torch.cat((weight, b.detach()), 1)))

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.silu(x @ weight.t() + x @ a.t() @ b.t())

    torch._dynamo.reset()
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    assert max(relative_errors(find_gradients(compiled, given), find_gradients(plain, given))) < 1e-5


@pytest.mark.parametrize(
    ("rank", "options"),
    [
        (0, {}),
        (4, {}),
        (4, {"base": "int8"}),
        (4, {"base": "nf4"}),
        (4, {"base": "nf4", "compute": "fp8"}),
        (4, {"base": "fp8"}),
    ],
    ids=["full", "lora", "int8", "nf4", "nf4-fp8", "fp8"],
)
def test_what_a_compiler_makes_of_our_segments_has_eager_gradients(
    hf_folders: Any, device: str, rank: int, options: dict[str, Any]
) -> None:
    """Traced and differentiated as for a GPU, run without its code generator: the fault of 2.11 lies before that. What
    the generator adds is held to fp32 by test_segments.py, on a GPU."""
    folder = hf_folders("qwen3")[0]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    plain = open_model(folder, rank=rank, device=device, dtype=dtype, **options)
    plain.segments = Segments(compiled=False)
    traced = open_model(folder, rank=rank, device=device, dtype=dtype, **options)
    traced.segments = Segments(compiled=False)
    torch._dynamo.reset()
    compile_ = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    heads, finish, kept = plain.segments.keep
    traced.segments.keep = BlockFunctions(compile_(heads), compile_(finish), compile_(kept))
    traced.segments.score_chunk = compile_(score_chunk)

    # fp8 codes may fall on the other side of a boundary where a sum is rounded otherwise.
    bound = 0.03 if device == "cuda" or "fp8" in options.values() else 1e-5
    assert_equal(compute_loss(traced, device=device), compute_loss(plain, device=device), bound)
    torch._dynamo.reset()


@pytest.mark.gpu
def test_chained_norms_compiled_by_our_settings_have_eager_gradients(
    record_property: Callable[[str, object], None],
) -> None:
    """pytorch issue 193061: since 2.10 row and column sums of a backward pass may be fused into one kernel, which may
    leave parts of the column sums (gradients of norm weights) unwritten. Our settings switch that fusion off; whether
    this torch would be wrong with it is recorded beside the result."""
    import torch._inductor.config as inductor

    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(8192, 1024, generator=generator, device="cuda")
    scales = torch.randn(4, 1024, generator=generator, device="cuda")

    def chained(x: Tensor, scales: Tensor) -> Tensor:
        y = norm_rms_plain(x, scales[0], 1e-5)
        y = x + norm_rms_plain(y * (1 + scales[1]), scales[2], 1e-5)
        return y + norm_rms_plain(y * (1 + scales[1]) + scales[3], scales[2], 1e-5)

    wanted = find_gradients(chained, (x, scales))
    errors = {}
    for fused in (True, False):
        torch._dynamo.reset()
        compiled = ours._compile(chained)  # switches the fusion off
        if fused and hasattr(inductor.triton, "mix_order_reduction"):
            inductor.triton.mix_order_reduction = True
        errors[fused] = max(relative_errors(find_gradients(compiled, (x, scales)), wanted))
    record_property("error with mix-order reduction", errors[True])
    print(
        f"chained norms: {errors[True]:.2g} from eager with mix-order reduction, {errors[False]:.2g} without"
    )
    torch._dynamo.reset()
    assert not getattr(inductor.triton, "mix_order_reduction", False)
    assert errors[False] < 1e-4

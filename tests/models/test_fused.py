"""What lies between products, put together: values and gradients against plain torch, eager, compiled, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from segment_tools import interpret
from tiny_models import relative_error
from torch import Tensor

from tunesmith.models.elementwise import gate_plain, rotate_plain
from tunesmith.models.fused import open_gate, project_gated, project_joined, split_heads

HEADS, KEYS = 6, 2


def draw(*shapes: Sequence[int], device: str = "cpu", dtype: torch.dtype | None = None) -> list[Tensor]:
    """Normal values a third as large as their last axis makes products; fp64 on the CPU, else fp32, or `dtype`."""
    torch.manual_seed(0)
    dtype = dtype or (torch.float64 if device == "cpu" else torch.float32)
    return [
        (torch.randn(shape, dtype=torch.float64) * 3 / shape[-1] ** 0.5).to(device, dtype) for shape in shapes
    ]


def differentiate(
    function: Callable[..., Tensor], weight: Tensor, *inputs: Tensor, grad: Tensor
) -> list[Tensor]:
    """The output, and the gradient of every input; `weight` is frozen."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = function(weight, *leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], device: str) -> None:
    for number, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        assert relative_error(got, wanted) < (1e-12 if device == "cpu" else 1e-5), number


# Each case: shapes of weight and inputs for T tokens, width I or F, O outputs and R ranks; the plain definition of a
# gate's kind; what stands for it.


def joined_shapes(tokens: int, width: int, outputs: int, ranks: int) -> list[tuple[int, int]]:
    return [(outputs, width), (tokens, width), (ranks, width), (outputs, ranks)]


def joined_plain(weight: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x @ weight.t() + (x @ a.t()) @ b.t()


def run_joined(weight: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return project_joined(x, a, b, torch.cat((weight, b), 1).detach())


def gated_shapes(tokens: int, width: int, outputs: int, ranks: int) -> list[tuple[int, int]]:
    return [(outputs, width), (tokens, 2 * width), (ranks, width), (outputs, ranks)]


def gated_plain(kind: str) -> Callable[..., Tensor]:
    return lambda weight, opened, a, b: joined_plain(weight, gate_plain(opened, kind), a, b)


def run_gated(kind: str, keep: bool) -> Callable[..., Tensor]:
    def run(weight: Tensor, opened: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return project_gated(opened, a, b, torch.cat((weight, b), 1).detach(), kind, keep=keep)

    return run


def apart_shapes(tokens: int, width: int, outputs: int, ranks: int) -> list[tuple[int, int]]:
    return [*gated_shapes(tokens, width, outputs, ranks), (tokens, 2 * ranks), (2 * width, 2 * ranks)]


def apart_plain(kind: str) -> Callable[..., Tensor]:
    def run(weight: Tensor, opened: Tensor, a: Tensor, b: Tensor, inner: Tensor, opening: Tensor) -> Tensor:
        return joined_plain(weight, gate_plain(opened + inner @ opening.t(), kind), a, b)

    return run


def run_apart(kind: str, keep: bool) -> Callable[..., Tensor]:
    def run(weight: Tensor, opened: Tensor, a: Tensor, b: Tensor, inner: Tensor, opening: Tensor) -> Tensor:
        gated, inner_TR = open_gate(opened, inner, opening, a, kind, keep=keep)
        return gated @ weight.t() + inner_TR @ b.t()

    return run


KINDS = ["silu", "gelu_tanh"]
CASES: dict[str, Any] = {
    "joined": (joined_shapes, lambda kind: joined_plain, lambda kind, keep: run_joined),
    "gated": (gated_shapes, gated_plain, run_gated),
    "apart": (apart_shapes, apart_plain, run_apart),
}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_plain_torch(
    device: str, name: str, kind: str, keep: bool
) -> None:
    make_shapes, make_plain, make = CASES[name]
    for sizes in ((37, 144, 48, 8), (64, 128, 32, 24), (17, 144, 16, 520)):  # the last: too many for a kernel
        *inputs, grad = draw(*make_shapes(*sizes), (sizes[0], sizes[2]), device=device)
        found = differentiate(make(kind, keep), *inputs, grad=grad)
        assert_same(found, differentiate(make_plain(kind), *inputs, grad=grad), device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("opens_adapted", [True, False])
def test_a_gate_that_no_adapter_reads_has_the_gates_gradient(
    device: str, kind: str, opens_adapted: bool
) -> None:
    opened, inner, b, grad = draw((37, 288), (37, 8), (288, 8), (37, 144), device=device)
    given = [opened, inner, b] if opens_adapted else [opened]

    def run(_: Tensor, opened: Tensor, inner: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        gated, nothing = open_gate(opened, inner, b, None, kind)
        assert nothing.shape == (37, 0)
        return gated

    def plain(_: Tensor, opened: Tensor, inner: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        return gate_plain(opened if inner is None or b is None else opened + inner @ b.t(), kind)

    found, expected = (differentiate(function, grad, *given, grad=grad) for function in (run, plain))
    assert_same(found, expected, device)


@pytest.mark.parametrize("name", ["gated", "apart"])
def test_what_is_not_kept_is_made_again(name: str) -> None:
    make_shapes, _, make = CASES[name]
    inputs = draw(*make_shapes(37, 144, 48, 8))
    sizes: dict[bool, int] = {}
    for keep in (True, False):
        saved: list[int] = []

        def pack(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            make("silu", keep)(inputs[0], *(tensor.requires_grad_() for tensor in inputs[1:]))
        sizes[keep] = sum(saved)
    # The gate's output, and the 8 columns beside it.
    assert sizes[True] - sizes[False] == 37 * (144 + (8 if name == "gated" else 0))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("name", CASES)
def test_a_compiler_passes_by(device: str, name: str) -> None:
    make_shapes, make_plain, make = CASES[name]
    *inputs, grad = draw(*make_shapes(37, 144, 48, 8), (37, 48), device=device)
    for keep in (True, False):
        found = differentiate(torch.compile(make("silu", keep), fullgraph=True), *inputs, grad=grad)
        assert_same(found, differentiate(make_plain("silu"), *inputs, grad=grad), device)
        torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_in_bf16_the_error_is_at_most_that_of_plain_bf16(name: str, kind: str) -> None:
    make_shapes, make_plain, make = CASES[name]
    shapes = [*make_shapes(515, 1024, 256, 16), (515, 256)]
    *inputs, grad = draw(*shapes)
    exact = differentiate(make_plain(kind), *inputs, grad=grad)
    *inputs, grad = draw(*shapes, device="cuda", dtype=torch.bfloat16)
    plain = differentiate(make_plain(kind), *inputs, grad=grad)
    for keep in (True, False):
        found = differentiate(make(kind, keep), *inputs, grad=grad)
        for got, theirs, wanted in zip(found, plain, exact, strict=True):
            assert relative_error(got.cpu(), wanted) < 1.2 * relative_error(theirs.cpu(), wanted)


# --- heads ------------------------------------------------------------------------------------------------------------


def make_heads(*, width: int, device: str, tokens: int = 19) -> list[Tensor]:
    """qkv (T, (H + 2N) d), cos and sin (T, 1, d/2), and gradients of q, k and v, which lie head by head."""
    qkv, angle, *grads = draw(
        (tokens, (HEADS + 2 * KEYS) * width),
        (tokens, 1, width // 2),
        *((heads, tokens, width) for heads in (HEADS, KEYS, KEYS)),
        device=device,
    )
    return [qkv, angle.cos(), angle.sin(), *(grad.transpose(0, 1) for grad in grads)]


def run_heads(operands: list[Tensor], split: Any = split_heads) -> list[Tensor]:
    """q, k, v and the gradient of qkv."""
    qkv, cos, sin, *grads = operands
    qkv = qkv.detach().clone().requires_grad_()
    found = split(qkv, cos, sin, HEADS, KEYS)
    return [*(tensor.detach() for tensor in found), *torch.autograd.grad(found, qkv, grads)]


def split_plain(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, ...]:
    heads = qkv.unflatten(1, (num_heads + 2 * num_kv_heads, -1))
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
    return rotate_plain(q, cos, sin), rotate_plain(k, cos, sin), v


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("width", [8, 24, 128])
def test_heads_and_their_gradient_are_those_of_plain_torch(device: str, width: int) -> None:
    operands = make_heads(width=width, device=device)
    expected = run_heads(operands, split_plain)
    assert_same(run_heads(operands), expected, device)
    assert_same(run_heads(operands, torch.compile(split_heads, fullgraph=True)), expected, device)
    torch._dynamo.reset()


# --- the kernels without a GPU ----------------------------------------------------------------------------------------

INTERPRETED = """
import torch
from test_fused import draw, make_heads, run_heads, split_plain
from tunesmith.models import fused_kernels
from tunesmith.models.elementwise import gate_plain

for tokens, width, ranks, opening in ((37, 144, 8, 0), (64, 128, 24, 16), (5, 300, 0, 8), (5, 300, 0, 0)):
    shapes = (tokens, 2 * width), (tokens, width + ranks), (ranks, width)
    shapes = *shapes, (tokens, opening + 1), (2 * width, opening + 1)
    opened, both, a, inner, b = (tensor.float() for tensor in draw(*shapes))
    grad, grad_inner = both[:, :width], both[:, width:]
    inner, b = inner[:, :opening], b[:, :opening]
    whole = (opened + inner @ b.t()).requires_grad_()
    read, fed = (grad_inner, a) if ranks else (None, None), (inner, b) if opening else (None, None)
    for kind in ("silu", "gelu_tanh"):
        wide = torch.zeros(tokens, width + ranks)
        fused_kernels.gate_into(wide[:, :width], opened, *fed, kind)
        torch.testing.assert_close(wide[:, :width], gate_plain(whole, kind), rtol=1e-4, atol=1e-5)
        assert not wide[:, width:].any()
        found = fused_kernels.gate_gradient(grad, *read, opened, *fed, kind)
        expected, = torch.autograd.grad(gate_plain(whole, kind), whole, grad + grad_inner @ a)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if ranks:
        torch.testing.assert_close(fused_kernels.add_product(both, grad_inner, a), grad + grad_inner @ a)

for width in (8, 24):
    qkv, cos, sin, *grads = (tensor.float() for tensor in make_heads(width=width, device="cpu"))
    expected = run_heads([qkv, cos, sin, *grads], split_plain)[-1]
    torch.testing.assert_close(fused_kernels.join_heads(*grads, cos, sin), expected)
"""


def test_the_kernels_compute_what_plain_torch_does() -> None:
    interpret(INTERPRETED)

"""The gate together with what reads it: values and gradients against plain torch, eager, compiled, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from segment_tools import interpret
from tiny_models import relative_error

from tunesmith.models.elementwise import gate_plain
from tunesmith.models.gated import open_gate, project_gated

NAMES = ("y", "opened", "a", "b")


def make_operands(
    *, tokens: int = 37, width: int = 144, outputs: int = 48, ranks: int = 8, device: str = "cpu"
) -> list[torch.Tensor]:
    """opened (T, 2F), A (R, F), B (O, R), W (O, F) and the output's gradient (T, O), fp64 on the CPU, else fp32."""
    torch.manual_seed(0)
    shapes = [(tokens, 2 * width), (ranks, width), (outputs, ranks), (outputs, width), (tokens, outputs)]
    scales = [1.5, 0.1, 0.1, 0.1, 1.0]
    made = [
        torch.randn(shape, dtype=torch.float64) * scale for shape, scale in zip(shapes, scales, strict=True)
    ]
    return made if device == "cpu" else [tensor.to(device, torch.float32) for tensor in made]


def run_plain(operands: list[torch.Tensor], kind: str) -> tuple[torch.Tensor, ...]:
    """Output and gradients by the definition."""
    opened, a, b = (tensor.detach().clone().requires_grad_() for tensor in operands[:3])
    gated = gate_plain(opened, kind)
    y = gated @ operands[3].t() + (gated @ a.t()) @ b.t()
    return y.detach(), *torch.autograd.grad(y, (opened, a, b), operands[4])


def run_joined(
    operands: list[torch.Tensor], kind: str, *, keep: bool, run: Any = project_gated
) -> tuple[torch.Tensor, ...]:
    opened, a, b = (tensor.detach().clone().requires_grad_() for tensor in operands[:3])
    joined = torch.cat((operands[3], operands[2]), 1)
    y = run(opened, a, b, joined, kind, keep=keep)
    return y.detach(), *torch.autograd.grad(y, (opened, a, b), operands[4])


def run_apart(operands: list[torch.Tensor], kind: str, *, keep: bool) -> tuple[torch.Tensor, ...]:
    opened, a, b = (tensor.detach().clone().requires_grad_() for tensor in operands[:3])
    gated, inner = open_gate(opened, a, kind, keep=keep)
    y = gated @ operands[3].t() + inner @ b.t()
    return y.detach(), *torch.autograd.grad(y, (opened, a, b), operands[4])


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("run", [run_joined, run_apart])
def test_output_and_gradients_are_those_of_plain_torch(device: str, run: Any, kind: str, keep: bool) -> None:
    for ranks in (8, 24):
        operands = make_operands(ranks=ranks, device=device)
        found, expected = run(operands, kind, keep=keep), run_plain(operands, kind)
        for name, got, wanted in zip(NAMES, found, expected, strict=True):
            assert relative_error(got, wanted) < (1e-12 if device == "cpu" else 1e-5), name


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_a_gate_without_adapters_has_the_gates_gradient(device: str, kind: str) -> None:
    opened = make_operands(device=device)[0].requires_grad_()
    gated, inner = open_gate(opened, None, kind)
    assert inner.shape == (37, 0)
    found, expected = (
        torch.autograd.grad(y.square().sum(), opened)[0] for y in (gated, gate_plain(opened, kind))
    )
    assert relative_error(found, expected) < (1e-12 if device == "cpu" else 1e-5)


@pytest.mark.parametrize("run", [run_joined, run_apart])
def test_what_is_not_kept_is_made_again(run: Any) -> None:
    operands = make_operands()
    sizes: dict[bool, int] = {}
    for keep in (True, False):
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            run(operands, "silu", keep=keep)
        sizes[keep] = sum(tensor.numel() for tensor in saved)
    # The gate's output, and the 8 columns beside it.
    assert sizes[True] - sizes[False] == 37 * (144 + (8 if run is run_joined else 0))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("keep", [True, False])
def test_a_compiler_passes_by(device: str, keep: bool) -> None:
    operands = make_operands(device=device)
    compiled = torch.compile(project_gated, fullgraph=True)
    found = run_joined(operands, "silu", keep=keep, run=compiled)
    for name, got, wanted in zip(NAMES, found, run_plain(operands, "silu"), strict=True):
        assert relative_error(got, wanted) < (1e-12 if device == "cpu" else 1e-5), name
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("keep", [True, False])
def test_in_bf16_the_error_is_at_most_that_of_plain_bf16(kind: str, keep: bool) -> None:
    sizes: Any = {"tokens": 515, "width": 1024, "outputs": 256, "ranks": 16}
    exact = run_plain(make_operands(**sizes), kind)
    rounded = [tensor.to("cuda", torch.bfloat16) for tensor in make_operands(**sizes)]
    plain = run_plain(rounded, kind)
    for run in (run_joined, run_apart):
        for name, got, theirs, wanted in zip(NAMES, run(rounded, kind, keep=keep), plain, exact, strict=True):
            assert relative_error(got.cpu(), wanted) < 1.2 * relative_error(theirs.cpu(), wanted), name


INTERPRETED = """
import torch
from tunesmith.models import gate_kernel
from tunesmith.models.elementwise import gate_plain

torch.manual_seed(0)
for tokens, width, ranks in ((37, 144, 8), (64, 128, 24), (5, 300, 0)):
    opened = torch.randn(tokens, 2 * width) * 1.5
    for kind in ("silu", "gelu_tanh"):
        wide = torch.zeros(tokens, width + ranks)
        gate_kernel.gate_into(wide[:, :width], opened, kind)
        torch.testing.assert_close(wide[:, :width], gate_plain(opened, kind), rtol=1e-5, atol=1e-6)
        assert not wide[:, width:].any()
        both = torch.randn(tokens, width + ranks)
        a = torch.randn(ranks, width)
        grad, inner = both[:, :width], both[:, width:]
        found = gate_kernel.gate_gradient(grad, inner if ranks else None, a if ranks else None, opened, kind)
        leaf = opened.clone().requires_grad_()
        expected, = torch.autograd.grad(gate_plain(leaf, kind), leaf, grad + inner @ a)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
"""


def test_the_kernels_compute_what_plain_torch_does() -> None:
    interpret(INTERPRETED)

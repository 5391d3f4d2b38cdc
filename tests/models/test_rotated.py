"""Rotated heads out of one projection: values and gradient against plain torch, eager, compiled, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from segment_tools import interpret
from tiny_models import relative_error

from tunesmith.models.elementwise import rotate_plain
from tunesmith.models.rotated import split_heads

HEADS, KEYS = 6, 2


def make_operands(*, width: int, device: str, tokens: int = 19) -> list[torch.Tensor]:
    """qkv (T, (H + 2N) d), cos and sin (T, 1, d/2), and gradients of q, k and v, which lie head by head."""
    torch.manual_seed(0)
    qkv = torch.randn(tokens, (HEADS + 2 * KEYS) * width, dtype=torch.float64)
    angle = torch.randn(tokens, 1, width // 2, dtype=torch.float64)
    grads = [
        torch.randn(heads, tokens, width, dtype=torch.float64).transpose(0, 1)
        for heads in (HEADS, KEYS, KEYS)
    ]
    made = [qkv, angle.cos(), angle.sin(), *grads]
    return made if device == "cpu" else [tensor.to(device, torch.float32) for tensor in made]


def run(operands: list[torch.Tensor], split: Any = split_heads) -> list[torch.Tensor]:
    """q, k, v and the gradient of qkv."""
    qkv, cos, sin, *grads = operands
    qkv = qkv.detach().clone().requires_grad_()
    found = split(qkv, cos, sin, HEADS, KEYS)
    return [*(tensor.detach() for tensor in found), *torch.autograd.grad(found, qkv, grads)]


def split_plain(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, num_kv_heads: int
) -> tuple[torch.Tensor, ...]:
    heads = qkv.unflatten(1, (num_heads + 2 * num_kv_heads, -1))
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
    return rotate_plain(q, cos, sin), rotate_plain(k, cos, sin), v


@pytest.mark.parametrize("width", [8, 24, 128])
def test_heads_and_their_gradient_are_those_of_plain_torch(device: str, width: int) -> None:
    operands = make_operands(width=width, device=device)
    for found, expected in zip(run(operands), run(operands, split_plain), strict=True):
        assert relative_error(found, expected) < (1e-14 if device == "cpu" else 1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # the compiler's own
def test_a_compiler_passes_by(device: str) -> None:
    operands = make_operands(width=16, device=device)
    compiled = torch.compile(split_heads, fullgraph=True)
    for found, expected in zip(run(operands, compiled), run(operands, split_plain), strict=True):
        assert relative_error(found, expected) < (1e-14 if device == "cpu" else 1e-6)
    torch._dynamo.reset()


INTERPRETED = """
import torch
from test_rotated import make_operands, run, split_plain
from tunesmith.models.rotate_kernel import join_heads

for width in (8, 24):
    qkv, cos, sin, *grads = (tensor.float() for tensor in make_operands(width=width, device="cpu"))
    expected = run([qkv, cos, sin, *grads], split_plain)[-1]
    torch.testing.assert_close(join_heads(*grads, cos, sin), expected)
"""


def test_the_kernel_computes_what_plain_torch_does() -> None:
    interpret(INTERPRETED)

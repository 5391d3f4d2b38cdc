"""The hand-written CPU passes equal the plain ops, forward and backward."""

from __future__ import annotations

import pytest
import torch
from tiny_models import relative_error

from tunesmith.models.attention import attend, attend_plain
from tunesmith.models.config import RopeConfig
from tunesmith.models.elementwise import (
    gate,
    gate_plain,
    make_inverse_frequencies,
    make_rotation,
    norm_rms,
    norm_rms_plain,
    rotate_plain,
)
from tunesmith.models.layout import make_layout


def _gradients(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    inputs = tuple(tensor.detach().clone().requires_grad_(True) for tensor in inputs)
    out = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    return [out.detach(), *(tensor.grad for tensor in inputs)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_norm_and_gate_equal_plain_ops(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 64).to(dtype), torch.rand(64).to(dtype)
    pairs = [
        (lambda a, w: norm_rms(a, w, 1e-5), lambda a, w: norm_rms_plain(a, w, 1e-5), (x, weight)),
        (gate, gate_plain, (x,)),
    ]
    for fast, plain, inputs in pairs:
        exact = _gradients(plain, *(tensor.double() for tensor in inputs))
        for found, wanted in zip(_gradients(fast, *inputs), exact, strict=True):
            assert relative_error(found, wanted) < tolerance


@pytest.mark.parametrize("window", [0, 9])
# Documents that begin as others do: some with document 0, one with a document that itself begins so.
@pytest.mark.parametrize(
    "sharing",
    [{}, {"shared": [0, 6, 6, 0], "hosts": [0] * 4}, {"shared": [0, 6, 9, 6], "hosts": [0, 0, 1, 0]}],
    ids=["apart", "with the first", "also with each other"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)])
def test_folded_attention_equals_plain_attention(
    dtype: torch.dtype, tolerance: float, sharing: dict[str, list[int]], window: int
) -> None:
    torch.manual_seed(0)
    layout = make_layout([7, 40, 12, 200], **sharing)
    qkv = torch.randn(layout.num_tokens, 4 + 2 * 2, 16).to(dtype)
    inverse = make_inverse_frequencies(RopeConfig(10000.0), 16)
    cos, sin = make_rotation(inverse, layout.positions_T, torch.float32)

    def plain(x: torch.Tensor) -> torch.Tensor:
        turned = rotate_plain(x[:, :6], cos, sin)
        return attend_plain(turned[:, :4], turned[:, 4:], x[:, 6:], layout, scale=0.25, window=window)

    def fast(x: torch.Tensor) -> torch.Tensor:
        return attend(x, cos.to(dtype), sin.to(dtype), layout, num_kv_heads=2, scale=0.25, window=window)

    for found, wanted in zip(_gradients(fast, qkv), _gradients(plain, qkv.double()), strict=True):
        assert relative_error(found, wanted) < tolerance


def test_long_documents_take_the_flash_path_and_agree() -> None:
    torch.manual_seed(0)
    layout = make_layout([600, 20])  # fp32: above the folded path's limit
    qkv = torch.randn(620, 4, 16)
    cos, sin = make_rotation(make_inverse_frequencies(RopeConfig(1e4), 16), layout.positions_T, torch.float32)
    together = attend(qkv, cos, sin, layout, num_kv_heads=1, scale=0.25, window=0)
    alone = attend(qkv[600:], cos[600:], sin[600:], make_layout([20]), num_kv_heads=1, scale=0.25, window=0)
    assert relative_error(together[600:], alone) < 1e-6


@pytest.mark.gpu
def test_varlen_attention_on_a_gpu_equals_plain_attention() -> None:
    from tunesmith.models.attention import attend_varlen

    torch.manual_seed(0)
    for window in (0, 9):
        layout = make_layout([7, 40, 200], device="cuda")
        q = torch.randn(247, 4, 64, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(247, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        plain = attend_plain(q.float(), k.float(), v.float(), layout, scale=0.125, window=window)
        assert relative_error(attend_varlen(q, k, v, layout, scale=0.125, window=window), plain) < 1e-2

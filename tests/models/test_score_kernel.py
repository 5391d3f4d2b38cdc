"""Cross-entropy and its gradient where the logits were: against the definition, `score_chunk`, in plain torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from segment_tools import interpret
from tiny_models import relative_error

from tunesmith.models.segments import score_chunk, score_chunk_in_place


def make_operands(rows: int, vocab: int, *, spread: float = 3.0) -> tuple[torch.Tensor, ...]:
    """Hidden states, head and targets, fp64; some targets are fillers."""
    torch.manual_seed(vocab)
    hidden, weight = torch.randn(rows, 64, dtype=torch.float64), torch.randn(vocab, 64, dtype=torch.float64)
    targets = torch.randint(vocab, (rows,))
    targets[::5] = -1
    targets[-1] = vocab - 1
    return hidden, weight * spread / 8, targets


INTERPRETED = """
import torch
from test_score_kernel import make_operands
from tunesmith.models import score_kernel
from tunesmith.models.segments import score_chunk

score_kernel._BLOCK = 64
for rows, vocab, spread in ((7, 40, 3), (3, 64, 3), (5, 1000, 3), (4, 257, 60)):
    hidden, weight, targets = make_operands(rows, vocab, spread=spread)
    expected, grad = score_chunk(hidden, weight, targets)
    wide = torch.zeros(rows, vocab + 3)
    wide[:, :vocab] = hidden @ weight.t()
    losses = score_kernel.score_in_place(wide[:, :vocab], targets)
    assert not losses[targets < 0].any() and not wide[targets < 0].any() and not wide[:, vocab:].any()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wide[:, :vocab].double(), grad, rtol=1e-4, atol=2e-5)
    wide[1] = float("nan")
    assert score_kernel.score_in_place(wide[:, :vocab], targets)[1].isnan()
"""


def test_the_kernel_computes_what_plain_torch_does() -> None:
    interpret(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [40, 257, 32000, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_as_near_the_truth_as_plain_torch(vocab: int, dtype: torch.dtype) -> None:
    operands = make_operands(200, vocab)
    exact_losses, exact = score_chunk(*operands)
    hidden, weight, targets = (tensor.cuda() for tensor in operands)

    def refuse(*_: Any) -> Any:
        raise AssertionError("there is no kernel")

    rounded = hidden.to(dtype), weight.to(dtype), targets
    plain_losses, plain = score_chunk(*rounded)
    losses, grad = partial(score_chunk_in_place, otherwise=refuse)(*rounded)
    assert grad.dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 1.2 * relative_error(plain, exact)
    assert relative_error(grad, exact) < bound
    assert relative_error(grad, plain) < (1e-5 if dtype == torch.float32 else 5e-3)
    assert relative_error(losses, plain_losses) < 1e-5
    assert relative_error(losses, exact_losses) < (1e-5 if dtype == torch.float32 else 2e-2)

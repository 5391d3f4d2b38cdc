"""What tests of segments.py and of the compiler share: a small model, its loss and every gradient."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_rows, relative_error

from tunesmith.job.spec import LoraSpec
from tunesmith.methods.sft import sft_loss
from tunesmith.models.decoder import Decoder
from tunesmith.models.layout import make_batch
from tunesmith.models.load import load_model
from tunesmith.models.lora import add_lora

ROWS = [20, 7, 33, 64]


def open_model(folder: Path, *, rank: int = 0, targets: Any = "all-linear", **options: Any) -> Decoder:
    """A decoder in training mode: adapters that are not zero, or all weights (rank 0)."""
    model = load_model(folder, trainable=not rank, **options)
    assert isinstance(model, Decoder)
    if rank:
        spec = LoraSpec(name="lora", rank=rank, targets=targets)
        add_lora(model, spec, seed=0)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.trainable_parameters():
                # Drawn on the CPU: the same on every device.
                parameter.add_((torch.randn(parameter.shape) * 0.05).to(parameter))
    model.train()
    return model


def compute_loss(
    model: Decoder, lengths: Sequence[int] = ROWS, *, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """The loss and every gradient."""
    total = sft_loss(model, make_batch(make_rows(list(lengths)), device=device)).total
    total.backward()
    found = {"loss": total.detach()}
    for name, parameter in model.named_trainable():
        assert parameter.grad is not None, name
        found[name], parameter.grad = parameter.grad, None
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert relative_error(tensor, expected[name]) < bound, name


def assert_rounds_no_worse(
    found: dict[str, torch.Tensor],
    plain: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    *,
    factor: float,
    least: float,
) -> None:
    """`found` is at most `factor` times as far from `exact` as plain code of the same precision; each single tensor,
    of which some are small and rounded well or badly by chance, at most half as far again.

    least: errors up to it count for nothing in the loss, one number that may be rounded to the truth by chance.
    """
    errors = {name: float(relative_error(found[name], exact[name])) for name in found}
    plain_errors = {name: float(relative_error(plain[name], exact[name])) for name in found}
    for name, error in errors.items():
        assert error < max(1.5 * factor * plain_errors[name], least if name == "loss" else 1e-5), name
    whole, plain_whole = (math.hypot(*values.values()) for values in (errors, plain_errors))
    assert whole < max(factor * plain_whole, least)


def relative_errors(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> list[float]:
    return [float(relative_error(f, w)) for f, w in zip(found, wanted, strict=True)]


def interpret(script: str) -> None:
    """Run a script in which Triton's interpreter runs kernels on CPU tensors; skip the test where Triton is missing.

    `pip install triton` brings it to any Linux. The interpreter does not round to bf16 and fp8 as a GPU does.
    """
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr

"""KTO's loss, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tunesmith.job.objective import KtoSpec
from tunesmith.methods.kto import kto_loss


def test_kto_by_hand() -> None:
    # beta 0.5, baseline 1: a good answer that gained 3 is worth sigmoid(1), a bad one that lost 1 sigmoid(1), too.
    spec = KtoSpec(name="kto", beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    found = kto_loss(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 0.0]), spec, baseline=torch.tensor(1.0))
    value = 1 / (1 + math.exp(-1))
    assert found.tolist() == pytest.approx([2 * (1 - value), 3 * (1 - value)], rel=1e-6)


def test_kto_begins_at_half() -> None:
    found = kto_loss(
        torch.zeros(2), torch.tensor([1.0, 0.0]), KtoSpec(name="kto"), baseline=torch.tensor(0.0)
    )
    assert found.tolist() == [0.5, 0.5]

"""DPO's and KTO's losses are TRL's on the same rows, computed by TRL's own trainers in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_rows

import cpu_vs_trl as bench
from tunesmith.core.types import RowGroup, TokenRow
from tunesmith.data.examples import WithNumber, flatten
from tunesmith.job.objective import DpoSpec, KtoSpec
from tunesmith.job.resolve import resolve_model
from tunesmith.job.spec import ModelSpec
from tunesmith.methods.objectives import (
    DESIRABLE,
    REFERENCE,
    KtoBaseline,
    answer_logps,
    make_objective,
    mismatch,
)
from tunesmith.models.layout import make_batch
from tunesmith.models.load import load_model
from tunesmith.models.weights import save_model

pytestmark = pytest.mark.trl

LABELS = [True, False, True, True, False, False, True, False]
# Our settings, and TRL's for the same.
DPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {"loss_type": ["sigmoid"]}),
    "ipo": ({"loss": "ipo"}, {"loss_type": ["ipo"]}),
    "hinge": ({"loss": "hinge"}, {"loss_type": ["hinge"]}),
    "robust": (
        {"loss": "robust", "label_smoothing": 0.1},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
    ),
    "normalised": ({"length_normalised": True}, {"loss_type": ["sigmoid_norm"]}),
}


def to_json(rows: list[TokenRow]) -> list[dict[str, Any]]:
    return [{"ids": list(row.ids), "mask": list(row.mask)} for row in rows]


def test_our_losses_are_theirs(tmp_path: Path) -> None:
    if not bench.TRL_PYTHON.exists():
        pytest.skip("TRL's environment is missing; run: make test-trl")
    base = resolve_model(ModelSpec(name="tunesmith/tiny")).folder
    policy, draw = load_model(base), torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=draw)
    save_model(policy, tmp_path / "policy", source_folder=base, dtype=torch.float32)
    policy, reference = load_model(tmp_path / "policy"), load_model(base)
    rows = make_rows([20, 31, 6, 9, 14, 40, 5, 17], vocab=2000)
    others = mismatch(rows)
    question = {
        "policy": str(tmp_path / "policy"),
        "reference": str(base),
        "rows": to_json(rows),
        "others": to_json(others),
        "labels": LABELS,
        "dpo": {name: theirs for name, (_, theirs) in DPO.items()},
        "kto": {"desirable_weight": 1.5, "undesirable_weight": 0.5},
    }
    (tmp_path / "question.json").write_text(json.dumps(question))
    answer = subprocess.run(
        [
            bench.TRL_PYTHON,
            "-W",
            "ignore",
            Path(__file__).with_name("ask_trl.py"),
            tmp_path / "question.json",
        ],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"},
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    theirs = json.loads(answer.stdout.splitlines()[-1])

    def run(model: Any, wanted: Any) -> torch.Tensor:
        with torch.no_grad():
            return answer_logps(model, make_batch(list(wanted)))

    pairs = WithNumber(
        [RowGroup(pair) for pair in zip(rows[::2], rows[1::2], strict=True)],
        REFERENCE,
        run(reference, rows).tolist(),
    )
    batch = make_batch(flatten(pairs))
    for name, (settings, _) in DPO.items():
        ours = make_objective(DpoSpec(name="dpo", beta=0.3, **settings)).loss(policy, batch).total / len(
            pairs
        )
        # Robust's two terms nearly cancel.
        assert ours.item() == pytest.approx(theirs[name], rel=2e-5, abs=5e-6), name
    spec = KtoSpec(name="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    known = WithNumber(rows, DESIRABLE, [float(label) for label in LABELS])
    known = list(WithNumber(known, REFERENCE, run(reference, rows).tolist()))
    measured = WithNumber(others, REFERENCE, run(reference, others).tolist())
    objective = make_objective(spec, baseline=KtoBaseline({row.row_id: row for row in measured}, run))
    assert objective.before_step is not None
    objective.before_step(policy, known)
    ours = objective.loss(policy, make_batch(known)).total / len(rows)
    assert ours.item() == pytest.approx(theirs["kto"], rel=2e-5)

"""One small comparison of frameworks, and what it left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.core.bundled import BUNDLED
from tunesmith.core.events import Event
from tunesmith.core.jsonl import read_json, read_jsonl
from tunesmith.core.parity import ParityRecord

# About twenty rows in steps of eight: each epoch ends with a smaller one. 1,300 tokens are four rows a forward pass.
TRAIN = {
    "epochs": 2, "batch_rows": 8, "micro_batch_tokens": 1300, "learning_rate": 1e-3, "weight_decay": 0.1,
    "clip_norm": 0.3, "schedule": "linear", "warmup": 0.34, "precision": "fp32",
}  # fmt: skip


def compare_arms(
    arms: list[Any],
    folder: Path,
    home: Path,
    *,
    on_event: Callable[[Event], None] | None = None,
    **train: Any,
) -> Path:
    """Compare them on the bundled model and 26 of its rows; returns the comparison's folder."""
    rows = (BUNDLED["tunesmith/tickets"] / "train.jsonl").read_text(encoding="utf-8").splitlines()[:26]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    job = {
        "model": "tunesmith/tiny",
        "data": {"train": str(folder / "rows.jsonl"), "split": {"validation": 0.1, "test": 0.1}},
        "method": {"name": "lora", "rank": 4},
        "train": TRAIN | train,
        "evaluate": {"max_rows": 2, "max_new_tokens": 2, "precision": "fp32", "forgetting": False},
        "compare": {"arms": arms, "seeds": [0]},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(home))
        tunesmith.compare(job, out=folder / "out", on_event=on_event or (lambda event: None))
    return folder / "out"


def read_parity(out: Path, arm: str) -> tuple[ParityRecord, ParityRecord]:
    """(the framework's, our own engine's)."""
    folder = out / "arms" / arm / "parity"
    theirs, ours = (read_json(folder / who / "parity.json") for who in ("parity", "reference"))
    return ParityRecord.from_json(theirs), ParityRecord.from_json(ours)


def read_steps(out: Path, arm: str) -> list[dict[str, Any]]:
    return [line for _, line in read_jsonl(out / "arms" / arm / "seed-0" / "steps.jsonl")]


def read_gates(out: Path, arm: str) -> list[str]:
    """What each parity gate says of an arm: `PASS`, or its name, word and figure."""
    gates = read_figures(out, arm)
    return [g["word"] if g["word"] == "PASS" else f"{g['name']}: {g['word']}, {g['says']}" for g in gates]


def read_figures(out: Path, arm: str) -> list[dict[str, Any]]:
    """The parity gates of an arm as they were stored."""
    return read_json(out / "gates.json")["arms"][arm]["gates"]

"""One small comparison in the native track, and what it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tunesmith
from tunesmith.core.bundled import BUNDLED
from tunesmith.core.comparison import Comparison
from tunesmith.core.jsonl import read_jsonl
from tunesmith.data.prepare import load_prepared


def read_tickets(count: int = 14) -> list[dict[str, Any]]:
    lines = (BUNDLED["tunesmith/tickets"] / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def join_tickets(count: int = 28) -> list[dict[str, Any]]:
    """Two tickets in a conversation: a system turn, and two answers."""
    turns = [row["messages"] for row in read_tickets(count)]
    return [{"messages": [*a, *b[1:]]} for a, b in zip(turns[::2], turns[1::2], strict=True)]


def compare_native(
    folder: Path, rows: list[dict[str, Any]], *, framework: str = "trl", samples: bool = True, **data: Any
) -> Comparison:
    """Train LoRA with one framework on `rows`, whose own preprocessing it is; into `folder`/out."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arm = {"method": "lora", "framework": framework}
    job = {
        "model": "tunesmith/tiny",
        "data": {
            "train": str(folder / "rows.jsonl"), "split": {"validation": 0.1, "test": 0.15}, **data
        },
        "method": {"name": "lora", "rank": 2},
        "train": {"epochs": 1, "batch_rows": 4, "learning_rate": 1e-3, "precision": "fp32"},
        "evaluate": {"max_rows": 1, "max_new_tokens": 1, "precision": "fp32", "forgetting": False},
        "compare": {"arms": [arm], "seeds": [0], "track": "native", "samples": samples},
    }  # fmt: skip
    return tunesmith.compare(job, out=folder / "out")


def read_both(
    folder: Path, framework: str = "trl"
) -> list[tuple[list[int], list[int], list[int], list[int]]]:
    """(our ids, our mask, the framework's ids, its labels) of each row."""
    ours = load_prepared(folder / "out" / "prepared").rows("train")
    parity = folder / "out" / "arms" / f"lora-{framework}" / "parity" / "parity"
    theirs = {line["row"]: line for _, line in read_jsonl(parity / "framework" / "native.jsonl")}
    return [
        (list(row.ids), list(row.mask), theirs[number]["input_ids"], theirs[number]["labels"])
        for number, row in enumerate(ours)
    ]


def kinds(comparison: Comparison, framework: str = "trl") -> dict[str, tuple[int, int]]:
    """Rows and tokens of each difference."""
    return {kind.name: (kind.rows, kind.tokens) for kind in comparison.native[f"lora-{framework}"].kinds}


def gates(comparison: Comparison, framework: str = "trl") -> dict[str, str]:
    return {gate.name: gate.word for gate in comparison.parity[f"lora-{framework}"].gates}

"""Prompting, LoRA and full fine-tuning of a small real model on rows of databricks-dolly-15k, end to end.

The path of recipes/dolly-small.yaml on what fits a laptop and needs no network: `compare` on the first 1,000 rows of a
copy of dolly and a model folder, with a learning-rate search equal for both trained arms.

    .venv/bin/python benchmarks/real_rows.py                              (minutes on one core)
    .venv/bin/python benchmarks/real_rows.py --model FOLDER --data FILE   (yours)

Writes benchmarks/results/real_rows.json and the table of docs/recipes.md.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.api import compare, comparison_json, report_markdown
from tunesmith.core.events import Event
from tunesmith.core.fingerprint import describe_hardware, describe_versions, hash_bytes
from tunesmith.core.jsonl import write_json

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "real_rows.json"
PAGE = ROOT / "docs" / "recipes.md"
SHARED = Path(os.environ.get("TUNESMITH_SHARED") or ROOT.parent / "shared" / "data")
SEEDS = [0, 1]
_MARKS = re.compile(r"(<!-- real rows: begin[^>]*-->\n).*?(<!-- real rows: end -->)", re.DOTALL)


def make_job(model: Path, rows: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": {
            "train": str(rows),
            "split": {"validation": 0.1, "test": 0.2},
            "max_tokens": 512,
            # The base has no chat template of its own, and no vocabulary to waste on markers.
            "template": "alpaca",
        },
        "train": {"epochs": 2, "batch_rows": 16, "precision": "fp32"},
        "evaluate": {"metrics": [], "precision": "fp32"},
        "compare": {
            # The rates that `auto` knows are for wider models: on this one the search ended at its upper edge.
            "arms": [
                "zero-shot",
                {"name": "lora", "method": {"name": "lora", "rank": 16}, "learning_rate": 0.02},
                {"name": "full", "method": "full", "learning_rate": 0.006},
            ],
            "seeds": SEEDS,
            "metric": "nll",
            "tune": {"trials": 3, "factor": 3.0},
        },
    }


def tell(event: Event) -> None:
    if event.kind in ("warning", "note") or (event.kind == "progress" and not event.done):
        print(f"{event.task} {event.text}".strip(), file=sys.stderr, flush=True)


def write_page(text: str) -> None:
    before = PAGE.read_text(encoding="utf-8")
    after, count = _MARKS.subn(lambda marks: f"{marks[1]}\n{text.strip()}\n\n{marks[2]}", before)
    assert count == 1, PAGE
    PAGE.write_text(after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "tinystories-656k")
    parser.add_argument("--data", type=Path, default=SHARED / "sft" / "dolly_part_no_context.jsonl")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    for path in (args.model, args.data):
        if not path.exists():
            sys.exit(f"{path}: not found; give --model and --data, or set TUNESMITH_SHARED")
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        with args.data.open("rb") as source:
            rows.write_bytes(b"".join(islice(source, args.rows)))
        run = Path(scratch) / "run"
        comparison = compare(make_job(args.model, rows), out=run, on_event=tell)
        public = comparison_json(comparison, run) | {"report": None}
        write_json(
            args.out,
            public
            | {
                "command": f"benchmarks/real_rows.py --rows {args.rows}",
                "model": args.model.name,
                "data": f"{args.data.name}, first {args.rows} rows",
                "data_sha256": hash_bytes(rows.read_bytes()),
                "seeds": SEEDS,
                "versions": describe_versions(),
                "hardware": describe_hardware(),
            },
        )
    table = report_markdown(comparison)
    if args.out == RESULT:
        write_page(table)
    print(table)


if __name__ == "__main__":
    main()

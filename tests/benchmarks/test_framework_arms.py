"""What docs/benchmarks.md shows of framework_arms.py: a table of arms, and nothing where it was not run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from framework_arms import describe_command, read_section


def make_arm(name: str, framework: str, nll: list[float], parity: dict[str, str] | None) -> dict[str, Any]:
    status = "done" if nll else "missing"
    return {
        "name": name,
        "framework": framework,
        "status": status,
        "per_seed": {"nll": nll},
        "parity": parity,
    }


def make_record() -> dict[str, Any]:
    gates = {"tokens": "PASS", "loss": "PASS", "curve": "FAIL"}
    return {
        "command": "python benchmarks/framework_arms.py --python trl=PYTHON",
        "hardware": {"cpu": "a CPU", "gpu": "a GPU"},
        "versions": {"commit": "abc"},
        "date": "2026-01-02T03:04:05Z",
        "comparison": {
            "arms": [
                make_arm("lora", "tunesmith", [1.5, 1.25, 1.75], None),
                make_arm("lora-trl", "trl", [1.5], gates),
                make_arm("lora-axolotl", "axolotl", [], None),
            ]
        },
        "runs": {
            "lora seed-0": {
                "tokens_per_second": 1000.0,
                "memory": {"allocated": 2**30, "resident": 5 * 2**30},
            },
            "lora seed-1": {"tokens_per_second": 3000.0, "memory": {"allocated": 2**30}},
            "lora seed-2": {"tokens_per_second": 2000.0, "memory": {"allocated": 2**31}},
            "lora-trl seed-0": {"tokens_per_second": None, "memory": {"resident": 3 * 2**30}},
        },
    }


def test_arms_are_shown_with_gates_and_the_spread_over_seeds(tmp_path: Path) -> None:
    (tmp_path / "arms.json").write_text(json.dumps(make_record()))
    section = read_section(tmp_path / "arms.json")
    assert "a GPU, commit `abc`, 2026-01-02." in section
    assert section.splitlines()[-3:] == [
        "| lora (tunesmith) |  | 1.5000 (1.2500 to 1.7500) | 2,000 (1,000 to 3,000) | 1.00 (1.00 to 2.00) |",
        "| lora-trl (trl) | PASS: tokens, loss; FAIL: curve | 1.5000 |  | 3.00 |",
        "| lora-axolotl (axolotl), missing |  |  |  |  |",
    ]


def test_nothing_is_shown_of_what_was_not_run(tmp_path: Path) -> None:
    assert read_section(tmp_path / "none.json") == ""


def test_the_command_has_every_option_that_decides_a_number_and_no_path() -> None:
    arguments = argparse.Namespace(
        python=["trl=/envs/trl/bin/python"], shape="smoke", steps=4, seeds=1, test_rows=100, precision="bf16",
        out=Path("here.json"), keep=None,
    )  # fmt: skip
    assert describe_command(arguments) == (
        "python benchmarks/framework_arms.py --python trl=PYTHON "
        "--shape smoke --steps 4 --seeds 1 --test-rows 100 --precision bf16"
    )

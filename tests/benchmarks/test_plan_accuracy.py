"""The script that measures `tunesmith plan` runs through, with tiny shapes and no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plan_accuracy.py"


def test_every_case_is_planned_and_trained(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    subprocess.run([sys.executable, str(SCRIPT), "--tiny", "--out", str(out)], check=True, cwd=tmp_path)
    record = json.loads(out.read_text())
    assert [(case["size"], case["method"]) for case in record["cases"]][:3] == [
        ("qwen-0.5b", "lora"),
        ("qwen-0.5b", "qlora"),
        ("qwen-0.5b", "full"),
    ]
    assert len(record["cases"]) == 11
    for case in record["cases"]:
        assert case["measured_peak_bytes"] > 0
        assert case["predicted_peak_bytes"] > 0
        assert case["memory_plan"]["levels"] == ["keep"] * 3

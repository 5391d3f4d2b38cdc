"""`train` and `eval` end to end with the bundled model on each device, as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")  # a bare GPU machine may lack these four
pytest.importorskip("ruamel.yaml")
pytest.importorskip("rensa")
pytest.importorskip("bm25s")

JOB = """\
model: tunesmith/tiny
data: {{train: tunesmith/tickets}}
method: {method}
train: {{steps: 4, batch_rows: 8, evaluate_every: never, learning_rate: 1e-3, precision: {precision}}}
"""
# What each says of the same rows may differ by bf16's rounding, or not at all: the judge's precision is the machine's.
TOLERANCE = 2e-2


def tunesmith(*arguments: str, cwd: Path, device: str) -> dict[str, Any]:
    """The JSON that a command prints. On "cpu" the process sees no GPU."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    # The package these tests have imported, installed or not, from whatever folder they were started in.
    path = os.pathsep.join(str(Path(part).absolute()) for part in sys.path if part)
    command = [sys.executable, "-m", "tunesmith.cli.main", *arguments, "--json"]
    done = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1", "PYTHONPATH": path, **hidden},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def train(method: str, precision: str, *, folder: Path, device: str) -> Path:
    """Four steps as a process; the record is checked, the run's folder returned."""
    (folder / "job.yaml").write_text(JOB.format(method=method, precision=precision))
    printed = tunesmith("train", "job.yaml", "--out", "run", cwd=folder, device=device)
    record = json.loads((folder / "run" / "run.json").read_text())
    assert printed == record
    assert record["status"] == "done"
    assert ("gpu" in record["hardware"]) is (device == "cuda")
    assert record["peak_bytes"] > 1 << 20
    # So few steps are of rows too different for their losses to be compared; tests/training/test_devices.py learns.
    steps = [json.loads(line) for line in (folder / "run" / "steps.jsonl").read_text().splitlines()]
    assert all(0 < step["loss"] < 8 and step["grad_norm"] > 0 for step in steps)
    return folder / "run"


def test_training_and_scoring_end_to_end(tmp_path: Path, device: str) -> None:
    train("{name: lora, rank: 4}", "fp32", folder=tmp_path, device=device)
    rows = ("eval", "run", "--data", "tunesmith/tickets", "--max-rows", "3")
    found = tunesmith(*rows, cwd=tmp_path, device=device)
    assert found["num_rows"] == 3
    expected = found if device == "cpu" else tunesmith(*rows, cwd=tmp_path, device="cpu")
    assert found["nll"] == pytest.approx(expected["nll"], rel=TOLERANCE)
    assert found["num_target_tokens"] == expected["num_target_tokens"]


@pytest.mark.parametrize(
    ("method", "result"),
    [("qlora", "adapter/adapter_model.safetensors"), ("full", "model/model.safetensors")],
)
def test_training_in_the_machines_own_precision(
    tmp_path: Path, device: str, method: str, result: str
) -> None:
    run = train(method, "auto", folder=tmp_path, device=device)
    assert (run / result).stat().st_size > 1 << 20

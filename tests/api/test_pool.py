"""How many processes a comparison starts, and with how many threads each computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.api.pool import _has_gpu, adopt_costs, plan_parallel
from tunesmith.core.jsonl import read_json, write_json
from tunesmith.core.records import RunRecord
from tunesmith.frameworks.process import ProcessUse


@pytest.mark.skipif(_has_gpu(), reason="one process at a time on a GPU")
def test_on_a_cpu_a_process_has_one_thread_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert plan_parallel("auto", model_bytes=1) == (2, 1)
    assert plan_parallel(1, model_bytes=1) == (1, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert plan_parallel("auto", model_bytes=1) == (1, 2)
    assert plan_parallel(1, model_bytes=1) == (1, 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert plan_parallel(3, model_bytes=1) == (3, 1)


@pytest.mark.parametrize(("said", "threads"), [(None, 1), ("2", 2)])
def test_a_single_training_takes_one_thread_unless_told_otherwise(said: str | None, threads: int) -> None:
    code = (
        "import torch; torch.set_num_threads(2)\n"
        "from tunesmith.api.devices import pick_device\n"
        "pick_device()\nprint(torch.get_num_threads())"
    )
    # Without a GPU, also on a machine that has one.
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env = {**kept, "CUDA_VISIBLE_DEVICES": "", **({"OMP_NUM_THREADS": said} if said else {})}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert int(run.stdout) == threads


@pytest.mark.parametrize(("hardware", "peak_bytes"), [({}, 900), ({"gpu": "a card"}, 500)])
def test_our_own_trainings_cost_what_the_parent_saw(
    tmp_path: Path, hardware: dict[str, str], peak_bytes: int
) -> None:
    # The worker's own clock starts after Python has; a resumed training knows of CPU time that an earlier process took.
    run = RunRecord(
        status="done", method="lora", framework="tunesmith", model="m", seed=0, config={}, fingerprints={}, versions={},
        hardware=hardware, wall_seconds=10.0, cpu_seconds=30.0, peak_bytes=500,
        phases={"loading": 1.0, "first step": 4.0, "steps": 5.0}, memory={"resident": 450},
    )  # fmt: skip
    write_json(tmp_path / "run.json", run.to_json())

    adopt_costs(tmp_path / "run.json", ProcessUse(0, wall_seconds=12.0, cpu_seconds=20.0, peak_bytes=900))

    found = RunRecord.from_json(read_json(tmp_path / "run.json"))
    assert (found.wall_seconds, found.cpu_seconds, found.peak_bytes) == (12.0, 30.0, peak_bytes)
    # What the worker did not see of itself is Python's start and the imports.
    assert found.phases == {"importing": 2.0, "loading": 1.0, "first step": 4.0, "steps": 5.0}
    assert found.memory == {"resident": 900}

"""How many processes a comparison starts, and with how many threads each computes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tunesmith.api.pool import _has_gpu, plan_parallel


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

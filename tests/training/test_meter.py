import json
import time
from collections import deque

import pytest
import torch

from tunesmith.core.records import StepRecord
from tunesmith.training.meter import Meter, peak_bytes, reset_peak_bytes
from tunesmith.training.steplog import StepLog

CPU = torch.device("cpu")


def test_the_rate_is_tokens_over_seconds_of_the_steps_in_the_window():
    meter = Meter(CPU, window=2)
    # Step ends at seconds 1, 2, 4 with 100 tokens each; the window holds the last two: 200 tokens in 3 seconds.
    meter._marks = deque([(1.0, 100), (2.0, 200), (4.0, 300)], maxlen=3)
    assert meter.tokens_per_second() == pytest.approx(200 / 3)
    assert meter.seconds_left(10) == pytest.approx(15.0)


def test_time_between_steps_counts_for_the_run_but_not_for_its_rate():
    meter = Meter(CPU)
    meter.count_step(num_tokens=10, num_target_tokens=5)
    time.sleep(0.05)
    meter.skip_time()
    assert meter.count_step(num_tokens=10, num_target_tokens=5) < 0.04
    assert meter.wall_seconds > 0.05
    assert (meter.train_tokens, meter.target_tokens) == (20, 10)


def test_totals_continue_where_an_earlier_part_ended():
    meter = Meter(CPU)
    meter.continue_from(
        {
            "train_tokens": 100,
            "target_tokens": 40,
            "wall_seconds": 50.0,
            "cpu_seconds": 30.0,
            "peak_bytes": 1 << 50,
        }
    )
    meter.count_step(num_tokens=10, num_target_tokens=5)
    totals = meter.totals()
    assert (totals["train_tokens"], totals["target_tokens"], totals["peak_bytes"]) == (110, 45, 1 << 50)
    assert 50 < totals["wall_seconds"] < 51
    assert meter.tokens_per_second() > 0


def test_the_peak_remembers_memory_that_is_free_again_until_it_is_reset():
    if not reset_peak_bytes(CPU):
        pytest.skip("this system can't reset the peak")
    before = peak_bytes(CPU)
    block = torch.ones(100_000_000 // 4)
    del block
    assert peak_bytes(CPU) - before > 90_000_000
    reset_peak_bytes(CPU)
    assert peak_bytes(CPU) - before < 50_000_000


def record(step):
    return StepRecord(step, 0.5, 1.0, 2.0, 0.1, 10, 5, 0.1, 1000)


def test_the_log_is_cut_back_to_the_checkpoint_and_loses_a_torn_line(tmp_path):
    path = tmp_path / "steps.jsonl"
    log = StepLog(path, last_step=0)
    for step in (1, 2, 3):
        log.append(record(step))
    log.close()
    with path.open("ab") as handle:
        handle.write(b'{"schema": 1, "step": 4, "ep')
    again = StepLog(path, last_step=2)
    again.append(record(3))
    again.flush_to_disk()
    again.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_lines_are_on_disk_as_soon_as_they_are_appended(tmp_path):
    log = StepLog(tmp_path / "steps.jsonl", last_step=0)
    log.append(record(1))
    assert StepRecord.from_json(json.loads((tmp_path / "steps.jsonl").read_text())) == record(1)
    log.close()


def test_a_new_run_starts_an_empty_log(tmp_path):
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n')
    StepLog(tmp_path / "steps.jsonl", last_step=0).close()
    assert (tmp_path / "steps.jsonl").read_text() == ""

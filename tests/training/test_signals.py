import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from train_tiny import TinyDecoder, make_spec, measure_validation, run_tiny

from tunesmith.core.errors import Interrupted
from tunesmith.core.rundir import RunDir
from tunesmith.training.checkpoint import list_checkpoints
from tunesmith.training.signals import StopNow, catch_signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_a_step_lets_it_finish_saves_and_tells_how_to_continue(tmp_path, number, code):
    from train_tiny import make_batch

    steps = 0

    def batch_with_signal(rows, device):
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), number)
        return make_batch(rows, device)

    with pytest.raises(Interrupted) as caught:
        run_tiny(tmp_path, make_spec(), make_batch=batch_with_signal)
    assert caught.value.exit_code == code
    name = signal.Signals(number).name
    assert f"stopped by {name} after step 3 of 12, checkpoint of step 3 saved" in str(caught.value)
    assert [path.name for path in list_checkpoints(RunDir(tmp_path).checkpoints)] == ["step-3"]


def test_a_signal_in_validation_cuts_it_off_and_saves_the_step_before(tmp_path):
    def evaluate():
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            time.sleep(0.01)
        raise AssertionError("validation ran to its end")

    started = time.monotonic()
    with pytest.raises(Interrupted, match="after step 2 of 12"):
        run_tiny(tmp_path, make_spec(evaluate_every=2), evaluate=evaluate)
    assert time.monotonic() - started < 5
    # The step is not logged before its validation is known.
    assert len(RunDir(tmp_path).steps.read_text().splitlines()) == 1


def test_a_signal_before_the_first_step_saves_nothing(tmp_path):
    model = TinyDecoder()
    switch = model.train

    def train(mode=True):
        if mode:
            os.kill(os.getpid(), signal.SIGTERM)
        return switch(mode)

    model.train = train
    with pytest.raises(Interrupted, match="after step 0 of 12, nothing to save yet"):
        run_tiny(tmp_path, make_spec(), model=model)
    assert not list_checkpoints(RunDir(tmp_path).checkpoints)


def test_a_signal_after_the_last_step_is_obeyed_too(tmp_path):
    def stop_at_the_end(progress):
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="after step 3 of 3"):
        run_tiny(tmp_path, make_spec(steps=3), on_step=stop_at_the_end)
    assert run_tiny(tmp_path, make_spec(steps=3), resume=True).steps == 3


def test_handlers_of_the_caller_come_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run_tiny(tmp_path, make_spec(steps=1))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_training_in_a_thread_works_without_signals(tmp_path):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(run_tiny(tmp_path, make_spec(steps=2))))
    thread.start()
    thread.join()
    assert outcomes[0].steps == 2


def test_an_interruptible_block_entered_after_the_signal_ends_at_once():
    with catch_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(StopNow), stop.interruptible():
            raise AssertionError("entered")
        assert stop.name == "SIGINT"


def test_a_second_signal_ends_the_process_at_once():
    # The block swallows the first signal and would run for a minute.
    code = """
import time
from tunesmith.training.signals import catch_signals
with catch_signals() as stop:
    print("ready", flush=True)
    while not stop.received:
        time.sleep(0.01)
    print("first", flush=True)
    time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "first\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT
    process.stdout.close()


def test_validation_after_an_interruption_happens_before_the_next_step(tmp_path):
    calls = 0
    model = TinyDecoder()

    def evaluate():
        nonlocal calls
        calls += 1
        if calls == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure_validation(model)

    spec = make_spec(steps=4, evaluate_every=2)
    with pytest.raises(Interrupted):
        run_tiny(tmp_path, spec, model=model, evaluate=evaluate)
    steps = []
    run_tiny(tmp_path, spec, model=model, evaluate=evaluate, on_step=steps.append, resume=True)
    assert [(p.step, p.validation_loss is not None) for p in steps] == [(2, True), (3, False), (4, True)]

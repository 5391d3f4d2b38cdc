import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from train_tiny import (
    LossSum,
    TinyDecoder,
    hash_tensors,
    make_batch,
    make_rows,
    make_spec,
    measure_validation,
    run_tiny,
    sum_loss,
)

from tunesmith.core.errors import RunDirError, TrainingFailed
from tunesmith.core.records import StepRecord
from tunesmith.core.rundir import RunDir
from tunesmith.data.batch import plan_epoch
from tunesmith.training.checkpoint import list_checkpoints


def read_steps(root: Path) -> list[StepRecord]:
    return [StepRecord.from_json(json.loads(line)) for line in RunDir(root).steps.read_text().splitlines()]


def test_a_tiny_decoder_learns_to_count(tmp_path):
    model = TinyDecoder()
    before = measure_validation(model)
    outcome = run_tiny(tmp_path, make_spec(epochs=20.0), model=model)
    assert before > 3
    assert measure_validation(model) < 0.6
    assert outcome.steps == 120
    assert outcome.trained_parameters == sum(p.numel() for p in model.parameters())


def test_every_row_is_trained_once_an_epoch_and_the_last_step_holds_the_rest(tmp_path):
    # 22 rows in batches of 4: five steps of 4 and one of 2.
    outcome = run_tiny(tmp_path, make_spec(epochs=2.0))
    steps = read_steps(tmp_path)
    assert len(steps) == outcome.steps == 12
    rows = make_rows(22)
    plan = [step for epoch in (0, 1) for step in plan_epoch(22, batch_rows=4, seed=0, epoch=epoch)]
    targets = [sum(rows[n].num_targets for n in step) for step in plan]
    assert [step.num_target_tokens for step in steps] == targets
    assert outcome.target_tokens == 2 * sum(row.num_targets for row in rows)
    assert outcome.train_tokens == 2 * sum(len(row.ids) for row in rows)
    assert steps[5].epoch == 1.0
    assert steps[-1].epoch == outcome.epochs == 2.0


def test_half_an_epoch_stops_in_the_middle_and_steps_override_epochs(tmp_path):
    assert run_tiny(tmp_path / "a", make_spec(epochs=0.5)).steps == 3
    assert run_tiny(tmp_path / "b", make_spec(epochs=0.5, steps=7)).steps == 7
    assert read_steps(tmp_path / "b")[-1].epoch == pytest.approx(7 / 6)


def test_the_order_of_rows_follows_from_the_seed(tmp_path):
    seen: list[list[str]] = []

    def record(rows, device):
        seen[-1] += [row.row_id for row in rows]
        return make_batch(rows, device)

    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        seen.append([])
        run_tiny(tmp_path / name, make_spec(epochs=1.0, seed=seed), make_batch=record)
    assert seen[0] == seen[1] != seen[2]


def test_the_micro_batch_budget_changes_no_result_beyond_rounding(tmp_path):
    models = [TinyDecoder() for _ in range(3)]
    for model, budget in zip(models, (1, 20, 4096), strict=True):
        run_tiny(
            tmp_path / str(budget), make_spec(micro_batch_tokens=budget, learning_rate=0.003), model=model
        )
    for model in models[1:]:
        assert_close(dict(model.named_parameters()), dict(models[0].named_parameters()), rtol=1e-3, atol=2e-4)
    curves = [[step.loss for step in read_steps(tmp_path / str(b))] for b in (1, 20, 4096)]
    assert_close(curves[1], curves[0], rtol=1e-4, atol=1e-5)
    assert_close(curves[2], curves[0], rtol=1e-4, atol=1e-5)


def test_the_logged_rate_is_the_schedule(tmp_path):
    run_tiny(tmp_path, make_spec(steps=4, warmup=0.25, schedule="linear", learning_rate=0.3))
    assert_close([step.learning_rate for step in read_steps(tmp_path)], [0.0, 0.3, 0.2, 0.1])


def test_the_weights_of_the_lowest_validation_loss_are_kept(tmp_path):
    # The third of four validations is best, by its own value.
    losses = iter([3.0, 2.0, 1.0, 2.5])
    kept = []

    def evaluate():
        value = next(losses)
        kept.append(hash_tensors(dict(model.named_parameters())))
        return value

    model = TinyDecoder()
    outcome = run_tiny(tmp_path, make_spec(steps=12, evaluate_every=3), model=model, evaluate=evaluate)
    assert (outcome.best_step, outcome.validation_loss) == (9, 1.0)
    assert hash_tensors(dict(model.named_parameters())) == kept[2] != kept[3]
    assert [s.validation_loss for s in read_steps(tmp_path) if s.validation_loss] == [3.0, 2.0, 1.0, 2.5]


def test_without_keep_best_the_last_weights_stay(tmp_path):
    losses = iter([1.0, 2.0])
    outcome = run_tiny(
        tmp_path,
        make_spec(steps=4, evaluate_every=2, keep_best=False, save_every=2),
        evaluate=lambda: next(losses),
    )
    assert (outcome.best_step, outcome.validation_loss) == (4, 2.0)
    assert not list(RunDir(tmp_path).checkpoints.glob("*/best.safetensors"))


def test_validation_runs_in_eval_mode_and_whatever_it_draws_changes_nothing(tmp_path):
    modes = []

    def evaluate():
        modes.append(model.training)
        torch.rand(5)
        return 1.0

    model, other = TinyDecoder(dropout=0.3), TinyDecoder(dropout=0.3)
    run_tiny(tmp_path / "a", make_spec(evaluate_every=2, keep_best=False), model=model, evaluate=evaluate)
    run_tiny(tmp_path / "b", make_spec(), model=other)
    assert set(modes) == {False}
    assert not model.training, "whoever judges the model next must not meet active dropout"
    assert hash_tensors(dict(model.named_parameters())) == hash_tensors(dict(other.named_parameters()))


def test_the_callers_random_state_is_left_alone(tmp_path):
    model = TinyDecoder(dropout=0.3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run_tiny(tmp_path, make_spec(steps=2), model=model)
    assert torch.equal(torch.rand(3), expected)


def test_progress_reports_step_rate_and_time_left(tmp_path):
    shown = []
    run_tiny(tmp_path, make_spec(steps=5), on_step=shown.append)
    assert [p.step for p in shown] == [1, 2, 3, 4, 5]
    assert {p.total_steps for p in shown} == {5}
    assert shown[-1].seconds_left == 0.0
    assert shown[0].seconds_left > 0
    assert all(p.tokens_per_second > 0 and p.peak_bytes > 1e6 and math.isfinite(p.loss) for p in shown)


def explode_at(step_row, model):
    """A loss that turns infinite as soon as row `step_row` is met."""

    def loss(model, batch):
        found = sum_loss(model, batch[0])
        return LossSum(found.total + torch.inf, found.num_targets) if batch[1] else found

    def batch(rows, device):
        return make_batch(rows, device), any(row.origin.place == step_row for row in rows)

    return {"loss": loss, "make_batch": batch}


def test_a_failing_run_keeps_the_checkpoint_before_and_saves_nothing_that_is_not_finite(tmp_path):
    place = f"train.jsonl:{plan_epoch(22, batch_rows=4, seed=0, epoch=0)[3][0] + 1}"
    with pytest.raises(TrainingFailed, match=f"step 4: the loss is inf because of {place}") as caught:
        run_tiny(tmp_path, make_spec(save_every=1, keep_checkpoints=9), **explode_at(place, None))
    assert caught.value.exit_code == 1
    assert [path.name for path in list_checkpoints(RunDir(tmp_path).checkpoints)] == [
        "step-3",
        "step-2",
        "step-1",
    ]
    assert [step.step for step in read_steps(tmp_path)] == [1, 2, 3]


def test_a_validation_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(TrainingFailed, match="step 2: the validation loss is nan"):
        run_tiny(tmp_path, make_spec(evaluate_every=2), evaluate=lambda: math.nan)


def test_weights_that_overflow_are_never_saved(tmp_path):
    # A finite gradient and an absurd rate: the update itself leaves fp32's range.
    with pytest.raises(TrainingFailed, match="not finite"):
        run_tiny(tmp_path, make_spec(steps=1, learning_rate=3e38, weight_decay=3.0, save_every=1))
    assert not list_checkpoints(RunDir(tmp_path).checkpoints)


def test_a_folder_with_checkpoints_is_not_overwritten(tmp_path):
    run_tiny(tmp_path, make_spec(steps=2, save_every=1))
    with pytest.raises(RunDirError, match=r"holds checkpoints of an earlier run.*Resume that run"):
        run_tiny(tmp_path, make_spec(steps=2))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_second_run_in_a_folder_is_refused_naming_the_first_until_that_dies(tmp_path):
    ready, go = os.pipe()
    first = os.fork()
    if first == 0:
        run_tiny(tmp_path, make_spec(steps=1), on_step=lambda progress: (os.write(go, b"x"), time.sleep(60)))
        os._exit(0)
    try:
        os.read(ready, 1)
        with pytest.raises(RunDirError, match=f"in use by process {first} on"):
            run_tiny(tmp_path, make_spec(steps=1))
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    assert run_tiny(tmp_path, make_spec(steps=1)).steps == 1


def test_a_rate_of_auto_must_be_resolved_by_the_caller(tmp_path):
    with pytest.raises(ValueError, match="auto_learning_rate"):
        run_tiny(tmp_path, make_spec(learning_rate="auto"))


def test_bf16_weights_train_through_their_fp32_masters(tmp_path):
    model = TinyDecoder(dtype=torch.bfloat16)
    run_tiny(tmp_path, make_spec(epochs=20.0), model=model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert measure_validation(model) < 0.6


def test_fp16_weights_train_with_a_loss_scale(tmp_path):
    model = TinyDecoder(dtype=torch.float16)
    outcome = run_tiny(tmp_path, make_spec(epochs=20.0, save_every="epoch"), model=model)
    assert measure_validation(model) < 0.6
    state = json.loads((list_checkpoints(RunDir(tmp_path).checkpoints)[0] / "state.json").read_text())
    assert state["loss_scale"]["value"] > 1
    assert outcome.steps == 120

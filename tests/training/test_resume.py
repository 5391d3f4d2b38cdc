"""Interrupted equals uninterrupted, bit for bit: every leg is a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_tiny import TinyDecoder, hash_run, make_spec, measure_distance, run_tiny

from tunesmith.core.errors import Interrupted, JobError, RunDirError
from tunesmith.core.rundir import RunDir
from tunesmith.training.checkpoint import list_checkpoints, write_checkpoint

TINY = Path(__file__).with_name("tiny.py")
# 22 rows in batches of 4 are 6 steps an epoch. Dropout, and validations whose best is not the last, both included.
SPEC = {
    "epochs": 2.5,
    "evaluate_every": 3,
    "save_every": "epoch",
    "learning_rate": 0.05,
    "micro_batch_tokens": 20,
}


def start_leg(root: Path, *options: str, spec: dict | None = None) -> subprocess.Popen:
    command = [
        sys.executable,
        str(TINY),
        str(root),
        "--spec",
        json.dumps(spec or SPEC),
        "--validate",
        *options,
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish_leg(process: subprocess.Popen, *, expect: int = 0) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == expect, err
    return out if expect == 0 else err


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("whole")
    return json.loads(finish_leg(start_leg(root, "--dropout", "0.2")))


@pytest.mark.parametrize(
    ("stop", "code"),
    [
        (["--stop-after", "4"], 143),  # in the middle of an epoch
        (
            ["--stop-after", "6", "--signal", "SIGINT"],
            130,
        ),  # at its end, after validation and a regular checkpoint
        (["--stop-in-validation", "3"], 143),  # step 9: taken, not yet validated
    ],
    ids=["mid-epoch", "epoch boundary", "in validation"],
)
def test_a_run_continued_in_a_new_process_equals_an_uninterrupted_one_in_every_bit(
    tmp_path, uninterrupted, stop, code
):
    message = finish_leg(start_leg(tmp_path, "--dropout", "0.2", *stop), expect=code)
    assert "checkpoint of step" in message
    assert "Run the same command again to continue" in message
    continued = json.loads(finish_leg(start_leg(tmp_path, "--dropout", "0.2", "--resume")))
    assert continued == uninterrupted


def test_a_killed_run_repeats_the_steps_after_its_checkpoint_and_logs_each_once(tmp_path, uninterrupted):
    # SIGKILL after step 8: the checkpoint is of step 6, steps 7 and 8 are in the log already.
    finish_leg(start_leg(tmp_path, "--dropout", "0.2", "--stop-after", "8", "--signal", "SIGKILL"), expect=-9)
    assert len(RunDir(tmp_path).steps.read_text().splitlines()) >= 7
    assert json.loads(finish_leg(start_leg(tmp_path, "--dropout", "0.2", "--resume"))) == uninterrupted


# --- in one process: the same, faster -----------------------------------------------------------------------------


class StopAt:
    """Asks this very process to stop, the way a shell does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, progress) -> None:
        import signal

        if progress.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def run_leg(
    root: Path, *, stop: int = 0, resume: bool = False, dtype=torch.float32, **spec
) -> dict[str, str]:
    model = TinyDecoder(dropout=0.2, dtype=dtype)
    values = {**SPEC, **spec}
    on_step = StopAt(stop) if stop else None
    evaluate = lambda: measure_distance(model)  # noqa: E731
    run_tiny(root, make_spec(**values), model=model, evaluate=evaluate, on_step=on_step, resume=resume)
    return hash_run(root, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stop", [1, 5, 6, 13, 14])
def test_every_precision_and_stopping_point_continues_exactly(tmp_path, dtype, stop):
    whole = run_leg(tmp_path / "whole", dtype=dtype, learning_rate=0.01)
    with pytest.raises(Interrupted):
        run_leg(tmp_path / "cut", stop=stop, dtype=dtype, learning_rate=0.01)
    assert run_leg(tmp_path / "cut", resume=True, dtype=dtype, learning_rate=0.01) == whole


OPTIMIZERS = [
    ("adamw", torch.float32),
    ("adamw-8bit", torch.float32),
    ("adamw-8bit", torch.bfloat16),
    ("adamw-bf16", torch.bfloat16),
    ("muon", torch.float32),
    ("muon", torch.bfloat16),
]


@pytest.mark.parametrize("stop", [1, 6, 13])
@pytest.mark.parametrize(("optimizer", "dtype"), OPTIMIZERS)
def test_every_optimizer_continues_exactly(tmp_path, monkeypatch, optimizer, dtype, stop):
    # The tiny decoder's matrices have 256 weights and more: quantise those too.
    monkeypatch.setattr("tunesmith.training.low_bit_adamw.SMALLEST_QUANTIZED", 256)
    settings = {"dtype": dtype, "optimizer": optimizer, "learning_rate": 0.01}
    whole = run_leg(tmp_path / "whole", **settings)
    with pytest.raises(Interrupted):
        run_leg(tmp_path / "cut", stop=stop, **settings)
    assert run_leg(tmp_path / "cut", resume=True, **settings) == whole


def test_every_optimizer_leaves_other_weights(tmp_path):
    found = {run_leg(tmp_path / f"{o}-{d}", optimizer=o, dtype=d)["weights"] for o, d in OPTIMIZERS}
    assert len(found) == len(OPTIMIZERS)


@pytest.mark.parametrize(("optimizer", "bytes_each"), [("adamw", 8), ("adamw-8bit", 2), ("adamw-bf16", 2)])
def test_states_are_saved_as_they_are_held(tmp_path, monkeypatch, optimizer, bytes_each):
    monkeypatch.setattr("tunesmith.training.low_bit_adamw.SMALLEST_QUANTIZED", 256)
    model = TinyDecoder(dtype=torch.bfloat16)
    run_tiny(tmp_path, make_spec(steps=2, save_every=2, optimizer=optimizer), model=model)
    newest = list_checkpoints(RunDir(tmp_path).checkpoints)[0]
    states = load_file(newest / "optimizer.safetensors")
    # 16 x 48 weights: three blocks.
    held = sum(t.numel() * t.element_size() for name, t in states.items() if name.endswith(".qkv.weight"))
    scales_and_step = 2 * 4 * 3 + 8 if bytes_each == 2 else 4
    assert held == bytes_each * 768 + scales_and_step
    weights = load_file(newest / "weights.safetensors")
    assert weights["qkv.weight"].dtype == (torch.bfloat16 if optimizer == "adamw-bf16" else torch.float32)


def test_three_interruptions_are_as_good_as_none(tmp_path):
    whole = run_leg(tmp_path / "whole")
    for number, stop in enumerate((2, 3, 11)):
        with pytest.raises(Interrupted):
            run_leg(tmp_path / "cut", stop=stop, resume=number > 0)
    assert run_leg(tmp_path / "cut", resume=True) == whole


def test_continuing_a_finished_run_changes_nothing(tmp_path):
    whole = run_leg(tmp_path)
    assert run_leg(tmp_path, resume=True) == whole


def drop_random(tensors, state):
    tensors["random"] = {"cpu": torch.Generator().manual_seed(1).get_state()}


def drop_optimizer(tensors, state):
    tensors["optimizer"] = {name: torch.zeros_like(t) for name, t in tensors["optimizer"].items()}


def drop_second_moment(tensors, state):
    tensors["optimizer"] = {
        n: t * 0 if n.startswith("exp_avg_sq") else t for n, t in tensors["optimizer"].items()
    }


def drop_position(tensors, state):
    state["position"] = None


def drop_epoch_of_position(tensors, state):
    state["position"]["epoch"] = 1


def drop_step(tensors, state):
    state["step"] = 3


def drop_best(tensors, state):
    state["best"] = None


def drop_weights(tensors, state):
    fresh = TinyDecoder(dropout=0.2)
    tensors["weights"] = {name: p.detach() for name, p in fresh.named_parameters()}


def drop_micro_batches(tensors, state):
    state["micro_batches"]["budget_tokens"] = 4096


MUTANTS = [
    drop_random,
    drop_optimizer,
    drop_second_moment,
    drop_position,
    drop_epoch_of_position,
    drop_step,
    drop_best,
    drop_weights,
    drop_micro_batches,
]


def rewrite_newest(root: Path, mutant) -> None:
    """Put a checkpoint that verifies, but lacks one state, in the newest one's place."""
    parent = RunDir(root).checkpoints
    newest = list_checkpoints(parent)[0]
    tensors = {path.stem: load_file(path) for path in newest.glob("*.safetensors")}
    state = json.loads((newest / "state.json").read_text())
    step = state["step"]
    mutant(tensors, state)
    shutil.rmtree(newest)
    write_checkpoint(parent, step, tensors=tensors, state=state)


@pytest.fixture(scope="module")
def whole_and_cut(tmp_path_factory) -> tuple[dict[str, str], Path]:
    root = tmp_path_factory.mktemp("mutants")
    whole = run_leg(root / "whole")
    assert json.loads(whole["position"])[2]["step"] == 3, "the best step lies before the interruption"
    with pytest.raises(Interrupted):
        run_leg(root / "cut", stop=4)
    return whole, root / "cut"


@pytest.mark.parametrize("mutant", [lambda tensors, state: None, *MUTANTS])
def test_the_comparison_notices_every_state_that_is_dropped(tmp_path, whole_and_cut, mutant):
    whole, cut = whole_and_cut
    shutil.copytree(cut, tmp_path / "cut")
    rewrite_newest(tmp_path / "cut", mutant)
    continued = run_leg(tmp_path / "cut", resume=True)
    # Rewriting alone, without dropping anything, must not change the outcome.
    assert (continued != whole) is (mutant in MUTANTS)


# --- what may change, and what may not ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "diff"),
    [
        ({"epochs": 4.0}, "train.epochs was 2.5 and is 4.0"),
        ({"steps": 20}, "train.steps was None and is 20"),
        ({"learning_rate": 0.1}, "train.learning_rate was 0.05 and is 0.1"),
        ({"seed": 1}, "train.seed was 0 and is 1"),
        ({"batch_rows": 8}, "train.batch_rows was 4 and is 8"),
        ({"schedule": "linear"}, "train.schedule was 'cosine' and is 'linear'"),
        ({"evaluate_every": 4}, "train.evaluate_every was 3 and is 4"),
        ({"optimizer": "adamw-8bit"}, "train.optimizer was 'adamw' and is 'adamw-8bit'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_changed_job_is_refused_with_what_changed(tmp_path, change, diff):
    with pytest.raises(Interrupted):
        run_leg(tmp_path, stop=2)
    before = RunDir(tmp_path).steps.read_text()
    with pytest.raises(JobError) as caught:
        run_leg(tmp_path, resume=True, **change)
    assert diff in str(caught.value)
    assert caught.value.exit_code == 2
    assert RunDir(tmp_path).steps.read_text() == before


def test_what_decides_nothing_about_the_weights_may_change(tmp_path):
    whole = run_leg(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_leg(tmp_path / "cut", stop=2)
    assert run_leg(tmp_path / "cut", resume=True, save_every=5, keep_checkpoints=1) == whole


def test_another_micro_batch_budget_is_obeyed_and_noted(tmp_path):
    with pytest.raises(Interrupted):
        run_leg(tmp_path, stop=2)
    outcome = run_tiny(
        tmp_path, make_spec(**{**SPEC, "micro_batch_tokens": 50}), model=TinyDecoder(), resume=True
    )
    assert outcome.micro_batch_tokens == 50
    assert any("micro_batch_tokens changed after step 2" in warning for warning in outcome.warnings)


def test_other_rows_another_model_or_another_method_are_refused(tmp_path):
    spec = make_spec(steps=4, save_every=2)
    run_tiny(tmp_path, spec, on_step=None, identity={"method": {"name": "lora", "rank": 8}})
    with pytest.raises(JobError, match="training_rows was"):
        run_tiny(tmp_path, spec, rows=23, resume=True, identity={"method": {"name": "lora", "rank": 8}})
    with pytest.raises(JobError, match=r"method.rank was 8 and is 16"):
        run_tiny(tmp_path, spec, resume=True, identity={"method": {"name": "lora", "rank": 16}})
    narrow = TinyDecoder()
    narrow.head.requires_grad_(False)
    with pytest.raises(JobError, match=r"trained_weights\.tensors was 8 and is 7"):
        run_tiny(tmp_path, spec, model=narrow, resume=True, identity={"method": {"name": "lora", "rank": 8}})


def test_another_number_of_threads_is_noted(tmp_path):
    run_tiny(tmp_path, make_spec(steps=2, save_every=1))
    torch.set_num_threads(2)
    outcome = run_tiny(tmp_path, make_spec(steps=2, save_every=1), resume=True)
    assert any("threads changed after step 2 (1 to 2)" in warning for warning in outcome.warnings)


def test_a_damaged_newest_checkpoint_costs_its_interval_only_and_is_reported(tmp_path):
    whole = run_leg(tmp_path / "whole", save_every=2)
    with pytest.raises(Interrupted):
        run_leg(tmp_path / "cut", stop=7, save_every=2)
    newest = list_checkpoints(RunDir(tmp_path / "cut").checkpoints)[0]
    assert newest.name == "step-7"
    with (newest / "weights.safetensors").open("r+b") as handle:
        handle.truncate(100)
    model = TinyDecoder(dropout=0.2)
    values = make_spec(**{**SPEC, "save_every": 2})
    outcome = run_tiny(
        tmp_path / "cut", values, model=model, evaluate=lambda: measure_distance(model), resume=True
    )
    assert hash_run(tmp_path / "cut", model) == whole
    assert outcome.continued_from == 6
    assert "step-7 is damaged: weights.safetensors has 100 bytes" in outcome.warnings[0]


def test_resume_without_any_checkpoint_starts_at_the_beginning(tmp_path):
    outcome = run_tiny(tmp_path, make_spec(steps=2), resume=True)
    assert (outcome.steps, outcome.continued_from) == (2, None)


def test_resume_with_nothing_but_damaged_checkpoints_is_refused(tmp_path):
    run_tiny(tmp_path, make_spec(steps=2, save_every=2))
    (tmp_path / "checkpoints" / "step-2" / "manifest.json").unlink()
    with pytest.raises(RunDirError, match="never restarts at step 0"):
        run_tiny(tmp_path, make_spec(steps=2, save_every=2), resume=True)
    assert len(RunDir(tmp_path).steps.read_text().splitlines()) == 2


def test_costs_add_up_over_interruptions(tmp_path):
    whole = run_tiny(tmp_path / "whole", make_spec(steps=6))
    with pytest.raises(Interrupted):
        run_tiny(tmp_path / "cut", make_spec(steps=6), on_step=StopAt(3))
    outcome = run_tiny(tmp_path / "cut", make_spec(steps=6), resume=True)
    assert (outcome.train_tokens, outcome.target_tokens) == (whole.train_tokens, whole.target_tokens)
    assert outcome.wall_seconds > 0
    assert outcome.cpu_seconds > 0

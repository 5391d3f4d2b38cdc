"""Each planted fault is named, and an honest comparison is left in peace."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.comparing.result import compare_run
from tunesmith.core.comparison import Comparison
from tunesmith.core.jsonl import read_json, write_json
from tunesmith.core.rundir import RunDir
from tunesmith.job.spec import Job

Example = tuple[RunDir, Job, Comparison]


def edit_runs(
    run_dir: RunDir, arm: str, change: Callable[[dict[str, Any]], Any], *, file: str = "record"
) -> None:
    for seed in (0, 1, 2):
        path: Path = getattr(run_dir.arm(arm, seed), file)
        if path.is_file():
            value = read_json(path)
            change(value)
            write_json(path, value)


@pytest.fixture
def copied(example: Example, tmp_path: Path) -> tuple[RunDir, Job]:
    shutil.copytree(example[0].root, tmp_path / "copy")
    return RunDir(tmp_path / "copy"), example[1]


def test_an_honest_comparison_raises_only_what_the_judge_saw(example: Example) -> None:
    unexpected = [
        warning for warning in example[2].warnings if "cut at evaluate.max_new_tokens" not in warning
    ]
    assert unexpected == []


@pytest.mark.parametrize(
    ("arm", "change", "expected"),
    [
        (
            "full",
            lambda r: r.update(steps=100),
            "unequal training: optimizer steps differ (lora 300, qlora 300, full 100)",
        ),
        ("full", lambda r: r["hardware"].update(cpu="other"), "arms ran on different hardware"),
        (
            "full",
            lambda r: r["fingerprints"].update(code="x"),
            "the package's code changed between trainings",
        ),
        ("full", lambda r: r.update(status="interrupted"), "full: training is interrupted"),
        (
            "full",
            lambda r: r.update(config={"train": {"optimizer": "adamw-bf16"}}),
            "full: pure bf16 full fine-tuning (adamw-bf16)",
        ),
        (
            "full",
            lambda r: r.update(warnings=["3 of 90 rows were truncated"]),
            "full: 3 of 90 rows were truncated",
        ),
    ],
)
def test_what_differs_between_trainings_is_said(
    copied: tuple[RunDir, Job], arm: str, change: Callable[[dict[str, Any]], Any], expected: str
) -> None:
    edit_runs(copied[0], arm, change)
    assert any(warning.startswith(expected) for warning in compare_run(*copied).warnings)


def test_selecting_on_the_reported_split_is_said(copied: tuple[RunDir, Job]) -> None:
    for arm in ("lora", "qlora", "full"):
        edit_runs(copied[0], arm, lambda r: r["fingerprints"].update(validation=r["fingerprints"]["test"]))
    warnings = compare_run(*copied).warnings
    assert (
        "lora, qlora, full: the split that selected the checkpoint is the split that is reported" in warnings
    )


def test_a_test_loss_far_below_the_training_loss_is_said(copied: tuple[RunDir, Job]) -> None:
    for seed in (0, 1, 2):
        path = copied[0].arm("full", seed).steps
        path.write_text(
            "".join(line.replace('"loss": 0', '"loss": 7') for line in path.read_text().splitlines(True))
        )
    warnings = compare_run(*copied).warnings
    assert "full: test loss is far below training loss: test rows may be in the training data" in warnings


def test_the_judges_doubt_is_repeated_once_for_all_seeds(copied: tuple[RunDir, Job]) -> None:
    for seed in (0, 1, 2):
        path = copied[0].arm("few-shot", seed).evaluation
        value = read_json(path)
        value["warnings"] = [f"nll {9 + seed}.5 is above ln(4096)"]
        write_json(path, value)
    warnings = [warning for warning in compare_run(*copied).warnings if "ln(4096)" in warning]
    assert warnings == ["few-shot: nll 9.5 is above ln(4096)"]


def test_unequal_tuning_and_a_best_rate_at_the_edge_are_said(copied: tuple[RunDir, Job]) -> None:
    shutil.rmtree(copied[0].trial("lora", 4).root)
    shutil.rmtree(copied[0].trial("lora", 3).root)
    warnings = compare_run(*copied).warnings
    assert "unequal tuning: learning-rate trials differ (lora 3, qlora 5, full 5)" in warnings
    edge = "lora: the best learning rate, 0.002, is at the edge of the grid: a better one may lie beyond"
    assert edge in warnings


def test_untuned_rates_are_said(copied: tuple[RunDir, Job]) -> None:
    for arm in ("lora", "qlora", "full"):
        shutil.rmtree(copied[0].trial(arm, 0).root.parent)
    warnings = compare_run(*copied).warnings
    assert any(
        warning.startswith("lora, qlora, full: the learning rate follows a formula") for warning in warnings
    )


def test_one_rate_for_full_and_adapters_is_said(copied: tuple[RunDir, Job]) -> None:
    for arm in ("lora", "qlora", "full"):
        shutil.rmtree(copied[0].trial(arm, 0).root.parent)
    run_dir, job = copied
    train = job.train.model_copy(update={"learning_rate": 1e-3})
    warnings = compare_run(run_dir, job.model_copy(update={"train": train})).warnings
    assert any(warning.startswith("full and adapter arms share one learning rate") for warning in warnings)


def test_few_clusters_are_said(tmp_path: Path, write_example: Callable[..., tuple[RunDir, Job]]) -> None:
    run_dir, job = write_example(tmp_path, num_rows=40, num_clusters=8)
    assert any(w.startswith("only 8 clusters of test rows") for w in compare_run(run_dir, job).warnings)

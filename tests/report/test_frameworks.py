"""Frameworks side by side, one by one: medians with their spread, ratios to ours, nothing ranked wrongly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from make_example import FOREIGN_ARMS, make_pages

from tunesmith.comparing.result import compare_run
from tunesmith.core.comparison import Comparison, Gate, Parity
from tunesmith.core.errors import DataError
from tunesmith.core.frameworks import FrameworkPages
from tunesmith.core.jsonl import read_json, read_jsonl, write_json
from tunesmith.core.rundir import RunDir
from tunesmith.report.framework_pages import view_pages
from tunesmith.report.frameworks import FrameworkRow, view_frameworks
from tunesmith.report.page import build_page, render_report
from tunesmith.report.trainings import measure_rates

FAILED = Parity("axolotl", {}, [Gate("tokens", "FAIL", 8, 0, "rows", "other rows")])


@pytest.fixture(scope="module")
def compared(
    tmp_path_factory: pytest.TempPathFactory, write_example: Callable[..., Any]
) -> tuple[RunDir, Comparison]:
    run, job = write_example(
        tmp_path_factory.mktemp("foreign"), num_rows=12, num_clusters=6, arms=FOREIGN_ARMS, trials=0
    )
    write_json(run.frameworks, make_pages().to_json())
    return run, compare_run(run, job, parity={"lora-axolotl": FAILED})


def rows_of(compared: tuple[RunDir, Comparison]) -> list[list[FrameworkRow]]:
    table = view_frameworks(*compared)
    assert table is not None
    return table.groups


def column(compared: tuple[RunDir, Comparison], title: str) -> int:
    table = view_frameworks(*compared)
    assert table is not None
    return [name for name, _ in table.columns].index(title)


def test_arms_of_one_job_stand_together_ours_first(compared: tuple[RunDir, Comparison]) -> None:
    names = [[row.arm for row in group] for group in rows_of(compared)]
    assert names == [["lora", "lora-trl", "lora-axolotl"], ["full", "full-trl"]]


def test_a_figure_is_the_median_of_processes_with_its_spread_and_its_ratio(
    compared: tuple[RunDir, Comparison],
) -> None:
    run, _ = compared
    walls = sorted(read_json(run.arm("lora-trl", seed).record)["wall_seconds"] for seed in (0, 1, 2))
    own = sorted(read_json(run.arm("lora", seed).record)["wall_seconds"] for seed in (0, 1, 2))
    (ours, theirs, _), _ = rows_of(compared)
    cell = theirs.cells[column(compared, "Whole training")]

    assert cell.text == f"{walls[1]:.1f} s"
    assert cell.spread == f"{walls[0]:.1f} s to {walls[2]:.1f} s"
    assert cell.against_ours == f"{walls[1] / own[1]:.2f} × ours"
    assert ours.cells[column(compared, "Whole training")].against_ours == ""
    # Of losses the difference; imports and loading are start-up.
    nll = column(compared, "Test NLL")
    assert theirs.cells[nll].against_ours[0] in "+−"
    assert theirs.cells[column(compared, "Start-up")].text == "3.80 s"


def test_speed_leaves_the_first_steps_out() -> None:
    def steps(*seconds: float) -> list[dict[str, Any]]:
        return [{"step_seconds": s, "num_tokens": 100, "num_target_tokens": 40} for s in seconds]

    # A step that compiled for a minute; then 4 s for two steps.
    assert measure_rates(steps(60, 1, 3)) == (20.0, 50.0)
    # A tenth of fifty steps is five.
    assert measure_rates(steps(*[9] * 5, *[1] * 45)) == (40.0, 100.0)
    assert measure_rates(steps(2)) is None
    assert measure_rates([]) is None


def test_an_arm_that_did_other_work_is_shown_and_never_the_best(compared: tuple[RunDir, Comparison]) -> None:
    (ours, theirs, other), _ = rows_of(compared)
    rate = column(compared, "Trained tokens/s")

    assert other.blocked == "parity failed: tokens"
    assert other.cells[rate].text != "–"
    assert [row.cells[rate].best for row in (ours, theirs, other)] == [True, False, False]
    assert not any(row.cells[column(compared, "Test NLL")].best for row in (ours, theirs, other))
    assert "not ranked: parity failed: tokens" in build_page(*compared)


def test_two_processes_are_too_few_for_a_best_one(tmp_path: Path, write_example: Callable[..., Any]) -> None:
    run, job = write_example(
        tmp_path, num_rows=12, num_clusters=6, arms=FOREIGN_ARMS[1:4], seeds=[0, 1], trials=0
    )
    groups = rows_of((run, compare_run(run, job)))
    assert not any(cell.best for group in groups for row in group for cell in row.cells)


def test_without_our_arm_of_the_same_job_there_is_no_ratio(
    tmp_path: Path, write_example: Callable[..., Any]
) -> None:
    arms = ["lora", {"method": {"name": "lora", "rank": 4}, "framework": "trl"}]
    run, job = write_example(tmp_path, num_rows=12, num_clusters=6, arms=arms, trials=0)
    ((row,),) = rows_of((run, compare_run(run, job)))
    assert row.arm == "lora-r4-trl"
    assert {cell.against_ours for cell in row.cells} == {""}


def test_a_training_that_is_missing_leaves_dashes_and_says_so(
    tmp_path: Path, write_example: Callable[..., Any]
) -> None:
    run, job = write_example(
        tmp_path, num_rows=12, num_clusters=6, arms=FOREIGN_ARMS[1:], seeds=[0], trials=0
    )
    folder = run.arm("lora-trl", 0)
    for path in (folder.record, folder.evaluation, folder.answers):
        path.unlink()
    row = next(
        row for group in rows_of((run, compare_run(run, job))) for row in group if row.arm == "lora-trl"
    )
    assert (row.blocked, row.num_processes, {cell.text for cell in row.cells}) == ("no result", 0, {"–"})


def test_the_page_of_a_framework_tells_what_it_was_told(compared: tuple[RunDir, Comparison]) -> None:
    page = build_page(*compared)
    assert (
        page.index('id="parity"') < page.index('id="frameworks"') < page.index('id="table"') < page.index('id="pages"')
    )  # fmt: skip
    for text in (
        "<span>trl <b>1.16.0</b></span>",
        "1 of 2 features",
        "its base is another: <b>QLoRA</b>. <span>Use lora.</span>",
        "<code>sft.max_grad_norm: 0.5</code>",
        "<code>loss_type</code>: said <code>chunked_nll</code>, used <code>nll</code>",
        "a warning of its own",
        "<dt>arguments.eval_delay</dt><dd>0</dd>",
        "&lt;script&gt;window.hit = 1&lt;/script&gt;",
        "<code>method: qlora</code>",
    ):
        assert text in page
    assert "<script>window.hit" not in page
    (view,) = view_pages(*compared, make_pages())
    assert ("Importing", "3.00 s", "3.00 s") in view.arms[0].phases
    assert [name for name, _, _ in view.arms[0].phases] == [
        "Importing", "Loading", "First step", "Steps", "Saving", "Whole process",
    ]  # fmt: skip
    assert "Trainings may have run beside each other" in page
    assert "without recomputation and without Liger kernels" in page


def test_a_comparison_of_our_own_arms_has_none_of_it(example: tuple[RunDir, Any, Comparison]) -> None:
    page = build_page(example[0], example[2])
    assert view_frameworks(example[0], example[2]) is None
    assert not any(f'id="{name}"' in page for name in ("frameworks", "pages", "matrix"))


def test_the_file_reads_back_equal_and_another_is_refused(compared: tuple[RunDir, Comparison]) -> None:
    run, _ = compared
    assert FrameworkPages.from_json(read_json(run.frameworks)) == make_pages()
    with pytest.raises(DataError, match=r"frameworks\.json: is of another schema"):
        FrameworkPages.from_json(make_pages().to_json() | {"schema": 2})
    value = make_pages().to_json()
    value["pages"] = [{key: item for key, item in value["pages"][0].items() if key != "log"}]
    with pytest.raises(DataError, match=r"pages\[0\]: has no 'log'"):
        FrameworkPages.from_json(value)


def test_it_is_rendered_from_files_alone(compared: tuple[RunDir, Comparison]) -> None:
    run, comparison = compared
    assert render_report(run).read_text(encoding="utf-8") == build_page(run, comparison)
    assert len(list(read_jsonl(run.arm("lora-trl", 0).steps))) == 300

"""The parity table comes before any result, and says what differs; where all arms are ours there is none."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tunesmith.comparing.result import compare_run
from tunesmith.core.comparison import Comparison, Gate, Parity
from tunesmith.core.jsonl import read_json
from tunesmith.core.rundir import RunDir
from tunesmith.job.spec import Job
from tunesmith.report.page import build_page
from tunesmith.report.parity import show_figure, view_parity

Example = tuple[RunDir, Job, Comparison]
SAME = [
    Gate("tokens", "PASS", 0, 0, "rows", "the same 160 rows"),
    Gate("parameters", "PASS", 0, 0, "tensors", "the same 28 tensors"),
    Gate("loss", "PASS", 2e-7, 1e-6, "relative", "the first loss is ours within noise"),
    Gate("gradient", "PASS", 0.0004, 0.002, "relative", "the first gradient is ours within noise"),
    Gate("curve", "PASS", 0.001, 0.003, "relative", "20 losses are ours within noise"),
    Gate("optimizer", "PASS", 0, 0, "settings", "the same settings"),
]
FAILED = replace(SAME[0], word="FAIL", figure=812, says="trl: labels of <b>8</b> rows include the prompt")
UNSEEN = Gate("optimizer", "UNVERIFIED", 0, 0, "settings", "could not be seen: clipping")


@pytest.fixture(scope="module")
def compared(example: Example, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, Comparison]:
    folder = tmp_path_factory.mktemp("parity") / "copy"
    shutil.copytree(example[0].root, folder)
    parity = {
        "lora": Parity("trl", {"trl": "1.15.0"}, SAME),
        "qlora": Parity("trl", {"trl": "1.15.0"}, [FAILED, *SAME[1:]]),
        "full": Parity("axolotl", {}, [*SAME[:-1], UNSEEN]),
    }
    return RunDir(folder), compare_run(RunDir(folder), example[1], parity=parity)


def test_it_is_the_first_table_and_says_what_differs(compared: tuple[RunDir, Comparison]) -> None:
    page = build_page(*compared)
    assert (
        page.index('<section id="parity">') < page.index('<section id="table">') < page.index('id="quality"')
    )
    assert page.count("<table") > page[: page.index('<table class="gates">')].count("<table") == 0
    for text in (
        "<small>trl 1.15.0</small>",
        "<b>FAIL</b><small>812 rows differ</small>",
        "<b>PASS</b><small>0.04%, allowed 0.2%</small>",
        "qlora: other work, and in no ranking",
        "trl: labels of &lt;b&gt;8&lt;/b&gt; rows include the prompt",
        "full: ranked, with doubts",
        "could not be seen: clipping",
    ):
        assert text in page
    assert "lora: ranked" not in page.replace("qlora: ranked", "")


def test_a_blocked_arm_is_in_no_picture_of_what_pays(compared: tuple[RunDir, Comparison]) -> None:
    page = build_page(*compared)
    costs = page[page.index('<section id="costs">') : page.index('<section id="curves">')]
    assert "full" in costs
    assert "qlora" not in costs
    quality = page[page.index('<section id="quality">') : page.index('<section id="gain">')]
    assert "parity failed: tokens" in quality


def test_without_other_frameworks_there_is_no_table(example: Example) -> None:
    assert view_parity(example[2]) == []
    assert 'id="parity"' not in build_page(example[0], example[2])


@pytest.mark.parametrize(
    ("gate", "text"),
    [
        (replace(SAME[0], figure=1, word="FAIL"), "1 row differs"),
        (replace(SAME[0], figure=1_200, word="FAIL"), "1,200 rows differ"),
        (SAME[0], "none differs"),
        (UNSEEN, ""),
        (replace(SAME[2], figure=None, tolerance=None), ""),
        (SAME[2], "2e-7, allowed 1e-6"),
        (replace(SAME[2], figure=0.0, tolerance=None), "0"),
        (replace(SAME[2], figure=float("inf")), "over 1,000%, allowed 1e-6"),
    ],
)
def test_figures_as_people_read_them(gate: Gate, text: str) -> None:
    assert show_figure(gate) == text


def test_the_page_is_rebuilt_from_files(compared: tuple[RunDir, Comparison]) -> None:
    folder, comparison = compared
    again = Comparison.from_json(read_json(Path(folder.comparison)))
    assert build_page(folder, again) == build_page(folder, comparison)

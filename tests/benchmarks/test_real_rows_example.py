"""What the example on real rows publishes: no words of a row, no folder of the machine that made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from real_rows_example import EXAMPLE, MAX_CHARACTERS, NUM_ROWS, choose_rows, publish
from tunesmith.core.comparison import Comparison
from tunesmith.core.jsonl import read_json
from tunesmith.core.rundir import RunDir

ROW = {
    "instruction": "Who's the keeper\nof a lighthouse?",
    "response": 'They said "the old man", and his dog.',
}


def leave(folder: Path, report: str) -> RunDir:
    """A run whose other files say nothing."""
    run = RunDir(folder / "run").create()
    for path in (run.comparison, run.gates, run.frameworks):
        path.write_text("{}", encoding="utf-8")
    run.report.write_text(report, encoding="utf-8")
    return run


@pytest.mark.parametrize(
    "text",
    [
        "<p>Who&#39;s the keeper\nof a lighthouse?</p>",
        json.dumps("so they said: Who's the keeper\nof a lighthouse"),
        json.dumps(json.dumps('They said "the old man", and')),
        "WHO'S THE KEEPER OF",
    ],
)
def test_a_file_that_quotes_a_row_is_not_published(tmp_path: Path, text: str) -> None:
    with pytest.raises(SystemExit, match=r"^report\.html: quotes a row"):
        publish(leave(tmp_path, text), [ROW], tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_file_that_names_a_folder_of_this_machine_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^report\.html: names a folder of this machine"):
        publish(leave(tmp_path, f"loaded {Path.home()}/model"), [ROW], tmp_path)


def test_names_are_relative_to_the_runs_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    publish(leave(tmp_path, f'"model": "{tmp_path}/stories260k", the keeper of a boat'), [ROW], out)
    assert (out / "report.html").read_text(encoding="utf-8") == '"model": "stories260k", the keeper of a boat'
    assert sorted(path.name for path in out.iterdir()) == [
        "comparison.json",
        "frameworks.json",
        "gates.json",
        "report.html",
    ]


def test_it_draws_the_same_short_rows_every_time(tmp_path: Path) -> None:
    rows = [{"instruction": f"row {n}", "response": "x" * (n % 500)} for n in range(NUM_ROWS + 1000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    first, again = (choose_rows(tmp_path / "rows.jsonl") for _ in range(2))
    assert first == again
    assert len({row["instruction"] for row in first}) == NUM_ROWS
    assert max(len(row["instruction"] + row["response"]) for row in first) <= MAX_CHARACTERS


def test_the_committed_example_is_of_five_engines_that_did_the_same_work() -> None:
    comparison = Comparison.from_json(read_json(EXAMPLE / "comparison.json"))
    assert comparison.record["job"]["compare"]["samples"] is False
    assert comparison.seeds == [0, 1, 2]
    frameworks = {arm.framework for arm in comparison.arms if arm.status == "done"}
    assert frameworks == {"tunesmith", "trl", "llamafactory", "axolotl", "unsloth"}
    assert len(comparison.parity) == 8

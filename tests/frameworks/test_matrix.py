"""What each framework can express is asked, never typed: the page is current, and no key of a job is forgotten."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tunesmith.cli.frameworks import app
from tunesmith.core.frameworks import Matrix
from tunesmith.frameworks.matrix import FEATURES, OWN, ask_all, render_matrix
from tunesmith.frameworks.port import Reason
from tunesmith.frameworks.ports import PORTS
from tunesmith.job.spec import Job, LoraSpec, TrainSpec

DOCS = Path(__file__).parents[2] / "docs"
# Every training has them, or they are about checkpoints, which are our engine's own.
EVERYBODYS = {"rank", "batch_rows", "learning_rate", "seed", "save_every", "keep_checkpoints"}


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    return ask_all()


def test_the_page_is_current(matrix: Matrix) -> None:
    assert (DOCS / "frameworks-matrix.md").read_text(encoding="utf-8") == render_matrix(matrix), (
        "run: tunesmith frameworks matrix --markdown > docs/frameworks-matrix.md"
    )


def test_every_key_of_a_training_is_asked_about() -> None:
    def keys(value: Any) -> set[str]:
        return set(value) if isinstance(value, dict) else set()

    rows = [settings for group in FEATURES.values() for settings in group.values()]
    asked = set[str]().union(*(keys(row.get(part)) for row in rows for part in ("method", "train", "data")))

    assert {*TrainSpec.model_fields, *LoraSpec.model_fields} - asked == EVERYBODYS


def test_a_framework_answers_for_itself(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Fussy:
        """Says no to every job of more than two passes."""

        name: str = "axolotl"

        def can(self, job: Job) -> Reason | None:
            return None if job.train.epochs < 3 else Reason("train.epochs", "too long", "Shorten it")

        translate: Any = None

    monkeypatch.setitem(PORTS, "axolotl", Fussy())
    asked = ask_all()

    assert [row.title for row in asked.features if row.answers["axolotl"].can] == ["Part of an epoch"]
    assert asked.missing("axolotl")[0].answers["axolotl"].cure == "Shorten it"
    # The others' answers stay what they were.
    assert [row.answers["trl"] for row in asked.features] == [row.answers["trl"] for row in matrix.features]


def test_our_own_engine_trains_whatever_a_job_can_say(matrix: Matrix) -> None:
    assert next(iter(matrix.frameworks)) == OWN
    assert matrix.missing(OWN) == []


def test_a_terminal_and_a_program_are_told_the_same(matrix: Matrix) -> None:
    found = json.loads(CliRunner().invoke(app, ["matrix", "--json"]).stdout)
    assert found == {"schema": 1, **matrix.public_json()}
    row = next(row for row in found["features"] if row["title"] == "int8 base")
    assert row["setting"] == "method: {name: lora, base: int8}"
    assert row["answers"]["tunesmith"] == {"can": True, "finding": None, "cure": None}
    assert row["answers"]["trl"]["can"] is False

    text = CliRunner().invoke(app, ["matrix"], env={"COLUMNS": "200"}).stdout
    for row in matrix.features:
        assert row.title in text
        assert all(answer.finding in text for answer in row.answers.values())

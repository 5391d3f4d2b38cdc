"""What the bundled model is aligned with is what its card says."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from tunesmith.api import check, demo_job
from tunesmith.comparing.plan import plan_arms
from tunesmith.core.bundled import BUNDLED
from tunesmith.demo import make_alignment, make_tickets
from tunesmith.eval.metrics import json_fields, json_valid

PROMPTS, PAIRS = "tunesmith/tickets-prompts", "tunesmith/tickets-preferences"
SPLITS = ("train", "validation", "test")
Rows = dict[str, list[dict]]


@pytest.fixture(scope="module")
def rows() -> dict[str, Rows]:
    """Name -> split -> rows."""
    return {
        name: {
            split: [
                json.loads(line)
                for line in (BUNDLED[name] / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            ]
            for split in SPLITS
        }
        for name in (PROMPTS, PAIRS)
    }


def list_sides(row: dict) -> tuple[str, str]:
    return row["chosen"][0]["content"], row["rejected"][0]["content"]


def test_the_script_writes_the_committed_files_byte_for_byte(tmp_path: Path) -> None:
    make_alignment.write_alignment(tmp_path, seed=0)
    for name in (PROMPTS, PAIRS):
        for path in sorted((tmp_path / name.removeprefix("tunesmith/")).iterdir()):
            assert path.read_bytes() == (BUNDLED[name] / path.name).read_bytes(), path


def test_another_seed_gives_other_prompts(tmp_path: Path) -> None:
    make_alignment.write_alignment(tmp_path, seed=1)
    made = tmp_path / "tickets-prompts" / "test.jsonl"
    assert made.read_bytes() != (BUNDLED[PROMPTS] / "test.jsonl").read_bytes()


def test_no_writer_stands_in_two_splits_or_in_the_sealed_test(rows: dict[str, Rows]) -> None:
    writers = {
        split: {row["family"] for name in (PROMPTS, PAIRS) for row in rows[name][split]} for split in SPLITS
    }
    lines = (BUNDLED["tunesmith/tickets"] / "test.jsonl").read_text(encoding="utf-8").splitlines()
    writers["sealed"] = {json.loads(line)["family"] for line in lines}
    assert [len(writers[split]) for split in SPLITS] == [112, 8, 30]
    assert sum(map(len, writers.values())) == len(set().union(*writers.values()))
    # The held-out writers are the clusters of intervals, all of the same size.
    assert set(Counter(row["family"] for row in rows[PROMPTS]["test"]).values()) == {8}
    assert min(Counter(row["family"] for row in rows[PAIRS]["test"]).values()) >= 4


def test_no_message_comes_twice(rows: dict[str, Rows]) -> None:
    messages = [
        row.get("messages", row.get("prompt"))[1]["content"]
        for name in (PROMPTS, PAIRS)
        for split in SPLITS
        for row in rows[name][split]
    ]
    tickets = [
        json.loads(line)["messages"][1]["content"]
        for split in SPLITS
        for line in (BUNDLED["tunesmith/tickets"] / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(set(messages)) == len(messages)
    assert not set(messages) & set(tickets)


def test_every_right_answer_fits_the_schema(rows: dict[str, Rows]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(make_tickets.build_schema())
    right = [row["messages"][2]["content"] for split in SPLITS for row in rows[PROMPTS][split]]
    right += [list_sides(row)[0] for split in SPLITS for row in rows[PAIRS][split]]
    for answer in right:
        validator.validate(json.loads(answer))


def test_a_rejected_answer_is_mostly_right_and_nearly_always_json(rows: dict[str, Rows]) -> None:
    pairs = [list_sides(row) for split in SPLITS for row in rows[PAIRS][split]]
    assert all(chosen.strip() != rejected.strip() for chosen, rejected in pairs)
    shares = [json_fields(rejected, chosen) for chosen, rejected in pairs]
    assert all(share < 1 for share in shares)
    assert 0.7 < sum(shares) / len(shares) < 0.95
    assert sum(json_valid(rejected, "") for _, rejected in pairs) / len(pairs) > 0.95


def test_length_does_not_tell_which_answer_is_chosen(rows: dict[str, Rows]) -> None:
    """To take the shorter one, or the longer one, is right about as often as to guess."""
    for split in ("train", "test"):
        sizes = [tuple(map(len, list_sides(row))) for row in rows[PAIRS][split]]
        shorter = sum((chosen < rejected) + 0.5 * (chosen == rejected) for chosen, rejected in sizes)
        assert 0.4 < shorter / len(sizes) < 0.6
        assert abs(sum(chosen - rejected for chosen, rejected in sizes)) / len(sizes) < 5


@pytest.mark.parametrize(("name", "objective"), [(PROMPTS, "sft"), (PROMPTS, "grpo"), (PAIRS, "dpo")])
def test_the_check_finds_nothing_wrong(name: str, objective: str, rows: dict[str, Rows]) -> None:
    learned = {"name": "grpo", "rewards": ["json_fields"]} if objective == "grpo" else objective
    report = check({"model": "tunesmith/tiny", "data": {"train": name}, "objective": learned})
    assert not report.errors
    assert not report.warnings
    assert {split: report.splits[split].num_rows for split in SPLITS} == {
        split: len(rows[name][split]) * (2 if name == PAIRS else 1) for split in SPLITS
    }


def test_readmes_name_the_rows_that_are_there(rows: dict[str, Rows]) -> None:
    for name in (PROMPTS, PAIRS):
        card = (BUNDLED[name] / "README.md").read_text(encoding="utf-8")
        for split in SPLITS:
            found = re.search(rf"\| {split}\.jsonl \| ([\d,]+) \|", card)
            assert found, (name, split)
            assert int(found[1].replace(",", "")) == len(rows[name][split])


def test_the_demo_goes_on_from_sft_by_three_objectives() -> None:
    job = demo_job(about="alignment", seeds=2)
    arms = plan_arms(job)
    assert job.compare.seeds == [0, 1]
    assert demo_job(about="alignment").compare.seeds == [0]
    assert [(arm.name, arm.starts_from) for arm in arms] == [
        ("sft", None),
        ("dpo", "sft"),
        ("ppo", "sft"),
        ("grpo", "sft"),
    ]

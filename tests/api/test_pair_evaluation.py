"""Pairs scored by reward models and by any other model; what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import tunesmith
from tunesmith.core.errors import DataError
from tunesmith.core.jsonl import read_json, read_jsonl

COLOURS = ["red", "green", "blue", "white", "black", "brown", "pink", "grey"]


def write_pairs(path: Path, colours: list[str]) -> Path:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Which of {one} and {other} is darker?"}],
            "chosen": f"Gladly: of {one} and {other} I would say {one}.",
            "rejected": f"Stupid question. {other}, obviously.",
        }
        for one in colours
        for other in COLOURS
        if one != other
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    pairs = write_pairs(folder / "train.jsonl", COLOURS[:6])
    job = {
        "model": "tunesmith/tiny",
        "data": {"train": str(pairs), "split": {"validation": 0.0, "test": 0.0}},
        "method": {"name": "lora", "rank": 4},
        "objective": "reward",
        "train": {"steps": 12, "batch_rows": 8, "evaluate_every": "never", "precision": "fp32", "learning_rate": 2e-3},
    }  # fmt: skip
    tunesmith.train(job, out=folder / "run")
    return folder / "run"


def test_a_reward_model_is_scored_by_what_transformers_computes(reward_run: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "held-out.jsonl", COLOURS[6:])
    found = tunesmith.api.evaluate_pairs(reward_run, pairs=pairs, out=tmp_path / "scores")
    assert (found["scored_by"], found["pairs"]) == ("reward", 14)
    assert found["accuracy"] == 1.0
    assert found["low"] < 1.0
    assert found["log_loss"] < 0.69
    rows = [row for _, row in read_jsonl(tmp_path / "scores" / "preferences.jsonl")]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        reward_run / "model", dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained("src/tunesmith/demo/tiny")
    asked = json.loads(pairs.read_text().splitlines()[3])
    for side in ("chosen", "rejected"):
        turns = [*asked["prompt"], {"role": "assistant", "content": asked[side]}]
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits.item()
        assert rows[3][side] == pytest.approx(wanted, abs=0.02)
    assert read_json(tmp_path / "scores" / "pairs.json")["accuracy"] == 1.0


def test_the_folder_of_a_reward_model_is_one_too(reward_run: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "held-out.jsonl", COLOURS[6:])
    by_run = tunesmith.api.evaluate_pairs(reward_run, pairs=pairs)
    by_folder = tunesmith.api.evaluate_pairs(reward_run / "model", pairs=pairs)
    assert by_folder["margin"] == by_run["margin"]


def test_any_other_model_is_scored_by_likelihood_and_claims_no_calibration(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "held-out.jsonl", COLOURS[6:])
    found = tunesmith.api.evaluate_pairs("tunesmith/tiny", pairs=pairs, max_rows=5)
    assert (found["scored_by"], found["pairs"], found["warnings"]) == ("likelihood", 5, [])
    assert "brier" not in found


def test_rows_with_one_answer_are_no_pairs(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "One:", "completion": " 1"}\n')
    with pytest.raises(DataError, match="its rows are answers"):
        tunesmith.api.evaluate_pairs("tunesmith/tiny", pairs=path)

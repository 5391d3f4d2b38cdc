"""Preference objectives through the public functions, on the bundled model: what is learned, kept and refused."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tunesmith
from tunesmith.core.errors import DataError, Interrupted, ModelError
from tunesmith.core.events import Event
from tunesmith.core.jsonl import read_jsonl
from tunesmith.data.prepare import load_prepared
from tunesmith.methods.objectives import score_answers
from tunesmith.models.layout import make_batch
from tunesmith.models.load import load_model

COLOURS = ["red", "green", "blue", "white", "black", "brown", "pink", "grey"]


def write_pairs(folder: Path) -> Path:
    """Polite answers are chosen, rude ones rejected."""
    path = folder / "pairs.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Which of {colour} and {other} is darker?"}],
            "chosen": f"Gladly: of {colour} and {other} I would say {colour}.",
            "rejected": f"Stupid question. {other}, obviously.",
        }
        for colour in COLOURS
        for other in COLOURS
        if colour != other
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_labelled(folder: Path) -> Path:
    path = folder / "labelled.jsonl"
    rows = []
    for _, pair in read_jsonl(write_pairs(folder)):
        for side, label in (("chosen", True), ("rejected", False)):
            answer = [{"role": "assistant", "content": pair[side]}]
            rows.append({"prompt": pair["prompt"], "completion": answer, "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def job(data: Path, objective: Any, method: Any = "lora", **train: Any) -> dict[str, Any]:
    return {
        "model": "tunesmith/tiny",
        "data": {"train": str(data), "split": {"validation": 0.2, "test": 0.0}},
        "method": method,
        "objective": objective,
        "train": {
            "steps": 12,
            "batch_rows": 8,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "save_every": "never",
            **train,
        },
    }


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [value for _, value in read_jsonl(folder / "steps.jsonl")]


@pytest.mark.parametrize(
    "objective", ["dpo", "orpo", "simpo", "kto", {"name": "dpo", "loss": "ipo"}], ids=str
)
def test_an_objective_is_learned(tmp_path: Path, objective: Any) -> None:
    data = write_labelled(tmp_path) if objective == "kto" else write_pairs(tmp_path)
    record = tunesmith.train(job(data, objective), out=tmp_path / "run")
    steps = steps_of(tmp_path / "run")
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert steps[-1]["measures"]["accuracy"] > 0.9
    assert record.validation_loss is not None
    assert record.validation_loss < 0.8 * steps[0]["loss"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("objective", ["dpo", "kto", "reward"])
def test_an_objective_is_learned_in_bf16(tmp_path: Path, objective: str, compiled: bool) -> None:
    data = write_labelled(tmp_path) if objective == "kto" else write_pairs(tmp_path)
    wanted = job(data, objective, precision="bf16", compile=compiled)
    tunesmith.train(wanted, out=tmp_path / "run")
    steps = steps_of(tmp_path / "run")
    # Rounding differs between the pass that measures the reference and the first step's.
    assert steps[0]["loss"] == pytest.approx(0.5 if objective == "kto" else math.log(2), rel=0.05)
    assert steps[-1]["measures"]["accuracy"] > 0.9


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_dpo_begins_at_the_logarithm_of_two_with_every_method(tmp_path: Path, method: str) -> None:
    tunesmith.train(
        job(write_pairs(tmp_path), "dpo", method, steps=2, evaluate_every="never"), out=tmp_path / "run"
    )
    assert steps_of(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_an_adapter_that_is_continued_is_its_own_reference(tmp_path: Path) -> None:
    data = write_pairs(tmp_path)
    tunesmith.train(job(data, "dpo", steps=6), out=tmp_path / "first")
    method = {"name": "lora", "adapter": str(tmp_path / "first" / "adapter")}
    tunesmith.train(job(data, "dpo", method, steps=2), out=tmp_path / "second")
    assert steps_of(tmp_path / "first")[-1]["loss"] < 0.6
    assert steps_of(tmp_path / "second")[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("objective", ["dpo", "kto", "reward"])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path, objective: str) -> None:
    data = write_labelled(tmp_path) if objective == "kto" else write_pairs(tmp_path)
    method = {"name": "lora", "rank": 4, "dropout": 0.2}
    wanted = job(data, objective, method, steps=6, evaluate_every=3)
    tunesmith.train(wanted, out=tmp_path / "whole")

    def interrupt(event: Event) -> None:
        if event.kind == "step" and event.done == 4:
            os.kill(os.getpid(), 2)

    with pytest.raises(Interrupted):
        tunesmith.train(wanted, out=tmp_path / "cut", on_event=interrupt)
    tunesmith.train(wanted, out=tmp_path / "cut")
    kept = ["step", "loss", "grad_norm", "measures", "validation_loss"]
    assert [[s[k] for k in kept] for s in steps_of(tmp_path / "cut")] == [
        [s[k] for k in kept] for s in steps_of(tmp_path / "whole")
    ]
    name = "model/model.safetensors" if objective == "reward" else "adapter/adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_reference_is_computed_once_and_again_for_other_rows(tmp_path: Path) -> None:
    data = write_pairs(tmp_path)
    said: list[str] = []
    wanted = job(data, "dpo", steps=1, evaluate_every="never")

    def listen(event: Event) -> None:
        said.append(event.text)

    tunesmith.train(wanted, out=tmp_path / "first", on_event=listen)
    assert "the reference" in said
    said.clear()
    shutil.copytree(
        tmp_path / "first", tmp_path / "second", ignore=shutil.ignore_patterns("run.json", "steps*")
    )
    tunesmith.train(wanted, out=tmp_path / "second", on_event=listen)
    assert "the reference" not in said
    data.write_text(data.read_text().replace("Gladly", "Happily"))
    tunesmith.train(wanted, out=tmp_path / "third", on_event=listen)
    shutil.copy(tmp_path / "first" / "reference.safetensors", tmp_path / "third")
    said.clear()
    tunesmith.train(wanted, out=tmp_path / "third", fresh=True, on_event=listen)
    assert "the reference" in said


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_reward_model_is_a_classifier_that_transformers_reads(tmp_path: Path, method: str) -> None:
    record = tunesmith.train(job(write_pairs(tmp_path), "reward", method, steps=20), out=tmp_path / "run")
    steps = steps_of(tmp_path / "run")
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert steps[-1]["measures"]["accuracy"] == 1.0
    assert record.validation_loss is not None
    assert record.validation_loss < 0.5
    folder = tmp_path / "run" / "model"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    ours = load_model(folder, classifier=True)
    rows = load_prepared(tmp_path / "run" / "prepared").rows("validation")
    with torch.no_grad():
        scores = [theirs(torch.tensor([list(row.ids)])).logits.item() for row in rows]
        assert score_answers(ours, make_batch(list(rows))).tolist() == pytest.approx(scores, abs=1e-4)
    # A pair's chosen answer comes first.
    assert all(good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True))


def test_a_reward_model_is_no_language_model(tmp_path: Path) -> None:
    tunesmith.train(
        job(write_pairs(tmp_path), "reward", steps=1, evaluate_every="never"), out=tmp_path / "run"
    )
    wanted = job(write_pairs(tmp_path), "dpo") | {"model": str(tmp_path / "run" / "model")}
    with pytest.raises(ModelError, match="is a sequence classifier"):
        tunesmith.train(wanted, out=tmp_path / "other")
    again = job(write_pairs(tmp_path), "reward", steps=1) | {"model": str(tmp_path / "run" / "model")}
    tunesmith.train(again, out=tmp_path / "more")
    assert steps_of(tmp_path / "more")[0]["loss"] != pytest.approx(math.log(2), rel=1e-6)


def test_rows_of_another_objective_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="objective"):
        tunesmith.train(job(write_pairs(tmp_path), "sft"), out=tmp_path / "run")
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(DataError, match="chosen"):
        tunesmith.train(job(answers, "dpo"), out=tmp_path / "other")

"""Distillation through the public functions, on the bundled model: what is learned, resumed, planned and refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.core.bundled import bundled_path
from tunesmith.core.errors import Interrupted, JobError, ModelError
from tunesmith.core.events import Event
from tunesmith.core.jsonl import read_jsonl

COLOURS = ["red", "green", "blue", "white", "black", "brown", "pink", "grey"]
DISTILL = {"name": "distill", "teacher": "tunesmith/tiny"}


def write_rows(folder: Path, *, answer: str = "Of {} and {} I would say the first.") -> Path:
    path = folder / "rows.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Which of {colour} and {other} is darker?"},
                {"role": "assistant", "content": answer.format(colour, other)},
            ]
        }
        for colour in COLOURS
        for other in COLOURS
        if colour != other
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def job(data: Path, objective: Any = None, method: Any = "lora", **train: Any) -> dict[str, Any]:
    return {
        "model": "tunesmith/tiny",
        "data": {"train": str(data), "split": {"validation": 0.2, "test": 0.0}},
        "method": method,
        "objective": objective or DISTILL,
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


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has fine-tuned the bundled model, whole."""
    folder = tmp_path_factory.mktemp("teacher")
    tunesmith.train(job(write_rows(folder), "sft", "full", steps=20), out=folder / "run")
    return folder / "run"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The bundled model as a folder of the user's."""
    source = bundled_path("tunesmith/tiny")
    assert source is not None
    return Path(shutil.copytree(source, tmp_path / "teacher"))


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_student_comes_close_to_its_teacher(tmp_path: Path, taught: Path, method: str, loss: str) -> None:
    rate = 3e-4 if method == "full" else 3e-3
    wanted = job(
        write_rows(tmp_path), {**DISTILL, "teacher": str(taught), "loss": loss}, method, learning_rate=rate
    )
    record = tunesmith.train(wanted, out=tmp_path / "run")
    steps = steps_of(tmp_path / "run")
    assert steps[0]["measures"]["kl"] == pytest.approx(steps[0]["loss"], rel=1e-6)
    assert steps[-1]["measures"]["kl"] < 0.5 * steps[0]["measures"]["kl"]
    # The teacher has learned these answers: whoever resembles it finds them likelier.
    assert steps[-1]["measures"]["nll"] < 0.8 * steps[0]["measures"]["nll"]
    assert record.validation_loss is not None
    assert record.validation_loss < 0.5 * steps[0]["loss"]
    assert "teacher" in record.fingerprints


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_student_comes_close_to_its_teacher_in_bf16(
    tmp_path: Path, taught: Path, method: str, compiled: bool
) -> None:
    rate = 3e-4 if method == "full" else 3e-3
    train = {"learning_rate": rate, "precision": "bf16", "compile": compiled}
    wanted = job(write_rows(tmp_path), {**DISTILL, "teacher": str(taught)}, method, **train)
    tunesmith.train(wanted, out=tmp_path / "run")
    steps = steps_of(tmp_path / "run")
    assert steps[-1]["measures"]["kl"] < 0.5 * steps[0]["measures"]["kl"]


def test_a_fresh_adapter_on_its_own_teacher_has_nothing_to_learn(tmp_path: Path) -> None:
    tunesmith.train(job(write_rows(tmp_path), steps=1), out=tmp_path / "run")
    (step,) = steps_of(tmp_path / "run")
    assert step["loss"] == pytest.approx(0, abs=1e-6)
    assert step["validation_loss"] == pytest.approx(0, abs=1e-6)
    assert step["measures"]["nll"] > 0.5


def test_a_teacher_may_be_an_adapter(tmp_path: Path) -> None:
    data = write_rows(tmp_path)
    tunesmith.train(job(data, "sft", learning_rate=5e-3), out=tmp_path / "sft")
    for number, teacher in enumerate((tmp_path / "sft", tmp_path / "sft" / "adapter")):
        out = tmp_path / str(number)
        tunesmith.train(job(data, {**DISTILL, "teacher": str(teacher)}, steps=1), out=out)
    first, second = (steps_of(tmp_path / name)[0] for name in "01")
    assert first["loss"] == second["loss"] > 0.1
    # What goes on from that adapter is its own teacher.
    going_on = {"name": "lora", "adapter": str(tmp_path / "sft" / "adapter")}
    again = job(data, {**DISTILL, "teacher": str(tmp_path / "sft")}, going_on, steps=1)
    tunesmith.train(again, out=tmp_path / "again")
    assert steps_of(tmp_path / "again")[0]["loss"] == pytest.approx(0, abs=1e-6)


def test_rows_may_stream(tmp_path: Path, taught: Path) -> None:
    wanted = job(write_rows(tmp_path), {**DISTILL, "teacher": str(taught)}, steps=3)
    wanted["data"] |= {"streaming": True, "split": {"validation": 0.0, "test": 0.0}, "max_tokens": 128}
    tunesmith.train(wanted, out=tmp_path / "run")
    steps = steps_of(tmp_path / "run")
    assert steps[-1]["measures"]["kl"] < steps[0]["measures"]["kl"]


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path, taught: Path) -> None:
    method = {"name": "lora", "rank": 4, "dropout": 0.2}
    objective = {**DISTILL, "teacher": str(taught), "sft_weight": 0.5, "temperature": 2.0}
    wanted = job(write_rows(tmp_path), objective, method, steps=6, evaluate_every=3)
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
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_does_not_go_on_under_a_changed_teacher(tmp_path: Path, copied: Path, taught: Path) -> None:
    wanted = job(write_rows(tmp_path), {**DISTILL, "teacher": str(copied)}, steps=6)

    def interrupt(event: Event) -> None:
        if event.kind == "step" and event.done == 2:
            os.kill(os.getpid(), 2)

    with pytest.raises(Interrupted):
        tunesmith.train(wanted, out=tmp_path / "run", on_event=interrupt)
    shutil.copyfile(taught / "model" / "model.safetensors", copied / "model.safetensors")
    with pytest.raises(JobError, match="teacher"):
        tunesmith.train(wanted, out=tmp_path / "run")


def test_an_embedding_with_more_rows_of_padding_is_the_same_teacher(tmp_path: Path, copied: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    config = json.loads((copied / "config.json").read_text())
    data = write_rows(tmp_path)
    embedding = tensors["model.embed_tokens.weight"]
    # Rows that a softmax over all of them would find likeliest.
    tensors["model.embed_tokens.weight"] = torch.cat((embedding, 10 * embedding[:64]))
    config["vocab_size"] += 64
    (copied / "config.json").write_text(json.dumps(config))
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    tunesmith.train(job(data, {**DISTILL, "teacher": str(copied)}, steps=1), out=tmp_path / "run")
    assert steps_of(tmp_path / "run")[0]["loss"] == pytest.approx(0, abs=1e-6)


def test_a_plan_counts_the_teachers_weights(tmp_path: Path) -> None:
    data = write_rows(tmp_path)
    alone, taught = (
        tunesmith.plan(job(data, objective), device="h100", memory="8GiB").methods[0].plan
        for objective in ("sft", DISTILL)
    )
    folder = bundled_path("tunesmith/tiny")
    assert folder is not None
    stored = (folder / "model.safetensors").stat().st_size
    # Stored in bf16, held in fp32 as the job asks.
    assert taught.parts["weights"] - alone.parts["weights"] == pytest.approx(2 * stored, rel=0.01)
    with pytest.raises(JobError, match="without its teacher"):
        tunesmith.plan(job(data), probe=True)


# --- refused before any data is read -----------------------------------------------------------------------------


def refuse(tmp_path: Path, teacher: Path | str, **train: Any) -> str:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ModelError) as caught:
        tunesmith.check(job(tmp_path / "none.jsonl", {**DISTILL, "teacher": str(teacher)}, **train))
    said = str(caught.value)
    assert said.startswith("objective.teacher")
    assert "\n" not in said
    return said


def test_a_teacher_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "no such folder" in refuse(tmp_path, tmp_path / "nobody")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refuse(tmp_path, tmp_path / "empty")


def test_a_broken_teacher_is_told(tmp_path: Path, copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refuse(tmp_path, copied)
    weights.unlink()
    assert "model.safetensors" in refuse(tmp_path, copied)


def test_a_teacher_of_other_tokens_is_told(tmp_path: Path, copied: Path) -> None:
    path = copied / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = [token for token in vocabulary if len(token) == 1][:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(content))
    assert "other tokens than the model that is trained" in refuse(tmp_path, copied)


def test_tokens_that_the_job_adds_are_unknown_to_a_teacher(tmp_path: Path) -> None:
    method = {"name": "lora", "new_tokens": ["<json>"]}
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ModelError, match="other tokens"):
        tunesmith.check(job(tmp_path / "none.jsonl", method=method))


def test_a_row_beyond_the_teachers_context_is_told(tmp_path: Path, copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["max_position_embeddings"] = 16
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"objective\.teacher: reads 16 tokens, and a row has \d+"):
        tunesmith.train(job(write_rows(tmp_path), {**DISTILL, "teacher": str(copied)}), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("objective", "finding"),
    [
        ("distill", "distill needs a teacher"),
        ({"name": "distill"}, "objective.teacher"),
        ({**DISTILL, "teacher": ""}, "is empty|objective.teacher"),
        ({**DISTILL, "loss": "kl"}, "objective.loss"),
        ({**DISTILL, "temperature": 0.0}, "objective.temperature"),
        ({**DISTILL, "sft_weight": -1.0}, "objective.sft_weight"),
        ({**DISTILL, "techer": "x"}, "unknown key"),
    ],
    ids=str,
)
def test_wrong_settings_are_told_with_their_key(tmp_path: Path, objective: Any, finding: str) -> None:
    with pytest.raises(JobError, match=finding):
        tunesmith.job_from(job(tmp_path / "rows.jsonl", objective))

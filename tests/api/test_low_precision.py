"""Training and judging on bases that multiply in fp8: what is told, recorded, refused, and kept by a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.api.comparing import GENERAL_TEXT
from tunesmith.api.evaluation import find_target, load_target
from tunesmith.core.errors import JobError, TrainingFailed
from tunesmith.core.events import Event
from tunesmith.core.jsonl import read_jsonl
from tunesmith.models.packed import PackedRows


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pieces of general text: fp8 moves the bundled model's loss on them by less than half a percent. Without the
    token that begins its documents the model is lost, and fp8 moves it more."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    pieces = ["<|bos|>" + row["text"][:600] for _, row in read_jsonl(GENERAL_TEXT)]
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces[:40]))
    return path


def job(source: str | Path, **method: Any) -> dict[str, Any]:
    return {
        "model": "tunesmith/tiny",
        "data": {"train": str(source)},
        "method": {"rank": 4, **method},
        "train": {"steps": 2, "evaluate_every": "never", "learning_rate": 1e-3},
    }


@pytest.mark.parametrize(
    "method", [{"name": "lora", "base": "fp8"}, {"name": "qlora", "compute": "fp8"}], ids=["fp8", "nf4"]
)
def test_a_run_in_fp8_tells_its_price_and_is_judged_in_fp8(
    text: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    events: list[Event] = []
    record = tunesmith.train(job(text, **method), out=tmp_path, on_event=events.append)
    check = record.fp8_check
    assert check is not None
    assert 0 < abs(check["difference"]) < 0.005
    assert check["difference"] == pytest.approx(check["fp8_loss"] / check["reference_loss"] - 1)
    [note] = [event.text for event in events if event.kind == "note"]
    assert note.startswith("fp8 changes the loss of the first step's rows by ")
    assert [warning for warning in record.warnings if "emulated" in warning]
    model = load_target(find_target(str(tmp_path)))
    assert all(isinstance(p.packed, PackedRows) and p.packed.compute == "fp8" for p in model.projections())
    # The first step's loss is the one that was measured: fresh adapters change nothing.
    [first, _] = [row for _, row in read_jsonl(tmp_path / "steps.jsonl")]
    assert first["loss"] == pytest.approx(check["fp8_loss"], rel=1e-3)


def test_a_base_that_fp8_moves_too_far_is_refused(tmp_path: Path) -> None:
    # The answers to tickets are copied, exactly: NF4 to fp8 costs these 1% more.
    with pytest.raises(
        TrainingFailed, match=r"^method\.compute: fp8 changes the loss .* Train with compute: auto$"
    ):
        tunesmith.train(job("tunesmith/tickets", name="qlora", compute="fp8"), out=tmp_path)


def test_tokens_that_the_job_adds_do_not_stop_the_check(text: Path, tmp_path: Path) -> None:
    added = tmp_path / "added.jsonl"
    added.write_text(text.read_text().replace(" the ", " <|the|> "))
    record = tunesmith.train(
        job(added, name="lora", base="fp8", new_tokens=["<|the|>"]), out=tmp_path / "run"
    )
    assert record.fp8_check is not None


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "lora", "compute": "fp8"}, "compute: fp8 is for an nf4 base; base: full multiplies in the"),
        (
            {"name": "lora", "base": "fp8", "compute": "fp8"},
            "base: fp8 multiplies in fp8 anyway, leave compute",
        ),
        ({"name": "qlora", "base": "fp8"}, "qlora trains on an nf4 base"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, method: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError, match=said):
        tunesmith.train(job("tunesmith/tickets", **method), out=tmp_path)


@pytest.mark.slow
def test_arms_are_named_after_their_base_and_judged_on_it(text: Path, tmp_path: Path) -> None:
    values = job(text, name="lora") | {
        "evaluate": {"metrics": [], "forgetting": False},
        "compare": {"arms": ["zero-shot", {"method": {"name": "lora", "rank": 4, "base": "fp8"}},
                             {"method": {"name": "qlora", "rank": 4, "compute": "fp8"}}],
                    "seeds": [0], "metric": "nll"},
    }  # fmt: skip
    comparison = tunesmith.compare(values, out=tmp_path)
    assert [arm.name for arm in comparison.arms] == ["zero-shot", "lora-fp8", "qlora-fp8"]

"""Quantised arms and quantisation-aware trainings, from the job file to the table."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from tunesmith import api
from tunesmith.api.evaluation import find_target, load_target
from tunesmith.core.bundled import BUNDLED
from tunesmith.core.errors import Interrupted, ModelError
from tunesmith.core.events import Event
from tunesmith.core.jsonl import read_json
from tunesmith.models.quantize import QuantizedRows, quantize_model

pytest.importorskip("torchao", reason="torchao is not installed (extra `quant`)")


def job(method: Any = "lora", arms: list[Any] | None = None, **train: Any) -> dict[str, Any]:
    return {
        "model": "tunesmith/tiny",
        "data": {"train": "tunesmith/tickets"},
        "method": method,
        "train": {"steps": 4, "evaluate_every": 2, "learning_rate": 1e-3, **train},
        "evaluate": {"max_rows": 6, "max_new_tokens": 8, "precision": "fp32"},
        "compare": {"arms": arms or ["lora"], "seeds": [0], "metric": "nll"},
    }


QAT = {"name": "lora", "rank": 4, "qat": "int4"}


@pytest.mark.slow
def test_quantised_arms_stand_beside_the_plain_one(tmp_path: Path) -> None:
    lora = {"name": "lora", "rank": 4}
    quantized = [
        {"method": lora, "quantize": "int4"},
        {"method": QAT},
        {"method": "zero-shot", "quantize": "int8"},
    ]
    arms = ["zero-shot", "lora", *quantized]
    comparison = tunesmith.compare(job(lora, arms), out=tmp_path)
    public = api.comparison_json(comparison, tmp_path)
    by_name = {arm["name"]: arm for arm in json.loads(json.dumps(public))["arms"]}
    assert list(by_name) == ["zero-shot", "lora", "lora-int4", "lora-qat-int4", "zero-shot-int8"]
    assert [arm["quantize"] for arm in by_name.values()] == [None, None, "int4", "int4", "int8"]
    loss = {name: arm["metrics"]["nll"]["value"] for name, arm in by_name.items()}
    assert len(set(loss.values())) == 5
    # Four bits cost this model much, eight next to nothing.
    assert loss["lora-int4"] == pytest.approx(loss["lora"], rel=0.6)
    assert loss["zero-shot-int8"] == pytest.approx(loss["zero-shot"], rel=0.02)
    # One training for lora and lora-int4; weights of four bits for the same model of the same size.
    assert not (tmp_path / "arms" / "lora-int4" / "seed-0" / "adapter").exists()
    whole = sum(path.stat().st_size for path in BUNDLED["tunesmith/tiny"].glob("*.safetensors"))
    assert by_name["lora-int4"]["size_bytes"] == by_name["lora-qat-int4"]["size_bytes"]
    assert by_name["lora-int4"]["size_bytes"] < by_name["zero-shot-int8"]["size_bytes"] < whole
    assert {"general_nll", "kl_from_base"} <= by_name["zero-shot-int8"]["forgetting"].keys()
    assert "int4, whole model" in api.report_markdown(comparison)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qat") / "run"
    tunesmith.train(job(QAT, precision="fp32"), out=folder)
    return folder


def test_a_run_with_qat_is_opened_quantised(trained: Path) -> None:
    target = find_target(str(trained))
    assert target.quantize is not None
    model = load_target(target, precision="fp32")
    assert all(isinstance(projection.packed, QuantizedRows) for projection in model.projections())
    # Its adapter is an ordinary one; folded in and rounded after training, it is the same model.
    plain = load_target(find_target(str(trained / "adapter")), precision="fp32")
    before = [projection.effective() for projection in plain.projections()]
    quantize_model(plain, target.quantize)
    for ours, theirs, full in zip(model.projections(), plain.projections(), before, strict=True):
        assert torch.equal(ours.effective(), theirs.effective())
        assert not torch.equal(ours.effective(), full)


def test_the_validation_loss_of_qat_is_that_of_the_quantised_model(trained: Path) -> None:
    from tunesmith.data.prepare import load_prepared
    from tunesmith.eval.nll import score_rows, summarize_scores

    record = read_json(trained / "run.json")
    rows = load_prepared(trained / "prepared").rows("validation")
    model = load_target(find_target(str(trained)), precision="fp32")
    assert record["validation_loss"] == pytest.approx(
        summarize_scores(score_rows(model, rows))["nll"], rel=1e-5
    )


@pytest.mark.slow
def test_a_step_of_qat_does_not_depend_on_how_it_is_cut(trained: Path, tmp_path: Path) -> None:
    tunesmith.train(job(QAT, precision="fp32", micro_batch_tokens=600, steps=1), out=tmp_path)
    # From the second step on, sums made in another order put a weight on the other side of a rounding border now and
    # then.
    whole, cut = (
        json.loads((folder / "steps.jsonl").read_text().splitlines()[0]) for folder in (trained, tmp_path)
    )
    assert (whole["loss"], whole["grad_norm"]) == pytest.approx((cut["loss"], cut["grad_norm"]), rel=1e-4)


@pytest.mark.slow
def test_qat_interrupted_goes_on_to_the_same_bits(trained: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.kind == "step" and event.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        tunesmith.train(job(QAT, precision="fp32"), out=tmp_path, on_event=stop)
    tunesmith.train(job(QAT, precision="fp32"), out=tmp_path)
    whole, cut = (folder / "adapter" / "adapter_model.safetensors" for folder in (trained, tmp_path))
    assert whole.read_bytes() == cut.read_bytes()


def test_groups_that_do_not_fit_are_refused_before_any_data_is_read(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    values = {"model": str(tmp_path / "model"), "data": {"train": "no_such.jsonl"}}
    said = r"self_attn\.q_proj\.weight has 48 inputs, .* groups of 32. Use scheme int8 or fp8"
    with pytest.raises(ModelError, match=rf"^method\.qat: .*{said}"):
        tunesmith.train({**values, "method": {"name": "full", "qat": "int8-int4"}}, out=tmp_path / "run")
    arms = {"compare": {"arms": [{"method": "zero-shot", "quantize": "int4"}]}}
    with pytest.raises(ModelError, match=rf"^compare\.arms, zero-shot-int4: .*{said}"):
        tunesmith.compare(values | arms, out=tmp_path / "all")

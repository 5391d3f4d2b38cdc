"""`plan` predicts each method without training; what a limit cannot hold is refused before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.api.planning import _make_workload, make_planner, plan
from tunesmith.api.trainable import training_lengths
from tunesmith.core.errors import JobError, SetupError
from tunesmith.core.quantities import format_gib, parse_bytes
from tunesmith.job.load import job_from

GIB = 2**30


def make_job(tmp_path: Path, **changes: Any) -> Any:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(f'{{"prompt": "Say {n}.", "completion": "{"one " * (n + 1)}"}}\n' for n in range(40))
    )
    return job_from(
        {
            "model": "tunesmith/tiny",
            "data": {"train": str(rows), "split": {"validation": 0, "test": 0}},
            "method": {"name": "lora", "rank": 8},
            "train": {"epochs": 2, "batch_rows": 8, "precision": "bf16", **changes},
        }
    )


def test_every_method_has_a_row_with_parts_that_add_up(tmp_path: Path) -> None:
    planned = plan(make_job(tmp_path), device="h200")
    assert [method.name for method in planned.methods] == ["lora", "full", "qlora"]
    assert [method.is_own for method in planned.methods] == [True, False, False]
    assert planned.steps == 10
    for method in planned.methods:
        assert sum(method.plan.parts.values()) == method.plan.peak_bytes < planned.limit_bytes
        assert set(method.plan.levels) == {"keep"}
        assert method.seconds == pytest.approx(method.plan.seconds_per_1k * planned.total_tokens / 1000)
    lora, full, qlora = (method.plan.parts for method in planned.methods)
    assert qlora["weights"] < lora["weights"] < full["weights"]
    assert full["optimizer"] == 8 * planned.methods[1].trained_parameters


def test_less_memory_makes_a_smaller_plan_and_too_little_none(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    roomy = plan(job, memory="8GiB").methods[0].plan
    short = plan(job, memory=f"{roomy.peak_bytes // 2**20 * 3 // 4}MiB").methods[0].plan
    assert short.fits
    assert short.peak_bytes < roomy.peak_bytes
    assert short.seconds_per_1k >= roomy.seconds_per_1k
    assert not plan(job, memory="1MiB").methods[0].plan.fits


def test_the_jobs_limit_and_budget_are_planned_with(tmp_path: Path) -> None:
    job = make_job(tmp_path, memory_limit="1GiB", micro_batch_tokens=256)
    planned = plan(job, device="h200")
    assert planned.limit_bytes == GIB
    assert {method.plan.budget_tokens for method in planned.methods} == {256}


def test_a_probe_measures_the_jobs_own_model_and_trains_nothing(tmp_path: Path) -> None:
    planned = tunesmith.plan(make_job(tmp_path), probe=True)
    own = planned.methods[0].plan
    assert own.probe["peak_bytes"] >= own.probe["resident_bytes"] > 0
    assert 0 < own.probe["tokens"] <= own.budget_tokens
    assert not planned.methods[1].plan.probe
    assert planned.to_json()["methods"][0]["plan"]["probe"] == own.probe


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        ({"device": "h900"}, "--device: is 'h900'"),
        ({"memory": "lots"}, "'lots' is no amount of memory"),
        ({"device": "h200", "probe": True}, "measures this machine"),
    ],
)
def test_wrong_options_are_told_in_one_line(tmp_path: Path, options: dict[str, Any], finding: str) -> None:
    with pytest.raises(JobError, match=finding):
        plan(make_job(tmp_path), **options)


def test_a_limit_in_the_job_is_an_amount(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"train\.memory_limit.*no amount of memory"):
        make_job(tmp_path, memory_limit="19.7")
    assert parse_bytes("19.7GiB") == int(19.7 * GIB)
    assert parse_bytes("800 MB") == 800_000_000
    assert format_gib(19.7 * GIB) == "19.7 GiB"


def test_a_limit_on_a_cpu_is_told_to_do_nothing(tmp_path: Path) -> None:
    record = tunesmith.train(make_job(tmp_path, memory_limit="1GiB", steps=1), out=tmp_path / "run")
    assert any("train.memory_limit" in warning for warning in record.warnings)
    assert record.memory_plan is None
    assert record.micro_batch_tokens == 4096


@pytest.mark.gpu
def test_a_run_stays_within_its_limit_and_one_that_cannot_is_refused(tmp_path: Path) -> None:
    # All rows in a step, so that it weighs something; before it counts, cuBLAS has made its workspaces.
    for name in ("before", "free"):
        free = tunesmith.train(make_job(tmp_path, steps=3, batch_rows=40), out=tmp_path / name)
    assert free.memory_plan is not None
    limit = int(free.peak_bytes * 0.9)
    job = make_job(tmp_path, steps=3, batch_rows=40, memory_limit=f"{limit // 1000}kB")
    within = tunesmith.train(job, out=tmp_path / "within")
    assert within.peak_bytes <= limit
    with pytest.raises(SetupError, match="the least that training takes"):
        tunesmith.train(make_job(tmp_path, memory_limit="1MiB"), out=tmp_path / "refused")


@pytest.mark.gpu
@pytest.mark.parametrize("levels", ["cheap", "recompute", "offload"])
def test_levels_on_a_gpu_give_the_gradients_of_keep(tmp_path: Path, levels: Any) -> None:
    import torch

    from tunesmith.core.bundled import bundled_path
    from tunesmith.data.prepare import prepare_data
    from tunesmith.data.tokenizer import load_tokenizer
    from tunesmith.methods.sft import sft_loss
    from tunesmith.models.decoder import Decoder
    from tunesmith.models.layout import make_batch
    from tunesmith.models.load import load_model
    from tunesmith.models.lora import add_lora
    from tunesmith.models.segments import Segments

    job, folder = make_job(tmp_path), bundled_path("tunesmith/tiny")
    assert folder is not None
    prepared = prepare_data(job, tokenizer=load_tokenizer(folder), folder=tmp_path / "prepared")
    device = torch.device("cuda", 0)
    model = load_model(folder, device=device, dtype=torch.bfloat16)
    add_lora(model, job.method_spec, seed=0)
    assert isinstance(model, Decoder)
    model.train().segments = Segments(compiled=False)
    planner, _ = make_planner(model, job, training_lengths(job, prepared), device)
    assert planner is not None
    found = []
    for chosen in ("keep", levels, levels):  # twice: pinned memory and streams are used again
        model.levels = (chosen,) * model.config.num_layers
        batch = make_batch(prepared.rows("train")[:8], device=device)
        sft_loss(model, batch).total.backward()
        gradients = [parameter.grad for parameter in model.trainable_parameters()]
        found.append([gradient.clone() for gradient in gradients if gradient is not None])
        for parameter in model.trainable_parameters():
            parameter.grad = None
    for again in found[1:]:
        for expected, gradient in zip(found[0], again, strict=True):
            assert (gradient - expected).norm() <= 2e-3 * expected.norm() + 1e-9


def test_a_step_of_a_stream_may_be_of_long_rows_only() -> None:
    def largest(streaming: bool) -> int:
        data = {"train": "rows.jsonl", "streaming": streaming, "max_tokens": 100}
        job = job_from({"model": "x", "data": data, "train": {"batch_rows": 3, "steps": 2}})
        return _make_workload(job, [100, 50, 50, 20]).largest_step

    assert (largest(True), largest(False)) == (300, 200)

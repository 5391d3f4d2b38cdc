"""Plans stay within their limit and compute as little again as it allows; a run keeps the plan it began with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from train_tiny import hash_run, make_rows, make_spec

from tunesmith.core.rundir import RunDir
from tunesmith.job.spec import FullSpec, LoraSpec, TrainSpec
from tunesmith.methods.sft import sft_loss
from tunesmith.models.config import load_config
from tunesmith.models.headers import list_expected
from tunesmith.models.layout import make_batch
from tunesmith.models.load import load_model
from tunesmith.models.lora import add_lora
from tunesmith.models.memory import MemoryModel, TrainingSetup
from tunesmith.training.checkpoint import open_newest
from tunesmith.training.loop import TrainOutcome, train
from tunesmith.training.planner import CARDS, PROBED, UNPROBED, MemoryPlan, Planner, Workload, describe_setup

GIB = 2**30
LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}
LORA = TrainingSetup(rank=16, recorded=True)
LORA_FP8, QLORA = replace(LORA, storage="fp8", fp8=True), replace(LORA, storage="nf4")
QLORA_FP8 = replace(QLORA, fp8=True)
EVEN = Workload(((2048,) * 8,), 2048, 128)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return load_config(folder)


def make_planner(llama: Any, setup: TrainingSetup, gib: float, **more: Any) -> Planner:
    return Planner(MemoryModel(llama, setup), EVEN, CARDS["h200"], int(gib * GIB), **more)


@pytest.mark.parametrize(
    ("setup", "gib", "unsloth_tokens_per_second", "bar"),
    [
        pytest.param(LORA, 19.7, 11_536, 1.05, id="lora"),
        pytest.param(LORA_FP8, 19.7, 11_536, 1.45, id="lora-fp8"),
        pytest.param(QLORA, 10.1, 11_436, 1.0, id="qlora"),
        pytest.param(QLORA_FP8, 10.1, 11_436, 1.3, id="qlora-fp8"),
    ],
)
def test_an_8b_model_fits_where_the_peers_default_does_and_is_predicted_faster(
    llama: Any, setup: TrainingSetup, gib: float, unsloth_tokens_per_second: float, bar: float
) -> None:
    for share in (UNPROBED, PROBED):
        plan = make_planner(llama, setup, gib, share=share).plan()
        assert plan.fits
        assert plan.peak_bytes <= share * gib * GIB
        assert not plan.is_roomy
    assert 1000 / plan.seconds_per_1k > bar * unsloth_tokens_per_second


def test_short_micro_batches_are_for_those_that_are_replayed(llama: Any) -> None:
    """The host launches a block in some milliseconds, whatever its tokens; replayed it need not."""
    for setup in (LORA, LORA_FP8, QLORA_FP8):
        limit = 10.1 if setup.storage == "nf4" else 19.7
        replayed = make_planner(llama, setup, limit, share=PROBED).plan()
        launched = make_planner(llama, replace(setup, recorded=False), limit, share=PROBED).plan()
        assert replayed.budget_tokens == 2048
        assert "offload" not in replayed.levels
        assert launched.budget_tokens > 2048
        assert launched.seconds_per_1k > replayed.seconds_per_1k


def test_with_room_everything_is_kept_and_speeds_are_those_measured(llama: Any) -> None:
    for setup, measured in ((LORA, 16_997), (LORA_FP8, 22_953)):
        plan = make_planner(llama, setup, 139.0).plan()
        assert plan.levels == ("keep",) * 32
        assert plan.budget_tokens == 16384
        assert plan.is_roomy
        assert 1000 / plan.seconds_per_1k == pytest.approx(measured, rel=0.05)


def test_more_memory_is_never_slower_and_every_plan_is_within_its_limit(llama: Any) -> None:
    times = []
    for gib in range(17, 100, 4):
        plan = make_planner(llama, LORA, gib).plan()
        assert not plan.fits or plan.peak_bytes <= PROBED * gib * GIB
        times.append((not plan.fits, plan.seconds_per_1k))
    assert times == sorted(times, reverse=True)


def test_what_does_not_fit_is_planned_smallest_and_says_so(llama: Any) -> None:
    plan = make_planner(llama, LORA, 12.0).plan()
    assert not plan.fits
    assert set(plan.levels) == {"offload"}
    assert plan.budget_tokens == 2048  # the longest row


def test_the_jobs_own_budget_is_obeyed(llama: Any) -> None:
    plan = make_planner(llama, LORA, 40.0, micro_batch_tokens=8192).plan()
    assert plan.budget_tokens == 8192
    assert plan.fits
    assert "keep" in plan.levels


def test_first_blocks_give_way_first(llama: Any) -> None:
    order = ["offload", "recompute", "cheap", "keep"]
    for gib in (17.5, 19.7, 22.0, 26.0, 32.0):
        ranks = [order.index(level) for level in make_planner(llama, LORA, gib).plan().levels]
        assert ranks == sorted(ranks)


def test_a_probe_that_took_more_than_predicted_makes_the_plan_smaller(llama: Any) -> None:
    planner = make_planner(llama, LORA, 30.0)
    first = planner.plan()
    resident = planner.model.resident_bytes()
    step = first.peak_bytes - resident
    found = planner.correct(first, tokens=2048, resident_bytes=resident, peak_bytes=resident + step * 3 // 2)
    assert planner.step_factor > 1.2
    assert found.fits
    assert found.peak_bytes <= 0.98 * 30 * GIB
    assert found.seconds_per_1k >= first.seconds_per_1k
    assert found.probe["peak_bytes"] == resident + step * 3 // 2


def test_a_probe_of_a_nearly_empty_micro_batch_is_not_taken_at_its_word(llama: Any) -> None:
    planner = make_planner(llama, LORA, 30.0)
    planner.correct(planner.plan(), tokens=2048, resident_bytes=16 * GIB, peak_bytes=16 * GIB + 1)
    assert planner.step_factor == 0.85


def test_rows_of_one_length_fill_a_budget_by_whole_rows() -> None:
    assert EVEN.split(3072) == (8, 2048)
    assert EVEN.split(16384) == (1, 16384)
    assert EVEN.split(1_000_000) == (1, 16384)
    uneven = Workload(((100, 300, 200), (90, 80, 10)), 700, 128)
    assert uneven.split(400) == (3, 768)  # some step may hold the longest row
    assert uneven.split(2000) == (2, 2048)


def test_one_small_step_does_not_make_the_others_two_passes(llama: Any) -> None:
    """A budget that just holds one step would split every other, at the price of a pass each."""
    steps = tuple((total // 8,) * 7 + (total // 8 + 8,) for total in (2040, 2200, 2400, 1900, 2300))
    planner = replace(make_planner(llama, LORA, 139.8), workload=Workload(steps, 400, 128))
    assert planner.plan().budget_tokens == 3072


def test_a_plan_survives_its_record(llama: Any) -> None:
    plan = replace(make_planner(llama, QLORA, 10.1).plan(), probe={"tokens": 5})
    assert MemoryPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_settings_of_a_job_become_the_setup() -> None:
    def describe(method: Any, **train: Any) -> TrainingSetup:
        return describe_setup(method, TrainSpec(**train), value_bytes=2, compiled=True)

    assert describe(FullSpec(name="full"), optimizer="muon") == TrainingSetup(0, optimizer="muon", fused=True)
    assert describe(LoraSpec(name="qlora", compute="fp8", rank=8)) == TrainingSetup(
        8, "nf4", fp8=True, fused=True, recorded=True
    )
    assert describe(LoraSpec(name="lora", base="fp8", targets=["q_proj"], dropout=0.1)) == TrainingSetup(
        32, "fp8", fp8=True, targets=("q_proj",)
    )
    assert describe(LoraSpec(name="lora", new_tokens=["<x>"])).tuned_tables == 2
    # Neither has a form that is compiled or recorded, whatever the job says.
    assert describe(LoraSpec(name="lora", dora=True)) == TrainingSetup(32, compiled=False)
    assert describe(FullSpec(name="full", qat="int4")) == TrainingSetup(0, compiled=False)


# --- in a run ---------------------------------------------------------------------------------------------------------

TINY = LLAMA_8B | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    generator = torch.Generator().manual_seed(0)
    shapes = list_expected(load_config(folder))
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def run(folder: Path, out: Path, planner: Planner | None, **more: Any) -> tuple[TrainOutcome, Any]:
    model = load_model(folder)
    add_lora(model, LoraSpec(name="lora", rank=4), seed=0)
    resume = more.pop("resume", False)
    outcome = train(
        model,
        make_rows(22),
        make_spec(**more),
        RunDir(out).create(),
        make_batch=lambda rows, device: make_batch(rows, device=device),
        loss=sft_loss,
        planner=planner,
        resume=resume,
    )
    return outcome, model


def plan_tightly(folder: Path, *, micro_batch_tokens: int) -> Planner:
    """A limit that keeps no block whole, on a card that does not exist."""
    memory = MemoryModel(load_config(folder), TrainingSetup(rank=4, value_bytes=4, compiled=False))
    least = memory.step_bytes(
        ("recompute",) * 4, tokens=micro_batch_tokens, micro_batches=3, loss_chunk_bytes=2**28
    )
    limit = int((memory.resident_bytes() + least) * 1.15)
    workload = Workload(((12,) * 4,), 12)
    return Planner(memory, workload, CARDS["h100"], limit, micro_batch_tokens=micro_batch_tokens)


def test_a_run_follows_its_plan_and_learns_the_same(tiny: Path, tmp_path: Path) -> None:
    # A probe on a CPU sees the whole process; what it says is told, and the plan is what counts here.
    planner = plan_tightly(tiny, micro_batch_tokens=12)
    planned, model = run(tiny, tmp_path / "planned", planner)
    plain, _ = run(tiny, tmp_path / "plain", None, micro_batch_tokens=12)
    assert planned.memory_plan is not None
    assert set(model.levels) != {"keep"}
    assert planned.memory_plan["levels"] == list(model.levels)
    assert planned.memory_plan["probe"]["tokens"] <= 12
    assert planned.micro_batch_tokens == planned.memory_plan["budget_tokens"]
    assert planned.loss == pytest.approx(plain.loss, rel=1e-5)
    assert plain.memory_plan is None


def test_a_continued_run_keeps_its_plan_and_every_bit(tiny: Path, tmp_path: Path) -> None:
    whole, whole_model = run(
        tiny, tmp_path / "whole", plan_tightly(tiny, micro_batch_tokens=12), save_every=3
    )
    out = tmp_path / "halves"
    first, _ = run(tiny, out, plan_tightly(tiny, micro_batch_tokens=12), save_every=3)
    for folder in sorted((out / "checkpoints").iterdir())[-1:]:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    # Another planner is at hand; the run's own plan is followed.
    again, model = run(tiny, out, plan_tightly(tiny, micro_batch_tokens=48), save_every=3, resume=True)
    assert again.continued_from is not None
    assert again.memory_plan == first.memory_plan
    assert list(model.levels) == first.memory_plan["levels"]  # type: ignore[index]
    assert again.loss == whole.loss
    checkpoint, _ = open_newest(RunDir(out).checkpoints)
    assert checkpoint is not None
    assert checkpoint.state["micro_batches"]["plan"] == first.memory_plan
    assert hash_run(out, model) == hash_run(tmp_path / "whole", whole_model)

"""What frameworks are told, word for word, and what is refused before anything runs. No framework is needed."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest

from tunesmith.core.errors import ArmFailed, DataError
from tunesmith.core.records import StepRecord
from tunesmith.frameworks.catalog import FRAMEWORKS
from tunesmith.frameworks.handoff import Handoff, Lora
from tunesmith.frameworks.port import (
    FrameworkRecord,
    HardwarePort,
    collect_parity,
    collect_training,
)
from tunesmith.frameworks.ports import PORTS, find_port
from tunesmith.job.load import job_from
from tunesmith.job.spec import Framework

GOLDEN = Path(__file__).with_name("golden")
LORA = Lora(
    start="/run/handoff/adapter", rank=8, alpha=16.0, dropout=0.05, targets=("q_proj", "down_proj"),
    rslora=True, dora=False, rank_pattern={}, alpha_pattern={},
)  # fmt: skip
HANDOFF = Handoff(
    label="lora-trl seed 3", model="/base", stored_dtype="bfloat16", rows="/rows.jsonl",
    validation="/validation.jsonl", order="/run/handoff/order.json", lora=LORA,
    base="full", double_quant=True, batch_rows=16, micro_rows=4,
    total_steps=120, warmup_steps=6, learning_rate=3e-4, schedule="constant", optimizer="adamw",
    weight_decay=0.01, beta1=0.8, beta2=0.95, epsilon=1e-7, clip_norm=0.5, seed=3, precision="bf16",
    device="cuda", compile=False, evaluate_every=0, keep_best=True, scratch="/run/framework",
    steps_file="/run/steps.jsonl", record="/run/framework/record.json", weights="/run/adapter",
    parity="/run/parity.json",
)  # fmt: skip


def settings_of(handoff: Handoff, framework: str = "trl") -> dict[str, Any]:
    return json.loads(PORTS[framework].translate(handoff).files[f"{framework}.json"])


QLORA = dataclasses.replace(HANDOFF, base="nf4")


@pytest.mark.parametrize(("method", "handoff"), [("lora", HANDOFF), ("qlora", QLORA)])
@pytest.mark.parametrize("name", PORTS)
def test_a_framework_is_told_every_number_of_the_job(name: str, method: str, handoff: Handoff) -> None:
    translation = PORTS[name].translate(handoff)

    assert dict(translation.files) == {
        f"{name}.json": (GOLDEN / f"{name}-{method}.json").read_text(encoding="utf-8")
    }
    worker, file = translation.argv
    assert Path(worker).is_file()
    assert file == f"/run/framework/{name}.json"


def test_full_fine_tuning_keeps_fp32_weights_and_no_clipping_is_none() -> None:
    settings = settings_of(dataclasses.replace(HANDOFF, lora=None, clip_norm=0.0))

    assert settings["lora"] is None
    assert settings["weights"] == "float32"
    assert settings["sft"]["bf16"] is True
    assert settings["sft"]["max_grad_norm"] == 0.0


def test_a_handoff_reads_back_equal() -> None:
    assert Handoff.from_json(json.loads(json.dumps(HANDOFF.to_json())), place="handoff.json") == HANDOFF


def test_a_handoff_of_another_kind_is_refused_by_field() -> None:
    value = HANDOFF.to_json() | {"schedule": "wavy"}

    with pytest.raises(DataError, match=r"handoff\.json: schedule: is 'wavy'; it is one of cosine, linear"):
        Handoff.from_json(value, place="handoff.json")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"method": {"name": "lora", "base": "int8"}}, "base"),
        ({"method": {"name": "lora", "base": "fp8"}}, "base"),
        ({"method": {"name": "qlora", "compute": "fp8"}}, "compute"),
        ({"method": {"name": "full", "qat": "int4"}}, "qat"),
        ({"method": {"name": "lora", "modules_to_save": ["lm_head"]}}, "modules_to_save"),
        ({"method": {"name": "lora", "new_tokens": ["<x>"]}}, "new_tokens"),
        ({"method": {"name": "lora", "dora": True}, "train": {"weight_decay": 0.1}}, "dora"),
        ({"method": "full", "train": {"optimizer": "adamw-8bit"}}, "train.optimizer"),
        ({"method": "full", "train": {"optimizer": "muon"}}, "train.optimizer"),
        (
            {"method": "full", "train": {"optimizer_in_backward": True, "clip_norm": None}},
            "train.optimizer_in_backward",
        ),
        ({"train": {"memory_limit": "10GiB"}}, "train.memory_limit"),
        ({"train": {"trackers": ["wandb"]}}, "train.trackers"),
        ({"data": {"train": "x.jsonl", "streaming": True}}, "data.streaming"),
    ],
)
def test_what_trl_cannot_express_is_a_reason(settings: dict[str, Any], key: str) -> None:
    reason = PORTS["trl"].can(job_from({"model": "tunesmith/tiny", "data": {"train": "x.jsonl"}, **settings}))

    assert reason is not None
    assert reason.key == key


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": {"name": "lora", "rslora": True, "dropout": 0.1, "targets": ["q_proj"]}},
        {"method": {"name": "lora", "dora": True}},
        {"method": "qlora", "train": {"optimizer": "adamw-8bit"}},
        {"method": {"name": "qlora", "double_quant": False, "dora": True}},
        {"method": "full", "train": {"clip_norm": None, "schedule": "linear", "weight_decay": 0.1}},
    ],
)
def test_what_trl_can_express_has_no_reason(settings: dict[str, Any]) -> None:
    job = job_from({"model": "tunesmith/tiny", "data": {"train": "x.jsonl"}, **settings})

    assert PORTS["trl"].can(job) is None


def test_every_framework_that_an_arm_can_name_has_an_adapter() -> None:
    assert {"tunesmith", *PORTS} == set(get_args(Framework))
    assert list(PORTS) == list(FRAMEWORKS)


@pytest.mark.parametrize(
    ("name", "settings", "key"),
    [
        ("axolotl", {"method": "full", "train": {"precision": "bf16"}}, "train.precision"),
        ("axolotl", {"method": {"name": "lora", "alpha": 12.5}}, "alpha"),
        ("axolotl", {"method": {"name": "qlora", "alpha": 12.5}}, "alpha"),
        ("llamafactory", {"method": {"name": "lora", "modules_to_save": ["lm_head"]}}, "modules_to_save"),
        ("unsloth", {"method": {"name": "lora", "base": "int8"}}, "base"),
        ("unsloth", {"method": {"name": "qlora", "double_quant": False}}, "double_quant"),
    ],
)
def test_what_another_framework_cannot_express_is_a_reason(
    name: str, settings: dict[str, Any], key: str
) -> None:
    reason = find_port(name).can(
        job_from({"model": "tunesmith/tiny", "data": {"train": "x.jsonl"}, **settings})
    )

    assert reason is not None
    assert reason.key == key


@pytest.mark.parametrize(
    ("name", "method", "device", "precision", "refused"),
    [
        ("axolotl", "lora", "cpu", "bf16", "Axolotl has no bf16 on a CPU"),
        ("axolotl", "lora", "cpu", "fp32", ""),
        ("axolotl", "lora", "cuda", "bf16", ""),
        (
            "axolotl",
            "full",
            "cuda",
            "bf16",
            "Axolotl keeps the weights that it trains in bf16, ours are fp32",
        ),
        ("axolotl", "full", "cuda", "fp32", ""),
        ("unsloth", "lora", "cuda", "fp32", "Unsloth computes in 16 bits on a GPU, whatever it is told"),
        ("unsloth", "lora", "cpu", "fp32", ""),
    ],
)
def test_what_hardware_stands_in_the_way_of_is_a_reason(
    name: str, method: str, device: str, precision: str, refused: str
) -> None:
    port, job = find_port(name), job_from({"model": "m", "data": {"train": "d"}, "method": method})
    assert port.can(job) is None
    assert isinstance(port, HardwarePort)
    reason = port.can_on(job, device=device, precision=precision)
    assert (reason.finding if reason else "") == refused


@pytest.mark.parametrize("name", ["llamafactory", "axolotl", "unsloth"])
def test_what_may_not_be_altered_is_written_beside_what_is_said(name: str) -> None:
    settings = settings_of(dataclasses.replace(HANDOFF, precision="fp32"), name)

    assert settings["expected"]["arguments"]["learning_rate"] == 3e-4
    assert settings["expected"]["arguments"]["gradient_accumulation_steps"] == 4
    assert settings["expected"]["lora"]["lora_alpha"] == 16.0
    assert settings_of(dataclasses.replace(HANDOFF, lora=None), name)["expected"]["lora"] is None


@pytest.mark.parametrize(
    ("name", "part", "key"),
    [("trl", "sft", "optim"), ("llamafactory", "arguments", "optim"), ("axolotl", "arguments", "optimizer"),
     ("unsloth", "sft", "optim")],
)  # fmt: skip
def test_8_bit_adamw_is_bitsandbytes(name: str, part: str, key: str) -> None:
    told = [
        settings_of(dataclasses.replace(HANDOFF, optimizer=optimizer), name)[part][key]
        for optimizer in ("adamw", "adamw-8bit")
    ]

    assert told == ["adamw_torch_fused", "adamw_8bit"]


@pytest.mark.parametrize("name", [name for name in PORTS if name != "unsloth"])
def test_how_scales_of_an_nf4_base_are_stored_follows_the_job(name: str) -> None:
    told = [
        PORTS[name].translate(dataclasses.replace(QLORA, double_quant=doubly)).files[f"{name}.json"]
        for doubly in (True, False)
    ]
    changed = [(a, b) for a, b in zip(*(text.splitlines() for text in told), strict=True) if a != b]

    assert [a.strip().rstrip(",") for a, _ in changed][:1] == ['"double_quant": true']
    assert len(changed) == 2


def test_axolotl_is_told_of_one_warm_up_step_as_a_share() -> None:
    told = [
        settings_of(dataclasses.replace(HANDOFF, warmup_steps=n), "axolotl")["arguments"] for n in (0, 1, 2)
    ]

    assert [(t["warmup_steps"], t["warmup_ratio"]) for t in told] == [(0, None), (None, 0.5 / 120), (2, None)]


def test_llamafactory_reads_ranks_of_single_layers_from_the_first_adapter() -> None:
    uneven = dataclasses.replace(HANDOFF, lora=dataclasses.replace(LORA, rank_pattern={"q_proj": 4}))

    assert settings_of(HANDOFF, "llamafactory")["arguments"]["adapter_name_or_path"] is None
    assert settings_of(uneven, "llamafactory")["arguments"]["adapter_name_or_path"] == "/run/handoff/adapter"


# --- what is left behind ----------------------------------------------------------------------------------------------

RECORD = FrameworkRecord(
    framework="trl", versions={"trl": "1"}, seconds={"steps": 1.0}, bytes={"resident": 1}, hardware={}, resolved={},
    steps=120, train_tokens=10, target_tokens=5, trained_parameters=2, total_parameters=3, micro_rows=4,
)  # fmt: skip


def step_line(step: int, **changes: Any) -> str:
    record = StepRecord(step, 0.1, 2.0, 1.0, 1e-3, 30, 10, 0.5, 1000)
    return json.dumps(record.to_json() | changes) + "\n"


@pytest.fixture
def handoff(tmp_path: Path) -> Handoff:
    """One whose worker left a good record and weights."""
    left = {
        "record": str(tmp_path / "record.json"),
        "weights": str(tmp_path),
        "parity": str(tmp_path / "parity.json"),
        "steps_file": str(tmp_path / "steps.jsonl"),
    }
    (tmp_path / "record.json").write_text(json.dumps(dataclasses.asdict(RECORD)))
    (tmp_path / "steps.jsonl").write_text("".join(step_line(step) for step in range(1, 121)))
    (tmp_path / "adapter_model.safetensors").touch()
    return dataclasses.replace(HANDOFF, **left)


def test_a_good_record_is_collected(handoff: Handoff) -> None:
    assert collect_training(handoff, framework="trl", log=Path("x.log")) == RECORD


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"steps": 7}, "its record is of 7 steps by trl; trl was asked for 120"),
        ({"framework": "axolotl"}, "its record is of 120 steps by axolotl"),
        ({"steps": "many"}, r"malformed record \(record\.json: steps: is 'many'\)"),
        ({"seconds": {"steps": "long"}}, r"malformed record \(record\.json: seconds\.steps: is 'long'\)"),
        ({"extra": 1}, "unknown field 'extra'"),
        (
            {"train_tokens": 10**300},
            r"malformed record \(record\.json: train_tokens: is a number of 301 digits",
        ),
        ({"seconds": {"steps": 10**400}}, "a number of 401 digits"),
        ({"seconds": {"steps": float("nan")}}, "NaN is not JSON"),
        ({"steps": True}, "steps: is 'True'"),
    ],
)
def test_a_record_of_something_else_is_refused(
    handoff: Handoff, change: dict[str, Any], finding: str
) -> None:
    Path(handoff.record).write_text(json.dumps(dataclasses.asdict(RECORD) | change))

    with pytest.raises(ArmFailed, match=finding) as caught:
        collect_training(handoff, framework="trl", log=Path("x.log"))
    assert "x.log" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("", "malformed record"),
        ('{"framework": "trl", "steps"', "malformed record"),
        ("[" * 100_000, "nested too deeply"),
        ('{"framework": "trl", "framework": "ours"}', "appears twice"),
        ("[]", "it is an object|is '\\[\\]'"),
        ("9" * 5000, "thousands of digits"),
        ("\x00", "NUL byte"),
    ],
    ids=["empty", "cut off", "deep", "twice", "a list", "digits", "NUL"],
)
def test_a_record_that_is_none_is_one_line(handoff: Handoff, text: str, finding: str) -> None:
    Path(handoff.record).write_text(text)

    with pytest.raises(ArmFailed, match=finding) as caught:
        collect_training(handoff, framework="trl", log=Path("x.log"))
    assert len(str(caught.value)) < 1000


def test_only_plain_files_of_sensible_size_are_read(handoff: Handoff, tmp_path: Path) -> None:
    record, good = Path(handoff.record), tmp_path / "good.json"
    record.rename(good)
    record.symlink_to(good)
    with pytest.raises(ArmFailed, match=r"something else than a plain file as its record \(record\.json\)"):
        collect_training(handoff, framework="trl", log=Path("x.log"))

    record.unlink()
    os.mkfifo(record)
    with pytest.raises(ArmFailed, match="something else than a plain file"):
        collect_training(handoff, framework="trl", log=Path("x.log"))

    record.unlink()
    with record.open("wb") as handle:
        handle.truncate(10**9)
    with pytest.raises(ArmFailed, match=r"left a record of 1\.00 GB \(record\.json\); it has at most"):
        collect_training(handoff, framework="trl", log=Path("x.log"))


@pytest.mark.parametrize(
    ("lines", "finding"),
    [
        ([step_line(1)], "steps.jsonl: has 1 steps, and trl was asked for 120"),
        ([step_line(1), step_line(3)], "steps.jsonl:2: step: is 3, and it is line 2"),
        ([step_line(1, loss="low")], "steps.jsonl:1: loss: is 'low'"),
        ([step_line(1, num_target_tokens=10**30)], "a number of 31 digits"),
        ([step_line(1).replace("2.0", "NaN")], "NaN is not JSON"),
        ([step_line(1)[:40]], "last line is cut off"),
        (["7\n"], "is no step's record"),
    ],
)
def test_a_malformed_log_of_steps_is_one_line(handoff: Handoff, lines: list[str], finding: str) -> None:
    Path(handoff.steps_file).write_text("".join(lines))

    with pytest.raises(ArmFailed, match=finding):
        collect_training(handoff, framework="trl", log=Path("x.log"))


def test_weights_that_are_a_link_are_no_result(handoff: Handoff, tmp_path: Path) -> None:
    weights = Path(handoff.weights or "") / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(ArmFailed, match=r"plain file among its weights"):
        collect_training(handoff, framework="trl", log=Path("x.log"))


def test_texts_of_a_record_do_nothing_to_a_terminal(handoff: Handoff) -> None:
    said = {"warnings": ["\x1b[31mred\x1b[0m" + "x" * 10**6], "versions": {"\x1b[2Jtrl": "1\x00"}}
    Path(handoff.record).write_text(json.dumps(dataclasses.asdict(RECORD) | said))
    record = collect_training(handoff, framework="trl", log=Path("x.log"))

    assert record.versions == {"trl": "1"}
    assert record.warnings[0].startswith("redx")
    assert len(record.warnings[0]) == 20_000


def test_a_record_without_weights_is_no_result(handoff: Handoff) -> None:
    (Path(handoff.weights or "") / "adapter_model.safetensors").unlink()

    with pytest.raises(ArmFailed, match="left no weights"):
        collect_training(handoff, framework="trl", log=Path("x.log"))


def test_a_missing_parity_record_is_told(handoff: Handoff) -> None:
    with pytest.raises(ArmFailed, match="left no parity record"):
        collect_parity(handoff, framework="trl", log=Path("x.log"))

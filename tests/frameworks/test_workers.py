"""What workers see of a framework, on plain values: digests and names like ours, and the order that was handed."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.core.fingerprint import hash_row
from tunesmith.core.jsonl import read_jsonl
from tunesmith.frameworks.port import WORKERS


@pytest.fixture(scope="module")
def hf() -> Any:
    """Workers import each other by file name, as they do where they run."""
    sys.path.insert(0, str(WORKERS))
    try:
        yield importlib.import_module("hf")
    finally:
        sys.path.remove(str(WORKERS))


@pytest.fixture(scope="module")
def capture(hf: Any) -> Any:
    return importlib.import_module("capture")


def test_padding_on_either_side_changes_no_digest(capture: Any) -> None:
    right = capture.describe_example([5, 6, 7, 0], [-100, 6, 7, -100], [1, 1, 1, 0])
    left = capture.describe_example([0, 5, 6, 7], [-100, -100, 6, 7], [0, 1, 1, 1])

    assert right == left
    assert right["digest"] == hash_row([5, 6, 7], [0, 1, 1])
    assert (right["num_tokens"], right["num_target_tokens"], right["labelled_pads"]) == (3, 2, 0)


def test_labels_on_padding_are_counted(capture: Any) -> None:
    assert capture.describe_example([5, 6, 0, 0], [-100, 6, 0, 0], [1, 1, 0, 0])["labelled_pads"] == 2


def test_a_label_that_is_not_its_token_makes_another_row(capture: Any) -> None:
    assert capture.describe_example([5, 6, 7], [-100, 7, 6], [1, 1, 1])["digest"] == hash_row(
        [5, 6, 7], [0, 2, 2]
    )


def test_a_label_that_nothing_precedes_carries_no_loss(capture: Any) -> None:
    assert capture.describe_example([5, 6], [5, 6], [1, 1])["digest"] == hash_row([5, 6], [0, 1])


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        (
            "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight",
            "model.layers.0.mlp.up_proj.lora_A.weight",
        ),
        (
            "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector.default.weight",
            "model.layers.0.mlp.up_proj.lora_magnitude_vector",
        ),
        ("module._orig_mod.model.norm.weight", "model.norm.weight"),
    ],
)
def test_names_are_those_that_are_saved(capture: Any, name: str, saved: str) -> None:
    assert capture.saved_name(name) == saved


@pytest.mark.parametrize(("bits", "kind"), [(8, "adamw-8bit"), (32, "adamw")])
def test_bitsandbytes_optimizer_is_told_by_its_bits(capture: Any, bits: int, kind: str) -> None:
    bitsandbytes, torch = (importlib.import_module(name) for name in ("bitsandbytes", "torch"))
    optimizer = bitsandbytes.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], optim_bits=bits)

    assert capture.describe_group(optimizer.param_groups[0], {}, optimizer)["kind"] == kind


def test_each_epoch_has_its_own_order_however_often_it_is_read(hf: Any) -> None:
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=0))
    order = hf._Order(trainer, [[[0, 1], [2]], [[2, 0], [1]]])

    assert len(order) == 3
    assert [list(order), list(order)] == [[0, 1, 2], [0, 1, 2]]
    trainer.state.global_step = 2
    assert list(order) == [2, 0, 1]


def test_a_setting_that_is_off_may_be_unknown_to_a_version_and_one_that_is_on_may_not(hf: Any) -> None:
    @dataclass
    class Config:
        rate: float

    assert hf.leave_out_unknown(Config, {"rate": 0.1, "packing": False, "coef": None}) == {"rate": 0.1}
    with pytest.raises(hf.Failure, match="Config has no setting 'packing'"):
        hf.leave_out_unknown(Config, {"rate": 0.1, "packing": True})


@pytest.fixture
def scripts(hf: Any) -> Any:
    return importlib.import_module("scripts")


def make_trainer(**changes: Any) -> Any:
    """What a framework made of a job: fp32 weights, two arguments, the adapters' settings."""
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 2)
    lora = SimpleNamespace(r=4, target_modules={"up_proj", "q_proj"}, use_dora=changes.get("use_dora", False))
    model.peft_config = {"default": lora}
    share = changes.get("warmup_steps", 1)
    args = SimpleNamespace(
        warmup_steps=share,
        max_steps=20,
        get_warmup_steps=lambda total: math.ceil(share * total) if share < 1 else share,
        lr_scheduler_kwargs={},
    )
    return SimpleNamespace(args=args, model=model.to(changes.get("dtype", torch.float32)))


EXPECTED = {
    "arguments": {"warmup_steps": 1, "lr_scheduler_kwargs": None},
    "lora": {"r": 4, "target_modules": ["q_proj", "up_proj"], "use_dora": False},
}


def test_a_trainer_with_the_settings_of_the_job_may_train(scripts: Any) -> None:
    scripts.check_settings(make_trainer(), EXPECTED)
    scripts.check_settings(make_trainer(warmup_steps=0.5 / 20), EXPECTED)
    scripts.check_settings(make_trainer(use_dora=True), EXPECTED | {"lora": None})


def test_a_trainer_with_other_settings_may_not_train(scripts: Any) -> None:
    import torch

    with pytest.raises(scripts.Failure, match="makes warmup_steps 2 of 1"):
        scripts.check_settings(make_trainer(warmup_steps=2), EXPECTED)
    with pytest.raises(scripts.Failure, match="makes the adapters' use_dora True of False"):
        scripts.check_settings(make_trainer(use_dora=True), EXPECTED)
    with pytest.raises(
        scripts.Failure, match=r"trains weight in torch\.bfloat16, where our engine keeps fp32"
    ):
        scripts.check_settings(make_trainer(dtype=torch.bfloat16), EXPECTED)


def test_a_base_is_handed_in_another_dtype_without_a_copy_of_its_weights(
    scripts: Any, tmp_path: Path
) -> None:
    base, scratch = tmp_path / "model", tmp_path / "scratch"
    base.mkdir()
    scratch.mkdir()
    (base / "config.json").write_text('{"hidden_size": 8, "dtype": "bfloat16", "torch_dtype": "bfloat16"}')
    (base / "model.safetensors").write_bytes(b"weights")

    scripts.link_base(SimpleNamespace(handoff={"model": str(base), "scratch": str(scratch)}), dtype="float32")

    config = json.loads((scratch / "base" / "config.json").read_text())
    assert config == {"hidden_size": 8, "dtype": "float32", "torch_dtype": "float32"}
    assert (scratch / "base" / "model.safetensors").resolve() == base / "model.safetensors"


# --- a frozen base ----------------------------------------------------------------------------------------------------


@pytest.fixture
def frozen(hf: Any) -> Any:
    return importlib.import_module("frozen")


def make_base(*, head: bool = False, **settings: Any) -> Any:
    """A layer that bitsandbytes keeps in 4 bits, an adapter beside it, and a head that is as it is unless asked for."""
    torch, nn = importlib.import_module("torch"), importlib.import_module("bitsandbytes").nn
    torch.manual_seed(0)
    told = {"quant_type": "nf4", "compress_statistics": True, "compute_dtype": torch.float32} | settings
    model = torch.nn.Module()
    model.weight_before = torch.randn(96, 256)
    layers = {"down_proj": nn.Linear4bit(256, 96, bias=False, **told)}
    layers["lm_head"] = (
        nn.Linear4bit(256, 64, bias=False, **told) if head else torch.nn.Linear(256, 64, bias=False)
    )
    layers["down_proj"].weight = nn.Params4bit(model.weight_before, **layers["down_proj"].weight.__dict__)
    for name, layer in layers.items():
        model.add_module(name, layer.to("cpu").requires_grad_(False))
    model.lora_A = torch.nn.Linear(256, 4, bias=False)
    model.get_output_embeddings = lambda: model.lm_head
    return model


NF4 = {"base": "nf4", "double_quant": True, "precision": "fp32"}


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({}, NF4),
        ({"compress_statistics": False}, NF4 | {"double_quant": False}),
        ({"quant_storage": "bfloat16"}, NF4),
    ],
)
def test_a_base_that_is_stored_as_the_job_says_may_be_trained_on(
    frozen: Any, settings: dict[str, Any], asked: dict[str, Any]
) -> None:
    torch = importlib.import_module("torch")
    if "quant_storage" in settings:
        settings = {"quant_storage": getattr(torch, settings["quant_storage"])}
    frozen.check_base(make_base(**settings), asked)


@pytest.mark.parametrize(
    ("settings", "asked", "finding"),
    [
        ({"quant_type": "fp4"}, NF4, "keeps down_proj in fp4, blocks of 64, quantised scales"),
        ({"compress_statistics": False}, NF4, "keeps down_proj in nf4, blocks of 64, products in"),
        ({}, NF4 | {"double_quant": False}, "where the job keeps it in nf4, blocks of 64, products in"),
        ({}, NF4 | {"precision": "bf16"}, "where the job keeps it .* products in torch.bfloat16"),
        ({}, NF4 | {"base": "full"}, "keeps down_proj in nf4.* where the job keeps it unquantised"),
        ({"head": True}, NF4, "keeps lm_head in nf4.* where the job keeps it unquantised"),
    ],
)
def test_a_base_that_is_stored_otherwise_is_not(
    frozen: Any, settings: dict[str, Any], asked: dict[str, Any], finding: str
) -> None:
    with pytest.raises(frozen.Failure, match=finding):
        frozen.check_base(make_base(**settings), asked)


@pytest.mark.parametrize("doubly", [True, False])
def test_values_of_a_base_are_those_that_our_engine_unpacks(frozen: Any, doubly: bool) -> None:
    from tunesmith.models.quant import Nf4Matrix

    model = make_base(compress_statistics=doubly)
    found = frozen.sample_base(model)

    ours = Nf4Matrix(model.weight_before, double_quant=doubly).dense(model.weight_before.dtype).flatten()
    assert found["down_proj"] == ours[[n * (96 * 256 - 1) // 15 for n in range(16)]].tolist()
    assert found.keys() == {"down_proj", "lm_head"}
    assert frozen.count_values(model) == 96 * 256 + 64 * 256 + 4 * 256


def test_validation_leaves_a_base_as_training_needs_it(frozen: Any) -> None:
    torch = importlib.import_module("torch")
    model = make_base()
    frozen.keep_layout(model)
    x = torch.randn(2, 256, requires_grad=True)
    before = model.down_proj(x)
    with torch.no_grad():
        assert torch.equal(model.down_proj.eval()(x.detach()), before)
    after = model.down_proj.train()(x)
    assert torch.equal(after, before)
    after.sum().backward()
    assert x.grad is not None


def test_adapters_that_were_cast_are_fp32_again_and_that_is_told(frozen: Any) -> None:
    told: list[str] = []
    run = SimpleNamespace(handoff=NF4, warn=told.append)
    model = make_base()
    model.lora_A.bfloat16()
    frozen.keep_adapters_fp32(run, model)
    frozen.keep_adapters_fp32(run, model)

    assert str(model.lora_A.weight.dtype) == "torch.float32"
    assert len(told) == 1


# --- the native track -------------------------------------------------------------------------------------------------


class Rows(list[dict[str, Any]]):
    """As a data set of `datasets`: rows by place, a column by name."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def test_rows_that_were_left_out_are_passed_over_and_steps_cut_anew(hf: Any) -> None:
    raw_rows = importlib.import_module("raw_rows")
    trainer = SimpleNamespace(train_dataset=Rows({"tunesmith_row": number} for number in (4, 0, 2, 3)))

    # Row 1 is gone; rows 4, 0, 2, 3 lie at places 0 to 3.
    assert raw_rows.keep_order(trainer, [[[3, 1], [0, 4], [2]]], batch_rows=2) == [[[3, 1], [0, 2]]]


def test_where_no_row_was_left_out_the_order_is_ours(hf: Any) -> None:
    raw_rows = importlib.import_module("raw_rows")
    order = [[[2, 0], [1]], [[1, 0], [2]]]

    assert raw_rows.keep_order(SimpleNamespace(train_dataset=[{}, {}, {}]), order, batch_rows=2) == order


def test_rows_without_numbers_that_are_fewer_cannot_be_told_apart(hf: Any) -> None:
    raw_rows = importlib.import_module("raw_rows")

    with pytest.raises(Exception, match="made 2 rows of 3, and does not say of which"):
        raw_rows.keep_order(SimpleNamespace(train_dataset=[{}, {}]), [[[2, 0], [1]]], batch_rows=2)


def test_what_the_collator_makes_is_written_by_row_without_padding(hf: Any, tmp_path: Path) -> None:
    raw_rows = importlib.import_module("raw_rows")
    torch = importlib.import_module("torch")

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        (row,) = rows
        assert row.keys() == {"input_ids"}
        ids = [0, *row["input_ids"]]
        seen, labels = [0, *[1] * len(row["input_ids"])], [-100, -100, *row["input_ids"][1:]]
        return {
            name: torch.tensor([value])
            for name, value in (("input_ids", ids), ("attention_mask", seen), ("labels", labels))
        }

    rows = Rows([{"tunesmith_row": 1, "input_ids": [7, 8]}, {"tunesmith_row": 0, "input_ids": [5, 6]}])
    raw_rows.write_made(SimpleNamespace(train_dataset=rows, data_collator=collate), str(tmp_path / "x.jsonl"))

    assert [value for _, value in read_jsonl(tmp_path / "x.jsonl")] == [
        {"row": 0, "input_ids": [5, 6], "labels": [-100, 6]},
        {"row": 1, "input_ids": [7, 8], "labels": [-100, 8]},
    ]


def test_several_rows_of_one_have_no_place_in_the_order(hf: Any) -> None:
    raw_rows = importlib.import_module("raw_rows")
    trainer = SimpleNamespace(train_dataset=Rows({"tunesmith_row": number} for number in (0, 1, 1)))

    with pytest.raises(Exception, match="makes several rows of one"):
        raw_rows.find_numbers(trainer, 2)


def write_raw(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_raw_rows_say_what_is_trained_in_a_frameworks_words(hf: Any, tmp_path: Path) -> None:
    raw_rows = importlib.import_module("raw_rows")
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant") * 2]
    path = write_raw(
        tmp_path / "raw.jsonl",
        {"messages": turns, "train": [False, False, False, True]},
        {"messages": turns[:2]},
    )

    assert raw_rows.number_rows(path) == [
        {"messages": turns, "tunesmith_row": 0}, {"messages": turns[:2], "tunesmith_row": 1}
    ]  # fmt: skip
    split = raw_rows.number_rows(path, splits_answer=True)
    assert split[0] == {"prompt": turns[:3], "completion": turns[3:], "tunesmith_row": 0}
    marked = raw_rows.number_rows(path, train_field="train")
    assert [[m["train"] for m in row["messages"]] for row in marked] == [
        [False, False, False, True], [False, True]
    ]  # fmt: skip


def test_numbers_follow_rows_through_what_takes_off_all_columns(
    hf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    raw_rows = importlib.import_module("raw_rows")
    for name in ("map", "remove_columns"):
        monkeypatch.setattr(datasets.Dataset, name, getattr(datasets.Dataset, name))
    raw_rows.keep_numbers()
    rows = datasets.Dataset.from_list(
        [{"text": text, "tunesmith_row": number} for number, text in enumerate(["", "abcd", "ef", "gh"])]
    )

    def halve(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        assert batch.keys() == {"text"}
        return {"half": [text[at : at + 2] for text in batch["text"] for at in range(0, len(text), 2)]}

    one = rows.map(lambda row: {"size": len(row["text"])}, remove_columns=rows.column_names)
    assert one[:] == {"tunesmith_row": [0, 1, 2, 3], "size": [0, 4, 2, 2]}
    # As many rows as before, and yet not one of each.
    halves = rows.map(halve, batched=True, remove_columns=rows.column_names)
    assert halves[:] == {"half": ["ab", "cd", "ef", "gh"], "tunesmith_row": [1, 1, 2, 3]}
    assert halves.filter(lambda row: row["half"] > "b").remove_columns(["half", "tunesmith_row"])[:] == {
        "tunesmith_row": [1, 2, 3]
    }
    plain = rows.select_columns(["text"]).map(halve, batched=True, remove_columns="text")
    assert plain.column_names == ["half"]

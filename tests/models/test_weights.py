"""Model folders in and out: what is refused, with which words, and what is written."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunesmith.core.errors import ModelError, RunDirError
from tunesmith.models.config import parse_config
from tunesmith.models.headers import check_model
from tunesmith.models.load import load_model
from tunesmith.models.weights import save_model, write_model


@pytest.fixture
def folder(hf_folders: Any, tmp_path: Path) -> Path:
    """A private copy of the tied Llama."""
    return Path(shutil.copytree(hf_folders("llama3-rope")[0], tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_saved_model_is_the_model_it_was(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("x")
    model = load_model(folder)
    save_model(model, tmp_path / "out", source_folder=folder)
    was, now = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert was.keys() == now.keys()
    assert all(torch.equal(was[key], now[key]) for key in was)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "x"
    save_model(model, tmp_path / "half", source_folder=folder, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    save_model(load_model(folder), folder, source_folder=folder)
    load_model(folder)


def test_a_disk_that_refuses_is_one_line(folder: Path, tmp_path: Path) -> None:
    """Python ignores the signal of the limit, so writing past it fails as it does on a full disk."""
    model = load_model(folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(
            RunDirError, match=r"model\.safetensors: File too large\. Give another --out"
        ) as caught:
            save_model(model, tmp_path / "out", source_folder=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.exit_code == 2
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_a_tied_matrix_may_lie_under_either_name(folder: Path) -> None:
    before = load_model(folder).embedding.weight
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert torch.equal(load_model(folder).embedding.weight, before)
    change_tensors(folder, lambda t: t.update({"model.embed_tokens.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ModelError, match="two different matrices"):
        load_model(folder)


def test_sharded_folders_load(folder: Path) -> None:
    before = load_model(folder).embedding.weight
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(load_model(folder).embedding.weight, before)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"part-1\.safetensors: No such file"):
        check_model(folder)
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(ModelError, match="outside the folder"):
        check_model(folder)


def test_damaged_folders_are_refused_in_one_line_before_loading(folder: Path) -> None:
    good = (folder / "model.safetensors").read_bytes()
    weights = folder / "model.safetensors"
    for size in (0, 5, 300, len(good) - 1):
        weights.write_bytes(good[:size])
        with pytest.raises(ModelError, match=r"safetensors|cut off") as caught:
            check_model(folder)
        assert "\n" not in str(caught.value)
    weights.write_bytes((3).to_bytes(8, "little") + b"[1]")
    with pytest.raises(ModelError, match="no readable safetensors header"):
        check_model(folder)
    weights.write_bytes(good)
    change_config(folder, intermediate_size=100)
    with pytest.raises(
        ModelError, match=r"mlp\.gate_proj\.weight has shape \[96, 64\], config\.json asks for \[100, 64\]"
    ):
        check_model(folder)
    change_config(folder, intermediate_size=96, num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"model\.layers\.3\..* is missing"):
        check_model(folder)
    change_config(folder, num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"model\.layers\.2\..* has no place"):
        check_model(folder)
    change_config(folder, num_hidden_layers=3)
    check_model(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: is a pickle file.*Convert"):
        check_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        check_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        check_model(folder)
    with pytest.raises(ModelError, match="is not a folder"):
        check_model(folder / "nowhere")


def test_the_header_must_tell_a_whole_file(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")

    def rewrite(**changes: Any) -> None:
        text = json.dumps(header | {name: header[name] | changes}).encode()
        weights.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])

    first, last = header[name]["data_offsets"]
    for changes, finding in [
        ({"shape": [-1, 4]}, "is not understood"),
        ({"shape": "64"}, "is not understood"),
        ({"dtype": "F99"}, "is not understood"),
        ({"data_offsets": [first, last, 3]}, "is not understood"),
        ({"shape": [3]}, r"takes \d+ bytes, its shape \[3\] needs 12"),
        ({"data_offsets": [first + 4, last + 4]}, r"begins at byte \d+, the tensor before it ends at"),
    ]:
        rewrite(**changes)
        with pytest.raises(ModelError, match=finding):
            check_model(folder)


def test_other_architectures_are_checked_as_far_as_their_embedding(hf_folders: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hf_folders("gpt2")[0], tmp_path / "model"))
    assert not check_model(folder).own
    change_config(folder, vocab_size=50)
    with pytest.raises(ModelError, match=r"wte\.weight has shape \[\d+, \d+\], config\.json asks for \[50, "):
        check_model(folder)


def test_a_pickle_with_the_right_name_is_not_read(folder: Path) -> None:
    torch.save({"model.embed_tokens.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        check_model(folder)


def test_old_and_new_rope_fields_mean_the_same() -> None:
    shape = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "vocab_size": 96,
    }
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = parse_config(shape | {"rope_theta": 5e5, "rope_scaling": llama3}, place="c")
    new = parse_config(shape | {"rope_parameters": llama3 | {"rope_theta": 5e5}}, place="c")
    assert old == new
    assert old.ropes[0].theta == 5e5
    assert old.num_kv_heads == 4
    yarn = parse_config(shape | {"rope_scaling": {"type": "yarn", "factor": 2.0}}, place="c")
    assert (yarn.own, yarn.why_not) == (False, "rope type 'yarn'")


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"vocab_size": None}, "has no 'vocab_size'"),
        ({"num_key_value_heads": 3}, "4 attention heads on 3"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantised"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"model_type": "mistral", "sliding_window": "x"}, "sliding_window is 'x'"),
        ({"torch_dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_bad_configs_name_the_key(changes: dict[str, Any], finding: str) -> None:
    shape = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "vocab_size": 96,
    }
    with pytest.raises(ModelError, match=finding):
        parse_config(shape | changes, place="config.json")


def test_large_models_are_written_in_shards(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.models.weights.SHARD_BYTES", 50_000)
    model = load_model(folder)
    write_model(model.weights(), tmp_path / "out", source_folder=folder, dtype=torch.float32)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    again = load_model(tmp_path / "out")
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(model.weights(), again.weights(), strict=True))

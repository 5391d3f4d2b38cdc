"""What is wrong with a model folder is said in one line by every verb, before data is read and without torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.core.bundled import BUNDLED
from tunesmith.core.errors import ModelError, RunDirError, SetupError, TunesmithError

TICKETS = "tunesmith/tickets"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A private copy of the bundled model."""
    return Path(shutil.copytree(BUNDLED["tunesmith/tiny"], tmp_path / "base"))


def change_config(base: Path, **changes: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_weights(base: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def change_width(base: Path) -> None:
    change_config(base, intermediate_size=100)


def deepen(base: Path) -> None:
    change_config(base, num_hidden_layers=10**9)


def misname_width(base: Path) -> None:
    change_config(base, hidden_size="big")


def rename_type(base: Path) -> None:
    change_config(base, model_type="nobody_knows")


def shrink_vocabulary(base: Path) -> None:
    change_config(base, vocab_size=100)


def break_config(base: Path) -> None:
    (base / "config.json").write_text('{"model_type": "llama",')


def break_settings(base: Path) -> None:
    (base / "tokenizer_config.json").write_text('{"eos_token": ')


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (cut_weights, r"base/model\.safetensors: is cut off or damaged: \d+ bytes, its header promises \d+; .*again"),
    (change_width, r"gate_proj\.weight has shape \[\d+, \d+\], config\.json asks for \[100, \d+\]; .*Give the config"),
    (deepen, r"num_hidden_layers is 1000000000; a model has at most 10000 layers\. Give the config"),
    (misname_width, r"hidden_size is 'big'; it is a whole number"),
    (rename_type, r"model_type 'nobody_knows' is known neither here nor to transformers; .*Use a supported"),
    (shrink_vocabulary, r"embed_tokens\.weight has shape \[\d+, \d+\], config\.json asks for \[100, \d+\]"),
    (break_config, r"base/config\.json:1: .* at column \d+; a model's settings are strict JSON\. Correct it, or "),
    (break_settings, r"base/tokenizer_config\.json:1: .*; a model's settings are strict JSON\. Correct it, or "),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "finding"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
@pytest.mark.parametrize("verb", ["check", "preview", "train", "compare", "eval"])
def test_an_unsound_model_is_refused_before_the_data_is_read(
    base: Path, tmp_path: Path, damage: Callable[[Path], None], finding: str, verb: str
) -> None:
    damage(base)
    job = {"model": str(base), "data": {"train": TICKETS}}
    out = tmp_path / "run"
    verbs: dict[str, Callable[[], Any]] = {
        "check": lambda: tunesmith.check(job),
        "preview": lambda: tunesmith.preview(job),
        "train": lambda: tunesmith.train(job, out=out),
        "compare": lambda: tunesmith.compare(job, out=out),
        "eval": lambda: tunesmith.evaluate(base, data=TICKETS, out=out),
    }
    with pytest.raises(ModelError, match=finding) as caught:
        verbs[verb]()
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert "on-bad-row" not in str(caught.value)
    assert not (out / "prepared").exists()


def test_looking_at_a_models_folder_needs_no_torch(base: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tunesmith.models.headers import check_model\n"
        f"check_model(Path({str(base)!r}))\n"
        "assert not {'torch', 'transformers', 'safetensors'} & sys.modules.keys()"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    for fresh in (False, True):
        with pytest.raises(RunDirError, match="holds no run of ours"):
            tunesmith.compare(
                {"model": "tunesmith/tiny", "data": {"train": TICKETS}}, out=tmp_path, fresh=fresh
            )
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["thesis.txt"]


def early_refusal(job: dict[str, Any], tmp_path: Path, error: type[TunesmithError]) -> str:
    """What check, train and compare say of a job, all the same, without having prepared data."""
    out, found = tmp_path / "early", set[str]()
    arms = {"compare": {"arms": ["lora"]}}
    for run in (
        lambda: tunesmith.check(job),
        lambda: tunesmith.train(job, out=out),
        lambda: tunesmith.compare({**job, **arms}, out=out),
    ):
        with pytest.raises(error) as caught:
            run()
        found.add(str(caught.value))
    assert not (out / "prepared").exists()
    assert len(found) == 1
    return found.pop()


TRAIN_ON = {"model": "tunesmith/tiny", "data": {"train": TICKETS}}


@pytest.mark.parametrize(
    ("method", "finding"),
    [
        (
            {"targets": ["foo_proj"]},
            "method.targets: no linear layer ends in 'foo_proj'. Choose from down_proj, ",
        ),
        ({"modules_to_save": ["nope"]}, "method.modules_to_save: 'nope' cannot be trained whole; "),
        (
            {"adapter": "nodir"},
            "nodir: no such folder; an adapter is a folder in PEFT format. Check the path",
        ),
    ],
)
def test_a_method_that_does_not_fit_the_base_is_refused_before_the_data_is_read(
    tmp_path: Path, method: dict[str, Any], finding: str
) -> None:
    job = TRAIN_ON | {"method": {"name": "lora", **method}}
    assert early_refusal(job, tmp_path, ModelError).startswith(finding)


def test_what_this_machine_lacks_is_told_before_the_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    job = TRAIN_ON | {"train": {"trackers": ["wandb"]}}
    assert early_refusal(job, tmp_path, SetupError).startswith(
        "train.trackers: wandb needs the package 'wandb'"
    )


def test_fp16_without_a_gpu_is_refused_before_the_data_is_read(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    job = TRAIN_ON | {"train": {"precision": "fp16"}}
    assert early_refusal(job, tmp_path, SetupError).startswith(
        "train.precision: is fp16, and there is no GPU"
    )


def test_a_continued_adapter_that_does_not_fit_is_refused_before_the_data_is_read(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from tunesmith.job.spec import LoraSpec
    from tunesmith.models.load import load_model
    from tunesmith.models.lora import add_lora, save_adapter

    model = load_model(BUNDLED["tunesmith/tiny"])
    add_lora(model, LoraSpec(name="lora", rank=4, targets=["q_proj"]), seed=0)
    folder = tmp_path / "adapter"
    save_adapter(model, folder, base_name="tunesmith/tiny")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, settings = load_file(weights), json.loads(config.read_text())

    def refuse(finding: str, **method: Any) -> None:
        job = TRAIN_ON | {"method": {"name": "lora", "adapter": str(folder), **method}}
        assert re.search(finding, early_refusal(job, tmp_path, ModelError))

    refuse("method.rank: the job and the adapter .* disagree", rank=8)
    refuse("method.rank: the job and the adapter .* disagree", rank=32)
    refuse("method.targets: the job and the adapter .* disagree", targets=["k_proj"])
    config.write_text(json.dumps(settings | {"r": 2}))
    refuse(r"q_proj\.lora_A\.weight has rank 4, adapter_config\.json says 2; .*Give the adapter_config\.json")
    config.write_text(json.dumps(settings))
    save_file({name.replace("q_proj", "w_proj"): tensor for name, tensor in tensors.items()}, weights)
    refuse(r"w_proj\.lora_A\.weight \[4, \d+\] has no place in this model; .*Give the adapter's own base")
    save_file({name: torch.zeros(*tensor.shape, 2) for name, tensor in tensors.items()}, weights)
    refuse(r"has shape \[\d+, \d+, 2\], this base asks for")
    save_file(tensors, weights)
    job = TRAIN_ON | {"method": {"name": "lora", "adapter": str(folder)}, "train": {"steps": 1}}
    record = tunesmith.train(job, out=tmp_path / "run")
    assert record.trained_parameters == sum(tensor.numel() for tensor in tensors.values())


def test_a_damaged_adapter_is_refused_before_the_data_is_read(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    job = {
        "model": "tunesmith/tiny",
        "data": {"train": TICKETS},
        "method": {"name": "lora", "rank": 4},
        "train": {"steps": 1, "evaluate_every": "never", "learning_rate": 1e-3},
    }
    tunesmith.train(job, out=tmp_path / "run")
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()

    def refuse(finding: str) -> None:
        for target in (tmp_path / "run", tmp_path / "run" / "adapter"):
            with pytest.raises(ModelError, match=finding):
                tunesmith.evaluate(target, data=TICKETS, out=tmp_path / "scores")
        assert not (tmp_path / "scores" / "prepared").exists()

    weights.write_bytes(whole[:-100])
    refuse(r"adapter_model\.safetensors: is cut off or damaged")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
    tensors[name] = tensors[name][:, :-1].copy()
    save_file(tensors, weights)
    refuse(
        r"q_proj\.lora_A\.weight has shape \[4, \d+\], this base asks for \[4, \d+\]; .*Give the adapter's own base"
    )
    (weights.parent / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config\.json:1: .*Correct it"):
        tunesmith.evaluate(weights.parent, data=TICKETS)

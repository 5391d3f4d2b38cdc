"""What is wrong with a model folder is said in one line by every verb, before data is read and without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.core.bundled import BUNDLED
from tunesmith.core.errors import ModelError, RunDirError

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


def shrink_vocabulary(base: Path) -> None:
    change_config(base, vocab_size=100)


def break_config(base: Path) -> None:
    (base / "config.json").write_text('{"model_type": "llama",')


def break_settings(base: Path) -> None:
    (base / "tokenizer_config.json").write_text('{"eos_token": ')


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (cut_weights, r"base/model\.safetensors: is cut off or damaged: \d+ bytes, its header promises \d+; .*again"),
    (change_width, r"gate_proj\.weight has shape \[\d+, \d+\], config\.json asks for \[100, \d+\]; .*Give the config"),
    (shrink_vocabulary, r"embed_tokens\.weight has shape \[\d+, \d+\], config\.json asks for \[100, \d+\]"),
    (break_config, r"base/config\.json: .* at column \d+; a model's settings are strict JSON\. Correct it, or "),
    (break_settings, r"base/tokenizer_config\.json: .*; a model's settings are strict JSON\. Correct it, or "),
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
    with pytest.raises(ModelError, match=r"adapter_config\.json: .*Correct it"):
        tunesmith.evaluate(weights.parent, data=TICKETS)

"""Every family of families.py is transformers' model: logits, gradients, generations, adapters, files back and forth.

The models are tiny and random, with each variation of their family in play: windows shorter than the rows, softcaps
low enough to bend scores, rotary bases that differ between layers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VARIATIONS, WINDOW, hf_loss, make_rows, relative_error

from tunesmith.infer.generate import generate
from tunesmith.job.spec import LoraSpec
from tunesmith.methods.sft import sft_loss
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.config import load_config, parse_config
from tunesmith.models.decoder import Decoder
from tunesmith.models.families import FAMILIES
from tunesmith.models.headers import check_model
from tunesmith.models.layout import make_batch, make_layout
from tunesmith.models.load import load_model
from tunesmith.models.lora import add_lora, load_adapter, merge, save_adapter
from tunesmith.models.weights import save_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore:Model has .tie_word_embeddings:UserWarning"
)


def load_own(folder: Path, **options: Any) -> CausalLM:
    model = load_model(folder, **options)
    assert isinstance(model, Decoder)
    return model


def run(model: CausalLM, rows: list[Any]) -> torch.Tensor:
    ids = torch.tensor([token for row in rows for token in row.ids])
    with torch.no_grad():
        return model.head(model.hidden(ids, make_layout([len(row.ids) for row in rows])))


def run_hf(model: Any, rows: list[Any]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([list(row.ids)])).logits[0] for row in rows])


def test_every_family_is_tried() -> None:
    assert {name.split("-")[0] for name in VARIATIONS} | {"llama", "gemma3_text"} >= set(FAMILIES)


@pytest.mark.parametrize("name", VARIATIONS)
def test_logits_of_packed_documents_equal_transformers_on_each_alone(folders: Any, name: str) -> None:
    folder, reference = folders(name)
    model, rows = load_own(folder), make_rows([5, 33, 16, 1, 130, 420])
    packed = run(model, rows)
    assert relative_error(packed, run_hf(reference, rows)) < 1e-5
    assert relative_error(packed, torch.cat([run(model, [row]) for row in rows])) < 2e-6
    short = [
        row for row in rows if len(row.ids) <= 384
    ]  # longer ones go another way, see attention.FOLDED_MAX
    assert torch.equal(run(model, short), torch.cat([run(model, [row]) for row in short]))
    wide = load_own(folder, dtype=torch.float64)  # the plain path
    assert relative_error(packed, run(wide, rows)) < 1e-5


@pytest.mark.parametrize("name", VARIATIONS)
def test_loss_and_gradients_equal_transformers(folders: Any, name: str) -> None:
    folder, reference = folders(name)
    model, rows = load_own(folder, trainable=True), make_rows([20, 7, 33, 60])
    loss = sft_loss(model, make_batch(rows), chunk=11)
    loss.total.backward()
    expected = hf_loss(reference, rows)
    reference.zero_grad()
    expected.backward()
    assert relative_error(loss.total, expected) < 1e-6
    theirs = dict(reference.named_parameters())
    floor = 1e-6 * float(torch.cat([p.grad.flatten() for p in theirs.values()]).norm())
    seen = 0
    for key, parameter in model.named_trainable():
        *parents, leaf = key.rpartition(".")[0].split(".")
        parts = [".".join([*parents, part, key.rpartition(".")[2]]) for part in leaf.split("+")]
        wanted = torch.cat([theirs[part].grad for part in parts])
        assert parameter.grad is not None
        # A key bias moves no attention weight: its gradient is rounding only, so it is measured against the model's.
        assert float((parameter.grad - wanted).norm()) < 1e-5 * float(wanted.norm()) + floor, key
        seen += len(parts)
    assert seen == len(theirs)


@pytest.mark.parametrize("name", VARIATIONS)
def test_generation_from_the_cache_is_what_the_whole_forward_says(folders: Any, name: str) -> None:
    folder, reference = folders(name)
    model, rows = load_own(folder), make_rows([20, 7, 33, 8])
    prompts = [list(row.ids) for row in rows]
    shared = [prompts[2] + prompt for prompt in prompts]  # a beginning that all have in common
    for asked in (prompts, shared):
        found = generate(model, asked, max_new_tokens=20, stop_ids=[])
        assert found == [generate(model, [prompt], max_new_tokens=20, stop_ids=[])[0] for prompt in asked]
        for prompt, generation in zip(asked, found, strict=True):
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + generation.ids])).logits[0]
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == generation.ids
    session = model.open_session(prompts)
    stepped = [session.prefill()]
    following = torch.tensor([3, 4, 5, 6])
    for _ in range(2):
        stepped.append(session.step(following))
    for number, prompt in enumerate(prompts):
        ids = torch.tensor(prompt + [int(following[number])] * 2)
        with torch.no_grad():
            whole = model.hidden(ids, make_layout([len(ids)]))[-3:]
        assert relative_error(torch.stack([hidden[number] for hidden in stepped]), whole) < 1e-5


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_saved_model_holds_the_tensors_that_were_read(folders: Any, tmp_path: Path, name: str) -> None:
    folder, _ = folders(name)
    check_model(folder)
    save_model(load_own(folder), tmp_path, source_folder=folder)
    was, now = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert was.keys() == now.keys()
    assert all(torch.equal(was[key], now[key]) for key in was)
    assert load_config(tmp_path) == load_config(folder)


@pytest.mark.parametrize("name", VARIATIONS)
def test_adapters_and_merged_models_are_what_peft_and_transformers_load(
    folders: Any, tmp_path: Path, name: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _ = folders(name)
    rows = make_rows([40, 7])
    model = load_own(folder)
    before = run(model, rows)
    add_lora(model, LoraSpec(name="lora", rank=4), seed=0)
    assert torch.equal(run(model, rows), before)
    _train(model, rows)
    after = run(model, rows)
    assert relative_error(after, before) > 1e-2
    save_adapter(model, tmp_path / "adapter", base_name=str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert relative_error(run_hf(theirs, rows), after) < 1e-5
    again = load_own(folder)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(run(again, rows), after)
    merge(model)
    save_model(model, tmp_path / "merged", source_folder=folder)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert relative_error(run_hf(merged, rows), after) < 1e-5


@pytest.mark.parametrize(
    ("name", "base"), [*((name, "nf4") for name in VARIATIONS), ("gemma3", "int8"), ("phi3", "int8")]
)
def test_adapters_on_a_packed_base_learn(folders: Any, name: str, base: Any) -> None:
    model = load_own(folders(name)[0], base=base)
    add_lora(model, LoraSpec(name="qlora", rank=4), seed=0)
    losses = _train(model, make_rows([40, 7]))
    assert losses[-1] < losses[0]


def _train(model: CausalLM, rows: list[Any]) -> list[float]:
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = sft_loss(model, make_batch(rows))
        (loss.total / loss.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.total.detach()))
    return losses


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "phi3-partial", "smollm3"])
def test_bf16_stays_close_to_fp32(folders: Any, name: str) -> None:
    folder, _ = folders(name)
    batch = make_batch(make_rows([40, 7]))
    losses = [
        float(sft_loss(load_own(folder, dtype=dtype), batch).total.detach())
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama3", {"model_type": "mixtral"}, "model_type 'mixtral'"),
        ("llama3", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("llama3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        (
            "llama3",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        (
            "llama3",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_parameters beside rope_scaling",
        ),
        ("llama3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ("phi3", {"rope_parameters": None, "rope_scaling": {"type": "su"}}, "rope type 'su'"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ("gemma2", {"hidden_activation": None}, "hidden_activation None"),
        ("gemma2", {"sliding_window": None}, "sliding_window null"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters of all layer types"),
        (
            "llama3",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters by layer type",
        ),
    ],
)
def test_what_is_not_understood_goes_to_the_fallback_with_its_reason(
    folders: Any, name: str, changes: dict[str, Any], reason: str
) -> None:
    raw = json.loads((folders(name)[0] / "config.json").read_text())
    assert parse_config(raw, place="c").own
    config = parse_config(raw | changes, place="c")
    assert not config.own
    assert reason in config.why_not


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "phi3-partial", "smollm3"])
def test_files_of_transformers_4_mean_the_same(folders: Any, tmp_path: Path, name: str) -> None:
    """Their rotary settings lie flat, and what has a default may be missing."""
    folder = Path(shutil.copytree(folders(name)[0], tmp_path / "model"))
    raw = json.loads((folder / "config.json").read_text())
    ropes = raw.pop("rope_parameters")
    if name == "gemma3":
        raw["rope_theta"] = ropes["full_attention"]["rope_theta"]
        raw["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
    else:
        raw |= {key: value for key, value in ropes.items() if key != "rope_type"}
    (folder / "config.json").write_text(json.dumps(raw | {"rope_scaling": None}))
    assert load_config(folder) == load_config(folders(name)[0])


def test_published_configs_are_read_as_transformers_reads_them(folders: Any) -> None:
    """Gemma 3's first files give a pattern instead of layer types, Gemma 2's and SmolLM3's not even that."""
    for name, gone, pattern in [
        ("gemma2-uncapped", ["layer_types"], (WINDOW, 0, WINDOW)),
        ("gemma3-linear", ["layer_types"], (WINDOW,) * 5 + (0, WINDOW)),
        ("smollm3-window", ["layer_types"], (0, WINDOW, 0, WINDOW)),
    ]:
        raw = json.loads((folders(name)[0] / "config.json").read_text())
        assert parse_config(raw, place="c").windows == pattern
        for key in gone:
            raw.pop(key)
        assert parse_config(raw, place="c").windows == pattern
    raw = json.loads((folders("gemma3-linear")[0] / "config.json").read_text())
    raw |= {"layer_types": None, "sliding_window_pattern": 3}
    assert parse_config(raw, place="c").windows == (WINDOW, WINDOW, 0, WINDOW, WINDOW, 0, WINDOW)
    raw = json.loads((folders("smollm3")[0] / "config.json").read_text())
    del raw["no_rope_layers"]
    raw["pretraining_tp"] = 2  # how it was trained; transformers does not read it
    assert parse_config(raw, place="c").own
    assert [rope.kind for rope in parse_config(raw, place="c").ropes] == ["default"] * 3 + ["none"]

"""Adapters: fresh = base, merged = unmerged, saved = what plain peft loads, continued = unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, make_rows, relative_error
from torch import nn

from tunesmith.core.errors import ModelError
from tunesmith.job.spec import LoraSpec
from tunesmith.methods.sft import sft_loss
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.layout import make_batch, make_layout
from tunesmith.models.load import load_model
from tunesmith.models.lora import add_lora, load_adapter, merge, save_adapter, set_enabled
from tunesmith.models.sizes import count_parameters
from tunesmith.models.weights import save_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore:Model has .tie_word_embeddings:UserWarning"
)
IDS = [row.ids for row in make_rows([21, 9])]
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True, "rank": 16},
    "dora": {"dora": True},
    "only q and v": {"targets": ["q_proj", "v_proj"]},
    "only mlp.down_proj": {"targets": ["mlp.down_proj"]},
    "embed_tokens": {"modules_to_save": ["embed_tokens"]},
    "both tables": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


def logits(model: CausalLM) -> torch.Tensor:
    flat = torch.tensor([token for ids in IDS for token in ids])
    with torch.no_grad():
        return model.head(model.hidden(flat, make_layout([len(ids) for ids in IDS])))


def hf_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([list(ids)])).logits[0] for ids in IDS])


def shake(model: CausalLM) -> None:
    """Move every trained value, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def spec(**changes: Any) -> LoraSpec:
    return LoraSpec(name="lora", **({"rank": 8} | changes))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_plain_peft_loads_a_saved_adapter_with_identical_logits(
    hf_folders: Any, tmp_path: Path, name: str, variant: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _ = hf_folders(name)
    model = load_model(folder)
    before = logits(model)
    add_lora(model, spec(**VARIANTS[variant]), seed=3)
    if variant != "dora":
        assert torch.equal(logits(model), before)
    assert relative_error(logits(model), before) < 1e-6
    shake(model)
    after = logits(model)
    assert relative_error(after, before) > 1e-2
    save_adapter(model, tmp_path / "adapter", base_name=str(folder))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert relative_error(hf_logits(theirs), after) < 1e-5

    again = load_model(folder)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), after)
    assert not again.trainable_parameters()
    set_enabled(model, False)
    assert torch.equal(logits(model), before)
    set_enabled(model, True)
    merge(model)
    assert relative_error(logits(model), after) < 1e-5
    save_model(model, tmp_path / "merged", source_folder=folder)
    assert relative_error(hf_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), after) < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_new_tokens_are_saved_with_the_adapter(hf_folders: Any, tmp_path: Path, name: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _ = hf_folders(name)
    model = load_model(folder)
    before = logits(model)
    add_lora(model, spec(new_tokens=["<a>", "<b>"]), seed=0, num_tokens=VOCAB + 2)
    assert relative_error(logits(model)[:, :VOCAB], before) < 1e-6
    shake(model)
    save_adapter(model, tmp_path, base_name=str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(VOCAB + 2)
    assert relative_error(hf_logits(PeftModel.from_pretrained(base, tmp_path)), logits(model)) < 1e-5
    again = load_model(folder)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"layers.1.*q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_adapters_made_by_peft_load_with_identical_logits(
    hf_folders: Any, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder, _ = hf_folders(name)
    torch.manual_seed(5)
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "task_type": "CAUSAL_LM",
    }
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**settings, **changes))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(tmp_path)
    model = load_model(folder)
    load_adapter(model, tmp_path)
    assert relative_error(logits(model), hf_logits(theirs.eval())) < 1e-5


def test_the_fast_pass_has_the_gradients_of_the_plain_one(hf_folders: Any) -> None:
    batch = make_batch(make_rows([30, 14]))

    def gradients(dtype: torch.dtype, *, plain: bool) -> torch.Tensor:
        model = load_model(hf_folders("qwen2")[0], dtype=dtype)
        add_lora(model, spec(targets=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]), seed=0)
        shake(model)
        for projection in model.projections():
            if dtype == torch.float64:
                projection.adapters.double()
            if plain:
                projection._project = _plain(projection)  # type: ignore[method-assign]
        sft_loss(model, batch).total.backward()
        return torch.cat(
            [p.grad.flatten().double() for p in model.trainable_parameters() if p.grad is not None]
        )

    exact = gradients(torch.float64, plain=True)
    assert relative_error(gradients(torch.float32, plain=False), exact) < 1e-5
    coarse = relative_error(gradients(torch.bfloat16, plain=True), exact)
    assert relative_error(gradients(torch.bfloat16, plain=False), exact) < 1.2 * coarse


def _plain(projection: Any) -> Any:
    def project(x: torch.Tensor) -> torch.Tensor:
        bias = projection.bias
        loras = projection.loras()
        return (
            projection._add_lora(x, bias, loras, x)
            if loras
            else nn.functional.linear(x, projection.weight, bias)
        )

    return project


def test_seed_alone_decides_a_fresh_adapter(hf_folders: Any) -> None:
    folder, _ = hf_folders("llama")
    torch.manual_seed(123)

    def draw(seed: int, **changes: Any) -> dict[str, torch.Tensor]:
        model = load_model(folder)
        torch.rand(7)
        add_lora(model, spec(**changes), seed=seed)
        return dict(model.named_trainable())

    key = "model.layers.1.self_attn.v_proj.lora_A.weight"
    assert torch.equal(draw(1)[key], draw(1, targets=["v_proj"])[key])
    assert not torch.equal(draw(1)[key], draw(2)[key])
    assert float(draw(1)[key].detach().abs().max()) <= 1 / 8  # 1 / sqrt(64 inputs)


def test_continuing_an_adapter(hf_folders: Any, tmp_path: Path) -> None:
    folder, _ = hf_folders("llama")
    model = load_model(folder)
    add_lora(model, spec(dropout=0.1), seed=0)
    shake(model)
    save_adapter(model, tmp_path, base_name="x")
    more = load_model(folder)
    add_lora(more, LoraSpec(name="lora", adapter=str(tmp_path)), seed=9)
    assert torch.equal(logits(more), logits(model))
    assert [name for name, _ in more.named_trainable()] == [name for name, _ in model.named_trainable()]
    with pytest.raises(ModelError, match=r"method\.rank: the job and the adapter .* disagree"):
        add_lora(load_model(folder), LoraSpec(name="lora", adapter=str(tmp_path), rank=4), seed=0)
    with pytest.raises(ModelError, match=r"q_proj\.lora_A\.weight has shape"):
        load_adapter(_make_narrow(tmp_path), tmp_path)


def _make_narrow(tmp_path: Path) -> CausalLM:
    """A model whose layers have the adapter's names but other shapes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, num_attention_heads=2, num_hidden_layers=3, intermediate_size=48, vocab_size=VOCAB
        )
    ).save_pretrained(tmp_path / "narrow")
    return load_model(tmp_path / "narrow")


def test_unknown_targets_and_foreign_adapters_are_refused(hf_folders: Any, tmp_path: Path) -> None:
    model = load_model(hf_folders("llama")[0])
    with pytest.raises(ModelError, match=r"no linear layer ends in 'query'.*q_proj"):
        add_lora(model, spec(targets=["query"]), seed=0)
    with pytest.raises(ModelError, match="cannot be trained whole"):
        add_lora(load_model(hf_folders("llama")[0]), spec(modules_to_save=["norm"]), seed=0)
    with pytest.raises(ModelError, match=r"has no adapter_config\.json"):
        load_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(ModelError, match="peft_type is 'IA3'"):
        load_adapter(model, tmp_path)


def test_dropout_acts_only_in_training(hf_folders: Any) -> None:
    model = load_model(hf_folders("llama")[0])
    add_lora(model, spec(dropout=0.5), seed=0)
    shake(model)
    still = logits(model)
    assert torch.equal(logits(model), still)
    model.train()
    assert not torch.equal(logits(model), still)


def test_parameter_counts(hf_folders: Any) -> None:
    model = load_model(hf_folders("qwen2")[0])
    hf = hf_folders("qwen2")[1]
    total = sum(p.numel() for p in hf.parameters())
    assert count_parameters(model).total == count_parameters(model).base == total
    add_lora(model, spec(targets=["q_proj"]), seed=0)
    count = count_parameters(model)
    assert (count.trainable, count.base) == (3 * 8 * (64 + 64), total)
    packed = load_model(hf_folders("qwen2")[0], base="nf4")
    assert count_parameters(packed).total == total

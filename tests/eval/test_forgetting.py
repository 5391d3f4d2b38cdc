"""Forgetting: nothing moved means exactly zero, and a moved model gives the value of the definition."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tunesmith.core.errors import DataError, JobError
from tunesmith.core.types import Origin, TokenRow
from tunesmith.data.render import Renderer
from tunesmith.eval.forgetting import Forgetting, read_general_text
from tunesmith.job.spec import LoraSpec
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.load import load_model
from tunesmith.models.lora import add_lora


def make_rows(count: int = 5) -> list[TokenRow]:
    draw = torch.Generator().manual_seed(3)
    return [
        TokenRow(
            torch.randint(0, 250, (12 + n,), generator=draw).tolist(),
            [0] * 6 + [1] * (6 + n),
            Origin(f"r:{n}", "r", n),
            "",
        )
        for n in range(count)
    ]


def adapt(folder: Path, *, moved: bool) -> CausalLM:
    model = load_model(folder)
    add_lora(model, LoraSpec(name="lora", rank=4), seed=0)
    if moved:
        draw = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, parameter in model.named_trainable():
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def test_a_fresh_adapter_has_forgotten_nothing(folder: Path):
    result = Forgetting(make_rows()).measure(adapt(folder, moved=False), make_rows(3))
    assert result["general_nll"] == result["general_nll_base"]
    assert result["kl_from_base"] == 0.0
    assert result["general_tokens"] == 6 + 7 + 8 + 9 + 10


def test_adapters_off_is_the_base_and_they_are_on_again_afterwards(folder: Path, model: CausalLM):
    moved = adapt(folder, moved=True)
    rows = make_rows()
    before = Forgetting(rows).measure(moved, rows)
    assert before["general_nll_base"] == pytest.approx(
        Forgetting(rows, base=model).measure(model, [])["general_nll"], rel=1e-6
    )
    assert before["general_nll"] != before["general_nll_base"]
    assert before["kl_from_base"] > 0.001
    assert Forgetting(rows).measure(moved, rows) == before


def test_a_base_that_was_run_for_one_model_serves_the_next(folder: Path):
    rows, kept = make_rows(), Forgetting(make_rows())
    for moved in (False, True):
        model = adapt(folder, moved=moved)
        assert kept.measure(model, rows[:3]) == Forgetting(rows).measure(model, rows[:3])


def test_divergence_equals_the_definition_over_the_whole_vocabulary(folder: Path, model: CausalLM):
    from transformers import AutoModelForCausalLM

    first = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    moved = load_model(folder)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for theirs in [p for n, p in first.named_parameters() if n == "model.norm.weight"]:
            noise = 0.3 * torch.randn(theirs.shape, generator=draw)
            theirs += noise.double()
            next(p for n, p in moved.named_parameters() if n == "norm.weight").add_(noise)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    rows = make_rows(3)
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            p = first(torch.tensor([list(row.ids)])).logits[0].softmax(-1)
            q = base(torch.tensor([list(row.ids)])).logits[0].softmax(-1)
        for at, bit in enumerate(row.mask):
            if bit:
                total += sum(
                    a * math.log(a / b) for a, b in zip(p[at - 1].tolist(), q[at - 1].tolist(), strict=True)
                )
                count += 1
    assert Forgetting([], base=model).measure_divergence(moved, rows) == pytest.approx(
        total / count, rel=1e-4
    )


def test_general_text_becomes_windows_of_one_length_spread_over_the_text(renderer: Renderer, tmp_path: Path):
    path = tmp_path / "general.txt"
    path.write_text("".join(f"{number:03d} " for number in range(250)))  # 1000 bytes, one token each
    windows = read_general_text(path, renderer.tokenizer, window_tokens=101, max_windows=5)
    assert [len(window.ids) for window in windows] == [101] * 5
    assert [window.num_targets for window in windows] == [100] * 5
    assert renderer.tokenizer.decode(list(windows[1].ids[1:5])) == "050 "
    assert len(read_general_text(path, renderer.tokenizer, window_tokens=101, max_windows=99)) == 10


def test_general_text_may_be_jsonl_and_what_cannot_be_used_is_refused(renderer: Renderer, tmp_path: Path):
    path = tmp_path / "general.jsonl"
    path.write_text("".join(json.dumps({"text": "word " * 20}) + "\n" for _ in range(4)))
    assert read_general_text(path, renderer.tokenizer, window_tokens=100)
    path.write_text('{"text": 3}\n')
    with pytest.raises(DataError, match=r"general\.jsonl:1: no `text`"):
        read_general_text(path, renderer.tokenizer)
    (tmp_path / "short.txt").write_text("hi")
    with pytest.raises(JobError, match="holds 2 tokens"):
        read_general_text(tmp_path / "short.txt", renderer.tokenizer)
    with pytest.raises(JobError, match="No such file"):
        read_general_text(tmp_path / "missing.txt", renderer.tokenizer)

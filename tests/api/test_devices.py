"""Whether a training repays compiling follows from its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from segment_tools import open_model

from tunesmith.api.devices import _count_tokens, compiles, records_graphs
from tunesmith.core.bundled import bundled_path
from tunesmith.data.prepare import prepare_data
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.job.load import job_from
from tunesmith.job.spec import LoraSpec
from tunesmith.models.decoder import Decoder
from tunesmith.models.load import load_model
from tunesmith.models.lora import add_lora, save_adapter
from tunesmith.models.segments import Segments


@pytest.mark.parametrize(
    ("train", "expected"),
    [({"epochs": 1}, False), ({"epochs": 1e10}, True), ({"steps": 10}, False), ({"steps": 10**9}, True)],
)
def test_only_long_trainings_are_compiled(tmp_path: Path, train: dict[str, Any], expected: bool) -> None:
    folder = bundled_path("tunesmith/tiny")
    assert folder is not None
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"prompt": "Say one.", "completion": "one"}\n{"prompt": "Say two.", "completion": "two"}\n'
    )
    job = job_from(
        {
            "model": str(folder),
            "data": {"train": str(rows), "split": {"validation": 0, "test": 0}},
            "method": "lora",
            "train": train,
        }
    )
    prepared = prepare_data(
        job, tokenizer=load_tokenizer(folder), folder=tmp_path / "out", on_bad_row="refuse"
    )
    values = sum(p.in_features * p.out_features for p in load_model(folder).projections())
    assert compiles(job, values, _count_tokens(job, prepared)) is expected


def test_graphs_are_recorded_where_compiled_blocks_train_nothing_but_adapters(
    hf_folders: Any, tmp_path: Path
) -> None:
    folder, gpu = hf_folders("llama")[0], torch.device("cuda")

    def open_compiled(**settings: Any) -> Decoder:
        model = load_model(folder)
        add_lora(model, LoraSpec(name="lora", **settings), seed=0)
        assert isinstance(model, Decoder)
        model.segments = Segments(compiled=True)
        return model

    assert records_graphs(open_compiled(), gpu)
    assert not records_graphs(open_compiled(), torch.device("cpu"))
    assert not records_graphs(open_compiled(dora=True), gpu)
    # What an adapter brings that training goes on from is in no job.
    for settings in ({"dropout": 0.1}, {"modules_to_save": ["lm_head"]}):
        model = open_compiled(**settings)
        assert not records_graphs(model, gpu)
        saved = tmp_path / next(iter(settings))
        save_adapter(model, saved, base_name=str(folder), revision=None)
        assert not records_graphs(open_compiled(adapter=str(saved)), gpu)
    uncompiled = open_compiled()
    uncompiled.segments = Segments(compiled=False)
    assert not records_graphs(uncompiled, gpu)
    full = open_model(folder)
    full.segments = Segments(compiled=True)
    assert not records_graphs(full, gpu)

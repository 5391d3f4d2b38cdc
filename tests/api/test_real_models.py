"""The whole path on real rows and real weights: job file, check, training, scores, and the result in other tools.

The models are too small to know anything; that the loss falls, on rows they saw and on others, is the point.
`pytest -rP` prints the figures.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.core.jsonl import read_jsonl

MODELS = ("stories260k", "tinystories-656k")
NUM_TRAIN, NUM_TEST = 40, 10
Rows = list[dict[str, Any]]


def _read(path: Path) -> Rows:
    if path.suffix == ".jsonl":
        return [row for _, row in read_jsonl(path)]
    return json.loads(path.read_text(encoding="utf-8"))


def _name_completion(row: dict[str, Any]) -> dict[str, str]:
    """A seed task of Self-Instruct as prompt and completion: its own field names are no shape we know."""
    first = row["instances"][0]
    return {"prompt": f"{row['instruction']}\n{first['input']}\n", "completion": first["output"]}


def _talk_rows(rows: Rows) -> Rows:
    """Conversations without tools: with their definitions no row is as short as these models' context."""
    return [row for row in rows if {turn["from"] for turn in row["conversations"]} == {"human", "gpt"}]


# format -> (file of real rows, what is taken of them, template)
SETS: dict[str, tuple[str, Callable[[Rows], Rows], str]] = {
    "messages": ("sgd_chat_1500.jsonl", lambda rows: rows, "chatml"),
    "alpaca": ("dolly_part_no_context.jsonl", lambda rows: rows[:300], "alpaca"),
    "sharegpt": ("glaive_toolcall_en_demo.json", _talk_rows, "zephyr"),
    "prompt_completion": (
        "self_instruct_seed_tasks.jsonl",
        lambda rows: [_name_completion(row) for row in rows],
        "chatml",
    ),
}


def _write_rows(shared: Path, name: str, folder: Path) -> None:
    """train.jsonl and test.jsonl: the shortest real rows of a set, since these models read 512 tokens."""
    file, take, _ = SETS[name]
    rows = take(_read(shared / "sft" / file))
    short = sorted(range(len(rows)), key=lambda n: (len(json.dumps(rows[n])), n))[: NUM_TRAIN + NUM_TEST]
    test = short[:: (NUM_TRAIN + NUM_TEST) // NUM_TEST]
    parts = {"train": [n for n in short if n not in test], "test": test}
    for split, places in parts.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(rows[n]) + "\n" for n in places))


def _write_job(shared: Path, model: str, name: str, folder: Path, method: str, rate: float) -> Path:
    path = folder / "job.yaml"
    path.write_text(f"""\
model: {shared / "models" / model}
data:
  train: {folder / "train.jsonl"}
  split: {{validation: 0, test: {folder / "test.jsonl"}}}
  template: {SETS[name][2]}
  max_tokens: 512
method: {method}
train: {{steps: 12, batch_rows: 8, learning_rate: {rate}, precision: fp32, save_every: never}}
""")
    return path


def _score(target: Any, data: Path, template: str | None = None) -> dict[str, float]:
    return tunesmith.evaluate(target, data=data, template=template, generate=False).metrics


def _other_tools_logits(run: Path, model: Path, ids: list[int]) -> Any:
    """What plain transformers, with plain PEFT on it for an adapter, answers."""
    import torch
    import transformers

    if (run / "adapter").is_dir():
        import peft

        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        theirs: Any = peft.PeftModel.from_pretrained(base, str(run / "adapter"))
    else:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    with torch.no_grad():
        return theirs.eval()(torch.tensor([ids])).logits[0]


def _our_logits(run: Path, ids: list[int]) -> Any:
    """Ours, on a base in full precision: what PEFT sees of a QLoRA adapter without quantising."""
    import torch

    from tunesmith.api.evaluation import find_target, load_target
    from tunesmith.models.layout import make_layout

    ours = load_target(dataclasses.replace(find_target(str(run)), storage="full"), precision="fp32")
    with torch.no_grad():
        hidden = ours.hidden(
            torch.tensor(ids, device=ours.device), make_layout([len(ids)], device=ours.device)
        )
        return ours.head(hidden).cpu()


LORA = ("{name: lora, rank: 8}", 0.01)
CASES = [
    *((model, name, *LORA) for model, name in itertools.product(MODELS, SETS)),
    *((model, "alpaca", "full", 0.002) for model in MODELS),
    *((model, "alpaca", "{name: qlora, rank: 8}", 0.01) for model in MODELS),
]


@pytest.mark.parametrize(("model", "name", "method", "rate"), CASES)
def test_a_real_model_learns_real_rows_and_the_result_loads_elsewhere(
    shared: Path,
    tmp_path: Path,
    model: str,
    name: str,
    method: str,
    rate: float,
) -> None:
    import torch

    _write_rows(shared, name, tmp_path)
    job = tunesmith.load_job(_write_job(shared, model, name, tmp_path, method, rate))
    report = tunesmith.check(job)
    assert not report.errors
    assert report.sources[0].format == name
    assert report.splits["train"].num_rows >= 12
    assert report.splits["test"].num_rows >= 4

    run, base = tmp_path / "run", shared / "models" / model
    record = tunesmith.train(job, out=run)
    assert record.status == "done"
    assert record.steps == 12

    for split in ("train", "test"):
        before = _score(base, tmp_path / f"{split}.jsonl", job.data.template)
        after = _score(run, tmp_path / f"{split}.jsonl")
        print(
            f"{model}, {name}, {record.method}: {split} {before['nll']:.3f} to {after['nll']:.3f} nats a token"
        )
        assert after["nll"] < before["nll"] - 0.1

    ids = [2 + (7 * n) % 500 for n in range(60)]
    assert torch.allclose(_our_logits(run, ids), _other_tools_logits(run, base, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_a_real_model_answers_held_out_rows_and_is_measured(shared: Path, tmp_path: Path, model: str) -> None:
    _write_rows(shared, "alpaca", tmp_path)
    record = tunesmith.evaluate(
        shared / "models" / model, data=tmp_path / "test.jsonl", template="alpaca", max_rows=3, out=tmp_path / "out"
    )  # fmt: skip
    assert record.num_rows == 3
    assert {"nll", "perplexity", "exact_match", "token_f1"} <= record.metrics.keys()
    answers = [row["answer"] for _, row in read_jsonl(tmp_path / "out" / "answers.jsonl")]
    assert all(isinstance(answer, str) for answer in answers)


def test_rows_beyond_the_context_are_told_before_training_and_when_scored(
    shared: Path, tmp_path: Path
) -> None:
    model = shared / "models" / "stories260k"
    rows = _read(shared / "sft" / "sgd_chat_1500.jsonl")[:6]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(source), "template": "chatml", "split": {"validation": 0.0, "test": 0.0}}
    for limit, told in ((8192, True), (512, False)):
        job = {"model": str(model), "data": {**data, "max_tokens": limit, "too_long": "truncate"}}
        warnings = tunesmith.check(job).warnings
        assert (
            any("beyond the model's context (512); set data.max_tokens to 512" in w for w in warnings) is told
        )
    scored = tunesmith.evaluate(model, data=source, template="chatml", generate=False)
    assert any(
        w.startswith("6 of 6 scored rows are longer than the model's context") for w in scored.warnings
    )

"""The judge's numbers, row by row, recomputed with transformers and plain loops that share no code with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tunesmith.core.bundled import bundled_path
from tunesmith.core.jsonl import read_jsonl
from tunesmith.core.records import AnswerRecord, EvalRecord
from tunesmith.core.rundir import RunDir
from tunesmith.data.prepare import Prepared, prepare_data
from tunesmith.data.render import Renderer
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.eval.judge import judge
from tunesmith.job.spec import EvaluateSpec, Job
from tunesmith.models.load import load_model

MODELS = ("tunesmith/tiny", "stories260k", "tinystories-656k")


@pytest.fixture(params=MODELS)
def model_folder(request: pytest.FixtureRequest) -> Path:
    """The bundled model, and the real small ones where they are."""
    return bundled_path(request.param) or request.getfixturevalue("shared") / "models" / request.param


def write_data(folder: Path) -> Path:
    """Twelve stories to finish: raw prompts and completions, as these models know text."""
    names = ["Lily", "Tim", "Sue", "Ben", "Tom", "Anna", "Max", "Mia", "Sam", "Lucy", "Jack", "Amy"]
    rows = [
        {
            "prompt": f"Once upon a time, there was a child named {name}.",
            "completion": f" {name} had {n} red balls.",
        }
        for n, name in enumerate(names)
    ]
    for split, part in (("train", rows[:6]), ("validation", rows[6:7]), ("test", rows[7:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def prepare(folder: Path, model_folder: Path) -> tuple[Prepared, Renderer]:
    data = write_data(folder)
    job = Job.model_validate(
        {
            "model": str(model_folder),
            "data": {
                "train": str(data / "train.jsonl"),
                "split": {"validation": str(data / "validation.jsonl"), "test": str(data / "test.jsonl")},
            },
        }
    )
    tokenizer = load_tokenizer(model_folder)
    return prepare_data(job, tokenizer=tokenizer, folder=folder / "prepared"), Renderer(tokenizer, job.data)


def compute_nll(reference, prompt: list[int], answer: list[int]) -> float:
    """Sum of -log p over the answer's tokens: one forward pass of transformers in float64, one token at a time."""
    with torch.no_grad():
        logits = reference(torch.tensor([prompt + answer])).logits[0].double()
    total = 0.0
    for place, token in enumerate(answer):
        row = logits[len(prompt) + place - 1]
        total -= (row[token] - row.logsumexp(0)).item()
    return total


def answer_greedily(reference, prompt: list[int], *, limit: int, stop_ids: tuple[int, ...]) -> list[int]:
    """The likeliest token again and again, the whole text recomputed each time."""
    ids: list[int] = []
    while len(ids) < limit:
        with torch.no_grad():
            token = int(reference(torch.tensor([prompt + ids])).logits[0, -1].argmax())
        if token in stop_ids:
            break
        ids.append(token)
    return ids


@pytest.mark.parametrize("prompting", ["zero-shot", "few-shot", "rag"])
def test_every_row_agrees_with_transformers(model_folder: Path, prompting: str, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    prepared, renderer = prepare(tmp_path, model_folder)
    out = RunDir(tmp_path / "out").create()
    spec = EvaluateSpec(max_new_tokens=12, shots=3, retrieved=2, metrics=["exact_match", "token_f1"])
    record = judge(
        load_model(model_folder),
        renderer,
        prepared,
        out=out,
        spec=spec,
        prompting=prompting,
        seed=7,  # type: ignore[arg-type]
    )
    answers = [AnswerRecord.from_json(value) for _, value in read_jsonl(out.answers)]
    reference = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    tokenizer = renderer.tokenizer

    nats, tokens = 0.0, 0
    for answer, row in zip(answers, prepared.rows("test"), strict=True):
        targets = [token for token, bit in zip(row.ids, row.mask, strict=True) if bit]
        # The prompt is found again from the text that the arm is known to show.
        shots = find_shots(prepared, renderer, answer.question, prompting=prompting, seed=7)
        text = "\n\n".join([*shots, answer.question])
        prompt = [tokenizer.bos_id] * tokenizer.adds_bos + tokenizer.encode(text)
        assert answer.num_prompt_tokens == len(prompt)
        assert answer.num_target_tokens == len(targets)
        expected = compute_nll(reference, prompt, targets)
        assert answer.nll == pytest.approx(expected, rel=2e-5)
        expected_ids = answer_greedily(reference, prompt, limit=12, stop_ids=renderer.stop_ids)
        assert answer.answer == tokenizer.decode(expected_ids)
        assert answer.scores["exact_match"] == float(
            tokenizer.decode(expected_ids).strip() == answer.truth.strip()
        )
        nats, tokens = nats + expected, tokens + len(targets)
    assert record.metrics["nll"] == pytest.approx(nats / tokens, rel=2e-5)
    assert EvalRecord.from_json(json.loads(out.evaluation.read_text())) == record


def find_shots(
    prepared: Prepared, renderer: Renderer, question: str, *, prompting: str, seed: int
) -> list[str]:
    """Texts of the examples an arm shows: drawn with the seed, or the most similar ones, best last."""
    import random
    import re

    import bm25s

    train = [(c.messages[0].content, c.messages[1].content) for c in prepared.conversations("train")]
    if prompting == "zero-shot":
        return []
    if prompting == "few-shot":
        chosen = random.Random(seed).sample(range(len(train)), 3)
    else:
        index = bm25s.BM25()
        index.index([re.findall(r"\w+", q.lower()) for q, _ in train], show_progress=False)
        words = [w for w in re.findall(r"\w+", question.lower()) if w in index.vocab_dict]
        scores = index.get_scores(words)
        chosen = sorted(range(len(train)), key=lambda n: (-round(float(scores[n]), 4), n))[:2][::-1]
    return [train[n][0] + train[n][1] for n in chosen]

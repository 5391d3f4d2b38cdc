"""The judge on each device: the CPU's likelihoods and, in fp32, its answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("pydantic")  # a bare GPU machine may lack these three
pytest.importorskip("rensa")
pytest.importorskip("bm25s")

import torch

from tunesmith.core.jsonl import read_jsonl
from tunesmith.core.records import EvalRecord
from tunesmith.core.rundir import RunDir
from tunesmith.data.prepare import Prepared, prepare_data
from tunesmith.data.render import Renderer
from tunesmith.eval.forgetting import Forgetting, read_general_text
from tunesmith.eval.judge import judge
from tunesmith.eval.nll import score_rows, summarize_scores
from tunesmith.job.spec import EvaluateSpec, Job
from tunesmith.models.load import load_model


@pytest.fixture
def prepared(tmp_path: Path, renderer: Renderer) -> Prepared:
    """Eight rows of test, as many examples to train on; prompts begin alike, as real ones do."""
    for split, start in (("train", 0), ("test", 100)):
        rows = [
            {
                "messages": [
                    {"role": "system", "content": "Answer with one JSON object and nothing else. " * 3},
                    {"role": "user", "content": f"My order {n}17{n} of a kettle number {n} is " + "late " * (n % 5)},
                    {"role": "assistant", "content": json.dumps({"order": f"{n}17{n}", "issues": ["late"]})},
                ]
            }
            for n in range(start, start + 8)
        ]  # fmt: skip
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = {"validation": 0.0, "test": str(tmp_path / "test.jsonl")}
    job = Job.model_validate(
        {"model": "tiny", "data": {"train": str(tmp_path / "train.jsonl"), "split": split}}
    )
    return prepare_data(job, tokenizer=renderer.tokenizer, folder=tmp_path / "prepared")


@pytest.mark.parametrize("prompting", ["zero-shot", "few-shot"])
def test_the_judge_gives_the_cpus_figures_on_each_device(
    folder: Path, renderer: Renderer, prepared: Prepared, tmp_path: Path, device: str, prompting: str
) -> None:
    spec = EvaluateSpec(max_new_tokens=8, shots=2)
    records: list[EvalRecord] = []
    answers = []
    (tmp_path / "general.txt").write_text("The kettle was late, and so was everyone else. " * 20)
    for name in ("cpu", device):
        out = RunDir(tmp_path / f"on {name}").create()
        records.append(
            judge(
                load_model(folder, device=name),
                renderer,
                prepared,
                out=out,
                spec=spec,
                prompting=prompting,  # type: ignore[arg-type]
                forgetting=Forgetting(
                    read_general_text(tmp_path / "general.txt", renderer.tokenizer),
                    base=load_model(folder, device=name),
                ),
            )
        )
        answers.append([row for _, row in read_jsonl(out.answers)])
    expected, found = records
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)
    assert found.num_target_tokens == expected.num_target_tokens
    assert found.warnings == expected.warnings
    assert found.forgetting == pytest.approx(expected.forgetting, rel=1e-4, abs=1e-6)
    for here, there in zip(*answers, strict=True):
        assert there["answer"] == here["answer"]
        assert there["nll"] == pytest.approx(here["nll"], rel=1e-5)


def test_bf16_scores_lie_within_rounding_of_fp32_on_each_device(
    folder: Path, prepared: Prepared, device: str
) -> None:
    rows = prepared.rows("test")[:]
    exact = summarize_scores(score_rows(load_model(folder), rows))["nll"]
    model = load_model(folder, device=device, dtype=torch.bfloat16)
    assert summarize_scores(score_rows(model, rows))["nll"] == pytest.approx(exact, rel=1e-2)


def test_scores_do_not_depend_on_the_batch_on_each_device(
    folder: Path, prepared: Prepared, device: str
) -> None:
    model = load_model(folder, device=device)
    rows = prepared.rows("test")[:]
    together = [score.nll for score in score_rows(model, rows)]
    alone = [score_rows(model, [row])[0].nll for row in rows]
    assert together == pytest.approx(alone, rel=1e-6)

"""The judge on a tiny model: what it writes, and what it says about numbers that should not be believed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tunesmith.core.errors import DataError
from tunesmith.core.events import Event
from tunesmith.core.jsonl import read_json, read_jsonl
from tunesmith.core.records import AnswerRecord, EvalRecord
from tunesmith.core.rundir import RunDir
from tunesmith.data.prepare import Prepared, prepare_data
from tunesmith.data.render import Renderer
from tunesmith.eval.doubts import doubt_lengths, find_doubts
from tunesmith.eval.forgetting import Forgetting, read_general_text
from tunesmith.eval.judge import judge
from tunesmith.job.spec import EvaluateSpec, Job
from tunesmith.models.causal_lm import CausalLM


def prepare(folder: Path, rows: list[dict[str, object]], renderer: Renderer) -> Prepared:
    """The last third is the test split, the first third train."""
    third = len(rows) // 3
    parts = {"train": rows[:third], "validation": rows[third : 2 * third], "test": rows[2 * third :]}
    for split, part in parts.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    split = {name: str(folder / f"{name}.jsonl") for name in ("validation", "test")}
    data = {"train": str(folder / "train.jsonl"), "split": split}
    job = Job.model_validate({"model": "tiny", "data": data})
    return prepare_data(job, tokenizer=renderer.tokenizer, folder=folder / "prepared")


def make_tickets(count: int = 12) -> list[dict[str, object]]:
    return [
        {
            "messages": [
                {"role": "system", "content": "Ticket to JSON."},
                {"role": "user", "content": f"My order {n}17{n} of a kettle number {n} is late"},
                {"role": "assistant", "content": json.dumps({"order": f"{n}17{n}", "issues": ["late"]})},
            ]
        }
        for n in range(count)
    ]


@pytest.fixture
def tickets(tmp_path: Path, renderer: Renderer) -> Prepared:
    return prepare(tmp_path, make_tickets(), renderer)


def read_answers(out: RunDir) -> list[AnswerRecord]:
    return [AnswerRecord.from_json(value) for _, value in read_jsonl(out.answers)]


def test_metrics_are_the_means_of_what_stands_in_the_answers(
    model: CausalLM, renderer: Renderer, tickets: Prepared, tmp_path: Path
):
    out = RunDir(tmp_path / "out").create()
    record = judge(model, renderer, tickets, out=out, spec=EvaluateSpec(max_new_tokens=8), model_name="tiny")
    answers = read_answers(out)
    assert record.num_rows == len(answers) == 4
    tokens = sum(answer.num_target_tokens for answer in answers)
    assert record.metrics["nll"] == pytest.approx(sum(answer.nll or 0 for answer in answers) / tokens)
    assert record.metrics["perplexity"] == pytest.approx(math.exp(record.metrics["nll"]))
    for name in ("exact_match", "json_valid", "json_fields"):
        assert record.metrics[name] == sum(answer.scores[name] for answer in answers) / 4
    assert {"json_fields.order", "json_fields.issues[]"} <= record.metrics.keys()
    assert [answer.place for answer in answers] == [f"test.jsonl:{n}" for n in (1, 2, 3, 4)]
    assert answers[0].truth == '{"order": "8178", "issues": ["late"]}'
    assert answers[0].question == "My order 8178 of a kettle number 8 is late"
    assert EvalRecord.from_json(read_json(out.evaluation)) == record
    assert record.data_sha256 == tickets.fingerprints["test_sha256"]


def test_every_arm_scores_the_same_targets_of_the_same_rows(
    model: CausalLM, renderer: Renderer, tickets: Prepared, tmp_path: Path
):
    facts = []
    for prompting in ("zero-shot", "few-shot", "rag"):
        out = RunDir(tmp_path / prompting).create()
        spec = EvaluateSpec(max_new_tokens=4, shots=3)
        judge(model, renderer, tickets, out=out, spec=spec, prompting=prompting)
        answers = read_answers(out)
        facts.append(
            [(a.row, a.row_id, a.truth, a.num_target_tokens, a.num_bytes, a.cluster) for a in answers]
        )
    assert facts[0] == facts[1] == facts[2]


def test_the_seed_changes_few_shot_and_nothing_else(
    model: CausalLM, renderer: Renderer, tickets: Prepared, tmp_path: Path
):
    def run(prompting: str, seed: int) -> dict[str, float]:
        out = RunDir(tmp_path / f"{prompting}{seed}").create()
        spec = EvaluateSpec(max_new_tokens=4, shots=2)
        return judge(model, renderer, tickets, out=out, spec=spec, prompting=prompting, seed=seed).metrics  # type: ignore[arg-type]

    assert run("few-shot", 1) == run("few-shot", 1)
    assert run("few-shot", 1)["nll"] != run("few-shot", 2)["nll"]
    assert run("zero-shot", 1) == run("zero-shot", 2)
    assert run("rag", 1) == run("rag", 2)


def test_cut_answers_and_an_impossible_likelihood_are_said(
    model: CausalLM, renderer: Renderer, tickets: Prepared, tmp_path: Path
):
    out = RunDir(tmp_path / "out").create()
    record = judge(model, renderer, tickets, out=out, spec=EvaluateSpec(max_new_tokens=2))
    assert record.metrics["finished"] < 1
    assert any("cut at evaluate.max_new_tokens (2)" in warning for warning in record.warnings)
    # Random weights with wide logits do worse than guessing each of the 259 tokens alike.
    assert record.metrics["nll"] > math.log(259)
    assert any("worse than guessing each token" in warning for warning in record.warnings)


def test_a_metric_that_suits_no_row_is_left_out_and_said(model: CausalLM, renderer: Renderer, tmp_path: Path):
    rows = [{"prompt": f"say {n} words", "completion": f"only {n} words"} for n in range(6)]
    prepared = prepare(tmp_path, rows, renderer)  # type: ignore[arg-type]
    spec = EvaluateSpec(max_new_tokens=3, metrics=["json_fields", "exact_match"])
    record = judge(model, renderer, prepared, out=RunDir(tmp_path / "out").create(), spec=spec)
    assert "json_fields" not in record.metrics
    assert "exact_match" in record.metrics
    assert any(warning.startswith("json_fields applies to 0 of 2 rows") for warning in record.warnings)


def test_plain_text_gets_a_likelihood_and_no_answers(model: CausalLM, renderer: Renderer, tmp_path: Path):
    prepared = prepare(tmp_path, [{"text": f"some text number {n}"} for n in range(6)], renderer)
    out = RunDir(tmp_path / "out").create()
    record = judge(model, renderer, prepared, out=out, spec=EvaluateSpec())
    assert set(record.metrics) == {"nll", "nll_content", "perplexity", "bits_per_byte"}
    assert all(answer.answer is None for answer in read_answers(out))
    assert any("likelihood only" in warning for warning in record.warnings)


def test_forgetting_is_measured_where_general_text_is_given(
    model: CausalLM, renderer: Renderer, tickets: Prepared, tmp_path: Path
):
    path = tmp_path / "general.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 20)
    windows = read_general_text(path, renderer.tokenizer, window_tokens=64)
    out = RunDir(tmp_path / "out").create()
    spec = EvaluateSpec(max_new_tokens=2)
    record = judge(model, renderer, tickets, out=out, spec=spec, forgetting=Forgetting(windows, base=model))
    assert record.forgetting is not None
    assert record.forgetting["kl_from_base"] == 0.0
    assert record.forgetting["general_nll"] == record.forgetting["general_nll_base"]


def test_progress_reaches_the_number_of_rows(
    model: CausalLM, renderer: Renderer, tickets: Prepared, tmp_path: Path
):
    events: list[Event] = []
    out = RunDir(tmp_path / "out").create()
    judge(
        model,
        renderer,
        tickets,
        out=out,
        spec=EvaluateSpec(max_new_tokens=2),
        task="x",
        on_event=events.append,
    )
    last = [event for event in events if event.text == "answers" and event.kind == "progress"][-1]
    assert (last.done, last.total, last.task) == (4, 4, "x")


def test_only_the_first_rows_are_scored_when_asked(
    model: CausalLM, renderer: Renderer, tickets: Prepared, tmp_path: Path
):
    out = RunDir(tmp_path / "out").create()
    judge(model, renderer, tickets, out=out, spec=EvaluateSpec(max_new_tokens=2, max_rows=2))
    assert [answer.row for answer in read_answers(out)] == [0, 1]


def test_a_split_that_is_not_there_is_refused(
    model: CausalLM, renderer: Renderer, tickets: Prepared, tmp_path: Path
):
    with pytest.raises(DataError):
        judge(model, renderer, tickets, out=RunDir(tmp_path), spec=EvaluateSpec(), split="sealed")


def make_answer(truth: str, *, answer: str | None = "x", finished: bool = True) -> AnswerRecord:
    return AnswerRecord(0, "", "t:1", "c", "q", truth, answer=answer, finished=finished)


def test_an_easy_perplexity_is_doubted_on_prose_but_not_on_json():
    prose = [make_answer("the quick brown fox jumps over the lazy dog")]
    doubts = find_doubts(prose, {"nll": 0.2}, vocab_size=1000, max_new_tokens=8)
    assert len(doubts) == 1
    assert doubts[0].startswith("perplexity 1.22 on prose")
    json_rows = [make_answer('{"a": "the quick brown fox jumps over the lazy dog"}')]
    assert find_doubts(json_rows, {"nll": 0.2}, vocab_size=1000, max_new_tokens=8) == []


def test_rows_beyond_the_context_are_doubted():
    assert doubt_lengths([512, 3], max_positions=512) == []
    assert doubt_lengths([513, 512], max_positions=512)[0].startswith("1 of 2 scored rows are longer")


def test_one_cut_answer_in_a_hundred_is_no_cause_for_doubt():
    answers = [make_answer("a", finished=n > 0) for n in range(100)]
    assert find_doubts(answers, {"nll": 1.0}, vocab_size=1000, max_new_tokens=8) == []
    answers[1] = make_answer("a", finished=False)
    assert len(find_doubts(answers, {"nll": 1.0}, vocab_size=1000, max_new_tokens=8)) == 1

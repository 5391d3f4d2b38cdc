"""A whole comparison over real worker processes: report, stable JSON, resuming, adding an arm, a failing arm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith import api
from tunesmith.core.errors import JobError, ModelError
from tunesmith.core.events import Event
from tunesmith.core.jsonl import read_jsonl

ARM_FIELDS = {
    "name", "kind", "framework", "seeds", "metrics", "versus_base", "trained_parameters", "train_tokens",
    "target_tokens", "wall_seconds", "cpu_seconds", "peak_bytes", "size_bytes",
}  # fmt: skip


def job(arms: list[Any], **more: Any) -> dict[str, Any]:
    return {
        "model": "tunesmith/tiny",
        "data": {"train": "tunesmith/tickets"},
        "method": {"name": "lora", "rank": 4},
        "train": {"steps": 2, "evaluate_every": "never", "learning_rate": 1e-3},
        "evaluate": {"max_rows": 6, "max_new_tokens": 8, "shots": 1, "precision": "fp32"},
        "compare": {"arms": arms, "seeds": [0, 1], **more},
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    tunesmith.compare(job(["zero-shot", "few-shot", "lora", "lora+rag"]), out=folder)
    return folder


def test_a_comparison_leaves_its_report_and_every_row(finished: Path) -> None:
    comparison = api.report(finished)
    public = json.loads(json.dumps(api.comparison_json(comparison, finished)))
    assert {"schema", "metric", "verdict", "report", "warnings", "arms"} <= public.keys()
    assert Path(public["report"]).read_text().startswith("<!doctype html>")
    assert [arm["name"] for arm in public["arms"]] == ["zero-shot", "few-shot", "lora", "lora+rag"]
    for arm in public["arms"]:
        assert arm.keys() >= ARM_FIELDS
        assert {"nll", "perplexity", "exact_match", "json_valid"} <= arm["metrics"].keys()
        for metric in arm["metrics"].values():
            assert metric.keys() == {"value", "low", "high"}
    trained = public["arms"][2]
    assert trained["trained_parameters"] > 0
    assert trained["train_tokens"] > trained["target_tokens"] > 0
    answers = finished / "arms" / "lora" / "seed-1" / "answers.jsonl"
    assert len(list(read_jsonl(answers))) == 6


def test_the_reports_numbers_are_those_of_transformers_and_a_loop_by_hand(finished: Path) -> None:
    import peft
    import torch
    import transformers

    from tunesmith.core.bundled import BUNDLED

    tiny = BUNDLED["tunesmith/tiny"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    test_rows = [row for _, row in read_jsonl(BUNDLED["tunesmith/tickets"] / "test.jsonl")][:6]
    per_seed = []
    for seed in (0, 1):
        folder = finished / "arms" / "lora" / f"seed-{seed}"
        base = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
        answers = [row for _, row in read_jsonl(folder / "answers.jsonl")]
        total, tokens = 0.0, 0
        for answer, row in zip(answers, test_rows, strict=True):
            prompt = tokenizer.apply_chat_template(
                row["messages"][:-1], add_generation_prompt=True, return_dict=False
            )
            truth = tokenizer(
                row["messages"][-1]["content"] + tokenizer.eos_token, add_special_tokens=False
            ).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([prompt + truth])).logits[0].double().log_softmax(-1)
            nll = -sum(logits[len(prompt) + n - 1, token].item() for n, token in enumerate(truth))
            assert answer["nll"] == pytest.approx(nll, rel=1e-4)
            assert answer["num_target_tokens"] == len(truth)
            total, tokens = total + nll, tokens + len(truth)
            ids = torch.tensor([prompt])
            made = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
            )
            assert answer["answer"] == tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True)
        per_seed.append(total / tokens)
    arm = api.report(finished).find_arm("lora")
    assert arm.per_seed["nll"] == pytest.approx(per_seed, rel=1e-4)
    assert arm.metrics["nll"].value == pytest.approx(sum(per_seed) / 2, rel=1e-4)
    assert f"{arm.metrics['nll'].value:.3f}" in (finished / "report.html").read_text()


def test_retrieval_shares_the_training_of_its_arm(finished: Path) -> None:
    assert (finished / "arms" / "lora" / "seed-0" / "adapter").is_dir()
    assert not (finished / "arms" / "lora+rag" / "seed-0" / "adapter").exists()


def test_running_again_starts_no_worker_and_a_new_arm_only_itself(finished: Path) -> None:
    events: list[Event] = []
    tunesmith.compare(
        job(["zero-shot", "few-shot", "lora", "lora+rag"]), out=finished, on_event=events.append
    )
    assert not [event for event in events if event.kind in ("done", "step")]
    tunesmith.compare(job(["zero-shot", "lora", "rag"]), out=finished, on_event=events.append)
    assert [event.task for event in events if event.kind == "done"] == ["rag judged"]


def test_an_arm_that_fails_is_a_warning_and_the_others_count(tmp_path: Path) -> None:
    arms = ["zero-shot", {"name": "broken", "method": "full", "learning_rate": 1e30}]
    comparison = tunesmith.compare(job(arms), out=tmp_path)
    (warning,) = [warning for warning in comparison.warnings if "ended without a result" in warning]
    assert warning.startswith("broken: ended without a result: seed 0: ")
    assert warning.count("broken seed 0") == 0
    assert comparison.verdict.startswith("No trained arm has a result (broken failed): zero-shot (")
    assert comparison.find_arm("zero-shot").status == "done"


def test_an_arm_that_the_base_cannot_have_is_refused_before_any_work(tmp_path: Path) -> None:
    arms = ["zero-shot", {"name": "broken", "method": {"name": "lora", "targets": ["no_such_layer"]}}]
    with pytest.raises(
        ModelError, match=r"compare\.arms, broken: method\.targets: no linear layer ends in 'no_such_"
    ):
        tunesmith.compare(job(arms), out=tmp_path)
    assert not (tmp_path / "prepared").exists()


@pytest.mark.slow
def test_learning_rates_are_searched_equally_and_chosen_on_validation(tmp_path: Path) -> None:
    values = job(["lora", "full"], tune={"trials": 2, "factor": 10.0}, metric="nll")
    values["train"] = {"steps": 2, "evaluate_every": 2, "learning_rate": 1e-5}
    values["compare"]["seeds"] = [0]
    comparison = tunesmith.compare(values, out=tmp_path)
    for arm in comparison.arms:
        assert len(arm.trials) == 2
        best = min(arm.trials, key=lambda trial: trial.validation_loss or 9e9)
        assert best.chosen
        assert arm.learning_rate == pytest.approx(best.learning_rate)
    rates = {arm.name: sorted(trial.learning_rate for trial in arm.trials) for arm in comparison.arms}
    values["compare"]["tune"]["trials"] = 1
    fewer = tunesmith.compare(values, out=tmp_path)
    for arm in fewer.arms:
        assert [trial.learning_rate for trial in arm.trials] == rates[arm.name][1:], (
            "its prior, the larger of the two"
        )
        assert arm.trials[0].chosen
    assert any("edge" in warning for warning in comparison.warnings)
    assert any("one seed" in warning.lower() for warning in comparison.warnings)


def test_files_for_the_judge_are_looked_for_before_any_work(tmp_path: Path) -> None:
    for key in ("schema_file", "general", "documents"):
        values = job(["zero-shot"])
        values["evaluate"] = {key: "nowhere"}
        with pytest.raises(JobError, match=rf"evaluate\.{key}: nowhere: no such file or folder"):
            tunesmith.compare(values, out=tmp_path)


def test_an_unknown_arm_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="Did you mean 'few-shot'"):
        tunesmith.compare(job(["few-shoot"]), out=tmp_path)
    assert not (tmp_path / "prepared").exists()


def test_arms_that_a_job_names_are_looked_at_by_check() -> None:
    with pytest.raises(JobError, match="Did you mean 'few-shot'"):
        tunesmith.check(job(["few-shoot"]))


@pytest.mark.slow
def test_a_streamed_comparison_trains_again_when_its_stream_changes(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Count to {n}:", "completion": " " + " ".join(map(str, range(n)))} for n in range(2, 30)
    ]
    lines = [json.dumps(row) for row in rows]
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("\n".join([*lines[:9], '{"prompt": "no completion", "completion": null}', *lines[9:20]]))
    test.write_text("\n".join(lines[20:]))
    values = job(["zero-shot", "lora"])
    values["data"] = {
        "train": str(train),
        "streaming": True,
        "split": {"validation": 0.0, "test": str(test)},
    }
    values["compare"]["seeds"] = [0]
    out = tmp_path / "run"

    def run() -> list[str]:
        events: list[Event] = []
        comparison = tunesmith.compare(values, out=out, on_bad_row="skip", on_event=events.append)
        assert [arm.status for arm in comparison.arms] == ["done", "done"]
        return sorted(event.task for event in events if event.kind == "done")

    assert run() == ["lora judged", "lora seed 0", "zero-shot judged"]
    rejected = out / "arms" / "lora" / "seed-0" / "rejected_stream_rows.jsonl"
    assert [row["place"] for _, row in read_jsonl(rejected)] == ["train.jsonl:10"]
    assert run() == []
    train.write_text("\n".join(lines[:19]))
    assert run() == ["lora judged", "lora seed 0", "zero-shot judged"]


@pytest.mark.slow
def test_arms_with_new_tokens_are_compared(tmp_path: Path) -> None:
    values = job(["lora", "qlora"])
    values["method"] = {"name": "lora", "rank": 4, "new_tokens": ["<ticket>"]}
    values["compare"]["seeds"] = [0]
    comparison = tunesmith.compare(values, out=tmp_path)
    assert [arm.status for arm in comparison.arms] == ["done", "done"]

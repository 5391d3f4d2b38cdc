"""The lm-eval model: log-likelihoods equal to the harness's own Hugging Face class, where lm-eval is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from tunesmith import api
from tunesmith.core.bundled import BUNDLED
from tunesmith.core.errors import JobError
from tunesmith.eval.harness import HarnessModel, cut_at

TINY = BUNDLED["tunesmith/tiny"]

PAIRS = [
    ("Once upon a time, there was", " a little girl named Lily."),
    ("Tim and Sue were sad ", "because it rained."),
    ("", "The dog ran to the park."),
    ("One day, a cat", " sat"),
]


def ask(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=n) for n, a in enumerate(arguments)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def models() -> tuple[HarnessModel, HFLM]:
    return HarnessModel(str(TINY)), HFLM(pretrained=str(TINY), device="cpu", dtype="float32", batch_size=1)


def test_the_model_is_registered_by_name():
    assert get_model("tunesmith") is HarnessModel


def test_likelihoods_of_continuations_equal_those_of_the_hugging_face_class(models):
    ours, theirs = (model.loglikelihood(ask("loglikelihood", PAIRS), disable_tqdm=True) for model in models)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], rel=1e-4)
    assert [bool(hit) for _, hit in ours] == [bool(hit) for _, hit in theirs]


def test_likelihoods_of_long_texts_equal_those_of_the_hugging_face_class(models):
    text = "Once upon a time, there was a little girl. She liked to play with her big red ball. " * 20
    requests = ask("loglikelihood_rolling", [(text,), ("The dog ran.",)])
    # By default that class puts a second BOS before a text and scores it; ours never doubles BOS.
    bare = HFLM(pretrained=str(TINY), device="cpu", dtype="float32", batch_size=1, add_bos_token=False)
    ours, theirs = (model.loglikelihood_rolling(requests, disable_tqdm=True) for model in (models[0], bare))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_greedy_continuations_equal_those_of_the_hugging_face_class(models):
    settings = {"until": [".", "\n"], "max_gen_toks": 24, "do_sample": False}
    requests = ask("generate_until", [("Once upon a time, there was", settings), ("Lily saw a", settings)])
    ours, theirs = (model.generate_until(requests, disable_tqdm=True) for model in models)
    assert [text.strip() for text in ours] == [text.strip() for text in theirs]


def test_a_text_is_cut_at_the_earliest_stop_string():
    assert cut_at("one. two\nthree", ["\n", "."]) == "one"
    assert cut_at("nothing here", [".", ""]) == "nothing here"
    assert cut_at("a;b", ";") == "a"


def test_a_model_is_scored_on_tasks_of_a_file(tmp_path: Path):
    rows = [{"text": "The dog", "good": " ran to the park.", "bad": " xq zz vv."}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "dogs.yaml").write_text(
        f"""task: dogs
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
    )
    out = tmp_path / "scores"
    record = api.evaluate_tasks("tunesmith/tiny", [str(tmp_path / "dogs.yaml")], out=out, max_rows=2)
    assert record["tasks"]["dogs"]["acc"] == 1.0
    assert json.loads((out / "harness.json").read_text()) == record
    with pytest.raises(
        JobError, match=r"--tasks blimb: is no task of lm-eval and no file; .* Did you mean blimp"
    ):
        api.evaluate_tasks("tunesmith/tiny", ["blimb"])

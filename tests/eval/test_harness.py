"""The lm-eval model: log-likelihoods equal to the harness's own Hugging Face class, where lm-eval is installed."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from tunesmith.core.bundled import BUNDLED
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

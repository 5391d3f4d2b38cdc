"""Metrics against values worked by hand, and answers that try to break them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tunesmith.core.errors import JobError
from tunesmith.core.types import Conversation, Message, Origin
from tunesmith.data.render import Renderer
from tunesmith.eval.cases import Case, mark_cases, summarize_cases
from tunesmith.eval.metrics import (
    METRICS,
    MetricContext,
    choose_metrics,
    cut_reasoning,
    flatten_fields,
    json_fields,
    load_schema,
    measure_common_subsequence,
    rouge_l,
    score_fields,
    token_f1,
)
from tunesmith.eval.nll import RowScore
from tunesmith.job.spec import METRICS as METRIC_NAMES

NOTHING = MetricContext()


def test_the_table_holds_the_metrics_a_job_file_may_name():
    assert set(METRICS) | {"nll"} == set(METRIC_NAMES)


@pytest.mark.parametrize(
    ("answer", "truth", "value"),
    [("yes", " yes\n", 1.0), ("Yes", "yes", 0.0), ('{"a":1}', '{"a": 1}', 0.0), ("", "", 1.0)],
)
def test_exact_match_forgives_nothing_but_white_space_at_the_ends(answer: str, truth: str, value: float):
    assert METRICS["exact_match"](answer, truth, NOTHING) == value


def test_token_f1_counts_common_words_after_dropping_case_punctuation_and_articles():
    # answer: cat sat on mat (4); truth: cat sat (2); common 2; P = 2/4, R = 2/2, F1 = 2/3
    assert token_f1("The cat sat on the mat!", "a cat, sat") == pytest.approx(2 / 3)
    # a word repeated counts as often as both have it: common = 1, F1 = 2 * 1 / (3 + 1)
    assert token_f1("no no no", "no") == pytest.approx(0.5)
    assert token_f1("the", "") == 1.0
    assert token_f1("cat", "") == 0.0


def test_rouge_l_equals_the_value_worked_out_by_hand():
    # "police killed the gunman" / "police kill the gunman" share police, the, gunman: 2*3/(4+4)
    assert rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(0.75)
    # order matters: "the gunman kill police" shares only "the gunman": 2*2/(4+4)
    assert rouge_l("the gunman kill police", "police kill the gunman") == pytest.approx(0.5)
    # different lengths: a b c d e against a c e g -> 3; 2*3/(5+4)
    assert rouge_l("A b, c d e.", "a c e g") == pytest.approx(6 / 9)


def test_the_bit_parallel_subsequence_equals_the_textbook_table():
    draw = random.Random(0)
    for _ in range(200):
        left = [draw.choice("abcd") for _ in range(draw.randrange(0, 90))]
        right = [draw.choice("abcd") for _ in range(draw.randrange(0, 90))]
        table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
        for i, x in enumerate(left):
            for j, y in enumerate(right):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert measure_common_subsequence(left, right) == table[-1][-1]


@pytest.mark.parametrize(
    "answer",
    [
        '{"a": 1} extra',
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        "{'a': 1}",
        "12",
        '"text"',
        "null",
        "",
        "\ufeff{}",
        '{"a": "\\ud800"}',
        "[" * 200_000,
        "[" + "9" * 20_000 + "]",
        '{"a": "\ud800"}',
    ],
)
def test_an_answer_that_is_not_strict_json_scores_zero_and_never_raises(answer: str):
    for name in ("json_valid", "json_fields"):
        assert METRICS[name](answer, '{"a": 1}', NOTHING) == 0.0


def test_a_deeply_nested_answer_gives_a_number():
    deep = "[" * 900 + "]" * 900
    assert json_fields(deep, '{"a": 1}') == 0.0


def test_json_fields_counts_leaves_and_punishes_missing_and_invented_ones():
    truth = '{"order": "A-1", "amount": {"value": 5, "currency": "EUR"}, "issues": ["late", "damaged"]}'
    assert json_fields(truth, truth) == 1.0
    # 5 leaves; wrong currency, second issue missing, one invented leaf: 3 right of 6
    answer = '{"order": "A-1", "amount": {"value": 5.0, "currency": "USD"}, "issues": ["late"], "note": "x"}'
    assert json_fields(answer, truth) == pytest.approx(3 / 6)
    fields = score_fields(answer, truth)
    assert fields == {"order": 1.0, "amount.value": 1.0, "amount.currency": 0.0, "issues[]": 0.5}


def test_json_fields_tells_true_from_one_and_null_from_absent():
    assert json_fields('{"a": 1}', '{"a": true}') == 0.0
    assert json_fields('{"a": "1"}', '{"a": 1}') == 0.0
    assert json_fields("{}", '{"a": null}') == 0.0
    assert json_fields('{"a": null}', '{"a": null}') == 1.0


def test_a_key_with_a_dot_is_not_a_nested_field():
    assert flatten_fields({"a.b": 1}).keys() != flatten_fields({"a": {"b": 1}}).keys()


def test_json_schema_checks_the_answer_against_the_given_schema(tmp_path: Path):
    path = tmp_path / "schema.json"
    path.write_text(
        json.dumps({"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}})
    )
    context = MetricContext(validator=load_schema(path))
    assert METRICS["json_schema"]('{"a": 3}', "{}", context) == 1.0
    assert METRICS["json_schema"]('{"a": "3"}', "{}", context) == 0.0
    assert METRICS["json_schema"]("not json", "{}", context) == 0.0


def test_a_file_that_is_no_schema_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "schema.json"
    path.write_text('{"type": "objekt"}')
    with pytest.raises(JobError, match=r"schema\.json: not a JSON Schema"):
        load_schema(path)


def test_auto_picks_json_metrics_for_json_answers_and_overlap_for_prose():
    assert choose_metrics(['{"a": 1}', "[1]"], has_schema=False, has_choices=False) == [
        "exact_match",
        "json_valid",
        "json_fields",
    ]
    assert "json_schema" in choose_metrics(["{}"], has_schema=True, has_choices=False)
    assert choose_metrics(['{"a": 1}', "hello"], has_schema=False, has_choices=False) == [
        "exact_match",
        "token_f1",
        "rouge_l",
    ]
    assert choose_metrics(["x"], has_schema=False, has_choices=True) == ["choice_accuracy"]


@pytest.mark.parametrize(
    ("answer", "truth", "said"),
    [
        ("<think>\nhm\n</think>\n\n42", "42", "\n\n42"),
        ("hm, 41?\n</think>\n\n42", "42", "\n\n42"),  # the prompt opened the block
        ("<think>a</think> no <think>b</think>42", "42", "42"),
        ("<think>still at it", "42", "<think>still at it"),
        ("42", "42", "42"),
        ("<think>a</think>42", "<think>b</think>42", "<think>a</think>42"),  # trained to be compared whole
    ],
)
def test_reasoning_is_cut_unless_the_truth_has_it_too(answer: str, truth: str, said: str):
    assert cut_reasoning(answer, truth) == said


def test_answers_are_measured_after_their_reasoning(renderer: Renderer):
    """Every generated metric and the fields of JSON answers; the record keeps what the model wrote."""
    truth = '{"order": "4711", "issues": ["late"]}'
    conversation = Conversation(
        (Message("user", "order 4711 is late"), Message("assistant", truth)),
        Origin("rows.jsonl:1", "rows.jsonl", 1),
    )
    case = Case(conversation, renderer.render_conversation(conversation), "c", truth)
    case.score = RowScore(nll=1.0, nll_content=1.0, num_target_tokens=3, num_content_tokens=2, num_bytes=10)
    case.answer = f'Order or customer {{"order": "12"}}? The order.\n</think>\n\n{truth}'
    names = ["exact_match", "token_f1", "rouge_l", "json_valid", "json_fields"]
    (answer,) = mark_cases([case], names, None)
    assert answer.scores == dict.fromkeys(names, 1.0)
    assert answer.answer == case.answer
    metrics = summarize_cases([case], [answer])
    assert (metrics["json_fields.order"], metrics["json_fields.issues[]"]) == (1.0, 1.0)

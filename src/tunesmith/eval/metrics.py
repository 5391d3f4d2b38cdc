"""What a generated answer is worth: one function and one row of `METRICS` per metric, values in [0, 1].

An answer is untrusted text: it is parsed as strict JSON (`core.jsonl.parse_json`), never evaluated, and
whatever it holds gives a number, not an exception. Metrics are given what stands after an answer's reasoning
(`cut_reasoning`).
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.errors import DataError, JobError
from tunesmith.core.jsonl import parse_json, read_json

REASONING_END = "</think>"
_ARTICLES = frozenset({"a", "an", "the"})
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class MetricContext:
    """What a metric may know besides answer and truth.

    validator:    a jsonschema validator, or None where the job gives no schema.
    chosen:       index of the option the model finds likeliest, None where a row has no options.
    answer_index: index of the true option.
    """

    validator: Any = None
    chosen: int | None = None
    answer_index: int | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """A row of the table.

    needs:    what a row must have, said to people when it does not.
    applies:  (truth, context) -> whether the metric can score this row.
    generates: whether it reads a generated answer.
    """

    compute: Callable[[str, str, MetricContext], float]
    needs: str = "any answer"
    applies: Callable[[str, MetricContext], bool] = lambda truth, context: True
    generates: bool = True

    def __call__(self, answer: str, truth: str, context: MetricContext) -> float:
        return self.compute(answer, truth, context)


def cut_reasoning(answer: str, truth: str) -> str:
    """What an answer says after its reasoning: everything up to and including the last `</think>` is cut.

    Only where the true answer has no reasoning; one that has it is compared as a whole. The opening tag may be missing:
    templates of such models write it into the prompt. An answer still reasoning at its end is left as it is, and wrong.
    """
    return answer if REASONING_END in truth else answer.rpartition(REASONING_END)[2]


def exact_match(answer: str, truth: str, context: MetricContext = MetricContext()) -> float:
    """1 if both are the same characters, white space at the ends aside.

    Nothing else is forgiven: for JSON, other spacing or key order is a mismatch; `json_fields` compares
    values.
    """
    return float(answer.strip() == truth.strip())


def token_f1(answer: str, truth: str, context: MetricContext = MetricContext()) -> float:
    """Harmonic mean of precision and recall over the bag of normalised words.

    Lower case, punctuation and the articles a/an/the removed, split at white space. Two empty bags agree (1),
    one empty bag does not (0). Source: Rajpurkar et al. 2016, arXiv:1606.05250, section 4 (SQuAD's F1).
    """
    got, want = _normalise_words(answer), _normalise_words(truth)
    if not got or not want:
        return float(got == want)
    common = sum((Counter(got) & Counter(want)).values())
    return 2 * common / (len(got) + len(want))


def _normalise_words(text: str) -> list[str]:
    kept = "".join(
        c for c in text.lower() if c not in string.punctuation and not unicodedata.category(c).startswith("P")
    )
    return [word for word in kept.split() if word not in _ARTICLES]


def rouge_l(answer: str, truth: str, context: MetricContext = MetricContext()) -> float:
    """F1 of the longest common subsequence of words; lower case, runs of letters and digits, no stemming.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3 (with beta = 1).
    """
    got, want = _WORD.findall(answer.lower()), _WORD.findall(truth.lower())
    if not got or not want:
        return float(got == want)
    return 2 * measure_common_subsequence(got, want) / (len(got) + len(want))


def measure_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence, one big-integer step per word of `right`.

    Bit i of `row` is 0 once the table's row gains at column i; an addition carries the gain past equal
    columns.
    Source: Hyyrö 2004, "Bit-parallel LCS-length computation revisited".
    """
    full = (1 << len(left)) - 1
    matches: dict[str, int] = {}
    for position, word in enumerate(left):
        matches[word] = matches.get(word, 0) | 1 << position
    row = full
    for word in right:
        hits = row & matches.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(left) - row.bit_count()


class _NotJson:
    """Stands for an answer that is not JSON; `None` would be the value of `null`."""


NOT_JSON = _NotJson()


def parse_answer(text: str) -> Any:
    """The JSON object or list that `text` is, as a whole, or `NOT_JSON`.

    Strict: duplicate keys, NaN, lone surrogates, text around the value are not JSON. A bare number, string or
    word is not accepted either, or "12" would pass for structured output.
    """
    try:
        value = parse_json(text.encode("utf-8", "surrogatepass"), place="answer")
    except (DataError, ValueError, RecursionError):  # ValueError: a number of thousands of digits
        return NOT_JSON
    return value if isinstance(value, dict | list) else NOT_JSON


def json_valid(answer: str, truth: str, context: MetricContext = MetricContext()) -> float:
    """1 if the answer as a whole is one strict JSON object or list."""
    return float(parse_answer(answer) is not NOT_JSON)


def json_schema(answer: str, truth: str, context: MetricContext) -> float:
    """1 if the answer is JSON that satisfies the job's schema."""
    value = parse_answer(answer)
    if value is NOT_JSON:
        return 0.0
    try:
        return float(context.validator.is_valid(value))
    except RecursionError:
        return 0.0


def json_fields(answer: str, truth: str, context: MetricContext = MetricContext()) -> float:
    """Share of fields that are right, among those of the truth and those the answer invents.

    A field is a leaf: {"a": {"b": 1}, "c": [2, 3]} has a.b, c[0] and c[1]. An invented field counts as wrong,
    as a missing one does; an answer that is not JSON scores 0.
    """
    got, want = parse_answer(answer), flatten_fields(parse_answer(truth))
    if got is NOT_JSON:
        return 0.0
    fields = flatten_fields(got)
    right = sum(path in fields and is_same_value(fields[path], value) for path, value in want.items())
    return right / len(want.keys() | fields.keys())


def score_fields(answer: str, truth: str) -> dict[str, float]:
    """Per field of the truth, 1 if right, 0 if wrong or absent; a list is averaged under `name[]`."""
    got = parse_answer(answer)
    fields = {} if got is NOT_JSON else flatten_fields(got)
    marks: dict[str, list[bool]] = {}
    for path, value in flatten_fields(parse_answer(truth)).items():
        right = path in fields and is_same_value(fields[path], value)
        marks.setdefault(re.sub(r"\[\d+\]", "[]", path), []).append(right)
    return {path: sum(hits) / len(hits) for path, hits in marks.items()}


def flatten_fields(value: Any) -> dict[str, Any]:
    """Leaves by path; an empty object or list is a leaf. Without recursion: an answer may nest deeply."""
    leaves: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [("", value)]
    while pending:
        path, item = pending.pop()
        if isinstance(item, dict) and item:
            pending.extend((_join_path(path, key), child) for key, child in item.items())
        elif isinstance(item, list) and item:
            pending.extend((f"{path}[{index}]", child) for index, child in enumerate(item))
        else:
            leaves[path] = item
    return leaves


def _join_path(path: str, key: str) -> str:
    # A key that looks like a path is quoted, or {"a.b": 1} would equal {"a": {"b": 1}}.
    name = key if key and not set(key) & set('.[]"') else json.dumps(key, ensure_ascii=False)
    return f"{path}.{name}" if path else name


def is_same_value(left: Any, right: Any) -> bool:
    """Equality of JSON leaves: 1 equals 1.0, but not true and not "1"."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, int | float) and isinstance(right, int | float):
        return left == right
    return type(left) is type(right) and left == right


def choice_accuracy(answer: str, truth: str, context: MetricContext) -> float:
    """1 if the likeliest option per byte is the true one (`choice.py`)."""
    return float(context.chosen == context.answer_index)


def _is_json(truth: str, context: MetricContext) -> bool:
    return parse_answer(truth) is not NOT_JSON


METRICS: dict[str, Metric] = {
    "exact_match": Metric(exact_match),
    "token_f1": Metric(token_f1),
    "rouge_l": Metric(rouge_l),
    "json_valid": Metric(json_valid),
    "json_schema": Metric(
        json_schema, "evaluate.schema_file", lambda truth, context: context.validator is not None
    ),
    "json_fields": Metric(json_fields, "a true answer that is a JSON object or list", _is_json),
    "choice_accuracy": Metric(
        choice_accuracy,
        "`choices` and `answer_index`",
        lambda truth, context: context.chosen is not None,
        generates=False,
    ),
}


def choose_metrics(truths: Sequence[str], *, has_schema: bool, has_choices: bool) -> list[str]:
    """What `evaluate.metrics: auto` means for these true answers.

    Options ask for choice_accuracy alone; answers that all are JSON for the JSON metrics; the rest for text
    overlap.
    """
    if has_choices:
        return ["choice_accuracy"]
    if truths and all(parse_answer(truth) is not NOT_JSON for truth in truths):
        return ["exact_match", "json_valid", "json_fields", *(["json_schema"] if has_schema else [])]
    return ["exact_match", "token_f1", "rouge_l"]


def load_schema(path: Path) -> Any:
    """A validator for a JSON Schema file; remote references are not fetched.

    Raises JobError if it is not a schema.
    """
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    schema = read_json(path)
    try:
        kind = validator_for(schema)
        kind.check_schema(schema)
    except (SchemaError, TypeError, AttributeError) as error:
        finding = f"not a JSON Schema: {getattr(error, 'message', error)}"
        raise JobError(str(path), finding, cure="Check evaluate.schema_file") from None
    return kind(schema, registry=Registry())

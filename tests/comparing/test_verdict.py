"""The sentence, the table and the Pareto judgement, from comparisons made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tunesmith.comparing.measures import describe_metric, format_bounds, format_difference, format_value
from tunesmith.comparing.pareto import find_dominated
from tunesmith.comparing.verdict import find_difference, write_verdict
from tunesmith.core.comparison import ArmResult, Comparison, Difference, Interval, Table
from tunesmith.core.quantities import format_bytes, format_count, format_seconds


def arm(name: str, value: float, *, kind: str = "trained", **more: Any) -> ArmResult:
    return ArmResult(
        name=name, kind=kind, framework="tunesmith", method="lora", prompting="zero-shot", status="done",
        trained_by=name if kind == "trained" else None, deterministic=False, seeds=[0, 1, 2],
        metrics={"exact_match": Interval(value, value - 0.02, value + 0.02)}, per_seed={}, **more,
    )  # fmt: skip


def pair(first: str, second: str, delta: float, verdict: str, advice: str = "") -> Difference:
    return Difference(first, second, "exact_match", delta, delta - 0.03, delta + 0.03, delta - 0.02, delta + 0.02,
                      0.01, 0.02, verdict, advice)  # fmt: skip


def comparison(arms: list[ArmResult], pairs: list[Difference]) -> Comparison:
    return Comparison(
        metric="exact_match", verdict="", details=[], base="zero-shot", seeds=[0, 1, 2], num_rows=300, num_clusters=60,
        num_target_tokens=9000, arms=arms, pairs=pairs, metrics={"exact_match": describe_metric("exact_match")},
        table=Table([], [], []), warnings=[], method={}, record={},
    )  # fmt: skip


RAG = arm("rag", 0.30, kind="prompted")
LORA = arm("lora", 0.85, train_wall_seconds=41.0)


@pytest.mark.parametrize(
    ("value", "verdict", "advice", "expected"),
    [
        (0.85, "better", "", "Fine-tuning won: lora reaches 85.0% exact match, 55.0 points (95% interval 52.0 to 58.0) "
            "above rag, the best prompting arm (30.0%), for 41.0 s of training."),
        (0.10, "worse", "", "Prompting won: lora reaches 10.0% exact match, 20.0 points (95% interval 17.0 to 23.0) "
            "below rag, the best prompting arm (30.0%). Fine-tuning did not pay here."),
        (0.301, "tie", "", "A tie: lora reaches 30.1% exact match, within 1.0 points of rag, the best prompting arm "
            "(30.0%), for 41.0 s of training."),
        (0.32, "inconclusive", "about 2 more seeds would resolve it", "Inconclusive: lora reaches 32.0% exact match, "
            "+2.0 points (95% interval −1.0 to +5.0) from rag, the best prompting arm (30.0%): about 2 more seeds "
            "would resolve it."),
    ],
)  # fmt: skip
def test_the_verdict_in_a_sentence(value: float, verdict: str, advice: str, expected: str) -> None:
    trained = replace(LORA, metrics={"exact_match": Interval(value, value - 0.02, value + 0.02)})
    made = comparison([RAG, trained], [pair("lora", "rag", value - 0.30, verdict, advice)])
    assert write_verdict(made)[0] == expected


def test_a_difference_reads_from_both_sides() -> None:
    made = comparison([RAG, LORA], [pair("lora", "rag", 0.55, "better")])
    there, back = find_difference(made, "lora", "rag"), find_difference(made, "rag", "lora")
    assert there is not None
    assert back is not None
    assert (back.delta, back.low, back.high, back.verdict) == (-0.55, -there.high, -there.low, "worse")  # type: ignore[operator]
    assert back.flip() == there
    assert find_difference(made, "lora", "lora") is None


def test_forgetting_is_told_when_it_is_notable() -> None:
    forgot = replace(LORA, forgetting={"general_nll": 3.5, "general_nll_base": 3.2, "kl_from_base": 0.1})
    kept = replace(LORA, forgetting={"general_nll": 3.21, "general_nll_base": 3.2, "kl_from_base": 0.1})
    pairs = [pair("lora", "rag", 0.55, "better")]
    assert (
        "Forgetting: loss on general text rose, in nats per token: lora +0.30."
        in write_verdict(comparison([RAG, forgot], pairs))[1]
    )
    assert any(
        "Nothing notable was forgotten" in text for text in write_verdict(comparison([RAG, kept], pairs))[1]
    )


def test_an_arm_is_dominated_by_a_better_and_cheaper_one_only() -> None:
    slow = arm("slow", 0.70, train_wall_seconds=100.0, peak_bytes=100, size_bytes=8)
    fast = arm("fast", 0.80, train_wall_seconds=40.0, peak_bytes=95, size_bytes=8)
    better, tie = pair("fast", "slow", 0.1, "better"), pair("fast", "slow", 0.1, "tie")
    assert find_dominated([slow, fast], [better], "exact_match")[0].dominated_by == {
        "train_wall_seconds": "fast"
    }
    assert find_dominated([slow, fast], [better.flip()], "exact_match")[0].dominated_by == {
        "train_wall_seconds": "fast"
    }
    assert find_dominated([slow, fast], [tie], "exact_match")[0].dominated_by == {}
    assert find_dominated([slow, fast], [better], "exact_match")[1].dominated_by == {}


def test_values_as_people_read_them() -> None:
    share, nats, perplexity = (
        describe_metric("exact_match"),
        describe_metric("nll"),
        describe_metric("perplexity"),
    )
    assert format_value(0.8431, share) == "84.3%"
    assert format_value(0.08314, nats) == "0.083"
    assert [format_value(v, perplexity) for v in (1.0834, 2.9, 31.27, 878_532)] == [
        "1.083",
        "2.90",
        "31.3",
        "878,532",
    ]
    assert format_bounds(Interval(0.5, 0.412, 0.6), share) == "41.2–60.0"
    assert format_bounds(Interval(0.5), share) == ""
    assert format_difference(-0.041, nats) == "−0.041 nats"
    assert format_difference(0.1234, share) == "+12.3 points"


def test_quantities_as_people_read_them() -> None:
    assert [format_bytes(b) for b in (0, 512, 1_480_000, 999_600, 16_060_000_000)] == [
        "–", "512 B", "1.48 MB", "1.00 MB", "16.1 GB",
    ]  # fmt: skip
    assert [format_seconds(s) for s in (0, 0.0421, 41.26, 200.4, 800, 7500)] == [
        "–", "0.042 s", "41.3 s", "200 s", "13 min 20 s", "2 h 05 min",
    ]  # fmt: skip
    assert [format_count(c) for c in (0, 512, 13_631, 1_235_000, 8_030_000_000)] == [
        "–",
        "512",
        "13.6k",
        "1.24M",
        "8.03B",
    ]


def test_the_table_leaves_out_what_no_arm_has_and_marks_the_best(example: Any) -> None:
    table = example[2].table
    keys = [column.key for column in table.columns]
    assert keys[:4] == ["name", "exact_match", "versus_base", "nll"]
    nll = [row[keys.index("nll")] for row in table.rows]
    best = [name for name, cell in zip(table.arms, nll, strict=True) if cell.tone == "best"]
    assert best == ["full"]
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert table.rows[0][keys.index("versus_base")].text == "base"


def test_arms_without_a_result_are_named_in_the_headline() -> None:
    failed = replace(LORA, name="full", status="missing", metrics={}, seeds=[])
    headline, details = write_verdict(comparison([RAG, failed], []))
    best = "rag (30.0% exact match) is the best way of prompting."
    assert headline == f"No trained arm has a result (full failed): {best}"
    assert details[0] == "Failed, and in no ranking: full. The warnings say why."
    apart = replace(LORA, not_comparable="scored on other test rows than rag")
    headline, _ = write_verdict(comparison([RAG, failed, apart], []))
    assert headline == f"No trained arm has a result (full failed; lora cannot be compared): {best}"
    assert write_verdict(comparison([RAG], []))[0] == f"No trained arm was run: {best}"
    lone = replace(RAG, name="zero-shot", status="missing", metrics={})
    headline, _ = write_verdict(comparison([lone, LORA], []))
    assert headline.startswith(
        "No prompting arm has a result (zero-shot failed): lora (85.0% exact match) is"
    )

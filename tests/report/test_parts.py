"""Scales, charts, differences, field shares and Markdown, each against values worked by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from tunesmith.core.comparison import Cell, Table
from tunesmith.core.records import AnswerRecord, StepRecord
from tunesmith.report.answers import (
    Piece,
    choose_row_metric,
    compare_texts,
    read_all_answers,
    share_fields,
    tally_rows,
    view_rows,
)
from tunesmith.report.card import escape_markdown, render_card
from tunesmith.report.charts import DotRow, Line, Spot, plot_dots, plot_lines, plot_spots
from tunesmith.report.figures import show_share, thin_curve
from tunesmith.report.scales import fit_scale, format_tick
from tunesmith.report.visible import make_visible


def test_hidden_characters_are_shown() -> None:
    assert make_visible("a\x1b[31m\u202eb\x7f") == "a␛[31m⟨U+202E⟩b␡"
    assert make_visible("tab\tline\nПривет שלום 👩‍🔧 می‌خواهم") == "tab\tline\nПривет שלום 👩‍🔧 می‌خواهم"


def test_a_scale_places_its_ends_and_its_middle() -> None:
    scale = fit_scale([0.0, 1.0], 100, 300, include=(0.0, 1.0))
    assert [scale.place(value) for value in (0, 0.5, 1, 7)] == [100, 200, 300, 300]
    assert scale.ticks == pytest.approx((0, 0.2, 0.4, 0.6, 0.8, 1.0))
    log = fit_scale([1.0, 100.0], 0, 200, log=True, pad=0.0)
    assert log.place(10.0) == pytest.approx(100)
    assert log.ticks == (1.0, 10.0, 100.0) or 10.0 in log.ticks


def test_a_wide_range_of_positive_values_is_logarithmic() -> None:
    assert fit_scale([0.08, 2.0], 0, 100, log=None).log
    assert not fit_scale([0.08, 0.2], 0, 100, log=None).log
    assert not fit_scale([0.0, 2.0], 0, 100, log=None).log


@pytest.mark.parametrize("values", [[3.0], [0.0], [-1.0, -1.0], [1e-9, 2e-9], [1e12, 1e13], []])
def test_any_values_have_a_scale_with_ticks(values: list[float]) -> None:
    scale = fit_scale(values, 0, 100)
    assert scale.high > scale.low
    assert scale.ticks
    assert all(0 <= scale.place(tick) <= 100 for tick in scale.ticks)


def test_ticks_and_shares_as_people_read_them() -> None:
    assert [format_tick(v) for v in (0, 0.05, 1200, -2.5, 2e-5)] == ["0", "0.05", "1200", "−2.5", "2e-5"]
    assert [show_share(v) for v in (0.2, 0.843, 1)] == ["20%", "84.3%", "100%"]


def test_a_dot_lies_where_its_value_says() -> None:
    chart = plot_dots(
        [DotRow("a<b", 0, 0.5, 0.25, 0.75, (0.4, 0.6))],
        title="t",
        x_label="x",
        show=show_share,
        include=(0, 1),
    )
    x0, x1 = (float(v) for v in re.search(r'class="interval" x1="([\d.]+)" x2="([\d.]+)"', chart).groups())  # type: ignore[union-attr]
    mark = float(re.search(r'class="mark" transform="translate\(([\d.]+),', chart)[1])  # type: ignore[index]
    assert mark == pytest.approx((x0 + x1) / 2, abs=0.1)
    assert chart.count('class="seed"') == 2
    assert "a&lt;b: 50%, 95% interval 25% to 75%; seeds 40%, 60%" in chart
    assert "a<b" not in chart


def test_lines_and_spots_are_drawn_with_their_numbers() -> None:
    lines = plot_lines(
        [Line("lora", 3, [(1, 2.0), (2, 1.0)], marks=True, chosen=2)], title="t", x_label="x", y_label="y"
    )
    assert lines.count('class="mark') == 2
    assert lines.count("chosen") == 1
    spots = plot_spots(
        [Spot("full", 5, 10.0, 0.9), Spot("slow", 6, 20.0, 0.8, faded=True, note="dominated by full")],
        title="t", x_label="x", y_label="y", show_x=format_tick, show_y=show_share,
    )  # fmt: skip
    assert '<g class="s6 faded"><title>slow: 80% at 20; dominated by full</title>' in spots


def test_marks_on_one_another_share_a_label_and_keep_their_tooltips() -> None:
    spots = [Spot("lora", 0, 10.0, 0.9), Spot("lora-trl", 1, 10.01, 0.9), Spot("full", 2, 20.0, 0.8),
             Spot("lora-axolotl", 3, 10.0, 0.9001)]  # fmt: skip
    chart = plot_spots(spots, title="t", x_label="x", y_label="y", show_x=format_tick, show_y=show_share)
    assert re.findall(r'<text class="name"[^>]*>([^<]*)<', chart) == ["lora and 2 more", "full"]
    assert [name for name in ("lora-trl", "lora-axolotl") if f"<title>{name}: 90% at 10" not in chart] == []


def test_a_thinned_curve_weighs_steps_by_their_tokens() -> None:
    def step(number: int, loss: float, tokens: int) -> StepRecord:
        return StepRecord(number, 0.0, loss, 1.0, 1e-3, tokens, tokens, 0.1, 0)

    # Two stretches of two steps: (1*3 + 3*1) / 4 at step 1.5, (5*1 + 5*1) / 2 at step 3.5.
    run = [step(1, 1.0, 3), step(2, 3.0, 1), step(3, 5.0, 1), step(4, 5.0, 1)]
    assert thin_curve([run], num_points=2) == [(1.5, 1.5), (3.5, 5.0)]


def test_a_difference_is_marked_word_by_word() -> None:
    assert compare_texts('{"a":"pan"}', '{"a":"pot"}') == [
        Piece("same", '{"a":"'), Piece("missing", "pan"), Piece("extra", "pot"), Piece("same", '"}'),
    ]  # fmt: skip
    assert compare_texts("one two", "") == []
    assert compare_texts("one two", "quite another thing, is it not") == [
        Piece("extra", "quite another thing, is it not")
    ]
    rebuilt = compare_texts("the red pan is late", "the blue pan is very late")
    assert "".join(p.text for p in rebuilt if p.kind != "missing") == "the blue pan is very late"
    assert "".join(p.text for p in rebuilt if p.kind != "extra") == "the red pan is late"


def answer(row: int, truth: str, text: str | None, score: float) -> AnswerRecord:
    return AnswerRecord(row, str(row), f"t:{row}", str(row), "q", truth, text, scores={"exact_match": score})


def test_fields_wins_and_rows_worked_by_hand(example: Any) -> None:
    comparison = replace(
        example[2], arms=[a for a in example[2].arms if a.name in ("zero-shot", "lora")], num_rows=2
    )
    truths = ['{"a":1,"b":2}', '{"a":3}']
    answers = {
        "zero-shot": {0: [answer(0, truths[0], '{"a":1,"b":0}', 0), answer(1, truths[1], "no", 0)]},
        "lora": {
            0: [answer(0, truths[0], truths[0], 1), answer(1, truths[1], '{"a":3,"c":1}', 0)],
            1: [answer(0, truths[0], '{"a":1}', 0), answer(1, truths[1], truths[1], 1)],
        },
    }
    fields = {field.name: (field.num_rows, field.shares) for field in share_fields(comparison, answers)}
    # a: zero-shot right in row 0 only; lora in all four. b is in row 0's truth alone: zero-shot 0 of 1, lora 1 of 2.
    assert fields == {"a": (2, [0.5, 1.0]), "b": (1, [0.0, 0.5]), "(invented)": (2, [0.0, 0.25])}
    (tally,) = tally_rows(comparison, answers, "exact_match")
    assert (tally.wins, tally.losses, tally.same) == (2, 0, 0)
    rows = view_rows(comparison, answers, "exact_match")
    assert [row.scores for row in rows] == [[0.0, 0.5], [0.0, 0.5]]
    assert [said.right for said in rows[0].said] == [False, True]


def test_plain_answers_have_no_fields(example: Any) -> None:
    comparison = replace(example[2], arms=example[2].arms[:1])
    assert share_fields(comparison, {"zero-shot": {0: [answer(0, "hello", "hello", 1)]}}) == []


def test_rows_are_judged_by_the_declared_metric_where_it_has_row_values(example: Any) -> None:
    answers = read_all_answers(example[0], example[2])
    assert choose_row_metric(example[2], answers) == "exact_match"
    assert choose_row_metric(replace(example[2], metric="json_fields"), answers) == "json_fields"
    assert choose_row_metric(replace(example[2], metric="nll"), answers) == "exact_match"


def test_the_card_is_a_table_that_text_cannot_break(example: Any) -> None:
    comparison = example[2]
    card = render_card(comparison)
    lines = [line for line in card.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(comparison.arms)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert card.startswith(f"**{escape_markdown(comparison.verdict)}**")
    assert "sealed test rows" in card
    assert "10,000 replicates" in card
    hostile = replace(
        comparison,
        table=Table(comparison.table.columns[:1], ["x"], [[Cell("a|b<script>[x](javascript:1)\n# h \x1b")]]),
        warnings=["`x` | <img>"],
    )
    text = render_card(hostile)
    assert r"| a\|b\<script\>\[x\](javascript:1) \# h ␛ |" in text
    assert r"- Warning: \`x\` \| \<img\>" in text


def test_the_card_needs_nothing_but_the_comparison(example: Any) -> None:
    again = type(example[2]).from_json(json.loads(json.dumps(example[2].to_json())))
    assert render_card(again) == render_card(example[2])

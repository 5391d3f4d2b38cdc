"""What is printed for people is the text itself: no bracket, place or escape character of it means anything to rich."""

from __future__ import annotations

import io
from typing import Any

import pytest
import typer
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from tunesmith.cli.main import app
from tunesmith.cli.progress import _Bars, watch
from tunesmith.cli.show import print_check, print_comparison, print_previews
from tunesmith.core.events import Event
from tunesmith.data.checks import CheckReport, Overlap, PreferenceFacts, SplitFacts
from tunesmith.data.preview import LabelledPreview, PairPreview, RowPreview, Segment

TEXT = "rows.jsonl:100: [INST] and tunesmith[hub], \\[/bold]"


def test_every_help_text_is_shown_as_it_is_written() -> None:
    command = typer.main.get_command(app)
    for name, verb in command.commands.items():  # type: ignore[attr-defined]
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80"}).output
        written = [verb.help, *(parameter.help for parameter in verb.params)]
        for text in filter(None, written):
            assert "".join(text.split()) in "".join(shown.split()), name


def test_square_brackets_and_places_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    segments = (Segment(TEXT, "masked"), Segment("[/s]\x1b[2J", "stop"))
    print_previews([RowPreview("rows.jsonl:100", "id", 5, 1, segments)])
    shown = capsys.readouterr().out
    assert "rows.jsonl:100 5 tokens" in shown
    assert f"{TEXT}[/s]␛[2J" in shown


@pytest.mark.parametrize("terminal", ["1", ""])
def test_progress_is_printed_as_it_is(
    terminal: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with watch() as draw:
        draw(Event("warning", text=f"{TEXT} one"))
        draw(Event("progress", "[x] seed 0", f"{TEXT} two", done=1, total=2))
        draw(Event("failed", "[x] seed 0", f"{TEXT} three"))
    shown = capsys.readouterr().err
    for text in (f"warning: {TEXT} one", f"[x] seed 0: {TEXT} three"):
        assert text in shown
    assert ("✗" in shown) == bool(terminal)


@pytest.mark.parametrize("width", [80, 140])
def test_a_bar_is_one_line_with_what_is_known(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    bars = _Bars(console)

    def show() -> str:
        with console.capture() as capture:
            console.print(bars._progress.get_renderable(), style="none", no_wrap=False)
        return Text.from_ansi(capture.get()).plain.rstrip()

    step = {"loss": 0.2, "tokens_per_second": 12345.0, "eta_seconds": 4000.0, "memory_bytes": 3 << 30}
    bars.draw(Event("step", "lora seed 0", done=26, total=400, **step))
    assert show().count("\n") == 0
    for text in ("lora seed 0 ", "26/400", "loss 0.200", "12,345 tok/s", "1:06:40 left"):
        assert text in show()
    assert ("3,072 MB" in show()) == (width == 140)
    bars.draw(Event("stage", "lora seed 0", "a part of unknown length"))
    assert "400" not in show()
    bars.draw(Event("step", "a-name-much-longer-than-its-column seed 0", done=26, total=400, **step))
    assert show().count("\n") == 1
    assert show().endswith("1:06:40 left")


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_table_fits_without_cutting_a_cell(
    example: Any, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _, comparison = example
    monkeypatch.setenv("COLUMNS", str(width))
    print_comparison(comparison, run_dir.root)
    table = capsys.readouterr().out.split("\n\n")[0]
    assert "…" not in table
    assert max(map(len, table.splitlines())) <= width
    assert table.count("inconclusive") == sum(
        cell.text == "inconclusive" for row in comparison.table.rows for cell in row
    )


def test_what_check_finds_in_three_splits_is_a_line_each_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = ("train", "validation", "test")
    facts = {
        name: SplitFacts(
            num_tokens=12_345_678, length_percentiles={"5": 12, "50": 345, "95": 1024, "100": 4096}
        )
        for name in splits
    }
    monkeypatch.setenv("COLUMNS", "80")
    print_check(CheckReport(splits=facts, overlap={name: Overlap() for name in splits[1:]}))
    shown = capsys.readouterr().out
    assert shown.count("1024 / 4096") == 3
    for line in ("whose stop token is not trained ", "also in train: near duplicates "):
        assert line in shown


def test_what_check_finds_in_pairs_and_labels_is_a_line_each_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    splits = ("train", "validation", "test")
    for kind, sides in (("pairs", ("chosen", "rejected")), ("labelled", ("desirable", "undesirable"))):
        facts = PreferenceFacts(
            kind=kind,
            num_examples=123_456,
            num_prompts=123_456,
            num_answers=dict.fromkeys(sides, 61_728),
            answer_tokens={side: {"50": 1234, "100": 4096} for side in sides},
            num_chosen_longer=61_728,
            num_conflicts=12,
        )
        report = CheckReport(
            splits=dict.fromkeys(splits, SplitFacts()), preferences=dict.fromkeys(splits, facts)
        )
        print_check(report)
        shown = capsys.readouterr().out
        assert shown.count("1234 / 4096") == 6
        assert shown.count("61,728 (50%)") == (3 if kind == "pairs" else 6)
        for line in (*(f"{side}, half / longest " for side in sides), "contradicting each other "):
            assert line in shown


def test_a_pair_is_shown_with_its_prompt_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    def answer(text: str) -> RowPreview:
        return RowPreview("t.jsonl:1", "a", 2, 2, (Segment(text, "trained"), Segment("<end>", "stop")))

    pair = PairPreview("t.jsonl:1", 9, (Segment("2+2?", "masked"),), answer("4"), answer("5"))
    labelled = LabelledPreview("t.jsonl:2", "a", 3, 1, (Segment("4", "trained"),), label=False)
    print_previews([pair, labelled])
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert shown[2:] == [
        "t.jsonl:1 a pair of 9 tokens; the prompt of both answers:",
        "2+2?",
        "chosen 2 trained",
        "4<end>",
        "rejected 2 trained",
        "5<end>",
        "",
        "t.jsonl:2 3 tokens, 1 trained, label false",
        "4",
    ]

"""Results on stdout, for people: tables that fit the terminal, text from models and data made harmless."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tunesmith.core.comparison import Cell, Comparison
from tunesmith.core.quantities import format_bytes, format_count, format_seconds
from tunesmith.core.records import EvalRecord, RunRecord
from tunesmith.core.rundir import RunDir
from tunesmith.data.checks import CheckReport, SplitFacts
from tunesmith.data.preview import RowPreview

TONES = {"better": "green", "best": "bold green", "worse": "red", "muted": "dim"}


def harmless(text: str) -> str:
    """Text without control, escape and direction-changing characters, so that it cannot drive the terminal."""
    return "".join(
        letter if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co") else "�"
        for letter in text
    )


def print_comparison(comparison: Comparison, out: Path) -> None:
    """Table, verdict, warnings, and where the report lies."""
    console = Console()
    console.print(_comparison_table(comparison, console.width))
    console.print(f"\n[bold]{escape(comparison.verdict)}[/]", highlight=False)
    for detail in comparison.details:
        console.print(escape(detail), highlight=False)
    for warning in comparison.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)
    console.print(f"\nReport: {escape(str(RunDir(out).report))}", highlight=False, soft_wrap=True)


def _comparison_table(comparison: Comparison, width: int) -> Table:
    """As many columns as fit, from the left: what decides stands first."""
    source = comparison.table
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    used = 0
    shown: list[int] = []
    for index, column in enumerate(source.columns):
        cells = [row[index] for row in source.rows]
        needed = 2 + max(
            [*(len(word) for word in column.title.split()), *(_cell_width(cell) for cell in cells)]
        )
        if used + needed > width and index > 2:
            continue
        used += needed
        shown.append(index)
        table.add_column(column.title, justify="right" if column.numeric else "left", no_wrap=index == 0)
    for row in source.rows:
        table.add_row(*(_cell_text(row[index]) for index in shown))
    if len(shown) < len(source.columns):
        left_out = [column.title for index, column in enumerate(source.columns) if index not in shown]
        table.caption = f"In the report, for want of width here: {', '.join(left_out)}"
    return table


def _cell_width(cell: Cell) -> int:
    return max(len(cell.text), len(cell.detail))


def _cell_text(cell: Cell) -> str:
    text = escape(harmless(cell.text))
    if tone := TONES.get(cell.tone):
        text = f"[{tone}]{text}[/]"
    return f"{text}\n[dim]{escape(harmless(cell.detail))}[/]" if cell.detail else text


def print_run(record: RunRecord, out: Path) -> None:
    """What a training run did and cost."""
    rows = {
        "method": record.method,
        "trained parameters": f"{format_count(record.trained_parameters)} of {format_count(record.total_parameters)}",
        "steps": f"{record.steps:,}",
        "learning rate": f"{record.learning_rate:g}",
        "tokens": f"{record.train_tokens:,} ({record.target_tokens:,} trained)",
        "validation loss": "–"
        if record.validation_loss is None
        else f"{record.validation_loss:.4f} nats/token",
        "time": f"{format_seconds(record.wall_seconds)} ({format_seconds(record.cpu_seconds)} of CPU)",
        "speed": f"{record.train_tokens / record.wall_seconds:,.0f} tokens/s" if record.wall_seconds else "–",
        "peak memory": format_bytes(record.peak_bytes),
        "size on disk": format_bytes(record.size_bytes),
    }
    _print_pairs(rows, record.warnings)
    Console().print(f"\nRun: {escape(str(out))}", highlight=False, soft_wrap=True)


def print_evaluation(record: EvalRecord) -> None:
    """Every metric of one evaluation."""
    rows = {name: f"{value:.4f}" for name, value in record.metrics.items()}
    rows |= {"rows": f"{record.num_rows:,}", "target tokens": f"{record.num_target_tokens:,}"}
    rows |= {f"forgetting: {name}": f"{value:.4f}" for name, value in (record.forgetting or {}).items()}
    rows |= {"time": format_seconds(record.wall_seconds), "peak memory": format_bytes(record.peak_bytes)}
    _print_pairs(rows, record.warnings)


def _print_pairs(rows: dict[str, Any], warnings: list[str]) -> None:
    console = Console()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, escape(harmless(str(value))))
    console.print(table, highlight=False)
    for warning in warnings:
        console.print(f"[yellow]warning:[/] {escape(harmless(warning))}", highlight=False)


def print_check(report: CheckReport) -> None:
    """What is in the data, split by split, then what to know about it."""
    console = Console()
    for source in report.sources:
        rejected = f", {source.num_rejected:,} rejected" if source.num_rejected else ""
        console.print(
            f"{escape(source.name)}: {source.num_rows:,} rows as {source.format}{rejected} -> {source.split}",
            highlight=False,
        )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in report.splits:
        table.add_column(name, justify="right")
    for title, read in _CHECK_ROWS:
        table.add_row(title, *(read(facts) for facts in report.splits.values()))
    for title, key in _OVERLAP_ROWS:
        if report.overlap:
            table.add_row(title, *(_overlap(report, name, key) for name in report.splits))
    console.print(table)
    for finding in report.findings:
        style = {"error": "[red]error:[/] ", "warning": "[yellow]warning:[/] ", "note": "[dim]note:[/] "}[
            finding.level
        ]
        console.print(f"{style}{escape(harmless(finding.message))}", highlight=False)


def _lengths(facts: SplitFacts) -> str:
    at = facts.length_percentiles
    return " / ".join(str(at.get(name, 0)) for name in ("5", "50", "95", "100"))


def _lost(facts: SplitFacts) -> str:
    return f"{facts.num_lost_targets:,}" if facts.num_lost_targets else "–"


def _count(name: str) -> Callable[[SplitFacts], str]:
    return lambda facts: f"{value:,}" if (value := getattr(facts, name)) else "–"


_CHECK_ROWS: tuple[tuple[str, Callable[[SplitFacts], str]], ...] = (
    ("conversations", _count("num_conversations")),
    ("token rows", _count("num_rows")),
    ("tokens", _count("num_tokens")),
    ("trained tokens", _count("num_targets")),
    ("length, 5% / half / 95% / longest", _lengths),
    ("dropped for length", _count("num_dropped")),
    ("cut for length", _count("num_truncated")),
    ("answer tokens lost by that", _lost),
    ("without a trained token", _count("num_without_targets")),
    ("whose stop token is not trained", _count("num_without_stop")),
    ("exact duplicates", _count("num_exact_duplicates")),
    ("near duplicates", _count("num_near_duplicates")),
    ("clusters", _count("num_clusters")),
)
_OVERLAP_ROWS = (
    ("also in train: equal rows", "num_exact"),
    ("also in train: same question", "num_same_question"),
    ("also in train: near duplicates", "num_near"),
    ("sharing 13 words with train", "num_shared_13grams"),
)


def _overlap(report: CheckReport, split: str, key: str) -> str:
    found = report.overlap.get(split)
    return "" if found is None else f"{getattr(found, key):,}" if getattr(found, key) else "–"


_PIECES = {"trained": "black on green", "stop": "bold white on blue", "masked": "dim"}


def print_previews(previews: Sequence[RowPreview]) -> None:
    """Rows piece by piece: trained, masked and stop tokens in colour, and what each colour means."""
    console = Console()
    console.print(" ".join(f"[{style}] {kind} [/]" for kind, style in _PIECES.items()))
    for item in previews:
        console.print(
            f"\n[bold]{escape(item.place)}[/] {item.num_tokens} tokens, {item.num_targets} trained",
            highlight=False,
        )
        line = Text()
        for text, kind in item.segments:
            line.append(harmless(text), style=_PIECES[kind])
        console.print(line, highlight=False)

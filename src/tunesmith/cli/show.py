"""Results on stdout, for people: tables that fit the terminal, text from models and data made harmless."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tunesmith.core.comparison import Cell, Comparison
from tunesmith.core.quantities import format_bytes, format_count, format_seconds
from tunesmith.core.records import EvalRecord, RunRecord
from tunesmith.core.rundir import RunDir

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
        needed = 2 + max([*(len(word) for word in column.title.split()), *(_cell_width(cell) for cell in cells)])
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
        "validation loss": "–" if record.validation_loss is None else f"{record.validation_loss:.4f} nats/token",
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

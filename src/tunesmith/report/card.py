"""The comparison as Markdown, for a README or a model card: verdict, table, and how it was measured."""

from __future__ import annotations

import re
from typing import Any

from tunesmith.core.comparison import Cell, Comparison
from tunesmith.report.visible import make_visible

# What Markdown or the HTML inside it would act on; the pipe would end a table's cell.
_ACTIVE = re.compile(r"([\\`*_\[\]<>|#~&])")


def render_card(comparison: Comparison) -> str:
    """Verdict, table, warnings and method, ending in a newline. Intervals stand in brackets behind their values."""
    table = comparison.table
    head = [escape_markdown(column.title) for column in table.columns]
    rule = ["---:" if column.numeric else "---" for column in table.columns]
    rows = [[_show_cell(cell, first=number == 0) for number, cell in enumerate(row)] for row in table.rows]
    lines = [f"**{escape_markdown(comparison.verdict)}**", ""]
    lines += [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]
    lines += ["", *(f"- {escape_markdown(detail)}" for detail in comparison.details)]
    lines += [f"- Warning: {escape_markdown(warning)}" for warning in comparison.warnings]
    lines += ["", _say_method(comparison)]
    return "\n".join(lines) + "\n"


def escape_markdown(text: str) -> str:
    """Plain text as Markdown: nothing in it formats, links or breaks out of a table cell."""
    return _ACTIVE.sub(r"\\\1", " ".join(make_visible(text).split()))


def _show_cell(cell: Cell, *, first: bool) -> str:
    text = escape_markdown(cell.text)
    if first:
        return text
    text = f"**{text}**" if cell.tone == "best" else text
    return f"{text} ({escape_markdown(cell.detail)})" if cell.detail else text


def _say_method(comparison: Comparison) -> str:
    method, metric = comparison.method, comparison.metrics[comparison.metric]
    versions = _first_training(comparison).get("versions", {})
    made_with = ", ".join(
        f"{name} {versions[name]}" for name in ("tunesmith", "torch", "commit") if name in versions
    )
    text = (
        f"How it was measured: every arm answered the same {comparison.num_rows:,} sealed test rows; the metric, "
        f"{metric.title}, was declared before the run. Intervals: {method.get('interval', '95%')}, "
        f"{method.get('replicates', 0):,} replicates. Seeds: {', '.join(map(str, comparison.seeds))}. "
        f"Tie: {method.get('tie', '')}, margin {method.get('margin', '')}. Correction: {method.get('correction', '')}."
    )
    if made_with:
        text += f" Made with {made_with}."
    return escape_markdown(text)


def _first_training(comparison: Comparison) -> dict[str, Any]:
    trainings: list[dict[str, Any]] = list(comparison.record.get("trainings", {}).values())
    return trainings[0] if trainings else {}

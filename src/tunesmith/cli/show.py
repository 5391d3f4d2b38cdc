"""Results on stdout, for people: tables that fit the terminal, text from models and data made harmless."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from tunesmith.cli.console import open_console, style_text
from tunesmith.core.comparison import Cell, Comparison
from tunesmith.core.quantities import format_bytes, format_count, format_gib, format_seconds
from tunesmith.core.records import EvalRecord, RunRecord
from tunesmith.core.rundir import RunDir
from tunesmith.data.checks import CheckReport, PreferenceFacts, SplitFacts
from tunesmith.data.preview import LabelledPreview, PairPreview, PromptPreview, RowPreview, Segment

if TYPE_CHECKING:
    from tunesmith.api.planning import Planned

TONES = {"better": "green", "best": "bold green", "worse": "red", "muted": "dim"}


def print_comparison(comparison: Comparison, out: Path) -> None:
    """Table, verdict, warnings, and where the report lies."""
    console = open_console()
    console.print(_comparison_table(comparison, console.width))
    console.print(style_text("\n", (comparison.verdict, "bold")))
    for detail in comparison.details:
        console.print(style_text(detail))
    for warning in comparison.warnings:
        console.print(style_text(("warning: ", "yellow"), warning))
    console.print(style_text(f"\nReport: {RunDir(out).report}"), soft_wrap=True)


def _comparison_table(comparison: Comparison, width: int) -> Table:
    """As many columns as fit, from the left: what decides stands first."""
    source = comparison.table
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    used = 1
    shown: list[int] = []
    for index, column in enumerate(source.columns):
        cells = [row[index] for row in source.rows]
        longest = max([*(len(word) for word in column.title.split()), *(_cell_width(cell) for cell in cells)])
        # A space on either side, and one between columns.
        if used + longest + 3 > width and index > 2:
            continue
        used += longest + 3
        shown.append(index)
        # Folded here: rich would rather cut cells short than fold a title.
        title = "\n".join(textwrap.wrap(column.title, longest))
        table.add_column(title, justify="right" if column.numeric else "left", no_wrap=index == 0)
    for row in source.rows:
        table.add_row(*(_cell_text(row[index]) for index in shown))
    if len(shown) < len(source.columns):
        left_out = [column.title for index, column in enumerate(source.columns) if index not in shown]
        table.caption = f"In the report, for want of width here: {', '.join(left_out)}"
    return table


def _cell_width(cell: Cell) -> int:
    return max(len(cell.text), len(cell.detail))


def _cell_text(cell: Cell) -> Text:
    text = (cell.text, TONES.get(cell.tone, ""))
    return style_text(text, "\n", (cell.detail, "dim")) if cell.detail else style_text(text)


def _describe_validation(record: RunRecord) -> dict[str, str]:
    loss = record.validation_loss
    if record.objective in ("grpo", "ppo"):
        return {"validation reward": "–" if loss is None else f"{-loss:.4f} an answer"}
    unit = "token" if record.objective == "sft" else "example"
    return {"validation loss": "–" if loss is None else f"{loss:.4f} nats/{unit}"}


def print_run(record: RunRecord, out: Path) -> None:
    """What a training run did and cost."""
    rows = {
        "method": record.method,
        **({} if record.objective == "sft" else {"objective": record.objective}),
        "trained parameters": f"{format_count(record.trained_parameters)} of {format_count(record.total_parameters)}",
        "steps": f"{record.steps:,}",
        "learning rate": f"{record.learning_rate:g}",
        "tokens": f"{record.train_tokens:,} ({record.target_tokens:,} trained)",
        **_describe_validation(record),
        "time": f"{format_seconds(record.wall_seconds)} ({format_seconds(record.cpu_seconds)} of CPU)",
        "speed": f"{record.train_tokens / record.wall_seconds:,.0f} tokens/s" if record.wall_seconds else "–",
        "peak memory": format_bytes(record.peak_bytes),
        "size on disk": format_bytes(record.size_bytes),
    }
    _print_pairs(rows, record.warnings)
    open_console().print(style_text(f"\nRun: {out}"), soft_wrap=True)


def print_evaluation(record: EvalRecord) -> None:
    """Every metric of one evaluation."""
    rows = {name: f"{value:.4f}" for name, value in record.metrics.items()}
    rows |= {"rows": f"{record.num_rows:,}", "target tokens": f"{record.num_target_tokens:,}"}
    rows |= {f"forgetting: {name}": f"{value:.4f}" for name, value in (record.forgetting or {}).items()}
    if record.quantize:
        rows["quantised to"] = f"{record.quantize}, {format_bytes(record.size_bytes)} as a whole model"
    rows |= {"time": format_seconds(record.wall_seconds), "peak memory": format_bytes(record.peak_bytes)}
    _print_pairs(rows, record.warnings)


def print_pair_evaluation(found: dict[str, Any]) -> None:
    """Accuracy on pairs; of a reward model how far its probabilities can be believed."""
    bounds = "" if found["low"] is None else f" ({100 * found['low']:.1f} to {100 * found['high']:.1f})"
    of = "score" if found["scored_by"] == "reward" else "nats per token"
    rows = {"pairs": f"{found['pairs']:,}", "accuracy": f"{100 * found['accuracy']:.1f}%{bounds}"}
    rows["chosen over rejected"] = f"{found['margin']:+.3f} {of}"
    if "brier" in found:
        rows["log loss"] = f"{found['log_loss']:.3f} nats (a coin: 0.693)"
        rows["Brier score"] = f"{found['brier']:.3f} (a coin: 0.250)"
        rows["calibration error"] = f"{100 * found['calibration_error']:.1f} points"
    _print_pairs(rows, found["warnings"])
    if "bins" in found:
        table = Table("It says", "Pairs", "Mean", "It is right", box=box.SIMPLE_HEAD, pad_edge=False)
        for row in found["bins"]:
            span = f"{100 * row['low']:.0f} to {100 * row['high']:.0f}%"
            shares = [f"{100 * row[name]:.1f}%" for name in ("probability", "won")]
            table.add_row(span, f"{row['pairs']:,}", *shares)
        open_console().print(table)


def _print_pairs(rows: dict[str, Any], warnings: list[str]) -> None:
    console = open_console()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, style_text(str(value)))
    console.print(table)
    for warning in warnings:
        console.print(style_text(("warning: ", "yellow"), warning))


def print_check(report: CheckReport) -> None:
    """What is in the data, split by split, then what to know about it."""
    console = open_console()
    for source in report.sources:
        rejected = f", {source.num_rejected:,} rejected" if source.num_rejected else ""
        facts = f"{source.num_rows:,} rows as {source.format}{rejected} -> {source.split}"
        console.print(style_text(f"{source.name}: {facts}"))
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
    if report.preferences:
        console.print(_tabulate_preferences(report))
    for finding in report.findings:
        style = {"error": "red", "warning": "yellow", "note": "dim"}[finding.level]
        console.print(style_text((f"{finding.level}: ", style), finding.message))


def _lengths(*percentiles: str) -> Callable[[SplitFacts], str]:
    return lambda facts: " / ".join(f"{facts.length_percentiles.get(name, 0)}" for name in percentiles)


def _lost(facts: SplitFacts) -> str:
    return f"{facts.num_lost_targets:,}" if facts.num_lost_targets else "–"


def _count(name: str) -> Callable[[SplitFacts], str]:
    return lambda facts: f"{value:,}" if (value := getattr(facts, name)) else "–"


_CHECK_ROWS: tuple[tuple[str, Callable[[SplitFacts], str]], ...] = (
    ("conversations", _count("num_conversations")),
    ("token rows", _count("num_rows")),
    ("tokens", _count("num_tokens")),
    ("trained tokens", _count("num_targets")),
    ("length, 5% / half", _lengths("5", "50")),
    ("length, 95% / longest", _lengths("95", "100")),
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


def _tabulate_preferences(report: CheckReport) -> Table:
    """Both sides of pairs, or answers by their label, split by split."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    splits = list(report.preferences.values())
    in_pairs = splits[0].kind == "pairs"
    table.add_column("pairs" if in_pairs else "labelled answers")
    for name in report.preferences:
        table.add_column(name, justify="right")

    def add(title: str, read: Callable[[PreferenceFacts], str]) -> None:
        table.add_row(title, *(read(facts) for facts in splits))

    add("pairs" if in_pairs else "answers", lambda facts: f"{facts.num_examples:,}")
    add("different prompts", lambda facts: f"{facts.num_prompts:,}")
    for side in splits[0].num_answers:
        if not in_pairs:
            add(side, lambda facts, side=side: _share(facts.num_answers[side], facts.num_examples))
        add(
            f"{side}, half / longest",
            lambda facts, side=side: _spread(facts.answer_tokens[side]),
        )
    if in_pairs:
        add("chosen is longer", lambda facts: _share(facts.num_chosen_longer, facts.num_examples))
        add("chosen is shorter", lambda facts: _share(facts.num_chosen_shorter, facts.num_examples))
    add("contradicting each other", lambda facts: f"{facts.num_conflicts:,}" if facts.num_conflicts else "–")
    return table


def _share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.0%})" if count else "–"


def _spread(percentiles: Mapping[str, int]) -> str:
    return " / ".join(str(percentiles.get(name, 0)) for name in ("50", "100")) if percentiles else "–"


def print_plan(planned: Planned) -> None:
    """A row for each method: what it takes, of what that consists, and what is done to stay within the limit."""
    console = open_console()
    facts = f"{planned.steps:,} steps, {format_count(planned.total_tokens)} tokens"
    blocks = (
        "" if planned.card == "CPU" else ", compiled blocks" if planned.compiled else ", blocks not compiled"
    )
    console.print(style_text(f"{planned.card}, {format_gib(planned.limit_bytes)}; {facts}{blocks}"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method")
    for title in ("peak\nGiB", "weights\nGiB", "states\nGiB", "step\nGiB", "tokens\na pass"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("blocks", min_width=12)
    for title in ("ms per\n1k tokens", "training"):
        table.add_column(title, justify="right", no_wrap=True)
    for method in planned.methods:
        plan = method.plan
        parts = plan.parts
        split = [parts.get("weights"), parts.get("optimizer"), parts["step"]]
        if "weights and optimizer" in parts:
            split[0] = parts["weights and optimizer"]
        timed = method.seconds is not None
        table.add_row(
            style_text((method.name, "bold" if method.is_own else "")),
            style_text((_gib(plan.peak_bytes), "" if plan.fits else "red")),
            *("–" if part is None else _gib(part) for part in split),
            f"{plan.budget_tokens:,}",
            plan.describe_levels() if plan.fits else f"{plan.describe_levels()}: does not fit",
            f"{1000 * plan.seconds_per_1k:.3g}" if timed else "–",
            format_seconds(method.seconds or 0),
        )
    console.print(table)
    for method in planned.methods:
        if probe := method.plan.probe:
            measured = format_gib(probe["peak_bytes"])
            console.print(style_text(f"probe of {method.name}: {measured} with {probe['tokens']:,} tokens"))


def _gib(num_bytes: int) -> str:
    return format_gib(num_bytes).removesuffix(" GiB")


_PIECES = {"trained": "black on green", "stop": "bold white on blue", "masked": "dim"}


def print_previews(previews: Sequence[RowPreview | PairPreview]) -> None:
    """Rows piece by piece: trained, masked and stop tokens in colour, and what each colour means."""
    console = open_console()
    console.print(Text(" ").join(style_text((f" {kind} ", style)) for kind, style in _PIECES.items()))
    for item in previews:
        if isinstance(item, PairPreview):
            facts = f" a pair of {item.num_tokens} tokens; the prompt of both answers:"
            console.print(style_text("\n", (item.place, "bold"), facts))
            console.print(_colour(item.prompt))
            for side, answer in (("chosen", item.chosen), ("rejected", item.rejected)):
                console.print(style_text((side, "bold"), f" {answer.num_targets} trained"))
                console.print(_colour(answer.segments))
            continue
        if isinstance(item, PromptPreview):
            console.print(style_text("\n", (item.place, "bold"), f" a prompt of {item.num_tokens} tokens"))
            console.print(_colour(item.segments))
            truth = (" none", "dim") if item.truth is None else f" {item.truth}"
            console.print(style_text(("truth", "bold"), truth))
            continue
        facts = f" {item.num_tokens} tokens, {item.num_targets} trained"
        if isinstance(item, LabelledPreview):
            facts += f", label {str(item.label).lower()}"
        console.print(style_text("\n", (item.place, "bold"), facts))
        console.print(_colour(item.segments))


def _colour(segments: Sequence[Segment]) -> Text:
    return style_text(*((text, _PIECES[kind]) for text, kind in segments))

"""The report of an import on stdout: what is not supported first, then what became of every other key."""

from __future__ import annotations

from rich.text import Text

from tunesmith.cli.console import open_console, style_text
from tunesmith.core.jsonl import dump_json
from tunesmith.job.importing.engine import Entry, Import


def print_import(made: Import) -> None:
    """A line for each key, in four groups: not supported, mapped, their defaults, implied."""
    console = open_console()
    framework = made.framework
    console.print(style_text(f"{made.file}: a configuration of {framework.title}"), soft_wrap=True)
    mapped = [entry for entry in made.entries if entry.status == "mapped"]
    for title, style, entries in (
        ("NOT SUPPORTED", "bold red", made.not_supported),
        ("mapped", "bold", [entry for entry in mapped if not entry.from_default]),
        (
            f"their defaults, of {framework.title} {framework.version}",
            "bold",
            [entry for entry in mapped if entry.from_default],
        ),
        ("implied", "bold", [entry for entry in made.entries if entry.status == "implied"]),
    ):
        if entries:
            console.print(style_text("\n", (f"{title} ({len(entries)})", style)))
        for entry in entries:
            console.print(_line(entry), soft_wrap=True)


def _line(entry: Entry) -> Text:
    line = (
        "default" if entry.from_default else f":{entry.place.rsplit(':', 1)[1]}" if ":" in entry.place else ""
    )
    theirs = "" if entry.value is None else f": {dump_json(entry.value)}"
    ours = "" if isinstance(entry.ours, dict | list) and "." in entry.to else f": {dump_json(entry.ours)}"
    arrow = f" -> {entry.to}{ours}" if entry.to else ""
    if not entry.key:  # a habit: what they do without a key for it
        return style_text((f"{line:>7}  ", "dim"), f"{entry.remark}{arrow}")
    remark = f"  ({entry.remark})" if entry.remark else ""
    return style_text((f"{line:>7}  ", "dim"), f"{entry.key}{theirs}{arrow}", (remark, "dim"))

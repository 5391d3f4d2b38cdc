"""`tunesmith frameworks`: environments of the frameworks that jobs can be run through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tunesmith.core.errors import SetupError
from tunesmith.core.jsonl import dump_json

if TYPE_CHECKING:
    from tunesmith.core.frameworks import Matrix
    from tunesmith.core.records import EnvironmentRecord
    from tunesmith.frameworks.doctor import Diagnosis

app = typer.Typer(
    help="Install, list and check the frameworks that jobs can be run through.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="trl, llamafactory, axolotl or unsloth.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command("list")
def list_frameworks(as_json: AsJson = False) -> None:
    """Show the frameworks, and which environment each has."""
    import platform

    import tunesmith
    from tunesmith.frameworks.catalog import FRAMEWORKS, hash_locks
    from tunesmith.frameworks.environments import list_environments

    records = list_environments()
    if as_json:
        own = {"status": "built in", "version": tunesmith.__version__}
        rows = {
            name: {
                "status": record.origin,
                "lock_is_current": record.lock_sha256 == hash_locks(FRAMEWORKS[name]),
            }
            | record.to_json()
            if record
            else {"status": "not installed"}
            for name, record in records.items()
        }
        print(dump_json({"tunesmith": own, **rows}))
        return
    lines = [("framework", "state", "version", "python", "torch", "size")]
    lines.append(("tunesmith", "built in", tunesmith.__version__, platform.python_version(), "", ""))
    lines += [_list_line(name, record) for name, record in records.items()]
    _print_columns(lines)


def _list_line(name: str, record: EnvironmentRecord | None) -> tuple[str, ...]:
    from tunesmith.core.quantities import format_bytes
    from tunesmith.frameworks.catalog import FRAMEWORKS, hash_locks, read_lock

    framework = FRAMEWORKS[name]
    if record is None:
        return (name, "not installed", f"({read_lock(framework.lock)[framework.shown[0]]})", "", "", "")
    state = record.origin
    if record.origin == "installed" and record.lock_sha256 != hash_locks(framework):
        state = "installed, lock has changed"
    version = record.versions.get(framework.shown[0], "?")
    size = format_bytes(record.size_bytes) if record.size_bytes else ""
    return (name, state, version, record.python_version, record.torch, size)


@app.command()
def install(
    name: Name,
    python: Annotated[str | None, typer.Option(help="Interpreter to make the environment for.")] = None,
    installer: Annotated[
        Literal["uv", "pip"] | None, typer.Option(help="Insist on one; else uv where it is found.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Make it anew although it is as locked.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make the environment of a framework from its lock: exact versions, hashes, the torch this machine needs."""
    from tunesmith.api.frameworks import install_framework
    from tunesmith.cli.progress import watch

    with watch() as on_event:
        done = install_framework(name, python=python, installer=installer, again=again, on_event=on_event)
    record = done.record
    if as_json:
        print(dump_json({**record.to_json(), "fresh": done.fresh}))
    elif done.fresh:
        _print_record(record)
    else:
        _print(f"{name} is installed already, from this lock (made {record.created})")


@app.command()
def add(
    name: Name,
    python: Annotated[str, typer.Option("--python", metavar="PATH", help="Its interpreter.")],
    as_json: AsJson = False,
) -> None:
    """Use an environment that exists already, as on a cluster. It is checked, and never changed."""
    from tunesmith.cli.progress import watch
    from tunesmith.core.events import Event
    from tunesmith.frameworks.adding import add_environment

    with watch() as on_event:
        record = add_environment(name, python, on_event=on_event)
        for difference in record.differences:
            on_event(Event("warning", text=f"not as locked: {difference}"))
    if as_json:
        print(dump_json(record.to_json()))
    else:
        _print_record(record)


@app.command()
def remove(name: Name, as_json: AsJson = False) -> None:
    """Delete the environment that we made; of an added one, only our note of it."""
    from tunesmith.frameworks.environments import open_environment

    left = open_environment(name).remove()
    if as_json:
        print(dump_json({"removed": name, "left": [str(path) for path in left]}))
        return
    _print(f"{name} is removed" + (f"; left, because it is not ours: {left[0]}" if left else ""))


@app.command()
def doctor(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One of them; else all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Import each framework in its environment, and show versions, torch, GPU and what differs from the lock."""
    from tunesmith.cli.progress import watch
    from tunesmith.core.events import Event
    from tunesmith.frameworks.catalog import FRAMEWORKS, find_framework
    from tunesmith.frameworks.doctor import OWN, examine

    if name and name != OWN:
        find_framework(name)
    found: list[Diagnosis] = []
    with watch() as on_event:
        for each in (name,) if name else (OWN, *FRAMEWORKS):
            on_event(Event("progress", text=f"importing {each}"))
            if diagnosis := examine(each):
                found.append(diagnosis)
            elif name:
                raise SetupError(name, "not installed", cure=f"Run: tunesmith frameworks install {name}")
    if as_json:
        print(dump_json({each.framework: each.to_json() for each in found}))
    else:
        for each in found:
            _print_diagnosis(each)
    raise typer.Exit(0 if all(each.ok for each in found) else 1)


@app.command()
def matrix(
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/frameworks-matrix.md.")] = False,
) -> None:
    """Show what each framework can express of what a job can say, and why not. Nothing need be installed."""
    from tunesmith.core.frameworks import SCHEMA
    from tunesmith.frameworks.matrix import ask_all, render_matrix

    asked = ask_all()
    if as_json:
        print(dump_json({"schema": SCHEMA, **asked.public_json()}))
    elif markdown:
        print(render_matrix(asked), end="")
    else:
        _print_matrix(asked)


def _print_matrix(asked: Matrix) -> None:
    from rich import box
    from rich.table import Table

    from tunesmith.cli.console import open_console, style_text

    console, group = open_console(), ""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in asked.frameworks:
        table.add_column(name, justify="center", min_width=len(name))
    for row in asked.features:
        if row.group != group:
            group = row.group
            table.add_row(style_text((group, "bold")))
        marks = (("yes", "green") if row.answers[name].can else ("–", "dim") for name in asked.frameworks)
        table.add_row(f"  {row.title}", *map(style_text, marks))
    console.print(table)
    for name in asked.frameworks:
        # One finding often stands behind several rows.
        reasons: dict[str, list[str]] = {}
        for row in asked.missing(name):
            reasons.setdefault(row.answers[name].finding, []).append(row.title)
        for finding, titles in reasons.items():
            console.print(style_text((f"{name}  ", "bold"), finding, (f"  ({'; '.join(titles)})", "dim")))


def _print_record(record: EnvironmentRecord) -> None:
    from tunesmith.core.quantities import format_bytes

    size = f", {format_bytes(record.size_bytes)}" if record.size_bytes else ""
    _print(f"{record.framework}: {record.origin}, Python {record.python_version}, torch {record.torch}{size}")
    _print(f"  {record.python}")


def _print_diagnosis(found: Diagnosis) -> None:
    from tunesmith.cli.console import open_console, style_text
    from tunesmith.core.quantities import format_bytes

    console = open_console()
    mark = ("ok", "green") if found.ok else ("broken", "bold red")
    console.print(style_text((found.framework, "bold"), "  ", mark))
    gpus = ", ".join(found.gpus) or "sees no GPU"
    build = f"CUDA {found.cuda}" if found.cuda else "CPU build"
    facts: list[tuple[str, Any]] = [
        ("python", f"{found.python_version}  {found.python}".strip()),
        ("torch", f"{found.torch} ({build}; {gpus})" if found.torch else ""),
        ("versions", ", ".join(f"{key} {value}" for key, value in found.versions.items())),
        ("size", format_bytes(found.size_bytes) if found.size_bytes else ""),
        ("import", f"{found.import_seconds:.1f} s" if found.import_seconds else ""),
        *(("not as locked", each) for each in found.differences),
    ]
    for label, value in facts:
        if value:
            console.print(style_text(f"  {label}: {value}"), soft_wrap=True)
    for each in found.warnings:
        console.print(style_text(("  warning: ", "yellow"), each), soft_wrap=True)
    for each in found.problems:
        console.print(style_text(("  problem: ", "red"), each), soft_wrap=True)


def _print_columns(lines: list[tuple[str, ...]]) -> None:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        _print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print(text: str) -> None:
    from tunesmith.cli.console import open_console, style_text

    open_console().print(style_text(text), soft_wrap=True)

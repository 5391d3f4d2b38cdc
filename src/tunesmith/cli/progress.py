"""Work in progress on the terminal: bars on a TTY, one plain line now and then elsewhere. Always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from tunesmith.cli.console import open_console, style_text
from tunesmith.core.events import Event, OnEvent
from tunesmith.report.visible import make_visible

PLAIN_SECONDS = 10.0


@contextmanager
def watch() -> Iterator[OnEvent]:
    """A function that draws the events given to it while the block runs."""
    console = open_console(stderr=True)
    if console.is_terminal:
        with _Bars(console) as bars:
            yield bars.draw
    else:
        yield _Lines().draw


class _Figures(ProgressColumn):
    """Loss, tokens/s, memory and time left, as far as they are known."""

    def render(self, task: Task) -> Text:
        event: Event | None = task.fields.get("event")
        return Text(_figures(event) if event and not task.finished else "", style="dim")


class _Bars:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(finished_text=Text("✓", style="green")),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
            _Figures(),
            TimeElapsedColumn(),
            console=console,
        )
        self._ids: dict[str, Any] = {}

    def __enter__(self) -> _Bars:
        self._progress.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._progress.__exit__(*args)

    def draw(self, event: Event) -> None:
        if event.kind in ("note", "warning", "stage"):
            told = (_told(event), "bold" if event.kind == "stage" else "")
            mark = (("warning: ", "yellow"),) if event.kind == "warning" else ()
            self._console.print(style_text(*mark, told))
            return
        if event.task not in self._ids:
            self._ids[event.task] = self._progress.add_task(event.task or "working", total=event.total or 1)
        bar = self._ids[event.task]
        if event.kind in ("done", "failed"):
            # A finished task leaves one plain line, so the live part stays short.
            self._progress.remove_task(bar)
            del self._ids[event.task]
            mark = ("✓ ", "green") if event.kind == "done" else ("✗ ", "red")
            self._console.print(style_text(mark, _told(event)))
        else:
            label = f"{event.task} · {event.text}" if event.text else event.task
            self._progress.update(
                bar, completed=event.done, total=event.total or 1, event=event, description=label
            )


class _Lines:
    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def draw(self, event: Event) -> None:
        now = time.monotonic()
        if event.kind in ("step", "progress"):
            if now - self._last.get(event.task, 0.0) < PLAIN_SECONDS:
                return
            self._last[event.task] = now
            text = f"{event.task} {event.text} {event.done}/{event.total} {_figures(event)}"
        else:
            text = f"{'warning: ' if event.kind == 'warning' else ''}{_told(event)}"
        print(make_visible(" ".join(text.split())), file=sys.stderr, flush=True)


def _told(event: Event) -> str:
    return f"{event.task}: {event.text}" if event.task else event.text


def _figures(event: Event) -> str:
    parts: list[str] = []
    if event.loss is not None:
        parts.append(f"loss {event.loss:.3f}")
    if event.tokens_per_second:
        parts.append(f"{event.tokens_per_second:,.0f} tok/s")
    if event.memory_bytes:
        parts.append(f"{event.memory_bytes / 2**20:,.0f} MB")
    if event.eta_seconds is not None:
        minutes, seconds = divmod(round(event.eta_seconds), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return "  ".join(parts)

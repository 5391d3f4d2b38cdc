"""Work in progress on the terminal: bars on a TTY, one plain line now and then elsewhere. Always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
)
from rich.table import Column
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


class _Spinner(SpinnerColumn):
    """Turns until the task is done: after the last step there is still something to save or to score."""

    def render(self, task: Task) -> RenderableType:
        return self.spinner.render(task.get_time())


class _Label(ProgressColumn):
    """What a bar is about: the only column that gives way, so that a bar stays one line."""

    def render(self, task: Task) -> Text:
        return Text(make_visible(task.description), no_wrap=True, overflow="ellipsis")


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:.0f}/{task.total:.0f}" if task.total else "", justify="right")


class _Figures(ProgressColumn):
    """Loss, tokens/s and memory, as far as they are known."""

    def __init__(self, *, memory: bool) -> None:
        super().__init__(Column(no_wrap=True))
        self._memory = memory

    def render(self, task: Task) -> Text:
        event: Event | None = task.fields.get("event")
        return Text("  ".join(_figures(event, memory=self._memory)) if event else "", style="dim")


class _Time(ProgressColumn):
    """Time left, where it is known; else time passed."""

    def render(self, task: Task) -> Text:
        event: Event | None = task.fields.get("event")
        left = event.eta_seconds if event and event.eta_seconds is not None else task.time_remaining
        if task.total and left is not None and round(left):
            return Text(f"{_clock(left)} left")
        return Text(_clock(task.elapsed or 0.0), style="dim")


class _Bars:
    def __init__(self, console: Console) -> None:
        wide = console.width >= 100
        self._console = console
        self._progress = Progress(
            _Spinner(),
            _Label(),
            BarColumn(bar_width=24 if wide else 12, table_column=Column(no_wrap=True)),
            _Count(Column(no_wrap=True)),
            _Figures(memory=wide),
            _Time(Column(no_wrap=True)),
            console=console,
        )
        self._ids: dict[str, Any] = {}
        self._labels: dict[str, str] = {}

    def __enter__(self) -> _Bars:
        self._progress.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        # What is still there was cut short; its last state would look like a result.
        for name in list(self._ids):
            self._remove(name)
        self._progress.__exit__(*args)

    def draw(self, event: Event) -> None:
        if event.kind in ("done", "failed"):
            # A finished task leaves one plain line, so the live part stays short.
            self._remove(event.task)
            mark = ("✓ ", "green") if event.kind == "done" else ("✗ ", "red")
            self._console.print(style_text(mark, _told(event)))
        elif event.task or event.kind in ("step", "progress"):
            self._move(event)
        else:
            told = (_told(event), "bold" if event.kind == "stage" else "")
            mark = (("warning: ", "yellow"),) if event.kind == "warning" else ()
            self._console.print(style_text(*mark, told))
            if event.kind == "stage":
                self._remove("")
                self._ids[""] = self._progress.add_task("working", total=None)

    def _move(self, event: Event) -> None:
        """The bar of a task; a new one takes the place of the line that shows that something is being prepared."""
        if event.task:
            self._remove("")
        label = " · ".join(filter(None, (event.task, event.text))) or "training"
        if event.task not in self._ids:
            self._ids[event.task] = self._progress.add_task(label, total=None)
        bar = self._ids[event.task]
        if self._labels.get(event.task) != label:
            # Another part of the task: length and speed of the last one say nothing about it.
            self._progress.reset(bar)
            next(task for task in self._progress.tasks if task.id == bar).total = None
            self._labels[event.task] = label
        total = event.total or None
        self._progress.update(bar, completed=event.done, total=total, event=event, description=label)

    def _remove(self, name: str) -> None:
        if name in self._ids:
            self._progress.remove_task(self._ids.pop(name))


class _Lines:
    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def draw(self, event: Event) -> None:
        now = time.monotonic()
        if event.kind in ("step", "progress"):
            if now - self._last.get(event.task, 0.0) < PLAIN_SECONDS:
                return
            self._last[event.task] = now
            left = "" if event.eta_seconds is None else f"{_clock(event.eta_seconds)} left"
            count = f"{event.done}/{event.total}" if event.total else ""
            text = " ".join([event.task, event.text, count, *_figures(event), left])
        else:
            text = f"{'warning: ' if event.kind == 'warning' else ''}{_told(event)}"
        print(make_visible(" ".join(text.split())), file=sys.stderr, flush=True)


def _told(event: Event) -> str:
    text = (
        f"{event.text}, {event.done} of {event.total} jobs"
        if event.kind == "done" and event.total
        else event.text
    )
    return f"{event.task}: {text}" if event.task else text


def _figures(event: Event, *, memory: bool = True) -> list[str]:
    parts: list[str] = []
    if event.loss is not None:
        parts.append(f"loss {event.loss:.3f}")
    if event.tokens_per_second:
        parts.append(f"{event.tokens_per_second:,.0f} tok/s")
    if event.memory_bytes and memory:
        parts.append(f"{event.memory_bytes / 2**20:,.0f} MB")
    return parts


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

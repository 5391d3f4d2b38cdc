"""What work in progress tells whoever watches: plain data, drawn by the cli, sent as JSON lines between processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.core.checked import read_checked

EventKind = Literal["stage", "step", "progress", "note", "warning", "done", "failed"]


@dataclass(frozen=True, slots=True)
class Event:
    """One sign of life.

    task: what it belongs to (`lora seed 0`), empty for the whole command.
    done, total: position in the task's own unit (steps, rows).
    loss, tokens_per_second, eta_seconds, memory_bytes: set for training steps.
    """

    kind: EventKind
    task: str = ""
    text: str = ""
    done: int = 0
    total: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    memory_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in dataclasses.asdict(self).items() if value not in (None, "")}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Event:
        """Fields that it has not are left out. Raises DataError for one of another type: it will be shown to people."""
        names = {field.name for field in dataclasses.fields(cls)}
        return read_checked(cls, {key: item for key, item in value.items() if key in names}, place="event")


OnEvent = Callable[[Event], None]


def ignore_event(event: Event) -> None:
    """For callers that do not watch."""

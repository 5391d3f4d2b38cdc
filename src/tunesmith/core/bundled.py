"""The names of what ships inside the package: `tunesmith/tiny` (a model), `tunesmith/tickets` (a data set), and what to
align a model with: `tunesmith/tickets-prompts` and `tunesmith/tickets-preferences`."""

from __future__ import annotations

from pathlib import Path

_DEMO = Path(__file__).parent.parent / "demo"
_NAMES = ("tiny", "tickets", "tickets-prompts", "tickets-preferences")
BUNDLED = {f"tunesmith/{name}": _DEMO / name for name in _NAMES}


def bundled_path(name: str) -> Path | None:
    """Folder of a bundled model or data set, or None if `name` is not one."""
    return BUNDLED.get(name)

"""The names of what ships inside the package: `tunesmith/tiny` (a model) and `tunesmith/tickets` (a data set)."""

from __future__ import annotations

from pathlib import Path

_DEMO = Path(__file__).parent.parent / "demo"
BUNDLED = {"tunesmith/tiny": _DEMO / "tiny", "tunesmith/tickets": _DEMO / "tickets"}


def bundled_path(name: str) -> Path | None:
    """Folder of a bundled model or data set, or None if `name` is not one."""
    return BUNDLED.get(name)

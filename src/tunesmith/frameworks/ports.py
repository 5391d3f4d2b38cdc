"""The adapters there are. Another framework is a file with an adapter, its worker, its lock, and a line here."""

from __future__ import annotations

from tunesmith.core.errors import JobError
from tunesmith.frameworks.port import Port
from tunesmith.frameworks.trl import Trl

PORTS: dict[str, Port] = {"trl": Trl()}


def find_port(name: str, *, place: str = "") -> Port:
    """The adapter of a framework. Raises JobError for one that has none yet. place: the arm that asks for it."""
    if name not in PORTS:
        raise JobError(
            f"{place}: framework" if place else "framework",
            f"{name} cannot be compared yet",
            rule=f"arms are trained by tunesmith or {', '.join(PORTS)}",
            cure="Remove the arm, or choose another framework",
        )
    return PORTS[name]

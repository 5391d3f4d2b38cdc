"""Installing frameworks, with Ctrl-C and SIGTERM ending it in order."""

from __future__ import annotations

from tunesmith.api.stopping import stop_on_signals
from tunesmith.core.errors import Interrupted
from tunesmith.core.events import OnEvent, ignore_event
from tunesmith.frameworks.install import Installation, Stopped
from tunesmith.frameworks.install import install_framework as install


def install_framework(
    name: str,
    *,
    python: str | None = None,
    installer: str | None = None,
    again: bool = False,
    on_event: OnEvent = ignore_event,
) -> Installation:
    """`tunesmith frameworks install`; see `frameworks.install`. Raises Interrupted once nothing half made is left."""
    with stop_on_signals() as (stop, received):
        try:
            return install(
                name, python=python, installer=installer, again=again, on_event=on_event, stop=stop
            )
        except Stopped:
            raise Interrupted(
                f"frameworks install {name}",
                "interrupted; what was begun is deleted, what was there before is untouched",
                signal_number=received[0],
                cure="Run it again",
            ) from None

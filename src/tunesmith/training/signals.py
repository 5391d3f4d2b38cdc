"""Ctrl-C and SIGTERM end a run in order: finish the step, save, exit 130 or 143. A second signal ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_CAUGHT = (signal.SIGINT, signal.SIGTERM)


class StopNow(BaseException):
    """Raised by a signal inside `StopSignals.interruptible`. Not an `Exception`, so that no handler on the way
    takes it for a failure; it never leaves this package."""


class StopSignals:
    """What has been asked so far: `received` is the signal's number, or None."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._raise_now = False

    @property
    def name(self) -> str:
        return signal.Signals(self.received).name if self.received else ""

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        # From here on the kernel's default applies: a second signal ends the process even inside one long C call.
        for caught in _CAUGHT:
            signal.signal(caught, signal.SIG_DFL)
        if self._raise_now:
            raise StopNow

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `StopNow` as soon as a signal arrives in this block, for work that changes nothing (validation)."""
        self._raise_now = True
        try:
            if self.received:
                raise StopNow
            yield
        finally:
            self._raise_now = False


@contextmanager
def catch_signals() -> Iterator[StopSignals]:
    """Collect stop signals in this block instead of dying from them; earlier handlers come back afterwards.

    Outside the main thread Python delivers no signals: nothing is caught and `received` stays None.
    """
    stop = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in _CAUGHT}
    for number in _CAUGHT:
        signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

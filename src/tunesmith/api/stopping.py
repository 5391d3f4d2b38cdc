"""Ctrl-C and SIGTERM as a flag, for work that ends in order."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_signals() -> Iterator[tuple[threading.Event, list[int]]]:
    """A flag that Ctrl-C and SIGTERM set, and the signals received. A second signal ends this process at once."""
    stop, received = threading.Event(), list[int]()

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop, received
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop, received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

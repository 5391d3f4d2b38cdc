"""What the next forward pass reads, made by a background thread while the device is busy with the last one.

Reading rows (tokenising them, with a stream) and laying them out takes time of the host that a GPU would wait for.
Nothing else changes: rows come in the same order, batches are functions of their rows alone and draw nothing, and what
fails ahead of time fails again where it is asked for, in the main thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from tunesmith.core.types import Example
from tunesmith.training.order import StepRows

MakeBatch = Callable[[Sequence[Example], torch.device], Any]
Begun = tuple[Sequence[Example], Any]


class StepsAhead:
    """The steps of a source by number, of which the next one may be read before its turn, by any thread.

    A step's position travels with it, so reading ahead moves nothing that a checkpoint keeps.
    """

    def __init__(self, steps: Iterator[StepRows]) -> None:
        self._steps, self._num_read = steps, 0
        self._lock = threading.Lock()
        self._latest: deque[StepRows] = deque(maxlen=2)
        self._error: Exception | None = None

    def read(self, number: int) -> StepRows:
        """Step `number`, from 0: one of the two read last, or the next. Raises what reading it raises, every time."""
        with self._lock:
            if number == self._num_read:
                if self._error is not None:
                    raise self._error
                try:
                    self._latest.append(next(self._steps))
                except Exception as error:
                    self._error = error
                    raise
                self._num_read += 1
            return self._latest[number - self._num_read]


class Feed:
    """Makes batches, one ahead of the one in use. On a CPU, whose cores are busy with the step itself, none ahead.

    make_batch: (rows, device) -> batch. On a GPU it copies from pinned memory, in the stream that computes: a batch is
    there when the first kernel reads it, and the host waits for neither.
    """

    def __init__(self, make_batch: MakeBatch, device: torch.device, *, ahead: bool | None = None) -> None:
        self._make_batch, self._device = make_batch, device
        self._ahead = device.type == "cuda" if ahead is None else ahead
        self._thread: ThreadPoolExecutor | None = None
        self._begun: Future[Begun | None] | None = None

    def begin(self, choose_rows: Callable[[], Sequence[Example] | None]) -> None:
        """Start to make the batch that `take` will want. choose_rows is called in the background; None: no batch."""
        if not self._ahead:
            return
        if self._thread is None:
            gpu = _name_gpu(self._device)
            self._thread = ThreadPoolExecutor(1, "feed", initializer=_enter_device, initargs=(gpu,))
        self._begun = self._thread.submit(self._make, choose_rows)

    def take(self, rows: Sequence[Example]) -> Any:
        """The batch of `rows`: the one begun if it is of these very rows, else a new one."""
        begun, self._begun = self._begun, None
        if begun is not None and begun.exception() is None:
            made = begun.result()
            if made is not None and len(made[0]) == len(rows) and all(map(_is, made[0], rows)):
                return made[1]
        return self._make_batch(rows, self._device)

    def close(self) -> None:
        """End the thread. The feed can be used again."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread = self._begun = None

    def _make(self, choose_rows: Callable[[], Sequence[Example] | None]) -> Begun | None:
        rows = choose_rows()
        return None if rows is None else (rows, self._make_batch(rows, self._device))


def _is(made: Example, wanted: Example) -> bool:
    return made is wanted


def _name_gpu(device: torch.device) -> int | None:
    """Number of the GPU: of "cuda" alone, the one that is current for the caller's thread. None: no GPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _enter_device(gpu: int | None) -> None:
    # The current GPU is a thread's own; pinned memory belongs to it.
    if gpu is not None:
        torch.cuda.set_device(gpu)

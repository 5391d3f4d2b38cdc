"""From numbers to positions on paper: linear and logarithmic axes with ticks a person would choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps [low, high] in the data to [start, stop] on paper; ticks are data values inside it."""

    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Position of a value; values outside are put on the edge."""
        low, high, value = (self._bend(v) for v in (self.low, self.high, value))
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return self.start + share * (self.stop - self.start)

    def _bend(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value


def fit_scale(
    values: Sequence[float],
    start: float,
    stop: float,
    *,
    num_ticks: int = 5,
    log: bool | None = False,
    include: Sequence[float] = (),
    pad: float = 0.04,
) -> Scale:
    """A scale that holds all values with a little room.

    log: None chooses a logarithmic axis when positive values span more than a factor of 8.
    include: values that must be on the axis besides (0 for shares).
    """
    every = [value for value in (*values, *include) if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(every), max(every)
    if log is None:
        log = low > 0 and high / low > 8
    if log:
        room = pad * max(math.log10(high / low), 0.1)
        low, high = low / 10**room, high * 10**room
        return Scale(low, high, start, stop, _log_ticks(low, high, num_ticks), log=True)
    if high - low < 1e-12 * max(abs(high), 1.0):
        room = 0.5 * max(abs(high), 0.02)
    else:
        room = pad * (high - low)
    # An included bound (0 %) stays the edge of the axis where the values allow it.
    low = low if low in include else low - room
    high = high if high in include else high + room
    return Scale(low, high, start, stop, _linear_ticks(low, high, num_ticks))


def _linear_ticks(low: float, high: float, wanted: int) -> tuple[float, ...]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten: (0, 1), 5 -> 0, 0.2, ..., 1."""
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(0.0 if n == 0 else n * step for n in range(first, last + 1))


def _log_ticks(low: float, high: float, wanted: int) -> tuple[float, ...]:
    """Powers of ten, with 2 and 5 (or 3) between them where there is room."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    best: tuple[float, ...] = ()
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = tuple(m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high)
        if len(ticks) <= wanted + 1 and len(ticks) > len(best):
            best = ticks
    return best or (math.sqrt(low * high),)


def format_tick(value: float) -> str:
    """Shortest faithful text: 0.05, 1.5, 20, 1200, 2e-5; a real minus sign."""
    if value == 0:
        return "0"
    size = abs(value)
    text = f"{size:.0e}".replace("e-0", "e-").replace("e+0", "e") if size < 1e-3 else f"{size:.4g}"
    return ("−" if value < 0 else "") + text

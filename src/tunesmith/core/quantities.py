"""Quantities as people read them: bytes, seconds, counts. One place, so that a table and a chart say the same."""

from __future__ import annotations

import math
import re

_UNITS = {
    unit: base**power
    for base, infix in ((1000, ""), (1024, "i"))
    for power, unit in (
        (1, f"k{infix}B".replace("ki", "Ki")),
        (2, f"M{infix}B"),
        (3, f"G{infix}B"),
        (4, f"T{infix}B"),
    )
}


def parse_bytes(text: str) -> int:
    """`19.7GiB`, `800 MB` -> bytes. Raises ValueError for anything else."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+) ?([kKMGT]i?B)", text.strip())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise ValueError(f"{text!r} is no amount of memory; write a number and {', '.join(_UNITS)}: 19.7GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def format_gib(num_bytes: float) -> str:
    """`19.7 GiB`, as cards are sold and limits are written."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes < 10 * 2**30 else f"{num_bytes / 2**30:.1f} GiB"


def format_bytes(num_bytes: float) -> str:
    """`1.5 MB`: powers of 1000, three significant digits. 0 is a dash: nothing is stored."""
    if num_bytes <= 0:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # 999.6 kB rounds to 1.00 MB, not to 1000 kB.
        if num_bytes >= 0.9995 * size:
            return f"{_three_digits(num_bytes / size)} {unit}"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """`0.42 s`, `41.3 s`, `200 s`, `13 min 20 s`, `2 h 05 min`. 0 is a dash: no time was spent."""
    if seconds <= 0:
        return "–"
    if seconds < 99.95:
        return f"{_three_digits(seconds)} s"
    whole = round(seconds)
    if whole < 600:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_count(count: float) -> str:
    """`512`, `13.6k`, `1.24M`, `8.03B`. 0 is a dash."""
    if count <= 0:
        return "–"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{_three_digits(count / size)}{unit}"
    return f"{count:.0f}"


def format_number(count: int, thing: str) -> str:
    """`1 row`, `12 rows`."""
    return f"{count} {thing}" + ("s" if count != 1 else "")


def _three_digits(value: float) -> str:
    """Three significant digits without an exponent, for values from 0 to 1000."""
    if value <= 0:
        return "0"
    # Rounded first: 0.9996 is 1.00, not 1.000.
    value = float(f"{value:.3g}")
    decimals = max(0, 2 - math.floor(math.log10(value) + 1e-9))
    return f"{value:.{min(decimals, 3)}f}"

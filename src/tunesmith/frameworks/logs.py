"""What a process prints, kept as text: whole lines, nothing that acts on a terminal, never more than a bound."""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path

MAX_LINE_BYTES = 1 << 16
# Of one log: its beginning, and the end of what came after. Why something failed stands in the last lines.
MAX_LOG_BYTES = 8 << 20
MAX_END_BYTES = 1 << 18
# Terminals' escape sequences (colours, cursor, titles), and every control character but tab and newline.
_CONTROLS = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


def clean_text(text: str) -> str:
    """Without escape sequences and control characters, which would act on the terminal that shows it."""
    return _CONTROLS.sub("", text)


def clean_line(line: bytes) -> str:
    """One line as text; of one that overwrites itself (progress bars) its last state."""
    return clean_text(line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace"))


class Lines:
    """Cuts a stream of bytes into lines; one longer than `MAX_LINE_BYTES` comes in pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def take(self, chunk: bytes) -> list[bytes]:
        """Lines that are complete now, without their ends."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            lines.append(self._rest)
            self._rest = b""
        return lines

    def take_rest(self) -> list[bytes]:
        """What is left when the stream has ended."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


class Log:
    """Appends lines to a file. What does not fit between beginning and end is counted and left out.

    A disk that is full loses lines and stops nobody: who filled it is told by its own failure.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._room = max(0, MAX_LOG_BYTES - path.stat().st_size)
        self._end: deque[bytes] = deque()
        self._end_bytes = self._left_out = 0

    def write(self, lines: Sequence[bytes]) -> None:
        if not self._room and lines:
            # Only cleaned if it is still there in the end.
            self._keep_for_end(b"\n".join(lines) + b"\n")
            return
        text = b"".join(f"{clean_line(line)}\n".encode() for line in lines)
        self._room = max(0, self._room - len(text))
        self._put(text)

    def close(self) -> None:
        if self._left_out:
            self._put(f"[{self._left_out:,} bytes left out]\n".encode())
        lines = b"".join(self._end).split(b"\n")[:-1]
        self._put(b"".join(f"{clean_line(line)}\n".encode() for line in lines))
        self._file.close()

    def _keep_for_end(self, text: bytes) -> None:
        self._end.append(text)
        self._end_bytes += len(text)
        while self._end_bytes > MAX_END_BYTES:
            gone = len(self._end.popleft())
            self._end_bytes -= gone
            self._left_out += gone

    def _put(self, text: bytes) -> None:
        if text:
            with contextlib.suppress(OSError):
                self._file.write(text)

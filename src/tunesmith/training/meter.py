"""What a run costs: tokens per second, wall and CPU seconds, peak memory, time left."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def reset_peak_bytes(device: torch.device) -> bool:
    """Start a new peak measurement. False if the system can't: the peak is then that of the process's whole life.

    Seeds that share one process are thereby measured apart.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        # Linux: 5 sets the high-water mark of resident memory to what is resident now.
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def allocated_bytes(device: torch.device) -> int:
    """What is taken now: device memory on CUDA, resident memory of this process on a CPU (0 where nobody tells)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def peak_bytes(device: torch.device) -> int:
    """Peak since the last reset: allocated device memory on CUDA, resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Meter:
    """Counts tokens and seconds of one run, added to what earlier parts of the same run have used.

    Speed and time left come from the last `window` steps; validation and saving between them are left out.
    """

    def __init__(self, device: torch.device, *, window: int = 50) -> None:
        self.device = device
        self.peak_is_own = reset_peak_bytes(device)
        self.train_tokens = self.target_tokens = 0
        self._earlier_wall = self._earlier_cpu = 0.0
        self._earlier_peak = 0
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        # (seconds, tokens so far) at step ends, the start included.
        self._marks: deque[tuple[float, int]] = deque([(self._wall, 0)], maxlen=window + 1)

    def continue_from(self, totals: dict[str, float]) -> None:
        """Add what the run had used when its checkpoint was written."""
        self.train_tokens, self.target_tokens = int(totals["train_tokens"]), int(totals["target_tokens"])
        self._earlier_wall, self._earlier_cpu = totals["wall_seconds"], totals["cpu_seconds"]
        self._earlier_peak = int(totals["peak_bytes"])
        self._marks.clear()
        self._marks.append((time.perf_counter(), self.train_tokens))

    def count_step(self, *, num_tokens: int, num_target_tokens: int) -> float:
        """Note a finished step; returns its seconds."""
        self.train_tokens += num_tokens
        self.target_tokens += num_target_tokens
        now = time.perf_counter()
        seconds = now - self._marks[-1][0]
        self._marks.append((now, self.train_tokens))
        return seconds

    def skip_time(self) -> None:
        """Leave the time since the last step (validation, saving) out of the next step's seconds."""
        # The whole window moves, so that rates stay rates of training itself.
        late = time.perf_counter() - self._marks[-1][0]
        for index, (when, tokens) in enumerate(self._marks):
            self._marks[index] = (when + late, tokens)

    def tokens_per_second(self) -> float:
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / (end - start) if end > start else 0.0

    def seconds_left(self, steps_left: int) -> float:
        measured = len(self._marks) - 1
        return steps_left * (self._marks[-1][0] - self._marks[0][0]) / measured if measured else 0.0

    @property
    def wall_seconds(self) -> float:
        return self._earlier_wall + time.perf_counter() - self._wall

    @property
    def cpu_seconds(self) -> float:
        return self._earlier_cpu + time.process_time() - self._cpu

    @property
    def peak(self) -> int:
        return max(self._earlier_peak, peak_bytes(self.device))

    def totals(self) -> dict[str, float]:
        """What a checkpoint stores and `continue_from` takes."""
        return {
            "train_tokens": self.train_tokens,
            "target_tokens": self.target_tokens,
            "wall_seconds": self.wall_seconds,
            "cpu_seconds": self.cpu_seconds,
            "peak_bytes": self.peak,
        }

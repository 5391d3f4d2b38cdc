"""One buffer per GPU that all frozen matrices unpack into, one at a time: as large as the largest of them.

What is taken is valid until the next `take` on that device. Only an operator that fills it and uses it up before it
returns may take it: operators run one after the other in their stream, and none of them hands the buffer on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BUFFERS: dict[torch.device, Tensor] = {}


def reserve(device: torch.device, num_bytes: int) -> None:
    """Make the buffer at least this large: once, before the first step, so that its address stays."""
    device = _name(device)
    held = _BUFFERS.get(device)
    if held is None or held.numel() < num_bytes:
        _BUFFERS.pop(device, None)
        del held
        _BUFFERS[device] = torch.empty(num_bytes, dtype=torch.uint8, device=device)


def take(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor in the buffer of `device`, its values undefined. On a CPU, a new one."""
    if device.type == "cpu":
        return torch.empty(*shape, dtype=dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    reserve(device, num_bytes)
    return _BUFFERS[_name(device)][:num_bytes].view(dtype).view(*shape)


def _name(device: torch.device) -> torch.device:
    """`cuda` is the current GPU."""
    return torch.device(device.type, torch.cuda.current_device()) if device.index is None else device


def release() -> None:
    """Give the memory of all buffers back."""
    _BUFFERS.clear()

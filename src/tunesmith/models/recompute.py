"""Blocks of which training keeps the input only, on the GPU or in the host's memory, and computes the rest again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recompute(
    run: Callable[..., Tensor], x: Tensor, *rest: Any, store: HostStore | None, random: bool
) -> Tensor:
    """run(x, *rest), of which x is kept: in `store`, if one is given. random: `run` may draw numbers."""

    def rerun(x: Tensor) -> Tensor:
        return run(x, *rest)

    # What is saved inside is the checkpoint's own business; its input alone passes the store.
    with nullcontext() if store is None else store.taking():
        y = checkpoint(rerun, x, use_reentrant=False, preserve_rng_state=random)
    assert isinstance(y, Tensor)
    return y


class HostStore:
    """Tensors of one forward pass, held in the host's memory until the backward pass asks for them, last one first.

    On a GPU copies run on a stream of their own, out while the next block computes and back while the one before in the
    backward pass does: two of them at most are on the GPU. On a CPU they are plain copies.
    """

    def __init__(self) -> None:
        self._held: list[Tensor] = []
        self._coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
        self._device: torch.device | None = None
        self._stream: torch.cuda.Stream | None = None

    def taking(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Inside, what autograd saves is put here."""
        return torch.autograd.graph.saved_tensors_hooks(self.put, self.take)

    def put(self, tensor: Tensor) -> int:
        """Copy `tensor` to the host; its number."""
        self._device, tensor = tensor.device, tensor.detach()
        if tensor.device.type != "cuda":
            self._held.append(tensor.clone())
            return len(self._held) - 1
        main = torch.cuda.current_stream(tensor.device)
        if self._stream is None:
            self._stream = _side_stream(tensor.device)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        # Its memory may be given to others only when the copy is done.
        tensor.record_stream(self._stream)
        self._held.append(host)
        return len(self._held) - 1

    def take(self, number: int) -> Tensor:
        """The tensor again, where it was; the one before it begins to come."""
        if self._stream is None:
            return self._held[number]
        self._fetch(number)
        tensor, arrived = self._coming.pop(number)
        torch.cuda.current_stream(self._device).wait_event(arrived)
        if number:
            self._fetch(number - 1)
        return tensor

    def _fetch(self, number: int) -> None:
        if number in self._coming:
            return
        assert self._stream is not None
        host = self._held[number]
        # The memory was free for the main stream, which may still be at work in it; should the backward pass be broken
        # off, it is free for others when the copy is done.
        tensor = torch.empty(host.shape, dtype=host.dtype, device=self._device)
        tensor.record_stream(self._stream)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            tensor.copy_(host, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        self._coming[number] = tensor, arrived


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]

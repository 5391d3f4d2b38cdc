"""CUDA graphs: what a function does on a GPU, recorded once and replayed; and a way out of a recording that failed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch


def record(function: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
    """The function's kernels, none of them run yet. pool: where its memory lies (`torch.cuda.graph_pool_handle`).

    Raises RuntimeError if it cannot be recorded: then call `leave_recording`.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads prepare batches meanwhile, with calls that would break a stricter recording.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        function()
    return graph


def try_to_record(function: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    """`record` in a pool of its own; None if that cannot be."""
    stream, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    try:
        return record(function, pool)
    except RuntimeError:
        return None
    finally:
        leave_recording(stream, pool)


def name_cause(error: BaseException) -> str:
    """What broke a recording off, which comes before what ending it then raised."""
    cause = error.__context__ or error
    return " ".join(str(cause).split())[:200] or type(cause).__name__


def leave_recording(stream: torch.cuda.Stream, pool: Any) -> None:
    """What torch leaves undone when it can't end a recording that broke off: its stream is still the current one, on
    which nothing waits for the batches that are copied, its pool still counts as in use, and its random generator
    still takes itself for recorded, and refuses to draw."""
    if torch.cuda.current_stream() == stream:
        return
    torch.cuda.set_stream(stream)
    generator = torch.cuda.default_generators[stream.device_index]
    generator.graphsafe_set_state(generator.clone_state())
    with suppress(RuntimeError):  # where the recording ended, and only its graph could not be made
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        torch._C._cuda_releasePool(stream.device_index, pool)

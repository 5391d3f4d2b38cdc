"""Micro-batches of one shape, recorded once as a CUDA graph and replayed: the host starts one thing, not thousands.

To launch what a block computes takes the host some five milliseconds. A GPU is done sooner where a model is small or
micro-batches are short, and then waits. Rows of one length give micro-batches of few shapes, over and over: once every
shape of a step has run twice, the next step records them, and from then on they are replayed, the same kernels in the
same order. Rows of all lengths give micro-batches of many shapes; where kernels take any lengths, a shape is not much
more than a number of tokens, and comes back, too.

What a graph reads and adds to stays in place: copies of the batch's tensors, the factor of the loss, sums of losses and
measures, gradients. Weights are updated in place anyway. Intermediate results lie in a pool of memory that no one else
may use. Graphs and ordinary passes need it twice: where there is no room for that, whatever is not replayed first gives
the pool back, and only steps of few shapes are recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tunesmith.models.recording import leave_recording, name_cause, record

# The first pass of a shape compiles, the second finds every buffer made.
_PASSES_BEFORE = 2
# Without room: steps of more shapes than this are of rows whose lengths come as they come.
_MOST_SHAPES = 4
# With room: the first shapes that come back are recorded. A graph takes some megabytes besides its pool.
_MOST_GRAPHS = 48
# Shapes whose passes are counted.
_MOST_COUNTED = 1024

# (batch, factor, sums): forward pass, backward pass of the loss times `factor`, the loss added to `sums`.
RunMicroBatch = Callable[[Any, Tensor, Tensor], None]


class FixedBatch(Protocol):
    """A batch whose kernels follow from `signature` alone (see `layout.Batch`)."""

    def signature(self, *, any_lengths: bool, by_rows: bool) -> Hashable: ...
    def fixed(self, *, any_lengths: bool) -> Any: ...
    def copy_(self, batch: Any) -> None: ...


class _Graph(NamedTuple):
    batch: Any
    graph: torch.cuda.CUDAGraph


class GraphRunner:
    """Runs micro-batches, recorded where they can be.

    hold_gradients: makes gradients stay where they are; False if they can't.
    refresh: brings what is computed with up to date with the weights, at the start of a step; False if nothing is.
    num_sums:    what a pass adds up: its loss, and measures.
    any_lengths, by_rows: as `layout.Batch.signature` takes them.
    has_room: memory suffices for graphs beside ordinary passes. Whoever runs out of it says so.
    failure: why nothing is recorded any more; empty while it is.
    """

    def __init__(
        self,
        run: RunMicroBatch,
        *,
        hold_gradients: Callable[[], bool],
        refresh: Callable[[], bool],
        device: torch.device,
        num_sums: int = 1,
        any_lengths: bool = False,
        by_rows: bool = False,
        has_room: bool = False,
    ) -> None:
        self._any_lengths, self._by_rows, self.has_room = any_lengths, by_rows, has_room
        self._run, self._hold_gradients, self._refresh = run, hold_gradients, refresh
        self._factor = torch.ones((), device=device)
        self._sums = torch.zeros(num_sums, dtype=torch.float64, device=device)
        self._passes: Counter[Hashable] = Counter()
        # Shapes of this step so far; whether all shapes of the last one are known well enough.
        self._shapes: set[Hashable] = set()
        self._is_settled = False
        self._graphs: dict[Hashable, _Graph] = {}
        self._refreshing: torch.cuda.CUDAGraph | None = None
        self._pool: Any = None
        self.failure = ""

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def begin(self) -> Tensor:
        """Start a step. Returns its sums (of the loss, of measures), float64, that every `run` adds to."""
        if self._refreshing is None:
            self._refresh()
        else:
            self._refreshing.replay()
        self._is_settled = 0 < len(self._shapes) <= _MOST_SHAPES and all(
            self._passes[key] >= _PASSES_BEFORE for key in self._shapes
        )
        self._shapes.clear()
        return self._sums.zero_()

    def run(self, batch: FixedBatch, factor: float) -> None:
        """Gradients of a micro-batch's loss times `factor`, and what is summed up to the step's sums."""
        self._factor.fill_(factor)
        key = batch.signature(any_lengths=self._any_lengths, by_rows=self._by_rows)
        if key not in self._passes and len(self._passes) > (_MOST_COUNTED if self.has_room else _MOST_SHAPES):
            self._passes.clear()
        self._shapes.add(key)
        self._passes[key] += 1
        graph = self._graphs.get(key)
        if graph is None and self._may_record(key):
            graph = self._record(key, batch)
        if graph is None:
            if not self.has_room:
                # To record others between such passes would be to do so again and again.
                self._is_settled = False
                self.release()
            self._run(batch, self._factor, self._sums)
            return
        graph.batch.copy_(batch)
        graph.graph.replay()

    def _may_record(self, key: Hashable) -> bool:
        settled = len(self._graphs) < _MOST_GRAPHS if self.has_room else self._is_settled
        return settled and self._passes[key] > _PASSES_BEFORE and not self.failure

    def release(self) -> None:
        """Forget the graphs and give their memory back; they are recorded anew."""
        if self._pool is not None:
            self._graphs.clear()
            self._refreshing = self._pool = None
            torch.cuda.empty_cache()

    def _record(self, key: Hashable, batch: FixedBatch) -> _Graph | None:
        if not self._hold_gradients():
            self.failure = "gradients do not stay in place"
            return None
        # What a recorded pass found out of date it would bring up to date in every replay.
        has_refresh = self._refresh()
        fixed, stream = batch.fixed(any_lengths=self._any_lengths), torch.cuda.current_stream()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            if has_refresh and self._refreshing is None:
                self._refreshing = self._capture(self._refresh)
            self._graphs[key] = _Graph(
                fixed, self._capture(lambda: self._run(fixed, self._factor, self._sums))
            )
            return self._graphs[key]
        except RuntimeError as error:
            # Nothing was computed. Step by step it may well fit, or run.
            self.failure = name_cause(error)
        finally:
            leave_recording(stream, self._pool)
        # Only now, when no traceback holds them any more, can the pass's tensors go.
        self.release()
        return None

    def _capture(self, function: Callable[[], object]) -> torch.cuda.CUDAGraph:
        return record(function, self._pool)

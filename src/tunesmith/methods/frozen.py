"""The model as training found it, without a second one: its trained tensors are kept and put back for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tunesmith.models.causal_lm import CausalLM


class FrozenStart:
    """What a model's trained tensors were when this was made: of adapters next to nothing, of all weights a copy.

    A score (value, reward) is no part of it: nobody asks the reference for one.
    """

    def __init__(self, model: CausalLM) -> None:
        scores = set() if model.score is None else {id(p) for p in model.score.parameters()}
        self._model = model
        self._trained = [p for p in model.trainable_parameters() if id(p) not in scores]
        self._start = [p.detach().clone() for p in self._trained]

    @contextmanager
    def restored(self) -> Iterator[CausalLM]:
        """The model with its first weights, inside the `with`; nothing may train there."""
        now = [p.detach().clone() for p in self._trained]
        self._put(self._start)
        try:
            yield self._model
        finally:
            self._put(now)

    def put_back(self) -> None:
        """Let the model go on as it was when this was made."""
        self._put(self._start)

    @torch.no_grad()
    def _put(self, tensors: list[torch.Tensor]) -> None:
        for parameter, tensor in zip(self._trained, tensors, strict=True):
            # In place: whatever is computed from a weight tells by its version that it changed.
            parameter.copy_(tensor)
        refresh = getattr(self._model, "refresh", None)
        if refresh is not None:
            refresh()

"""Tokens that all rows start with (a few-shot prompt), run once: their keys and values serve every row.

T: tokens of a batch behind the prefix, P: prefix tokens, K: target tokens, D: width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.core.types import TokenRow
from tunesmith.models.cache import LayerCache, PrefillView
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.decoder import Decoder
from tunesmith.models.layout import Batch, make_layout, pad_length

MIN_SHARED = 64
"""Shorter prefixes are not worth a pass of their own."""


def count_shared(rows: Sequence[TokenRow]) -> int:
    """Tokens that all rows start with and that no row needs a prediction from: the first target's source stays out."""
    if len(rows) < 2:
        return 0
    first = list(rows[0].ids)
    shared = len(first)
    for row in rows:
        limit = next((at for at, bit in enumerate(row.mask) if bit), len(row.mask)) - 1
        shared = max(0, min(shared, limit))
        if list(row.ids[:shared]) != first[:shared]:
            shared = next(at for at in range(shared) if row.ids[at] != first[at])
    return shared


class SharedPrefix:
    """Keys and values of a prefix in every layer of a model."""

    def __init__(self, model: Decoder, ids: Sequence[int]) -> None:
        self._model, self.num_tokens = model, len(ids)
        ids_P = torch.tensor(list(ids), device=model.device)
        caches = _make_caches(model, 1, pad_length(len(ids)))
        view = PrefillView.of(make_layout([len(ids)], device=model.device))
        model.step(
            ids_P, torch.arange(len(ids), device=model.device), caches, view, torch.zeros_like(ids_P[:1])
        )
        self._layers = [(c.k[0, :, : len(ids)].clone(), c.v[0, :, : len(ids)].clone()) for c in caches]

    def run(self, batch: Batch) -> Tensor:
        """Hidden states (K, D) at the sources of a batch of rows cut behind the prefix."""
        model, layout = self._model, batch.layout
        caches = _make_caches(model, len(layout.lengths), pad_length(layout.max_length))
        for cache, layer in zip(caches, self._layers, strict=True):
            cache.prefix = layer
        positions_T = layout.positions_T + self.num_tokens
        return model.step(batch.ids_T, positions_T, caches, PrefillView.of(layout), batch.sources_K)


def find_shared_prefix(model: CausalLM, rows: Sequence[TokenRow]) -> SharedPrefix | None:
    """The common beginning of all rows, run once; None where there is too little of it, or the model cannot.

    A sliding window would have to hide part of the prefix from late tokens, so such models run whole rows.
    """
    if not isinstance(model, Decoder) or any(model.config.windows):
        return None
    shared = count_shared(rows)
    return SharedPrefix(model, rows[0].ids[:shared]) if shared >= MIN_SHARED else None


def _make_caches(model: Decoder, slots: int, capacity: int) -> list[LayerCache]:
    config = model.config
    return [
        LayerCache(
            slots,
            capacity,
            kv_heads=config.num_kv_heads,
            width=config.head_dim,
            dtype=model.dtype,
            device=model.device,
        )
        for _ in range(config.num_layers)
    ]

"""Tokens that all rows start with (a few-shot prompt), run once: their keys and values serve every row."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tunesmith.core.types import TokenRow
from tunesmith.models.cache import PrefillView, Session, SharedPrefix
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.decoder import Decoder
from tunesmith.models.layout import Batch

MIN_SHARED = 64
"""Shorter prefixes are not worth a pass of their own."""


def find_shared_prefix(model: CausalLM, rows: Sequence[TokenRow]) -> SharedPrefix | None:
    """The common beginning of all rows, run once; None where there is too little of it, or the model cannot."""
    if not isinstance(model, Decoder) or not model.shares_prefix:
        return None
    shared = count_shared(rows)
    return SharedPrefix.of(model, list(rows[0].ids[:shared])) if shared >= MIN_SHARED else None


def count_shared(rows: Sequence[TokenRow]) -> int:
    """Tokens that all rows start with, short of the token that any row's first target is predicted from."""
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


def run_behind(model: Decoder, prefix: SharedPrefix, batch: Batch) -> Tensor:
    """Hidden states (K, D) at the sources of a batch of rows cut behind the prefix, ascending in length."""
    layout = batch.layout
    rows = [ids.tolist() for ids in batch.ids_T.split(list(layout.lengths))]
    session = Session(model, rows, max_new_tokens=0, prefix=prefix)
    positions_T = layout.positions_T + prefix.length
    return model.step(batch.ids_T, positions_T, session.caches, PrefillView.of(layout), batch.sources_K)

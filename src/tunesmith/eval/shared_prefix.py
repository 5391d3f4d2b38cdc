"""Tokens that all rows start with (a few-shot prompt), run once: their keys and values serve every row."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.core.types import TokenRow
from tunesmith.models.cache import SharedPrefix
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.decoder import Decoder

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

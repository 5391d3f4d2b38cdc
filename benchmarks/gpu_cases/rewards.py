"""What the benchmark's answers are worth: a function that both sides call with the same arguments."""

from __future__ import annotations

from typing import Any


def even_tokens(completion_ids: list[list[int]], **_columns: Any) -> list[float]:
    """Share of an answer's tokens that have an even id: next to nothing to compute, and no two answers alike."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]

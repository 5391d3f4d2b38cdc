"""Does a reward model know how sure it is: its probabilities of which answer wins, against which one did.

A Bradley-Terry model says sigmoid(score of a - score of b) that a is preferred. Of a pair it bets on the answer of the
higher score, with that probability, 0.5 or more; bets of 80% should be won eight times of ten.

P: pairs
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

BINS = 10


def measure_calibration(margins_P: Sequence[float], *, bins: int = BINS) -> dict[str, Any]:
    """`log_loss` (nats, ln 2 for coin flips), `brier` (0.25 for coin flips), `calibration_error` and `bins`.

    margins_P: score of the chosen answer minus that of the rejected one.
    calibration_error: |share won - mean probability| over bins of equal width in probability, weighted by their pairs
    (expected calibration error, Naeini et al. 2015). bins: `low`, `high`, `pairs`, `probability`, `won`; a tie is half
    won. Empty bins are left out.
    """
    margins = np.asarray(margins_P, dtype=np.float64)
    if not len(margins):
        raise ValueError("no pair to measure calibration on")
    sure = 1 / (1 + np.exp(-np.abs(margins)))
    won = np.where(margins == 0, 0.5, margins > 0)
    places = np.minimum(((sure - 0.5) * 2 * bins).astype(int), bins - 1)
    found: list[dict[str, float]] = []
    for place in range(bins):
        mine = places == place
        if mine.any():
            edges = {"low": 0.5 + place / (2 * bins), "high": 0.5 + (place + 1) / (2 * bins)}
            means = {"probability": float(sure[mine].mean()), "won": float(won[mine].mean())}
            found.append({**edges, "pairs": int(mine.sum()), **means})
    error = sum(row["pairs"] * abs(row["won"] - row["probability"]) for row in found) / len(margins)
    return {
        # log(1 + exp(-margin)) without overflow
        "log_loss": float(np.logaddexp(0.0, -margins).mean()),
        "brier": float(np.mean((1 - 1 / (1 + np.exp(-np.clip(margins, -700, 700)))) ** 2)),
        "calibration_error": float(error),
        "bins": found,
    }

"""Whether a contender computes the gradients it is timed for: against fp32, allowing what its precision costs.

The yardstick for bf16 is the same eager code in bf16: a contender may be three times as far from fp32 as that. For fp8
it is eager code whose frozen products are fp8's by definition: half as far again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Times the distance of plain code in the same precision from fp32, and at least this much.
ALLOWED_NOISE = {"rounded": 3.0, "rounded-fp8": 1.5}
LEAST_TOTAL, LEAST_WORST = 0.01, 0.05
# Of the loss, relative.
ALLOWED_LOSS = 0.005


@dataclass(frozen=True)
class Distance:
    """total: norm of the difference of all gradients over the norm of the reference's; worst: the largest such ratio
    of a single tensor, and which one."""

    total: float
    worst: float
    worst_name: str


@dataclass(frozen=True)
class Parity:
    """What the gate saw. `passed` decides whether a contender is timed."""

    passed: bool
    reason: str
    distance: Distance
    allowed_total: float
    allowed_worst: float
    loss: float
    reference_loss: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def split_name(name: str) -> list[str]:
    """Names behind a merged matrix: `a.q_proj+k_proj.weight` -> `a.q_proj.weight`, `a.k_proj.weight`."""
    stem, _, kind = name.rpartition(".")
    first, *others = stem.split("+")
    parent = first.rpartition(".")[0]
    return [f"{first}.{kind}", *(f"{parent}.{other}.{kind}" for other in others)]


def measure_distance(gradients: Path, reference: Path) -> Distance:
    """Distance of two files of gradients. Raises ValueError if one has a tensor that the other lacks."""
    from safetensors import safe_open

    with safe_open(str(gradients), "numpy") as found, safe_open(str(reference), "numpy") as wanted:
        names = sorted(found.keys())
        parts = {name: split_name(name) for name in names}
        missing = set(wanted.keys())
        for part in (part for name in names for part in parts[name]):
            if part not in missing:
                raise ValueError(f"the reference has no gradient of {part}")
            missing.remove(part)
        if missing:
            raise ValueError(f"no gradient of {sorted(missing)[0]}")

        def compare(name: str) -> tuple[float, float]:
            """Squared norms of the difference and of the truth."""
            truths = [wanted.get_tensor(part) for part in parts[name]]
            truth = truths[0] if len(truths) == 1 else np.concatenate(truths)
            truth = truth.astype(np.float32, copy=False)
            return _square(found.get_tensor(name).astype(np.float32, copy=False) - truth), _square(truth)

        # Gradients of full fine-tuning are gigabytes.
        with ThreadPoolExecutor(4) as pool:
            squares = dict(zip(names, pool.map(compare, names), strict=True))
    worst, worst_name = 0.0, ""
    for name, (difference, norm) in squares.items():
        ratio = math.sqrt(difference / norm) if norm else (math.inf if difference else 0.0)
        # `not <=`: a NaN is the worst there is.
        if not ratio <= worst:
            worst, worst_name = ratio, name
    total = sum(difference for difference, _ in squares.values()) / sum(norm for _, norm in squares.values())
    return Distance(math.sqrt(total), worst, worst_name)


def _square(values: np.ndarray) -> float:
    flat = values.ravel()
    return float(np.dot(flat, flat))


def measure_noise(folder: Path, kind: str = "rounded") -> Distance:
    """How far plain code in bf16, or with products in fp8, is from the reference; measured once, the file is large."""
    kept, rounded = folder / f"noise-{kind}.json", folder / f"{kind}.safetensors"
    if not kept.is_file():
        noise = measure_distance(rounded, folder / "reference.safetensors")
        kept.write_text(json.dumps(asdict(noise)), encoding="utf-8")
        rounded.unlink()
    return Distance(**json.loads(kept.read_text(encoding="utf-8")))


def check_parity(
    folder: Path, gradients: Path, answer: Mapping[str, Any], *, fp8: bool, exact: bool = False
) -> Parity:
    """Hold a contender's gradients to the reference in `folder` (reference.py).

    exact: the contender computes in fp32 itself, so that bf16's noise is no excuse.
    """
    losses = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    distance = measure_distance(gradients, folder / "reference.safetensors")
    if exact:
        total, worst = 1e-3, 1e-2
    else:
        kind = "rounded-fp8" if fp8 else "rounded"
        noise, times = measure_noise(folder, kind), ALLOWED_NOISE[kind]
        total, worst = max(times * noise.total, LEAST_TOTAL), max(times * noise.worst, LEAST_WORST)
    reasons: list[str] = []
    if not distance.total <= total:
        reasons.append(f"gradients are {distance.total:.3g} from fp32, allowed {total:.3g}")
    if not distance.worst <= worst:
        reasons.append(f"{distance.worst_name} is {distance.worst:.3g} from fp32, allowed {worst:.3g}")
    if not abs(answer["loss"] - losses["reference"]) <= ALLOWED_LOSS * losses["reference"]:
        reasons.append(f"the loss is {answer['loss']:.5f}, in fp32 {losses['reference']:.5f}")
    return Parity(
        passed=not reasons,
        reason="; ".join(reasons),
        distance=distance,
        allowed_total=total,
        allowed_worst=worst,
        loss=answer["loss"],
        reference_loss=losses["reference"],
    )

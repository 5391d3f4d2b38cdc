"""The jobs of `tunesmith demo`: what is compared on the bundled model and data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tunesmith.core.bundled import BUNDLED
from tunesmith.job.load import load_job
from tunesmith.job.spec import Job


def demo_job(
    overrides: Sequence[str] = (),
    *,
    about: Literal["methods", "alignment"] = "methods",
    seeds: int | None = None,
) -> Job:
    """The job of `tunesmith demo`.

    about: `methods` compares prompting, retrieval and fine-tuning; `alignment` SFT with what goes on from it.
    seeds: how many; default: as the job says. Overrides come after.
    """
    file = BUNDLED["tunesmith/tickets"].parent / ("demo.yaml" if about == "methods" else "align.yaml")
    counted = [] if seeds is None else [f"compare.seeds={list(range(seeds))}"]
    return load_job(file, [*counted, *overrides])

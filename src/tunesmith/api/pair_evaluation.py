"""Score a model on pairs of a chosen and a rejected answer: a reward model by its scores, any other by likelihood."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tunesmith.api.alignment import score_pairs
from tunesmith.api.evaluation import Target, check_target, find_target, load_target, open_scores
from tunesmith.comparing.stats import RatioSample, paired_bootstrap
from tunesmith.core.events import Event, OnEvent, ignore_event
from tunesmith.core.jsonl import read_json, write_json, write_jsonl
from tunesmith.core.records import RunRecord
from tunesmith.core.rundir import RunDir
from tunesmith.data.batch import plan_micro_batches
from tunesmith.data.prepare import Prepared, prepare_data
from tunesmith.data.sources import find_sources
from tunesmith.eval.calibration import measure_calibration
from tunesmith.job.load import job_from
from tunesmith.job.spec import SourceSpec
from tunesmith.models.config import load_config

if TYPE_CHECKING:
    from tunesmith.models.causal_lm import CausalLM

BUDGET_TOKENS = 8192


def evaluate_pairs(
    target: str | Path,
    *,
    pairs: str | Path,
    out: str | Path | None = None,
    max_rows: int | None = None,
    template: str | None = None,
    base: str | None = None,
    on_bad_row: Literal["refuse", "skip"] = "refuse",
    on_event: OnEvent = ignore_event,
) -> dict[str, Any]:
    """How often a model prefers the chosen answer, with a 95% interval; of a reward model also how well its
    probabilities are calibrated.

    target: as in `evaluate`, or a run of objective reward, or a reward model's folder.
    pairs:  file, folder (its test split), bundled name or hub id.
    out:    folder that keeps `pairs.json` and `preferences.jsonl`.
    """
    found = _find_model(str(target), base=base)
    tokenizer = check_target(found)
    scored = load_config(found.model_folder).is_classifier
    test = "auto" if "test" in find_sources(SourceSpec(path=str(pairs))) else str(pairs)
    job = job_from(
        {
            "model": found.model_name,
            "data": {
                "train": str(pairs),
                "split": {"validation": 0.0, "test": test},
                "template": template or found.template,
                "max_tokens": 1 << 20,
                "deduplicate": "none",
            },
        }
    )
    with tempfile.TemporaryDirectory() as scratch, open_scores(out or scratch) as run:
        on_event(Event("stage", text="Preparing pairs"))
        prepared = prepare_data(
            job,
            tokenizer=tokenizer,
            folder=Path(scratch) / "prepared",
            on_bad_row=on_bad_row,
            splits=("test",),
            rejects=run.rejects,
            rows="pairs",
        )
        on_event(Event("stage", text="Scoring pairs"))
        rows = (_score if scored else _weigh)(found, prepared, max_rows)
        record = {"schema": 1, "model": found.model_name, "scored_by": "reward" if scored else "likelihood"}
        record |= _summarise(rows, calibrated=scored) | {
            "data_sha256": prepared.fingerprints["test_sha256"],
            # The pairs stand in for training rows, too, so that nothing else it says of them is news.
            "warnings": [f.message for f in prepared.report.findings if f.code == "rejected_rows"],
        }
        write_jsonl(run.pair_scores, rows)
        write_json(run.root / "pairs.json", record)
    return record


def _find_model(name: str, *, base: str | None) -> Target:
    """A run of objective reward is scored by the classifier that it made."""
    run = RunDir(Path(name).expanduser())
    if run.record.is_file():
        record = RunRecord.from_json(read_json(run.record), place=str(run.record))
        if record.objective == "reward":
            return replace(find_target(str(run.model)), model_name=record.model)
    return find_target(name, base=base)


def _score(target: Target, prepared: Prepared, max_rows: int | None) -> list[dict[str, Any]]:
    """A reward model's scores of both answers."""
    import torch

    from tunesmith.api.devices import pick_device, pick_dtype
    from tunesmith.methods.objectives import score_answers
    from tunesmith.models.layout import make_batch
    from tunesmith.models.load import load_model

    device = pick_device()
    model: CausalLM = load_model(
        target.model_folder, device=device, dtype=pick_dtype("auto", device), classifier=True
    )
    rows = prepared.rows("test")[: None if max_rows is None else 2 * max_rows]
    scores = [0.0] * len(rows)
    with torch.no_grad():
        for numbers in plan_micro_batches([len(row.ids) for row in rows], budget_tokens=BUDGET_TOKENS):
            batch = make_batch([rows[n] for n in numbers], device=device)
            for n, value in zip(numbers, score_answers(model, batch).tolist(), strict=True):
                scores[n] = value
    clusters = prepared.clusters("test")
    return [
        _as_row(n // 2, rows[n].origin.place, clusters[n], scores[n : n + 2]) for n in range(0, len(rows), 2)
    ]


def _weigh(target: Target, prepared: Prepared, max_rows: int | None) -> list[dict[str, Any]]:
    """Any other model's log-probabilities per token of both answers."""
    found = score_pairs(load_target(target), prepared)[:max_rows]
    return [
        _as_row(
            pair.row,
            pair.place,
            pair.cluster,
            [logp / max(1, tokens) for logp, tokens in zip(pair.logps, pair.tokens, strict=True)],
        )
        for pair in found
    ]


def _as_row(row: int, place: str, cluster: str, values: Sequence[float]) -> dict[str, Any]:
    return {"row": row, "place": place, "cluster": cluster, "chosen": values[0], "rejected": values[1]}


def _summarise(rows: Sequence[dict[str, Any]], *, calibrated: bool) -> dict[str, Any]:
    margins = [row["chosen"] - row["rejected"] for row in rows]
    right = np.array([[0.5 if margin == 0 else float(margin > 0) for margin in margins]])
    sample = RatioSample(right, np.ones_like(right), is_share=True)
    estimate = paired_bootstrap([sample], [row["cluster"] for row in rows]).estimate(0)
    accuracy = {"accuracy": estimate.value, "low": _or_none(estimate.low), "high": _or_none(estimate.high)}
    found = {"pairs": len(rows), **accuracy, "margin": fmean(margins)}
    return found | (measure_calibration(margins) if calibrated else {})


def _or_none(bound: float) -> float | None:
    return None if np.isnan(bound) else bound

"""What each storage of a frozen base costs on trained weights: its loss, and the loss of LoRA trained on it.

    .venv/bin/python benchmarks/low_precision.py [--steps 80] [MODEL_FOLDER ...]          (minutes on a CPU)

On a CPU fp8 products are emulated: codes as on a GPU, sums in fp32. Losses of the bundled model are measured on its
general text and on 320 tickets, those of other folders on the text. `spread`: standard deviation of the relative
difference from bf16 over groups of 16 rows, one optimizer step; the check before the first step sees one such group.
Writes benchmarks/results/low_precision.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tunesmith.api.comparing import GENERAL_TEXT
from tunesmith.api.devices import pick_device
from tunesmith.api.trainable import load_trainable
from tunesmith.core.fingerprint import describe_hardware, describe_versions
from tunesmith.core.jsonl import write_json
from tunesmith.core.rundir import RunDir
from tunesmith.core.types import TokenRow
from tunesmith.data.prepare import prepare_data
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.eval.forgetting import read_general_text
from tunesmith.eval.nll import RowScore, score_rows, summarize_scores
from tunesmith.job.load import job_from
from tunesmith.job.resolve import resolve_model
from tunesmith.job.spec import ModelSpec
from tunesmith.methods.sft import sft_loss
from tunesmith.models.layout import make_batch
from tunesmith.models.load import load_model
from tunesmith.models.packed import PackedRows
from tunesmith.training.loop import train

RESULT = Path(__file__).parent / "results" / "low_precision.json"
BASES: dict[str, dict[str, Any]] = {
    "bf16": {"name": "lora"},
    "int8": {"name": "lora", "base": "int8"},
    "fp8": {"name": "lora", "base": "fp8"},
    "nf4": {"name": "qlora"},
    "nf4 to fp8": {"name": "qlora", "compute": "fp8"},
}
GROUP = 16


def load_base(folder: Path, method: dict[str, Any]) -> Any:
    base = method.get("base", "nf4" if method["name"] == "qlora" else "full")
    return load_model(
        folder,
        device=pick_device(),
        dtype=torch.bfloat16,
        base=base,
        compute=method.get("compute", "auto"),
    )


def compare_scores(found: Sequence[RowScore], reference: Sequence[RowScore]) -> dict[str, float]:
    """Relative difference of the mean loss, and its standard deviation over groups of rows."""
    ends = range(GROUP, len(found) + 1, GROUP)
    groups = [
        sum(row.nll for row in found[end - GROUP : end])
        / sum(row.nll for row in reference[end - GROUP : end])
        - 1
        for end in ends
    ]
    loss = summarize_scores(found)["nll"]
    return {
        "loss": loss,
        "difference": loss / summarize_scores(reference)["nll"] - 1,
        "spread": statistics.stdev(groups) if len(groups) > 2 else float("nan"),
    }


def measure_bases(folder: Path, rows: Sequence[TokenRow]) -> dict[str, dict[str, float]]:
    reference = score_rows(load_base(folder, BASES["bf16"]), rows)
    measured = {"bf16": compare_scores(reference, reference)}
    for name, method in list(BASES.items())[1:]:
        model = load_base(folder, method)
        measured[name] = compare_scores(score_rows(model, rows), reference)
        if name == "fp8":
            packed = [p.packed for p in model.projections() if isinstance(p.packed, PackedRows)]
            for each in packed:
                each.scaling = "tensor"
            measured["fp8, one scale per tensor"] = compare_scores(score_rows(model, rows), reference)
            for each in packed:
                each.compute = "auto"
            measured["fp8, weights only"] = compare_scores(score_rows(model, rows), reference)
    return measured


def train_adapters(scratch: Path, *, steps: int, seeds: Sequence[int]) -> dict[str, list[dict[str, float]]]:
    """LoRA on tickets on each base; the check before the first step is left out."""
    found: dict[str, list[dict[str, float]]] = {}
    for name, method in BASES.items():
        for seed in seeds:
            job = job_from(
                {
                    "model": "tunesmith/tiny",
                    "data": {"train": "tunesmith/tickets"},
                    "method": method,
                    "train": {"steps": steps, "evaluate_every": "never", "seed": seed, "learning_rate": 2e-3},
                }
            )
            folder = resolve_model(job.model_spec).folder
            tokenizer = load_tokenizer(folder)
            run = RunDir(scratch / f"{name} {seed}").create()
            prepared = prepare_data(job, tokenizer=tokenizer, folder=run.prepared)
            model = load_trainable(job, folder, tokenizer, pick_device(), torch.bfloat16)
            losses: list[float] = []
            train(
                model,
                prepared.rows("train"),
                job.train,
                run,
                make_batch=lambda rows, where: make_batch(rows, device=where, round_tokens=128),
                loss=sft_loss,
                evaluate=None,
                on_step=lambda progress, kept=losses: kept.append(progress.loss),
                resume=False,
                identity={},
            )
            rows = list(prepared.rows("validation"))[:160]
            result = {
                "last_losses": statistics.mean(losses[-20:]),
                "validation": summarize_scores(score_rows(model.eval(), rows))["nll"],
            }
            found.setdefault(name, []).append(result)
            print(f"LoRA on {name}, seed {seed}: {result}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--steps", type=int, default=80)
    chosen = parser.parse_args()
    tiny = resolve_model(ModelSpec(name="tunesmith/tiny")).folder
    with tempfile.TemporaryDirectory() as scratch:
        job = job_from({"model": "tunesmith/tiny", "data": {"train": "tunesmith/tickets"}})
        prepared = prepare_data(job, tokenizer=load_tokenizer(tiny), folder=Path(scratch) / "prepared")
        sets = {"tunesmith/tiny, tickets": (tiny, list(prepared.rows("train"))[:320])}
        for folder in (tiny, *chosen.folders):
            rows = read_general_text(GENERAL_TEXT, load_tokenizer(folder), max_windows=96)
            sets[f"{'tunesmith/tiny' if folder == tiny else folder.name}, text"] = (folder, rows)
        losses = {}
        for name, (folder, rows) in sets.items():
            losses[name] = measure_bases(folder, rows)
            for base, value in losses[name].items():
                print(
                    f"{name:28} {base:26} {value['loss']:.4f} {value['difference']:+.3%} +- {value['spread']:.3%}",
                    flush=True,
                )
        trained = train_adapters(Path(scratch), steps=chosen.steps, seeds=(0, 1))
    record = {
        "schema": 1,
        "losses": losses,
        "lora": {"steps": chosen.steps, "learning_rate": 2e-3, "by_base": trained},
        "versions": describe_versions(),
        "hardware": {**describe_hardware(), "threads": torch.get_num_threads()},
    }
    write_json(RESULT, record)


if __name__ == "__main__":
    main()

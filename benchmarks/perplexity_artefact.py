"""How a perplexity of hundreds of thousands becomes 1.4: pads and prompt in the loss, and a doubled BOS.

A widely copied notebook pads every row with EOS to a fixed length, takes `labels = input_ids`, writes BOS into the text
and lets the tokenizer add another. This script does that to the bundled model and data, beside the honest measure:

    .venv/bin/python benchmarks/perplexity_artefact.py          (minutes on a CPU)

Each of base, LoRA and full is trained twice, on artefact rows and on honest rows, and every result is measured both
ways. Writes benchmarks/results/perplexity_artefact.json and prints the table of docs/perplexity-artefact.md.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tunesmith.api.devices import pick_device, pick_dtype
from tunesmith.api.trainable import load_trainable
from tunesmith.core.fingerprint import describe_hardware, describe_versions, hash_row
from tunesmith.core.jsonl import write_json
from tunesmith.core.rundir import RunDir
from tunesmith.core.types import TokenRow
from tunesmith.data.prepare import prepare_data
from tunesmith.data.tokenizer import Tokenizer, load_tokenizer
from tunesmith.eval.nll import score_rows, summarize_scores
from tunesmith.job.load import job_from
from tunesmith.job.resolve import resolve_model
from tunesmith.job.spec import Job
from tunesmith.methods.sft import sft_loss
from tunesmith.models.layout import make_batch
from tunesmith.training.loop import train

RESULT = Path(__file__).parent / "results" / "perplexity_artefact.json"
RATES = {"lora": 2e-3, "full": 1e-3}


def spoil_row(row: TokenRow, tokenizer: Tokenizer, *, length: int) -> TokenRow:
    """The row as the notebook makes it: BOS twice, EOS up to `length`, every token a target."""
    assert tokenizer.bos_id is not None
    pad = tokenizer.eos_ids[0]
    ids = [tokenizer.bos_id, *row.ids][:length]
    ids += [pad] * (length - len(ids))
    mask = [0] + [1] * (length - 1)
    return replace(row, ids=ids, mask=mask, row_id=hash_row(ids, mask))


def measure(model: Any, rows: Sequence[TokenRow]) -> float:
    """NLL, nats per target token."""
    return summarize_scores(score_rows(model.eval(), rows))["nll"]


def train_on(job: Job, method: str, rows: Sequence[TokenRow], folder: Path, tokenizer: Tokenizer) -> Any:
    """A model trained by `method` on `rows` for the job's epochs; None rows leave the base as it is."""
    device = pick_device()
    job = job.model_copy(update={"method": method})
    model = load_trainable(job, folder, tokenizer, device, pick_dtype("auto", device))
    spec = job.train.model_copy(update={"learning_rate": RATES[method], "save_every": "never"})
    with tempfile.TemporaryDirectory() as scratch:
        train(
            model,
            rows,
            spec,
            RunDir(Path(scratch)),
            make_batch=lambda batch, where: make_batch(batch, device=where),
            loss=sft_loss,
        )
    return model


def run(job: Job, *, length: int, test_rows: int) -> dict[str, Any]:
    """Every arm under both ways of training and both ways of measuring."""
    base = resolve_model(job.model_spec)
    tokenizer = load_tokenizer(base.folder)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare_data(job, tokenizer=tokenizer, folder=Path(scratch) / "prepared")
        honest = list(prepared.rows("train")[:])
        test = list(prepared.rows("test")[:])[:test_rows]
        spoiled = [spoil_row(row, tokenizer, length=length) for row in honest]
        spoiled_test = [spoil_row(row, tokenizer, length=length) for row in test]
        device = pick_device()
        untouched = load_trainable(
            job.model_copy(update={"method": "lora"}),
            base.folder,
            tokenizer,
            device,
            pick_dtype("auto", device),
        )
        arms = [{"arm": "base", "trained_on": "-", "parameters": 0, **_both(untouched, test, spoiled_test)}]
        for method in ("lora", "full"):
            for name, rows in (("artefact rows", spoiled), ("honest rows", honest)):
                started = time.perf_counter()
                model = train_on(job, method, rows, base.folder, tokenizer)
                trained = sum(p.numel() for p in model.trainable_parameters())
                arms.append(
                    {
                        "arm": method,
                        "trained_on": name,
                        "parameters": trained,
                        **_both(model, test, spoiled_test),
                    }
                )
                print(f"{method} on {name}: {time.perf_counter() - started:.0f} s", flush=True)
    num_pads = sum(length - 1 - len(row.ids) for row in test)
    return {
        "arms": arms,
        "uniform_nll": math.log(tokenizer.vocab_size),
        "pad_share": num_pads / (len(test) * (length - 1)),
        "padded_length": length,
        "test_rows": len(test),
        "train_rows": len(honest),
    }


def _both(model: Any, test: Sequence[TokenRow], spoiled: Sequence[TokenRow]) -> dict[str, float]:
    return {"artefact_nll": measure(model, spoiled), "honest_nll": measure(model, test)}


def format_table(result: dict[str, Any]) -> str:
    """The table of docs/perplexity-artefact.md."""
    lines = [
        "| arm | trained on | trained parameters | perplexity, the notebook's | perplexity, honest | NLL, honest |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for arm in result["arms"]:
        lines.append(
            f"| {arm['arm']} | {arm['trained_on']} | {arm['parameters']:,} | {_perplexity(arm['artefact_nll'])} "
            f"| {_perplexity(arm['honest_nll'])} | {arm['honest_nll']:.4f} |"
        )
    return "\n".join(lines)


def _perplexity(nll: float) -> str:
    value = math.exp(nll)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tunesmith/tiny")
    parser.add_argument("--data", default="tunesmith/tickets")
    parser.add_argument("--length", type=int, default=512, help="padded length, tokens")
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    job = job_from(
        {
            "model": args.model,
            "data": {"train": args.data},
            "train": {"steps": args.steps, "evaluate_every": "never"},
        }
    )
    result = run(job, length=args.length, test_rows=args.test_rows)
    result |= {
        "command": f"{Path(__file__).name} --length {args.length} --test-rows {args.test_rows} --steps {args.steps}",
        "model": args.model,
        "data": args.data,
        "seed": 0,
        "versions": describe_versions(),
        "hardware": describe_hardware(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    print(format_table(result))


if __name__ == "__main__":
    main()

"""DPO on a CPU: Tunesmith against TRL's DPOTrainer + PEFT, interleaved in one run, on the same tokens.

    python benchmarks/cpu_dpo_vs_trl.py                       # after `make benchmark-trl` has made both environments
    python benchmarks/cpu_dpo_vs_trl.py --steps 10 --rounds 2

LoRA on the bundled model. Pairs are made from the bundled tickets: the right record is chosen, the same one with two
values of another ticket rejected. Both sides get the same token ids, the same pairs in each optimizer step, and take
one epoch. Before anything is timed, both train the first steps in fp32 from the same adapters: the first loss must be
ln 2 and all of them equal.

TRL runs twice: as its documentation starts it (`DPOConfig` defaults), and with the best settings that we found for it
here: the reference's log-probabilities computed before training or in every step, fp32, bf16 and autocast, pairs of a
forward pass, no recomputation. (`padding_free` is switched off in TRL's DPOTrainer, 1.15 and 1.16.) The seconds are
those of training with the reference's pass; ours also hold loading the model and saving the adapter.

Writes benchmarks/results/cpu_vs_trl_dpo.json with all single measurements, hardware, versions, commit and command.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from cpu_vs_trl import (
    BEST,
    DEFAULTS,
    LORA,
    OURS,
    RESULT,
    TRL_PYTHON,
    Bench,
    Measured,
    check_same_work,
    compute_ratios,
    copy_bundled,
    describe_hardware,
    find_best_settings,
    print_table,
    read_commit,
    read_rows,
    run_trl,
    say,
    train_ours,
)
from gpu_cases.inputs import write_adapter

DPO_RESULT = RESULT.with_name("cpu_vs_trl_dpo.json")
LEARNING_RATE = 1e-4
PARITY_STEPS = 5
# Relative, in fp32 and over the first steps.
ALLOWED_LOSS = 1e-5

_LEAN = {"gradient_checkpointing": False, "logging_strategy": "no", "disable_tqdm": True}
_ONCE = {**_LEAN, "precompute_ref_log_probs": True}
_FP32, _BF16 = ("float32", False), ("bfloat16", False)
_AUTOCAST = ("float32", True)


def _setting(dtype: tuple[str, bool], dpo: dict[str, Any], micro_rows: int) -> dict[str, Any]:
    weights, autocast = dtype
    return {"weights": weights, "dpo": {**dpo, "bf16": autocast}, "micro_rows": micro_rows}


CANDIDATES: dict[str, dict[str, Any]] = {
    "fp32, reference in every step, 8 pairs": _setting(_FP32, _LEAN, 8),
    "fp32, reference once, 8 pairs": _setting(_FP32, _ONCE, 8),
    "fp32, reference once, 4 pairs": _setting(_FP32, _ONCE, 4),
    "fp32, reference once, 2 pairs": _setting(_FP32, _ONCE, 2),
    "bf16 weights, reference in every step, 8 pairs": _setting(_BF16, _LEAN, 8),
    "bf16 weights, reference once, 8 pairs": _setting(_BF16, _ONCE, 8),
    "bf16 weights, reference once, 4 pairs": _setting(_BF16, _ONCE, 4),
    "bf16 weights, reference once, 2 pairs": _setting(_BF16, _ONCE, 2),
    "fp32 weights, autocast, reference in every step, 8 pairs": _setting(_AUTOCAST, _LEAN, 8),
    "fp32 weights, autocast, reference once, 8 pairs": _setting(_AUTOCAST, _ONCE, 8),
    "fp32 weights, autocast, reference once, 4 pairs": _setting(_AUTOCAST, _ONCE, 4),
    "fp32 weights, autocast, reference once, 2 pairs": _setting(_AUTOCAST, _ONCE, 2),
}


# --- the same pairs for both ------------------------------------------------------------------------------------------


def write_ticket_pairs(tickets: Path, path: Path, *, count: int) -> None:
    """Pairs of a right and a wrong record of a ticket: two values of the wrong one are another ticket's."""
    rows: list[Any] = read_rows(tickets / "train.jsonl")[: count + 1]
    with path.open("w", encoding="utf-8") as file:
        for row, other in pairwise(rows):
            *prompt, answer = row["messages"]
            chosen, strange = answer["content"], json.loads(other["messages"][-1]["content"])
            wrong = json.loads(chosen)
            changed = [key for key in wrong if key in strange and strange[key] != wrong[key]][-2:]
            wrong |= {key: strange[key] for key in changed} if changed else {"order": "unknown"}
            rejected = json.dumps(wrong, separators=(",", ":"), ensure_ascii=False)
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")


def write_pairs(prepared: Path, bench: Bench) -> None:
    """The pairs of our run in training order, as token ids."""
    from tunesmith.data.prepare import load_prepared
    from tunesmith.training.order import EpochOrder

    pairs = load_prepared(prepared).examples("train")
    order = EpochOrder(pairs, batch_rows=bench.batch_rows, seed=bench.seed)
    with bench.rows_file.open("w", encoding="utf-8") as file:
        for step in islice(order.steps_from(None), bench.steps):
            for pair in step.rows:
                chosen, rejected = ([*map(int, row.ids)] for row in pair.rows)  # type: ignore[union-attr]
                starts = {list(row.mask).index(1) for row in pair.rows}  # type: ignore[union-attr]
                assert len(starts) == 1, "the answers of a pair begin at one place"
                at = starts.pop()
                parts = {"prompt_ids": chosen[:at], "chosen_ids": chosen[at:], "rejected_ids": rejected[at:]}
                file.write(json.dumps(parts) + "\n")


# --- one run of TRL ---------------------------------------------------------------------------------------------------


def train_trl(
    bench: Bench,
    who: str,
    *,
    dpo: dict[str, Any],
    weights: str,
    micro_rows: int,
    steps: int | None = None,
    adapter: Path | None = None,
) -> Measured:
    """TRL on the pairs that our run trained on."""
    task = {
        "model": str(bench.model),
        "rows": str(bench.rows_file),
        "steps": steps or bench.steps,
        "batch_rows": bench.batch_rows,
        "micro_rows": min(micro_rows, bench.batch_rows),
        "lora": bench.lora,
        "learning_rate": bench.learning_rate,
        "seed": bench.seed,
        "dpo": dpo,
        "weights": weights,
        "adapter": adapter and str(adapter),
    }
    pairs = read_rows(bench.rows_file)[: task["steps"] * bench.batch_rows]
    answers = sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
    return run_trl(
        bench,
        who,
        task,
        worker="trl_dpo_worker.py",
        num_tokens=answers + 2 * sum(len(pair["prompt_ids"]) for pair in pairs),
        num_target_tokens=answers,
    )


# --- the whole --------------------------------------------------------------------------------------------------------


def check_losses(bench: Bench) -> dict[str, list[float]]:
    """Losses of the first steps on both sides, fp32, from the same adapters (B zero); stops here if they differ."""
    adapter = bench.folder / "adapter"
    config = json.loads((bench.model / "config.json").read_text(encoding="utf-8"))
    write_adapter(adapter, config, **LORA, seed=bench.seed, device="cpu", deviation_b=0.0)
    method = {"name": "lora", **LORA, "adapter": str(adapter)}
    short = replace(bench, steps=PARITY_STEPS, precision="fp32", job={**bench.job, "method": method})
    ours = train_ours(short, out=bench.folder / "parity")
    write_pairs(bench.folder / "parity" / "prepared", short)
    told = {"logging_steps": 1, "disable_tqdm": True, "gradient_checkpointing": False, "bf16": False}
    theirs = train_trl(short, "trl", dpo=told, weights="float32", micro_rows=8, adapter=adapter)
    check_same_work([ours, theirs])
    if not math.isclose(ours.losses[0], math.log(2), rel_tol=1e-6):
        raise SystemExit(f"our first loss is {ours.losses[0]}, not ln 2")
    for step, (mine, other) in enumerate(zip(ours.losses, theirs.losses, strict=True), 1):
        if not math.isclose(mine, other, rel_tol=ALLOWED_LOSS):
            raise SystemExit(f"the losses of step {step} differ: ours {mine}, TRL's {other}")
    say(f"the first losses agree: {', '.join(f'{loss:.6f}' for loss in ours.losses)}")
    return {"ours": ours.losses, "trl": theirs.losses}


def compare(bench: Bench, *, rounds: int, candidate_steps: int) -> dict[str, Any]:
    """All runs, interleaved. Returns the record that is written to disk."""
    parity = check_losses(bench)
    say("warm-up: our engine once, which also renders the rows")
    train_ours(bench, out=bench.folder / "warm-up")
    write_pairs(bench.folder / "warm-up" / "prepared", bench)
    say("TRL's best settings on this machine:")
    shortened = min(bench.steps, candidate_steps)
    best, tried = find_best_settings(
        lambda name: train_trl(bench, name, **CANDIDATES[name], steps=shortened), bench.candidates
    )
    runs: list[Measured] = []
    for number in range(1, rounds + 1):
        for who in (OURS, DEFAULTS, BEST):
            if who == OURS:
                measured = train_ours(bench, out=bench.folder / f"ours-{number}")
            elif who == DEFAULTS:
                measured = train_trl(bench, who, dpo={}, weights="auto", micro_rows=8)
            else:
                measured = train_trl(bench, who, **CANDIDATES[best])
            runs.append(measured)
            seconds = f"{measured.wall_seconds:6.2f} s  {measured.cpu_seconds:6.2f} CPU s"
            say(f"  round {number}/{rounds}  {seconds}  {who}")
    check_same_work(runs)
    return {
        "what": f"LoRA training on a CPU, {bench.what}",
        "steps": bench.steps,
        "batch_rows": bench.batch_rows,
        "lora": bench.lora,
        "threads": bench.threads,
        "our_precision": bench.precision,
        "seed": bench.seed,
        "rounds": rounds,
        "first_losses_fp32": parity,
        "trl_best_settings": {"name": best, **CANDIDATES[best]},
        "ratios": {who: compute_ratios(runs, who) for who in (DEFAULTS, BEST)},
        "runs": [asdict(run) for run in runs],
        "trl_candidates": tried,
        "hardware": describe_hardware(),
        "commit": read_commit(),
        "command": "python benchmarks/cpu_dpo_vs_trl.py " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def make_bench(
    folder: Path,
    *,
    steps: int,
    batch_rows: int,
    precision: str,
    threads: int,
    seed: int,
    candidates: Sequence[str] = tuple(CANDIDATES),
) -> Bench:
    """The bundled model, and as many pairs as the steps of one epoch take."""
    tickets, pairs = copy_bundled("tunesmith/tickets", folder), folder / "pairs.jsonl"
    write_ticket_pairs(tickets, pairs, count=steps * batch_rows)
    split = {"validation": 0.0, "test": 0.0}
    return Bench(
        folder=folder,
        what="DPO of tunesmith/tiny on pairs of tunesmith/tickets",
        model=copy_bundled("tunesmith/tiny", folder),
        data=pairs,
        steps=steps,
        batch_rows=batch_rows,
        seed=seed,
        threads=threads,
        precision=precision,
        candidates=tuple(candidates),
        learning_rate=LEARNING_RATE,
        job={"objective": "dpo", "data": {"train": str(pairs), "split": split}},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--batch-rows", type=int, default=8, help="pairs per step (8 is DPOConfig's default)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each side; 0 leaves it to torch")
    parser.add_argument("--precision", default="auto", help="ours: auto, bf16 or fp32")
    parser.add_argument("--candidate-steps", type=int, default=20, help="steps of each of TRL's settings")
    parser.add_argument(
        "--candidates", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES), metavar="NAME",
        help="TRL's settings tried, default all: " + "; ".join(CANDIDATES),
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DPO_RESULT)
    given = parser.parse_args()
    if not TRL_PYTHON.exists():
        raise SystemExit("TRL's environment is missing; run: make benchmark-trl")
    with tempfile.TemporaryDirectory() as folder:
        bench = make_bench(
            Path(folder),
            steps=given.steps,
            batch_rows=given.batch_rows,
            precision=given.precision,
            threads=given.threads,
            seed=given.seed,
            candidates=given.candidates,
        )
        record = compare(bench, rounds=given.rounds, candidate_steps=given.candidate_steps)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print_table(record)
    say(f"\nwritten: {given.out}")


if __name__ == "__main__":
    main()

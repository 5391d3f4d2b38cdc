"""LoRA on a CPU: Tunesmith against TRL + PEFT, interleaved in one run, on the same tokens.

    make benchmark-trl                      # sets up both environments and runs this
    make benchmark-trl ARGS="--steps 20 --rounds 2"
    make benchmark-trl ARGS="--shape qwen2.5-0.5b --tokenizer DIR --rows dolly.jsonl --steps 3"

Both train the bundled model on the bundled tickets, or a model of random weights in the shape of a known one on rows of
your own: same token ids and labels (rendered once, by us, and handed over),
same rows in each optimizer step, same number of steps, same rank, alpha, target layers and learning rate. TRL runs
twice: as its documentation starts it (`SFTConfig` defaults), and with the best settings that we found for it here (each
candidate is tried first; the fastest by CPU time is taken and named). A, B, C, A, B, C ...: what else the machine does
falls on all of them.

Measured are wall and CPU seconds of training, and beside them those of the whole command. TRL's are those of its loop
alone; ours are from the run record and also hold loading the model and saving the adapter. Neither side evaluates or
writes checkpoints while it trains. Both have one thread; `--threads 0` leaves the number to torch.

Writes benchmarks/results/cpu_vs_trl.json with all single measurements, hardware, versions, commit and command.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
RESULT = CHECKOUT / "benchmarks" / "results" / "cpu_vs_trl.json"
TRL_PYTHON = CHECKOUT / ".venv-trl" / "bin" / "python"
OURS, DEFAULTS, BEST = "tunesmith", "trl defaults", "trl best"
LORA = {"rank": 32, "alpha": 64}
LEARNING_RATE = 1e-3

# What makes TRL faster here than its defaults: no recomputation, nothing printed, less or no padding.
_LEAN = {"gradient_checkpointing": False, "logging_strategy": "no", "disable_tqdm": True}
_GROUPED = {**_LEAN, "train_sampling_strategy": "group_by_length"}
_FLAT = {**_LEAN, "padding_free": True, "max_length": None}
CANDIDATES: dict[str, dict[str, Any]] = {
    "fp32": {"weights": "float32", "sft": {**_LEAN, "bf16": False}},
    "fp32, grouped by length": {"weights": "float32", "sft": {**_GROUPED, "bf16": False}},
    "bf16 weights": {"weights": "bfloat16", "sft": {**_LEAN, "bf16": False}},
    "bf16 weights, grouped by length": {"weights": "bfloat16", "sft": {**_GROUPED, "bf16": False}},
    "bf16 weights, padding-free": {"weights": "bfloat16", "sft": {**_FLAT, "bf16": False}},
    "bf16 weights, autocast": {"weights": "bfloat16", "sft": {**_LEAN, "bf16": True}},
    "bf16 weights, autocast, grouped by length": {"weights": "bfloat16", "sft": {**_GROUPED, "bf16": True}},
    "fp32 weights, autocast, grouped by length": {"weights": "float32", "sft": {**_GROUPED, "bf16": True}},
}


@dataclass(frozen=True)
class Measured:
    """One training run: seconds of training and of the whole command, tokens it trained on (all, targets)."""

    who: str
    wall_seconds: float
    cpu_seconds: float
    command_wall_seconds: float
    command_cpu_seconds: float
    peak_bytes: int
    num_tokens: int
    num_target_tokens: int
    trained_parameters: int
    losses: list[float]
    grad_norms: list[float]
    versions: dict[str, str]


@dataclass(frozen=True)
class Bench:
    """What every run has in common. `model` and `data` are folders; `lora` None trains every weight."""

    folder: Path
    what: str
    model: Path
    data: Path
    steps: int
    batch_rows: int
    seed: int
    threads: int
    precision: str
    candidate_steps: int = 20
    candidates: tuple[str, ...] = tuple(CANDIDATES)
    lora: dict[str, int] | None = field(default_factory=lambda: dict(LORA))
    learning_rate: float = LEARNING_RATE
    # Keys of our job beyond those that all benchmarks share.
    job: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def rows_file(self) -> Path:
        return self.folder / "rows.jsonl"

    def environment(self) -> dict[str, str]:
        """This process's environment with the number of threads set, or left to torch."""
        environ = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
        return {**environ, **quiet, **({"OMP_NUM_THREADS": str(self.threads)} if self.threads else {})}


# --- one run of each side ---------------------------------------------------------------------------------------------


def train_ours(bench: Bench, *, out: Path) -> Measured:
    """`tunesmith train`, as anybody would call it."""
    job = bench.folder / "job.yaml"
    job.write_text(json.dumps(describe_job(bench)), encoding="utf-8")  # JSON is YAML
    command = [str(Path(sys.executable).with_name("tunesmith")), "train", str(job), "--out", str(out)]
    wall, cpu = run_timed(command, bench)
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    return Measured(
        who=OURS,
        wall_seconds=record["wall_seconds"],
        cpu_seconds=record["cpu_seconds"],
        command_wall_seconds=wall,
        command_cpu_seconds=cpu,
        peak_bytes=record["peak_bytes"],
        num_tokens=record["train_tokens"],
        num_target_tokens=record["target_tokens"],
        trained_parameters=record["trained_parameters"],
        losses=[step["loss"] for step in steps],
        grad_norms=[step["grad_norm"] for step in steps],
        versions=record["versions"],
    )


def describe_job(bench: Bench) -> dict[str, Any]:
    """The job: nothing beside training, and a linear decay without warm-up, as TRL has it."""
    return {
        "model": str(bench.model),
        "data": {"train": str(bench.data)},
        "method": {"name": "lora", **bench.lora} if bench.lora else "full",
        **bench.job,
        "train": {
            "steps": bench.steps,
            "batch_rows": bench.batch_rows,
            "learning_rate": bench.learning_rate,
            "schedule": "linear",
            "warmup": 0.0,
            "seed": bench.seed,
            "precision": bench.precision,
            "evaluate_every": "never",
            "save_every": "never",
            "keep_best": False,
        },
    }


def train_trl(
    bench: Bench, who: str, *, sft: dict[str, Any], weights: str, steps: int | None = None
) -> Measured:
    """TRL on the rows that our run trained on."""
    task = {
        "model": str(bench.model),
        "rows": str(bench.rows_file),
        "steps": steps or bench.steps,
        "batch_rows": bench.batch_rows,
        "lora": bench.lora,
        "learning_rate": bench.learning_rate,
        "seed": bench.seed,
        "sft": sft,
        "weights": weights,
    }
    rows = read_rows(bench.rows_file)[: task["steps"] * bench.batch_rows]
    return run_trl(
        bench,
        who,
        task,
        worker="trl_worker.py",
        num_tokens=sum(len(row["input_ids"]) for row in rows),
        num_target_tokens=sum(label != -100 for row in rows for label in row["labels"]),
    )


def run_trl(
    bench: Bench, who: str, task: dict[str, Any], *, worker: str, num_tokens: int, num_target_tokens: int
) -> Measured:
    """A task in TRL's environment, by one of the workers beside this file."""
    task_file, result_file = bench.folder / "task.json", bench.folder / "result.json"
    task_file.write_text(json.dumps(task), encoding="utf-8")
    path = str(CHECKOUT / "benchmarks" / worker)
    wall, cpu = run_timed([str(TRL_PYTHON), path, str(task_file), str(result_file)], bench)
    result = json.loads(result_file.read_text(encoding="utf-8"))
    taken = ("wall_seconds", "cpu_seconds", "peak_bytes", "trained_parameters", "losses", "grad_norms")
    return Measured(
        who=who,
        command_wall_seconds=wall,
        command_cpu_seconds=cpu,
        num_tokens=num_tokens,
        num_target_tokens=num_target_tokens,
        versions=result["versions"],
        **{name: result[name] for name in taken},
    )


def run_timed(command: list[str], bench: Bench) -> tuple[float, float]:
    """Run a command to its end. Returns its wall and CPU seconds, children included; stops here if it fails."""
    started, times = time.perf_counter(), os.times()
    done = subprocess.run(command, env=bench.environment(), cwd=CHECKOUT, capture_output=True, text=True)
    wall, after = time.perf_counter() - started, os.times()
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-3000:]}")
    return wall, (after.children_user - times.children_user) + (after.children_system - times.children_system)


# --- the same rows for both -------------------------------------------------------------------------------------------


def write_rows(prepared: Path, bench: Bench) -> None:
    """The rows of our run in training order, as token ids and labels."""
    from tunesmith.data.prepare import load_prepared
    from tunesmith.training.order import EpochOrder

    order = EpochOrder(load_prepared(prepared).rows("train"), batch_rows=bench.batch_rows, seed=bench.seed)
    with bench.rows_file.open("w", encoding="utf-8") as file:
        for step in islice(order.steps_from(None), bench.steps):
            for row in step.rows:
                ids = [int(token) for token in row.ids]
                labels = [token if kept else -100 for token, kept in zip(ids, row.mask, strict=True)]
                file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")


def copy_bundled(name: str, folder: Path) -> Path:
    """A copy of a bundled folder: every run of a long benchmark reads the same bytes."""
    from tunesmith.core.bundled import bundled_path

    source = bundled_path(name)
    if source is None:
        raise ValueError(f"{name} is not bundled")
    return Path(shutil.copytree(source, folder / source.name))


# Real shapes; their weights are random, which changes no time.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645, "torch_dtype": "bfloat16",
    },
}  # fmt: skip


def build_shape(name: str, tokenizer: Path, folder: Path, *, seed: int) -> Path:
    """A model folder of that shape with the tokenizer's files: bf16, normal weights of deviation 0.02."""
    import torch
    from safetensors.torch import save_file

    from tunesmith.models.config import load_config
    from tunesmith.models.headers import list_expected

    model = folder / name
    shutil.copytree(tokenizer, model)
    (model / "config.json").write_text(json.dumps(SHAPES[name]), encoding="utf-8")
    torch.manual_seed(seed)
    tensors = {
        key: (torch.ones(shape) if "norm" in key else torch.randn(shape) * 0.02).to(torch.bfloat16)
        for key, shape in list_expected(load_config(model)).items()
    }
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def read_rows(path: Path) -> list[dict[str, list[int]]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- the whole --------------------------------------------------------------------------------------------------------


def find_best_settings(
    run: Callable[[str], Measured], names: Sequence[str]
) -> tuple[str, list[dict[str, Any]]]:
    """Try every candidate once and the three fastest again. Returns the fastest by CPU time, and all figures."""
    tried: list[Measured] = []
    for turn in (1, 2):
        turns = names if turn == 1 else [one.who for one in sorted(tried, key=_cpu_seconds)[:3]]
        for name in turns:
            measured = run(name)
            tried.append(measured)
            say(
                f"  candidate {turn}/2  {measured.cpu_seconds:6.2f} CPU s  {measured.wall_seconds:6.2f} s  {name}"
            )
    return min(tried, key=_cpu_seconds).who, [asdict(one) for one in tried]


def _cpu_seconds(one: Measured) -> float:
    return one.cpu_seconds


def compare(bench: Bench, *, rounds: int) -> dict[str, Any]:
    """All runs, interleaved. Returns the record that is written to disk."""
    say("warm-up: our engine once, which also renders the rows")
    train_ours(bench, out=bench.folder / "warm-up")
    write_rows(bench.folder / "warm-up" / "prepared", bench)
    say("TRL's best settings on this machine:")
    shortened = min(bench.steps, bench.candidate_steps)
    best, tried = find_best_settings(
        lambda name: train_trl(bench, name, **CANDIDATES[name], steps=shortened), bench.candidates
    )
    runs: list[Measured] = []
    for number in range(1, rounds + 1):
        for who in (OURS, DEFAULTS, BEST):
            if who == OURS:
                measured = train_ours(bench, out=bench.folder / f"ours-{number}")
            elif who == DEFAULTS:
                measured = train_trl(bench, who, sft={}, weights="auto")
            else:
                measured = train_trl(bench, who, **CANDIDATES[best])
            runs.append(measured)
            say(
                f"  round {number}/{rounds}  {measured.wall_seconds:6.2f} s  {measured.cpu_seconds:6.2f} CPU s  {who}"
            )
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
        "trl_best_settings": {"name": best, **CANDIDATES[best]},
        "ratios": {who: compute_ratios(runs, who) for who in (DEFAULTS, BEST)},
        "runs": [asdict(run) for run in runs],
        "trl_candidates": tried,
        "hardware": describe_hardware(),
        "commit": read_commit(),
        "command": "python benchmarks/cpu_vs_trl.py " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def check_same_work(runs: Iterable[Measured]) -> None:
    """Same tokens, same targets, same trained parameters, or there is nothing to compare."""
    for name in ("num_tokens", "num_target_tokens", "trained_parameters"):
        values = {run.who: getattr(run, name) for run in runs}
        if len(set(values.values())) != 1:
            raise SystemExit(f"not the same work: {name} is {values}")


def compute_ratios(runs: list[Measured], other: str) -> dict[str, Any]:
    """How many times `other`'s seconds are ours: of the medians, and of each round's pair (lowest, highest)."""
    ratios: dict[str, Any] = {}
    for name in ("wall_seconds", "cpu_seconds", "command_wall_seconds", "command_cpu_seconds"):
        ours = [getattr(run, name) for run in runs if run.who == OURS]
        theirs = [getattr(run, name) for run in runs if run.who == other]
        pairs = [b / a for a, b in zip(ours, theirs, strict=True)]
        ratios[name] = {
            "of_medians": statistics.median(theirs) / statistics.median(ours),
            "lowest": min(pairs),
            "highest": max(pairs),
        }
    return ratios


def print_table(record: dict[str, Any]) -> None:
    """Medians and ratios, as Markdown."""
    print(
        f"\n{record['what']}: {record['steps']} steps of {record['batch_rows']} rows, {record['rounds']} rounds,"
    )
    print(f"{record['threads'] or 'default'} thread(s), {record['hardware']['cpu']}\n")
    print(
        "| | wall s | CPU s | tokens/s | tokens/CPU-s | x wall | x CPU (range) | command wall s | peak MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for who in (OURS, DEFAULTS, BEST):
        runs = [run for run in record["runs"] if run["who"] == who]
        wall, cpu, command, peak = (
            statistics.median(run[name] for run in runs)
            for name in ("wall_seconds", "cpu_seconds", "command_wall_seconds", "peak_bytes")
        )
        tokens = runs[0]["num_tokens"]
        label = who if who != BEST else f"{who}: {record['trl_best_settings']['name']}"
        times = "| | "
        if who != OURS:
            ratio = record["ratios"][who]
            r = ratio["cpu_seconds"]
            times = (
                f"| {ratio['wall_seconds']['of_medians']:.2f} "
                f"| {r['of_medians']:.2f} ({r['lowest']:.2f} to {r['highest']:.2f}) "
            )
        print(
            f"| {label} | {wall:.2f} | {cpu:.2f} | {tokens / wall:,.0f} | {tokens / cpu:,.0f} "
            f"{times}| {command:.1f} | {peak / 2**20:,.0f} |"
        )


def describe_hardware() -> dict[str, Any]:
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return {"cpu": name, "cores": os.cpu_count(), "system": platform.system(), "load_at_end": os.getloadavg()}


def read_commit() -> str:
    """Commit of this checkout, marked when files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False).stdout.strip()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--batch-rows", type=int, default=8, help="rows per step (8 is SFTConfig's default)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each side; 0 leaves it to torch")
    parser.add_argument("--precision", default="auto", help="ours: auto, bf16 or fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shape", choices=list(SHAPES), help="a model of this shape instead of the bundled one"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder of its tokenizer, with a chat template")
    parser.add_argument("--rows", type=Path, help="the rows it trains on, any format that tunesmith reads")
    parser.add_argument(
        "--candidate-steps", type=int, default=20, help="steps of each of TRL's settings tried"
    )
    parser.add_argument(
        "--candidates", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES), metavar="NAME",
        help="TRL's settings tried, default all: " + "; ".join(CANDIDATES),
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/cpu_vs_trl[_SHAPE].json")
    arguments = parser.parse_args()
    if arguments.shape and not (arguments.tokenizer and arguments.rows):
        parser.error("--shape needs --tokenizer and --rows")
    if not TRL_PYTHON.exists():
        raise SystemExit("TRL's environment is missing; run: make benchmark-trl")
    with tempfile.TemporaryDirectory() as folder:
        what, model, data = open_material(arguments, Path(folder))
        bench = Bench(
            folder=Path(folder),
            what=what,
            model=model,
            data=data,
            candidate_steps=arguments.candidate_steps,
            candidates=tuple(arguments.candidates),
            steps=arguments.steps,
            batch_rows=arguments.batch_rows,
            seed=arguments.seed,
            threads=arguments.threads,
            precision=arguments.precision,
        )
        record = compare(bench, rounds=arguments.rounds)
    suffix = f"_{arguments.shape}.json" if arguments.shape else ".json"
    out = arguments.out or RESULT.with_name(RESULT.stem + suffix)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print_table(record)
    say(f"\nwritten: {out}")


def open_material(arguments: argparse.Namespace, folder: Path) -> tuple[str, Path, Path]:
    """What is trained on what, in words and as paths."""
    if not arguments.shape:
        named = "tunesmith/tiny on tunesmith/tickets"
        return named, copy_bundled("tunesmith/tiny", folder), copy_bundled("tunesmith/tickets", folder)
    model = build_shape(arguments.shape, arguments.tokenizer, folder, seed=arguments.seed)
    rows = Path(shutil.copy(arguments.rows, folder))
    return f"random weights of {arguments.shape} on {rows.name}", model, rows


if __name__ == "__main__":
    main()

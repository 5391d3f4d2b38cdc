"""How well `tunesmith plan` predicts: predicted against measured peak memory of LoRA, QLoRA and full, at three sizes.

    python benchmarks/plan_accuracy.py             on a GPU: benchmarks/results/plan_accuracy.json
    python benchmarks/plan_accuracy.py --tiny      try the script on a CPU; writes nothing but what it prints

Each case plans with `tunesmith.plan`, then trains two steps of 16 rows of 1,024 random tokens with weights of the
shape (random, seeded, drawn on the card), in one process, with what `tunesmith train` is made of. Measured is
torch.cuda.max_memory_allocated over both steps. Blocks are compiled for LoRA at every size and left alone elsewhere,
so that all cases together take less than three minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
for _folder in (CHECKOUT / "src", CHECKOUT / "benchmarks"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

import torch  # noqa: E402

from cpu_vs_trl import describe_hardware, say  # noqa: E402
from gpu_cases.cases import SHAPES  # noqa: E402
from gpu_cases.inputs import _write_tokenizer, list_tensors, write_random_rows  # noqa: E402
from tunesmith.api.devices import describe_gpu, pick_device, set_up_segments  # noqa: E402
from tunesmith.api.planning import build_planner, make_planner  # noqa: E402
from tunesmith.api.trainable import training_lengths  # noqa: E402
from tunesmith.core.fingerprint import describe_versions, hash_code  # noqa: E402
from tunesmith.core.rundir import RunDir  # noqa: E402
from tunesmith.data.prepare import load_prepared  # noqa: E402
from tunesmith.job.load import job_from  # noqa: E402
from tunesmith.job.spec import Job, LoraSpec  # noqa: E402
from tunesmith.methods.sft import sft_loss  # noqa: E402
from tunesmith.models import scratch  # noqa: E402
from tunesmith.models.config import load_config  # noqa: E402
from tunesmith.models.decoder import Decoder  # noqa: E402
from tunesmith.models.layout import make_batch  # noqa: E402
from tunesmith.models.lora import add_lora  # noqa: E402
from tunesmith.models.packed import pack_model  # noqa: E402
from tunesmith.training.loop import train  # noqa: E402
from tunesmith.training.meter import reset_peak_bytes  # noqa: E402
from tunesmith.training.planner import CARDS, MemoryPlan  # noqa: E402

RESULT = CHECKOUT / "benchmarks" / "results" / "plan_accuracy.json"
SIZES = ("qwen-0.5b", "qwen-1.5b", "llama-8b")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": {"name": "lora", "rank": 16}},
    "qlora": {"method": {"name": "qlora", "rank": 16}},
    "full": {"method": {"name": "full"}},
}
ROW_TOKENS, BATCH_ROWS, STEPS = 1024, 16, 2
# Within this share of what was measured.
BOUND = 0.10


@dataclass(frozen=True)
class Case:
    size: str
    method: str
    limit: str = "auto"

    def make_job(self, folder: Path, *, tiny: bool) -> Job:
        spec = METHODS[self.method]
        train_keys: dict[str, Any] = {
            "steps": STEPS,
            "batch_rows": BATCH_ROWS,
            "learning_rate": 1e-5,
            "precision": "bf16",
            "compile": self.method == "lora" and not tiny,
            "evaluate_every": "never",
            "save_every": "never",
            "memory_limit": self.limit,
        }
        # fp32 masters of 8B weights take 145 GB.
        if self.method == "full" and self.size == "llama-8b":
            train_keys["optimizer"] = "adamw-bf16"
        return job_from({"model": str(folder), "data": {"train": str(folder)}, **spec, "train": train_keys})


def list_cases() -> list[Case]:
    cases = [Case(size, method) for size in SIZES for method in METHODS]
    # And where memory is short, so that blocks are computed again or offloaded.
    return [*cases, Case("llama-8b", "lora", "19.7GiB"), Case("llama-8b", "qlora", "10.1GiB")]


def draw_model(folder: Path, job: Job, device: torch.device) -> Decoder:
    """A decoder of the folder's shape, its weights drawn where they are used."""
    config = load_config(folder)
    full = not isinstance(job.method_spec, LoraSpec)
    masters = torch.bfloat16 if job.train.optimizer == "adamw-bf16" else torch.float32
    raw = json.loads((folder / "config.json").read_text())
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
        for name, shape in list_tensors(raw)
    }
    model = Decoder(
        config, tensors, folder=folder, dtype=torch.bfloat16, storage=masters if full else torch.bfloat16
    )
    tensors.clear()
    model = model.to(device)
    method = job.method_spec
    if isinstance(method, LoraSpec):
        if method.storage != "full":
            pack_model(model, method.storage, double_quant=method.double_quant, device=device)
        add_lora(model, method, seed=0)
    else:
        model.make_trainable(masters)
    return model


def run_case(case: Case, work: Path, device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Predicted and measured bytes of one case."""
    started = time.perf_counter()
    folder, rows = work / case.size, work / f"{case.size}-rows"
    if not folder.exists():
        config = SHAPES["tiny" if tiny else case.size].config
        folder.mkdir()
        extra = {"torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1}
        (folder / "config.json").write_text(json.dumps(config | extra))
        _write_tokenizer(folder)
        tokens = 64 if tiny else ROW_TOKENS
        write_random_rows(rows, lengths=[tokens] * BATCH_ROWS, vocab_size=config["vocab_size"], seed=0)
    job, prepared = case.make_job(folder, tiny=tiny), load_prepared(rows)
    lengths = training_lengths(job, prepared)
    model = draw_model(folder, job, device)
    set_up_segments(model, job, prepared, device)
    if tiny:  # a card that isn't there, so that all of this script is tried
        planner = build_planner(model, job, lengths, CARDS["h200"])
    else:
        planner, _ = make_planner(model, job, lengths, device)
    # The first plan is what `tunesmith plan` prints: of shapes alone. The run's own knows what the allocator holds.
    predicted = None if planner is None else planner.plan()
    reset_peak_bytes(device)
    outcome = train(
        model,
        prepared.rows("train"),
        job.train,
        RunDir(work / f"out-{case.size}-{case.method}-{case.limit}").create(),
        make_batch=lambda batch, where: make_batch(batch, device=where, round_tokens=128),
        loss=sft_loss,
        planner=planner,
    )
    found: dict[str, Any] = {"size": case.size, "method": case.method, "limit": case.limit}
    found |= {"compiled": bool(job.train.compile), "optimizer": job.train.optimizer}
    found |= {"measured_peak_bytes": outcome.peak_bytes, "memory_plan": outcome.memory_plan}
    found["warnings"] = outcome.warnings
    if predicted is not None and outcome.memory_plan is not None and planner is not None:
        # What shapes alone say of the plan that was run.
        followed = outcome.memory_plan
        micro_batches, tokens = planner.workload.split(followed["budget_tokens"])
        shapes = planner.model.resident_bytes() + planner.model.step_bytes(
            followed["levels"],
            tokens=tokens,
            micro_batches=micro_batches,
            loss_chunk_bytes=followed["loss_chunk_bytes"],
        )
        found |= {"predicted_peak_bytes": shapes, "planned_peak_bytes": followed["peak_bytes"]}
        found["first_plan"] = predicted.to_json()
        found["error"] = shapes / outcome.peak_bytes - 1
        found["error_after_probe"] = followed["peak_bytes"] / outcome.peak_bytes - 1
        found["is_within_limit"] = outcome.peak_bytes <= followed["limit_bytes"]
    found["seconds"] = time.perf_counter() - started
    del model
    gc.collect()
    scratch.release()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def read_section(path: Path = RESULT) -> str:
    """The part of docs/benchmarks.md; empty if nothing is measured."""
    if not path.is_file():
        return ""
    record = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "## What `tunesmith plan` predicts",
        "",
        f"Peak memory (`max_memory_allocated`) of {record['steps']} steps of {record['batch_rows']} rows of "
        f"{record['row_tokens']:,} tokens, against the plan made from the shapes alone, and after one probe. "
        f"{record['hardware']['gpu']}, commit `{record['versions']['commit']}`. Made by `benchmarks/plan_accuracy.py`.",
        "",
        "| shape | method | limit | measured GiB | predicted | after the probe | blocks |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in record["cases"]:
        plan = MemoryPlan.from_json(case["memory_plan"])
        cells = [case["size"], case["method"], case["limit"], f"{case['measured_peak_bytes'] / 2**30:.2f}"]
        cells += [f"{100 * case[name]:+.1f}%" for name in ("error", "error_after_probe")]
        lines.append("| " + " | ".join([*cells, plan.describe_levels()]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument("--only", help="cases whose name holds this, as in llama-8b/lora")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    device = pick_device()
    if device.type != "cuda" and not options.tiny:
        parser.error("needs a GPU; --tiny tries the script without one")
    out = options.out or (None if options.tiny or options.only else RESULT)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        for case in list_cases():
            name = f"{case.size}/{case.method}/{case.limit}"
            if options.only and options.only not in name:
                continue
            found = run_case(case, Path(work), device, tiny=options.tiny)
            results.append(found)
            told = f"measured {found['measured_peak_bytes'] / 2**30:.2f} GiB"
            if "error" in found:
                told += f", predicted {100 * found['error']:+.1f}%"
                told += f", as planned {100 * found['error_after_probe']:+.1f}%"
            say(f"{name}: {told}, {found['seconds']:.0f} s")
            if out is not None:  # after every case: what is measured stays, whatever ends the script
                out.write_text(json.dumps(describe(results, device), indent=1) + "\n")


def describe(results: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    return {
        "hardware": {**describe_hardware(), **describe_gpu(device)},
        "versions": describe_versions(),
        "code": hash_code(),
        "command": "python benchmarks/plan_accuracy.py",
        "bound": BOUND,
        "row_tokens": ROW_TOKENS,
        "batch_rows": BATCH_ROWS,
        "steps": STEPS,
        "cases": results,
        "is_within_bound": all(abs(found.get("error", 1.0)) <= BOUND for found in results),
    }


if __name__ == "__main__":
    main()

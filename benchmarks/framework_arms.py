"""The same LoRA job through our engine, TRL and Unsloth on one GPU: `tunesmith compare`, with parity proven first.

    python benchmarks/framework_arms.py --python trl=/envs/trl/bin/python --python unsloth=/envs/unsloth/bin/python
    python benchmarks/framework_arms.py --shape smoke --steps 4 --seeds 1 --python trl=...   on a CPU

A model of a real shape with random weights (seeded) learns the bundled tickets. What it learns is no matter; that all
arms learn the same from the same tokens, and what it takes them, is. Keeps the comparison, the parity gates and every
run's costs in benchmarks/results/framework_arms.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
for _folder in (CHECKOUT / "src", CHECKOUT / "benchmarks"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

import tunesmith  # noqa: E402
from cpu_vs_trl import describe_hardware  # noqa: E402
from gpu_cases.cases import SHAPES  # noqa: E402
from gpu_cases.inputs import write_model  # noqa: E402
from tunesmith import api  # noqa: E402
from tunesmith.api.devices import describe_gpu  # noqa: E402
from tunesmith.core.bundled import BUNDLED  # noqa: E402
from tunesmith.core.events import Event  # noqa: E402
from tunesmith.core.fingerprint import describe_versions, hash_code  # noqa: E402
from tunesmith.core.jsonl import read_json, read_jsonl  # noqa: E402
from tunesmith.core.rundir import RunDir  # noqa: E402
from tunesmith.frameworks.adding import add_environment  # noqa: E402
from tunesmith.report.trainings import measure_rates  # noqa: E402

RESULT = CHECKOUT / "benchmarks" / "results" / "framework_arms.json"
# Not kept: what each is known by elsewhere, or what is long.
_LEFT_OUT = ("config", "fingerprints")


def make_model(folder: Path, shape: str, *, device: str) -> Path:
    """A model folder of the shape with random weights, and the bundled model's tokenizer."""
    tokenizer = BUNDLED["tunesmith/tiny"]
    write_model(folder, SHAPES[shape].config, seed=0, device=device)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer / name, folder / name)
    known = read_json(tokenizer / "config.json")
    ids = {key: known.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = read_json(folder / "config.json") | ids
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def make_job(model: Path, arguments: argparse.Namespace, frameworks: list[str]) -> dict[str, Any]:
    arms: list[Any] = ["lora", *({"method": "lora", "framework": name} for name in frameworks)]
    return {
        "model": str(model),
        "data": {"train": "tunesmith/tickets"},
        "method": {"name": "lora", "rank": 16},
        "train": {
            "steps": arguments.steps,
            "batch_rows": 32,
            "learning_rate": 5e-4,
            "precision": arguments.precision,
            "evaluate_every": "never",
            "save_every": "never",
        },
        "evaluate": {"max_rows": arguments.test_rows, "max_new_tokens": 1, "forgetting": False},
        "compare": {"arms": arms, "seeds": list(range(arguments.seeds)), "metric": "nll"},
    }


def tell(event: Event) -> None:
    if event.kind != "step" and event.text:
        print(f"{event.task}: {event.text}" if event.task else event.text, file=sys.stderr, flush=True)


def collect(comparison: Any, out: Path) -> dict[str, Any]:
    """What the comparison found, and what every training took; `tokens_per_second` are all tokens but padding."""
    run = RunDir(out)
    runs: dict[str, Any] = {}
    for path in sorted(out.glob("arms/*/seed-*/run.json")):
        rates = measure_rates([line for _, line in read_jsonl(path.with_name("steps.jsonl"))])
        kept = {name: value for name, value in read_json(path).items() if name not in _LEFT_OUT}
        runs[f"{path.parts[-3]} {path.parts[-2]}"] = kept | {"tokens_per_second": rates and rates[1]}
    return {
        "comparison": api.comparison_json(comparison, out),
        "gates": read_json(run.gates) if run.gates.is_file() else {},
        "runs": runs,
    }


def describe_command(arguments: argparse.Namespace) -> str:
    """The command with every option that decides a number, defaults too; interpreters without their paths."""
    words = [f"--python {given.partition('=')[0]}=PYTHON" for given in arguments.python]
    words += [
        f"--{name.replace('_', '-')} {getattr(arguments, name)}"
        for name in ("shape", "steps", "seeds", "test_rows", "precision")
    ]
    return " ".join(["python benchmarks/framework_arms.py", *words])


def read_section(path: Path = RESULT) -> str:
    """The part of docs/benchmarks.md; empty if nothing is measured."""
    if not path.is_file():
        return ""
    record = json.loads(path.read_text(encoding="utf-8"))
    where = record["hardware"].get("gpu", record["hardware"]["cpu"])
    commit = record["versions"].get("commit", "")
    lines = [
        "## Frameworks on the same job",
        "",
        f"`{record['command']}`: {where}, commit `{commit}`, {record['date'][:10]}. Medians over seeds, with the "
        "lowest and highest. No arm of a framework has recomputation or Liger kernels: these are settings that all "
        "can share, not the fastest of each.",
        "",
        "| arm | parity gates | nats per test token | tokens/s | peak memory GiB (allocated; on a CPU, resident) |",
        "|---|---|---|---|---|",
    ]
    for arm in record["comparison"]["arms"]:
        runs = [run for name, run in record["runs"].items() if name.rpartition(" ")[0] == arm["name"]]
        memory = [run.get("memory") or {} for run in runs]
        peaks = [found.get("allocated", found.get("resident")) for found in memory]
        cells = [
            f"{arm['name']} ({arm['framework']})" + (f", {arm['status']}" if arm["status"] != "done" else ""),
            _tell_gates(arm["parity"]),
            _tell_spread(arm["per_seed"].get("nll", []), "{:.4f}"),
            _tell_spread([run["tokens_per_second"] for run in runs], "{:,.0f}"),
            _tell_spread([peak / 2**30 for peak in peaks if peak], "{:.2f}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _tell_gates(parity: dict[str, str] | None) -> str:
    """What each gate said, gates of one word together; nothing for our own engine, which they are held against."""
    if not parity:
        return ""
    words = {word: [gate for gate, said in parity.items() if said == word] for word in parity.values()}
    return "; ".join(f"{word}: {', '.join(gates)}" for word, gates in words.items())


def _tell_spread(values: list[float | None], show: str) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return ""
    middle, low, high = (show.format(one) for one in (statistics.median(found), min(found), max(found)))
    return middle if low == high else f"{middle} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", required=True)
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen-1.5b")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--keep", type=Path, help="folder in which model and runs stay")
    arguments = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        os.environ["TUNESMITH_HOME"] = str(folder / "home")
        frameworks = [given.partition("=")[0] for given in arguments.python]
        for given in arguments.python:
            name, _, python = given.partition("=")
            add_environment(name, python)
        model = make_model(folder / "model", arguments.shape, device=device)
        comparison = tunesmith.compare(
            make_job(model, arguments, frameworks), out=folder / "compare", on_event=tell
        )
        found = collect(comparison, folder / "compare")
    record = {
        "schema": 1,
        "command": describe_command(arguments),
        "shape": arguments.shape,
        "precision": arguments.precision,
        "seconds": time.monotonic() - began,
        "hardware": describe_hardware() | describe_gpu(torch.device(device)),
        "versions": describe_versions(),
        "code": hash_code(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **found,
    }
    # Where it happened to lie is of no interest.
    text = json.dumps(record, indent=1).replace(json.dumps(str(folder))[1:-1], "DIR")
    arguments.out.write_text(text + "\n", encoding="utf-8")
    print(api.report_markdown(comparison))


if __name__ == "__main__":
    main()

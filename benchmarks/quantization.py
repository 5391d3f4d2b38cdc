"""What rounding costs on the bundled model: LoRA in 16 bits, quantised afterwards, and trained to be quantised.

    .venv/bin/python benchmarks/quantization.py [--seeds 0 1 2] [--out runs/quantization]     (ten minutes on two cores)

One comparison with the settings of `tunesmith demo`: every arm answers the 300 sealed test rows. Arms that end in a
scheme share the training of `lora`; arms with `qat` train as long, with the same rows, rate and seed.
Writes benchmarks/results/quantization.json: of each arm the metrics with their intervals, loss on general text, size,
training time. Run again after the bundled model has changed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import tunesmith
from tunesmith import api
from tunesmith.api.devices import pick_device, pick_dtype
from tunesmith.core.events import Event
from tunesmith.core.fingerprint import describe_hardware, describe_versions
from tunesmith.core.jsonl import write_json

RESULT = Path(__file__).parent / "results" / "quantization.json"
SCHEMES = ("int8", "fp8", "int8-int4", "int4")
COARSE = {"scheme": "int4", "group_size": 128}
KEPT = ("name", "metrics", "versus_base", "quantize", "size_bytes", "train_wall_seconds", "forgetting")


def make_job(seeds: list[int]) -> Any:
    demo = api.demo_job()
    method = {"name": "lora", "rank": 32}
    arms: list[Any] = [
        "zero-shot",
        *({"method": "zero-shot", "quantize": scheme} for scheme in SCHEMES),
        "lora",
    ]
    arms += [{"method": method, "quantize": scheme} for scheme in (*SCHEMES, COARSE)]
    arms += [{"method": {**method, "qat": scheme}} for scheme in ("int8-int4", "int4", COARSE)]
    values = demo.model_dump() | {"method": method, "compare": {"arms": arms, "seeds": seeds}}
    return api.job_from(values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quantization"))
    arguments = parser.parse_args()

    def tell(event: Event) -> None:
        if event.kind in ("done", "failed", "warning"):
            print(event.task, event.text, flush=True)

    comparison = tunesmith.compare(make_job(arguments.seeds), out=arguments.out, on_event=tell)
    arms = api.comparison_json(comparison, arguments.out)["arms"]
    found = {
        "schema": 1,
        "command": "python benchmarks/quantization.py --seeds " + " ".join(map(str, arguments.seeds)),
        "seeds": arguments.seeds,
        "precision": str(pick_dtype("auto", pick_device())).removeprefix("torch."),
        "num_rows": comparison.num_rows,
        "num_clusters": comparison.num_clusters,
        "arms": [{key: arm[key] for key in KEPT} for arm in arms],
        "versions": describe_versions(),
        "hardware": describe_hardware(),
    }
    write_json(RESULT, found)
    print(api.report_markdown(comparison))


if __name__ == "__main__":
    main()

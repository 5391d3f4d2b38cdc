"""Time and memory of one update of every optimizer, on matrices of a Llama-3.1-8B's shapes. Needs a GPU.

python benchmarks/optimizers.py [--layers 4]

Prints one JSON object a line: milliseconds (best of five after the first, which compiles), bytes of state a weight, and
the largest memory above weights, gradients and states while updating.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping

import torch
from torch import nn

from tunesmith.training.low_bit_adamw import AdamW8bit, AdamWBf16
from tunesmith.training.muon import Muon
from tunesmith.training.optim import MasterAdamW

# Merged query, key and value; output; merged gate and up; down: rows of each part, inputs.
LAYER = {
    "qkv": ((4096, 1024, 1024), 4096),
    "out": ((4096,), 4096),
    "gate_up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
}
NAMES = ("adamw", "adamw-8bit", "adamw-bf16", "muon")


def make_weights(layers: int, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    return {
        f"{layer}.{name}": nn.Parameter(torch.randn(sum(parts), inputs, device="cuda", dtype=dtype) * 0.02)
        for layer in range(layers)
        for name, (parts, inputs) in LAYER.items()
    }


def list_parts(named: Mapping[str, nn.Parameter]) -> dict[str, list[slice]]:
    found = {}
    for key in named:
        ends = torch.tensor(LAYER[key.partition(".")[2]][0]).cumsum(0).tolist()
        found[key] = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return found


def measure(name: str, layers: int) -> dict[str, object]:
    named = make_weights(layers, torch.bfloat16 if name == "adamw-bf16" else torch.float32)
    before = torch.cuda.memory_allocated()
    optimizer = {
        "adamw": lambda: MasterAdamW(named),
        "adamw-8bit": lambda: AdamW8bit(named),
        "adamw-bf16": lambda: AdamWBf16(named),
        "muon": lambda: Muon(named, matrices=list_parts(named)),
    }[name]()
    count = sum(weight.numel() for weight in named.values())
    states = (torch.cuda.memory_allocated() - before) / count
    seconds: list[float] = []
    extra = 0
    for _ in range(6):
        # A loss whose gradient is the weight: gradients come by autograd, as in training.
        for weight in named.values():
            (weight.square().sum() * 0.5).backward()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held, started = torch.cuda.memory_allocated(), time.perf_counter()
        optimizer.update(learning_rate=1e-5)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        extra = torch.cuda.max_memory_allocated() - held
    return {
        "optimizer": name,
        "weights": count,
        "update_ms": round(min(seconds[1:]) * 1e3, 2),
        "first_update_seconds": round(seconds[0], 2),
        "state_bytes_each": round(states, 3),
        "extra_mebibytes": extra >> 20,
        "finite": all(bool(torch.isfinite(weight).all()) for weight in named.values()),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    for name in NAMES:
        print(json.dumps(measure(name, arguments.layers)), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

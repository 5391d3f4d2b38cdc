"""Where the time of our training steps goes: kernels of two steps by CUDA time, for a case of gpu.py.

    python benchmarks/gpu_profile.py --case lora-bf16                    on a GPU: about a minute and a half
    python benchmarks/gpu_profile.py --case lora-bf16 --device cpu       tries the script on a tiny shape

Prints the share of each kind of kernel (products, attention, the rest) and the longest kernels with their counts.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
for _folder in (CHECKOUT / "src", CHECKOUT / "benchmarks"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from gpu_cases.cases import CASES, SHAPES  # noqa: E402
from gpu_cases.inputs import write_model, write_random_rows  # noqa: E402
from tunesmith.api.tasks import TrainTask  # noqa: E402
from tunesmith.api.training import run_train_task  # noqa: E402
from tunesmith.core.jsonl import write_json  # noqa: E402
from tunesmith.job.load import job_from  # noqa: E402
from tunesmith.training.step import Stepper  # noqa: E402

WARM_STEPS, PROFILED_STEPS = 4, 2
# The first pattern that a kernel's name holds decides its kind.
KINDS = (
    ("attention", r"attention|attn|fmha|flash|sdpa|cudnn.*(fprop|bprop)"),
    ("products", r"gemm|nvjet|cutlass|matmul|::mm|addmm|scaled_mm|xmma"),
    ("compiled elementwise", r"triton"),
    ("copies", r"memcpy|memset|copy"),
)


def name_kind(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel.lower())), "other")


def profile_steps(case: Any, shape: Any, folder: Path, *, device: str, row_tokens: int) -> Any:
    """Train with the case's job; the profile of the steps after the warm ones."""
    write_model(folder / "model", shape.config, seed=0, device=device)
    rows = case.batch_rows * (WARM_STEPS + PROFILED_STEPS)
    write_random_rows(
        folder / "rows", lengths=[row_tokens] * rows, vocab_size=shape.config["vocab_size"], seed=0
    )
    train = {"steps": WARM_STEPS + PROFILED_STEPS, "batch_rows": case.batch_rows, "learning_rate": 1e-4}
    train |= {"evaluate_every": "never", "save_every": "never"} | case.job.get("train", {})
    method = {"name": case.method} | ({"rank": 16} if case.method == "lora" else {})
    job = job_from(
        {
            "model": str(folder / "model"),
            "data": {"train": "unused.jsonl", "max_tokens": row_tokens},
            "method": method | case.job.get("method", {}),
            "train": train,
        }
    )
    values = job.model_dump(mode="json")
    write_json(folder / "job.json", values)
    task = TrainTask(
        label="", job=values, out=str(folder / "run"), prepared=str(folder / "rows"), revision=None, key="profile",
        model_folder=str(folder / "model"), model_name="random", resume=False, keep_weights=False,
    )  # fmt: skip
    activities = [ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]
    profiler = profile(activities=activities)
    take, taken = Stepper.take, 0

    def count(self: Stepper, *given: Any, **named: Any) -> Any:
        nonlocal taken
        if taken == WARM_STEPS:
            profiler.start()
        taken += 1
        result = take(self, *given, **named)
        if taken == WARM_STEPS + PROFILED_STEPS:
            if device == "cuda":
                torch.cuda.synchronize()
            profiler.stop()
        return result

    Stepper.take = count
    try:
        (folder / "run").mkdir()
        run_train_task(task, lambda event: None)
    finally:
        Stepper.take = take
    return profiler


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", choices=list(CASES), default="lora-bf16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--longest", type=int, default=40, help="kernels listed")
    arguments = parser.parse_args()
    case, is_gpu = CASES[arguments.case], arguments.device == "cuda"
    shape = SHAPES[case.shape if is_gpu else "tiny"]
    with tempfile.TemporaryDirectory() as folder:
        profiler = profile_steps(
            case, shape, Path(folder), device=arguments.device, row_tokens=2048 if is_gpu else 32
        )
    spent: Counter[str] = Counter()
    events = []
    for event in profiler.key_averages():
        milliseconds = (event.self_device_time_total if is_gpu else event.self_cpu_time_total) / 1e3
        spent[name_kind(event.key)] += milliseconds / PROFILED_STEPS
        events.append((milliseconds / PROFILED_STEPS, event.count / PROFILED_STEPS, event.key))
    total = sum(spent.values())
    print(f"{arguments.case}: {total:.1f} ms a step in kernels")
    for kind, milliseconds in spent.most_common():
        print(f"{milliseconds:9.2f} ms {100 * milliseconds / total:5.1f}%  {kind}")
    for milliseconds, count, name in sorted(events, reverse=True)[: arguments.longest]:
        print(f"{milliseconds:9.2f} ms {count:7.1f} x  {name[:150]}")


if __name__ == "__main__":
    main()

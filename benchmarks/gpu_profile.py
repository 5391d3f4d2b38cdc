"""Where the time of our training steps goes: kernels of two steps by CUDA time, for a case of gpu.py.

    python benchmarks/gpu_profile.py --case lora-bf16                    on a GPU: about a minute and a half
    python benchmarks/gpu_profile.py --case lora-bf16 --device cpu       tries the script on a tiny shape

Prints the share of each kind of kernel (products, attention, the rest), the longest kernels with their counts, when the
GPU had nothing to do, and of one more step who asked for the copies.
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
from torch.autograd import DeviceType  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from gpu_cases.cases import CASES, SHAPES  # noqa: E402
from gpu_cases.inputs import write_model, write_random_rows  # noqa: E402
from tunesmith.api.tasks import TrainTask  # noqa: E402
from tunesmith.api.training import run_train_task  # noqa: E402
from tunesmith.core.jsonl import write_json  # noqa: E402
from tunesmith.job.load import job_from  # noqa: E402
from tunesmith.training.step import Stepper  # noqa: E402

WARM_STEPS, PROFILED_STEPS = 4, 2
# One more, in which the host is watched, too: that slows it down.
NUM_STEPS = WARM_STEPS + PROFILED_STEPS + 1
# The first pattern that a kernel's name holds decides its kind.
KINDS = (
    ("attention", r"attention|attn|fmha|flash|sdpa|cudnn.*(fprop|bprop)"),
    ("products", r"gemm|nvjet|cutlass|matmul|::mm|addmm|scaled_mm|xmma"),
    ("compiled elementwise", r"triton"),
    ("copies", r"memcpy|memset|copy"),
)


def name_kind(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel.lower())), "other")


def profile_steps(
    case: Any, shape: Any, folder: Path, *, device: str, row_tokens: int
) -> tuple[profile, profile]:
    """Train with the case's job; the profile of the steps after the warm ones, and of the last step with the host."""
    write_model(folder / "model", shape.config, seed=0, device=device)
    rows = case.batch_rows * NUM_STEPS
    write_random_rows(
        folder / "rows", lengths=[row_tokens] * rows, vocab_size=shape.config["vocab_size"], seed=0
    )
    train = {"steps": NUM_STEPS, "batch_rows": case.batch_rows, "learning_rate": 1e-4}
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
    here = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    profiler = profile(activities=[here])
    watcher = profile(activities=list({here, ProfilerActivity.CPU}), record_shapes=True)
    take, taken = Stepper.take, 0

    def count(self: Stepper, *given: Any, **named: Any) -> Any:
        nonlocal taken
        begins = {WARM_STEPS: profiler, NUM_STEPS - 1: watcher}.get(taken)
        if begins is not None:
            begins.start()
        taken += 1
        result = take(self, *given, **named)
        ends = {WARM_STEPS + PROFILED_STEPS: profiler, NUM_STEPS: watcher}.get(taken)
        if ends is not None:
            if device == "cuda":
                torch.cuda.synchronize()
            ends.stop()
        return result

    Stepper.take = count
    try:
        (folder / "run").mkdir(exist_ok=True)
        run_train_task(task, lambda event: None)
    finally:
        Stepper.take = take
    return profiler, watcher


def print_gaps(profiler: profile, *, longest: int) -> None:
    """When no kernel ran, between the first and the last one."""
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events() or []
        if event.device_type == DeviceType.CUDA
    )
    if not kernels:
        return
    gaps, free = [], kernels[0][1]
    before = kernels[0][2]
    for start, end, name in kernels[1:]:
        if start > free:
            gaps.append((start - free, before, name))
        if end > free:
            free, before = end, name
    whole = (free - kernels[0][0]) / 1e3
    idle = sum(gap for gap, _, _ in gaps) / 1e3
    print(f"idle {idle / PROFILED_STEPS:.2f} of {whole / PROFILED_STEPS:.2f} ms a step, in {len(gaps)} gaps")
    for gap, name, following in sorted(gaps, reverse=True)[:longest]:
        print(f"{gap / 1e3:9.2f} ms  {name[:60]}  ->  {following[:60]}")


def print_copies(watcher: profile) -> None:
    """Who copied what: device time by shapes and by the operators around them."""
    spent: Counter[str] = Counter()
    for event in watcher.events() or []:
        if event.name not in ("aten::copy_", "aten::clone", "aten::add", "aten::add_"):
            continue
        around, parent = [], event.cpu_parent
        while parent is not None and len(around) < 4:
            around.append(parent.name[:40])
            parent = parent.cpu_parent
        shapes = [shape for shape in event.input_shapes if shape][:2]
        spent[f"{event.name} {shapes} in {' < '.join(around)}"] += event.device_time_total / 1e3
    print("copies and sums of one step, operators within others counted in both:")
    for what, milliseconds in spent.most_common(15):
        print(f"{milliseconds:9.2f} ms  {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", choices=list(CASES), default="lora-bf16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--folder", type=Path, help="where weights are written, and found again")
    parser.add_argument("--longest", type=int, default=40, help="kernels listed")
    arguments = parser.parse_args()
    case, is_gpu = CASES[arguments.case], arguments.device == "cuda"
    shape = SHAPES[case.shape if is_gpu else "tiny"]
    with tempfile.TemporaryDirectory() as folder:
        profiler, watcher = profile_steps(
            case,
            shape,
            arguments.folder or Path(folder),
            device=arguments.device,
            row_tokens=2048 if is_gpu else 32,
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
    print_gaps(profiler, longest=12)
    print_copies(watcher)


if __name__ == "__main__":
    main()

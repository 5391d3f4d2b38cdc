"""Every fast path of our engine once, at a small shape, each in a process of its own: all faults in one call.

    python benchmarks/gpu_smoke.py                       on a GPU: 2 layers of width 1,024, 4,096 tokens; about a minute
    python benchmarks/gpu_smoke.py --wheels .whl --peers  the peers, too, through gpu.py at the same shape
    python benchmarks/gpu_smoke.py --device cpu --jobs 2  what a CPU can run of it, on a smaller shape
    python benchmarks/gpu_smoke.py --only nf4-fp8         one path, with its whole traceback

A path passes if its gradients are as near to eager fp32 as its precision allows, and three steps lower the loss.
Prints PASS, SKIP or FAIL for each, with the last lines of what went wrong; exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
for _folder in (CHECKOUT / "src", CHECKOUT / "benchmarks"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from gpu_cases.cases import SHAPES  # noqa: E402

EVEN, MIXED = [1024] * 4, [1500, 900, 700, 400, 300, 150, 100, 46]
SMALL_EVEN, SMALL_MIXED = [64] * 4, [90, 60, 40, 30, 20, 16]
OTHERS = ([1024] * 3, [800, 500, 90])
RANK, RATE = 16, 1e-3
# Distance of all gradients from eager fp32's: bf16 keeps 8 bits, e4m3 four; random weights add nothing to that.
ALLOWED = {"bf16": 0.03, "fp8": 0.25, "fp32": 1e-4}


class Skip(Exception):
    """This machine cannot run the path; one line."""


# --- the pieces of a path ---------------------------------------------------------------------------------------------


def write_inputs(folder: Path, device: str) -> None:
    """The model, by the function that the benchmark uses."""
    from gpu_cases.inputs import write_model

    write_model(
        folder / "model", SHAPES["smoke" if device == "cuda" else "tiny"].config, seed=0, device=device
    )


def make_rows(lengths: Sequence[int], vocab_size: int) -> list[Any]:
    import numpy as np

    from tunesmith.core.types import Origin, TokenRow

    drawn = np.random.default_rng(len(lengths))
    return [
        TokenRow(
            drawn.integers(3, vocab_size, length).tolist(),
            [0] * (length // 4 + 1) + [1] * (length - length // 4 - 1),
            Origin(f"random:{number}", "random", number),
            str(number),
        )
        for number, length in enumerate(lengths)
    ]


def open_model(folder: Path, device: str, dtype: str, *, lora: bool = True, **how: Any) -> Any:
    """A model in training mode; its adapters' B are not zero, so that every A has a gradient."""
    import torch

    from tunesmith.job.spec import LoraSpec
    from tunesmith.models.load import load_model
    from tunesmith.models.lora import add_lora

    model = load_model(
        folder / "model", device=device, dtype=getattr(torch, dtype), trainable=not lora, **how
    )
    if lora:
        add_lora(model, LoraSpec(name="lora", rank=RANK, alpha=2 * RANK), seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_trainable():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1e-2)
    return model.train()


def find_gradients(model: Any, rows: Sequence[Any]) -> dict[str, Any]:
    """loss and gradients, fp32 on the CPU."""
    from tunesmith.methods.sft import sft_loss
    from tunesmith.models.layout import make_batch

    total = sft_loss(model, make_batch(rows, device=model.device, round_tokens=128)).total
    total.backward()
    found = {"loss": total.detach().float().cpu()}
    for name, parameter in model.named_trainable():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name], parameter.grad = parameter.grad.float().cpu(), None
    return found


def measure_distance(found: dict[str, Any], truth: dict[str, Any]) -> tuple[float, float, str]:
    """(norm of all differences over the norm of all gradients, the largest such ratio of one tensor, its name)."""
    names = truth.keys() - {"loss"}
    off = {name: float((found[name] - truth[name]).norm()) for name in names}
    size = {name: float(truth[name].norm()) for name in names}
    worst = max(names, key=lambda name: off[name] / max(size[name], 1e-12))
    total = sum(o * o for o in off.values()) ** 0.5 / sum(s * s for s in size.values()) ** 0.5
    return total, off[worst] / max(size[worst], 1e-12), worst


def take_steps(model: Any, rows: Sequence[Any], optimizer: str, *, count: int = 3) -> list[float]:
    """Losses of real optimizer steps, two micro-batches each."""
    from tunesmith.job.spec import TrainSpec
    from tunesmith.methods.sft import sft_loss
    from tunesmith.models.layout import make_batch
    from tunesmith.training.optim import LossScale
    from tunesmith.training.optimizers import make_optimizer
    from tunesmith.training.step import Stepper

    spec = TrainSpec.model_validate({"optimizer": optimizer, "learning_rate": RATE})
    stepper = Stepper(
        model,
        make_optimizer(model, dict(model.named_trainable()), spec),
        make_batch=lambda each, where: make_batch(each, device=where, round_tokens=128),
        loss=sft_loss,
        device=model.device,
        budget_tokens=sum(len(row.ids) for row in rows) // 2 + 1,
        clip_norm=1.0,
        scale=LossScale(enabled=False),
    )
    return [stepper.take(rows, step=n + 1, learning_rate=RATE).loss for n in range(count)]


def check_path(
    folder: Path,
    device: str,
    *,
    compiled: bool = True,
    allowed: str = "bf16",
    lengths: Sequence[Sequence[int]] = (),
    optimizer: str = "adamw",
    lora: bool = True,
    recomputed: int = 0,
    masters: str = "float32",
    **how: Any,
) -> str:
    """Gradients against eager fp32, then steps. Returns what was seen."""
    import torch

    from tunesmith.models.segments import Segments

    batches = list(lengths) or [EVEN if device == "cuda" else SMALL_EVEN]
    vocab = SHAPES["smoke" if device == "cuda" else "tiny"].config["vocab_size"]
    # NF4 changes the weights themselves: the truth is fp32 products with what it unpacks to.
    truth_base = how.get("base", "full") if how.get("base") in ("nf4", "int8") else "full"
    exact = open_model(folder, device, "float32", lora=lora, base=truth_base)
    truths = [find_gradients(exact, make_rows(each, vocab)) for each in batches]
    del exact
    if not lora:
        how["master_dtype"] = getattr(torch, masters)
    model = open_model(folder, device, "bfloat16", lora=lora, **how)
    model.segments = Segments(compiled=compiled)
    model.num_recomputed = recomputed
    said: list[str] = []
    for each, truth in zip(batches, truths, strict=True):
        total, worst, name = measure_distance(find_gradients(model, make_rows(each, vocab)), truth)
        said.append(f"{total:.3g}")
        if not total <= ALLOWED[allowed]:
            raise AssertionError(
                f"gradients are {total:.3g} from eager fp32, allowed {ALLOWED[allowed]}; worst {name}, {worst:.3g}"
            )
    losses = take_steps(model, make_rows(batches[0], vocab), optimizer)
    if not losses[-1] < losses[0]:
        raise AssertionError(f"losses of three steps: {losses}")
    return f"gradients {', '.join(said)} from fp32; loss {losses[0]:.4f} to {losses[-1]:.4f}"


def check_attention(device: str, *, variant: str, width: int = 128, window: int = 0, cap: float = 0.0) -> str:
    """A variant of attention.py against plain attention in fp32, forward and backward, of the lengths it is for."""
    import torch

    from tunesmith.models import attention
    from tunesmith.models.layout import make_layout

    if device != "cuda" and variant == "varlen":
        raise Skip("torch's variable-length kernel needs a GPU")
    lengths = ([512] * 4 if variant == "even" else [700, 300, 41, 7]) if device == "cuda" else [48] * 3
    layout = make_layout(lengths, device=device)
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 8 + 2 * 2, width, device=device, dtype=torch.bfloat16)
    given = {"scale": width**-0.5, "window": window, "cap": cap}

    def run(x: torch.Tensor, attend: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        q, k, v = x.split((8, 2, 2), 1)
        out = attend(q, k, v)
        torch.manual_seed(1)
        (out.float() * torch.randn(out.shape, device=device)).sum().backward()
        assert x.grad is not None
        return out.detach().float(), x.grad.float()

    variants: dict[str, Callable[..., torch.Tensor]] = {
        "even": lambda q, k, v: attention.attend_even(q, k, v, lengths[0], scale=given["scale"]),
        "varlen": lambda q, k, v: attention.attend_varlen(
            q, k, v, layout, scale=given["scale"], window=window
        ),
        "chosen": lambda q, k, v: attention.attend_rotated(q, k, v, layout, **given),
    }
    wanted = run(qkv.float(), lambda q, k, v: attention.attend_plain(q, k, v, layout, **given))
    found = run(qkv, variants[variant])
    off = [float((f - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True)]
    if not max(off) < 0.02:
        raise AssertionError(f"output and gradient are {off[0]:.3g} and {off[1]:.3g} from plain attention")
    return f"output {off[0]:.2g}, gradient {off[1]:.2g} from plain attention"


def check_products(device: str) -> str:
    """fp8 products on the GPU's units against their emulation, by rows and by tensor."""
    import torch

    from tunesmith.models.fp8 import emulate, multiply, quantize_rows, quantize_tensor

    torch.manual_seed(0)
    x, w = torch.randn(4096, 1024, device=device), torch.randn(2816, 1024, device=device) * 0.02
    w_codes, w_scale = quantize_rows(w)
    worst = 0.0
    for quantize in (quantize_rows, quantize_tensor):
        codes, scale = quantize(x)
        for b_scale in (w_scale[:, 0].contiguous(), None):
            found = multiply(codes, scale, w_codes, b_scale, torch.bfloat16).float()
            wanted = emulate(codes, scale, w_codes, b_scale, torch.float32)
            worst = max(worst, float((found - wanted).norm() / wanted.norm()))
    if not worst < 0.01:
        raise AssertionError(f"fp8 products are {worst:.3g} from their emulation")
    return f"{worst:.2g} from the emulation"


def check_unpacking(device: str) -> str:
    """NF4 as the kernels unpack it: bit for bit what plain torch says."""
    import torch

    from tunesmith.models.packed import PackedRows, unpack, unpack_fp8
    from tunesmith.models.quant import Nf4Matrix

    if device != "cuda":
        raise Skip("the kernels need a GPU")
    torch.manual_seed(0)
    for double in (False, True):
        weights = [torch.randn(1024, 1024, device=device) * 0.02, torch.randn(256, 1024, device=device)]
        rows = PackedRows([Nf4Matrix(weight, double_quant=double) for weight in weights])
        rows.set_compute("fp8")
        stored, _, inverse = rows.tensors()
        for dtype in (torch.bfloat16, torch.float32):
            assert torch.equal(unpack(rows.kind, stored, rows.sizes, 1024, dtype), rows.dense(dtype)), dtype
        assert inverse is not None
        wanted = (
            (rows.dense(torch.float32) * inverse[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        )
        for transposed in (False, True):
            codes = unpack_fp8(rows.kind, stored, rows.sizes, 1024, inverse, transposed=transposed).float()
            off = int((codes != (wanted.t() if transposed else wanted)).sum())
            assert not off, f"{off} codes differ (double {double}, transposed {transposed})"
    return "bit for bit"


def check_waiting(folder: Path, device: str) -> str:
    """Micro-batches, backward and update, with torch set to raise where the host would wait for the GPU."""
    import torch

    from tunesmith.methods.sft import sft_loss
    from tunesmith.models.layout import make_batch
    from tunesmith.models.segments import Segments
    from tunesmith.training.optim import LossScale, MasterAdamW
    from tunesmith.training.step import Stepper

    if device != "cuda":
        raise Skip("a CPU has nobody to wait for")
    model = open_model(folder, device, "bfloat16")
    model.segments = Segments(compiled=False)
    rows = make_rows(MIXED, 8192)
    stepper = Stepper(
        model,
        MasterAdamW(dict(model.named_trainable())),
        make_batch=lambda each, where: make_batch(each, device=where, round_tokens=128),
        loss=sft_loss,
        device=model.device,
        budget_tokens=2000,
        clip_norm=1.0,
        scale=LossScale(enabled=False),
    )
    stepper.take(rows, step=1, learning_rate=RATE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepper._run_micro_batches(rows, [[0], [1, 2], [3, 4, 5, 6, 7]], 1000)  # pyright: ignore[reportPrivateUsage]
        stepper.optimizer.gradient_norm()
        stepper.optimizer.update(learning_rate=RATE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "the host waits once a step, for loss and norm"


def check_job(folder: Path, device: str, *, method: dict[str, Any]) -> str:
    """A whole compiled job through the function behind `tunesmith train`."""
    from gpu_cases.inputs import write_random_rows
    from tunesmith.api.tasks import TrainTask
    from tunesmith.api.training import run_train_task
    from tunesmith.job.load import job_from

    own = folder / f"job-{method['name']}-{method.get('compute', method.get('base', ''))}"
    shutil.rmtree(own, ignore_errors=True)
    length, vocab = (1024, 8192) if device == "cuda" else (64, 512)
    write_random_rows(own / "rows", lengths=[length] * 12, vocab_size=vocab, seed=0)
    train = {"steps": 3, "batch_rows": 4, "learning_rate": RATE, "compile": True, "save_every": "never"}
    train |= {"evaluate_every": "never", "keep_best": False, "precision": "bf16"}
    model = str(folder / "model")
    job = job_from({"model": model, "data": {"train": str(own / "rows")}, "method": method, "train": train})
    dumped = job.model_dump(mode="json")
    task = TrainTask(
        label="",
        job=dumped,
        out=str(own / "out"),
        prepared=str(own / "rows"),
        model_folder=model,
        model_name="random",
        revision=None,
        key="smoke",
    )
    record = run_train_task(task, lambda event: None)
    losses = [json.loads(line)["loss"] for line in (own / "out" / "steps.jsonl").read_text().splitlines()]
    if not losses[-1] < losses[0] + 0.1:
        raise AssertionError(f"losses: {losses}")
    return f"{record.steps} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}, {record.wall_seconds:.0f} s"


def check_peer(folder: Path, arguments: argparse.Namespace, case: str) -> str:
    """One case of gpu.py at this shape: inputs, reference, gradients of both sides, a step of each."""
    command = [sys.executable, str(CHECKOUT / "benchmarks" / "gpu.py"), "--case", case, "--shape", "smoke"]
    command += [
        "--row-tokens",
        "1024",
        "--batch-rows",
        "4",
        "--rounds",
        "1",
        "--steps",
        "2",
        "--warm-up",
        "2",
    ]
    command += [
        "--out",
        str(folder / f"{case}.json"),
        "--folder",
        str(folder / case),
        "--case-seconds",
        "150",
    ]
    command += ["--wheels", str(arguments.wheels)] if arguments.wheels else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode:
        raise AssertionError("\n".join(told[-25:]))
    return told[-1]


# --- the list ---------------------------------------------------------------------------------------------------------


def list_paths(arguments: argparse.Namespace) -> dict[str, Callable[[], str]]:
    folder, device = arguments.folder, arguments.device
    mixed = [MIXED, *OTHERS] if device == "cuda" else [SMALL_MIXED]

    def path(**how: Any) -> Callable[[], str]:
        return lambda: check_path(folder, device, **how)

    def attention(**how: Any) -> Callable[[], str]:
        return lambda: check_attention(device, **how)

    def full(optimizer: str, masters: str = "float32", **how: Any) -> Callable[[], str]:
        return path(lora=False, optimizer=optimizer, masters=masters, **how)

    paths: dict[str, Callable[[], str]] = {
        "bf16": path(),
        "bf16-lengths": path(lengths=mixed),
        "bf16-eager": path(compiled=False, lengths=mixed),
        "bf16-recomputed": path(recomputed=2),
        "fp8": path(base="fp8", allowed="fp8"),
        "nf4": path(base="nf4"),
        "nf4-fp8": path(base="nf4", compute="fp8", allowed="fp8"),
        "int8": path(base="int8"),
        "full-adamw-bf16": full("adamw-bf16", "bfloat16"),
        "full-adamw": full("adamw"),
        "full-muon": full("muon", compiled=False),
        "lora-adamw-8bit": path(optimizer="adamw-8bit", compiled=False),
        "products-fp8": lambda: check_products(device),
        "unpacking": lambda: check_unpacking(device),
        "attention-even": attention(variant="even"),
        "attention-varlen": attention(variant="varlen"),
        "attention-varlen-64": attention(variant="varlen", width=64),
        "attention-window": attention(variant="varlen", window=100),
        "attention-cap": attention(variant="chosen", cap=20.0),
        "no-waiting": lambda: check_waiting(folder, device),
        "job-lora": lambda: check_job(folder, device, method={"name": "lora"}),
        "job-fp8": lambda: check_job(folder, device, method={"name": "lora", "base": "fp8"}),
        "job-qlora-fp8": lambda: check_job(folder, device, method={"name": "qlora", "compute": "fp8"}),
    }
    if arguments.peers:
        for case in ("lora-bf16", "qlora-limit", "full-1.5b", "full-8b", "dpo-1.5b", "grpo-1.5b"):
            paths[f"peer-{case}"] = lambda case=case: check_peer(folder, arguments, case)
    return paths


def run_here(arguments: argparse.Namespace) -> None:
    """One path, in this process; the last line says how it went."""
    began = time.perf_counter()
    try:
        word, said = "PASS", list_paths(arguments)[arguments.path]()
    except Skip as reason:
        word, said = "SKIP", str(reason)
    except BaseException:
        word, said = "FAIL", traceback.format_exc()
    print(json.dumps([word, time.perf_counter() - began, said]))


def run_apart(
    name: str, arguments: argparse.Namespace, environment: dict[str, str]
) -> tuple[str, float, str]:
    """(PASS, SKIP or FAIL, seconds, what it said) of one path in its own process: a broken GPU context ends with it."""
    command = [sys.executable, str(Path(__file__).resolve()), "--path", name, "--device", arguments.device]
    command += ["--folder", str(arguments.folder), *(["--peers"] if arguments.peers else [])]
    command += ["--wheels", str(arguments.wheels)] if arguments.wheels else []
    seconds = arguments.seconds * (3 if name.startswith("peer-") else 1)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return "FAIL", seconds, f"no answer within {seconds:.0f} s"
    try:
        word, took, said = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return "FAIL", 0.0, f"ended with {done.returncode}\n{done.stderr[-3000:]}"
    return word, took, said


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", action="append", default=[], help="a path, or the beginning of several")
    parser.add_argument("--peers", action="store_true", help="the peers' side of gpu.py, too (minutes)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for this run")
    parser.add_argument("--folder", type=Path, help="where the model is written, and found again")
    parser.add_argument("--jobs", type=int, default=12, help="paths at a time")
    parser.add_argument("--seconds", type=float, default=100.0, help="the most that one path may take")
    parser.add_argument("--lines", type=int, default=6, help="lines shown of a failure")
    parser.add_argument("--path", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    arguments.folder = (arguments.folder or Path(tempfile.gettempdir()) / "tunesmith-smoke").resolve()
    if arguments.path:
        run_here(arguments)
        return
    began = time.perf_counter()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    # Many processes compile at once: each with its own sixteen workers would be in the others' way.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    if arguments.wheels:
        from gpu import install_wheels

        site = install_wheels(arguments.wheels.resolve(), arguments.folder)
        environment["PYTHONPATH"] = os.pathsep.join([str(site), *sys.path[:2]])
        sys.path.insert(0, str(site))
    if arguments.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    write_inputs(arguments.folder, arguments.device)
    names = [n for n in list_paths(arguments) if not arguments.only or n.startswith(tuple(arguments.only))]
    counts = {"PASS": 0, "SKIP": 0, "FAIL": 0}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = {pool.submit(run_apart, name, arguments, environment): name for name in names}
        for future in as_completed(running):
            word, took, said = future.result()
            counts[word] += 1
            lines = said.strip().splitlines()
            shown = lines if arguments.only or word != "FAIL" else lines[-arguments.lines :]
            print(
                f"{word} {running[future]:20} {took:5.0f} s  {shown[0] if word != 'FAIL' else ''}", flush=True
            )
            if word == "FAIL":
                print("\n".join(f"    {line}" for line in shown), flush=True)
    print(f"{counts}, {time.perf_counter() - began:.0f} s")
    if counts["FAIL"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""A real decoder small enough to train in milliseconds, its rows, and a run as a process: `python tiny.py OPTIONS`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunesmith.core.errors import TunesmithError
from tunesmith.core.fingerprint import hash_row
from tunesmith.core.rundir import RunDir
from tunesmith.core.types import Origin, TokenRow
from tunesmith.job.spec import TrainSpec
from tunesmith.training.checkpoint import list_checkpoints
from tunesmith.training.loop import TrainOutcome, train

VOCAB, WIDTH = 23, 16


class TinyDecoder(nn.Module):
    """One block of causal attention and an MLP. Rows are (B, S); padding sits at the end and nobody sees it."""

    def __init__(self, *, seed: int = 0, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.norm = nn.RMSNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.dropout = nn.Dropout(dropout)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim >= 2:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
                elif parameter is not self.norm.weight:
                    parameter.zero_()
        self.to(dtype)

    def named_trainable(self):
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def named_matrices(self) -> dict[str, list[slice]]:
        thirds = [slice(at * WIDTH, (at + 1) * WIDTH) for at in range(3)]
        return {"qkv.weight": thirds, "mlp.0.weight": [slice(0, 32)], "mlp.2.weight": [slice(0, WIDTH)]}

    def forward(self, ids_BS: Tensor) -> Tensor:
        x = self.embed(ids_BS)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.dropout(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        x = x + self.dropout(self.mlp(self.norm(x)))
        return self.head(x)


@dataclass(frozen=True)
class LossSum:
    total: Tensor
    num_targets: int


def make_batch(rows: Sequence[TokenRow], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids (B, S) and labels (B, S), -100 where the next token is no target."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), -100)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        next_ids = [t if m else -100 for t, m in zip(row.ids, row.mask, strict=True)][1:]
        labels[i, : len(next_ids)] = torch.tensor(next_ids)
    return ids.to(device), labels.to(device)


def sum_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossSum:
    ids, labels = batch
    logits = model(ids).float()
    total = F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1), ignore_index=-100, reduction="sum")
    return LossSum(total, int((labels != -100).sum()))


def make_rows(count: int, *, seed: int = 0) -> list[TokenRow]:
    """Rows of 4 to 12 tokens that count upwards modulo VOCAB: the first two tokens are the prompt."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        start, length = rng.randrange(VOCAB), rng.randrange(4, 13)
        ids = [(start + i) % VOCAB for i in range(length)]
        mask = [0, 0] + [1] * (length - 2)
        rows.append(
            TokenRow(ids, mask, Origin(f"train.jsonl:{index + 1}", "train.jsonl", index), hash_row(ids, mask))
        )
    return rows


def make_spec(**changes: object) -> TrainSpec:
    values = {
        "epochs": 2.0,
        "batch_rows": 4,
        "learning_rate": 0.01,
        "evaluate_every": "never",
        "save_every": "never",
    }
    return TrainSpec(**{**values, **changes})  # type: ignore[arg-type]


def run_tiny(
    root: Path, spec: TrainSpec, *, rows: int = 22, model: nn.Module | None = None, **more
) -> TrainOutcome:
    """Train a tiny model in `root`."""
    arguments = {"make_batch": make_batch, "loss": sum_loss, **more}
    run_dir = RunDir(root).create()
    with run_dir.lock():
        return train(model or TinyDecoder(), make_rows(rows), spec, run_dir, **arguments)


def measure_validation(model: nn.Module) -> float:
    """Nats per target token on four fixed rows."""
    with torch.no_grad():
        found = sum_loss(model, make_batch(make_rows(4, seed=99), torch.device("cpu")))
    return found.total.item() / found.num_targets


def measure_distance(model: nn.Module) -> float:
    """A validation that is lowest early in a run: how far the loss is from 2 nats."""
    return abs(measure_validation(model) - 2.0)


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_run(root: Path, model: nn.Module) -> dict[str, str]:
    """What must be equal between an uninterrupted run and a continued one."""
    from safetensors.torch import load_file

    newest = list_checkpoints(RunDir(root).checkpoints)[0]
    state = json.loads((newest / "state.json").read_text())
    steps = [json.loads(line) for line in RunDir(root).steps.read_text().splitlines()]
    measured = ("step_seconds", "peak_bytes")
    curve = [{k: v for k, v in step.items() if k not in measured} for step in steps]
    return {
        "model": hash_tensors(dict(model.named_parameters())),
        "weights": hash_tensors(load_file(newest / "weights.safetensors")),
        "optimizer": hash_tensors(load_file(newest / "optimizer.safetensors")),
        "random": hash_tensors(load_file(newest / "random.safetensors")),
        "position": json.dumps([state["step"], state["position"], state["best"], state["loss_scale"]]),
        "steps": json.dumps(curve),
    }


def main() -> int:
    """One leg of a run in its own process. Prints hashes as JSON at the end; errors go out as the real program's do."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--spec", default="{}")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--validate", action="store_true")
    parser.add_argument(
        "--stop-after", type=int, default=0, help="send the signal to ourselves after this step"
    )
    parser.add_argument("--stop-in-validation", type=int, default=0, help="in the n-th validation")
    parser.add_argument("--signal", default="SIGTERM")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = TinyDecoder(dropout=options.dropout, dtype=getattr(torch, options.dtype))
    number = getattr(signal, options.signal)
    validations = 0

    def evaluate() -> float:
        nonlocal validations
        validations += 1
        torch.rand(3)  # validation may draw; training must not notice
        if validations == options.stop_in_validation:
            os.kill(os.getpid(), number)
        return measure_distance(model)

    def on_step(progress) -> None:
        if progress.step == options.stop_after:
            os.kill(os.getpid(), number)

    try:
        run_tiny(
            options.root,
            make_spec(**json.loads(options.spec)),
            model=model,
            evaluate=evaluate if options.validate else None,
            on_step=on_step,
            resume=options.resume,
        )
    except TunesmithError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(hash_run(options.root, model)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

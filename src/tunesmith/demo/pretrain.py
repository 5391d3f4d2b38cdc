"""Pre-train `tunesmith/tiny` on a folder of text and self-made instruction tasks; write an ordinary model folder.

    python -m tunesmith.demo.pretrain --text DIR --out DIR --minutes 5

On a GPU this takes minutes; on a CPU use small settings, such as `--rows 2 --steps 20 --workers 1`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tunesmith.demo import model_folder
from tunesmith.demo.instruction_tasks import Stock
from tunesmith.demo.pretrain_model import Decoder, Layout, Shape, make_optimizers, make_rope
from tunesmith.demo.pretrain_text import (
    BOS,
    PAD,
    Prepared,
    find_token,
    load_prepared,
    pack_task_rows,
    prepare,
    save_prepared,
)

PROMPT_WEIGHT = 0.1  # a task's prompt is mostly noise to predict, its answer is the lesson
ANSWER_WEIGHT = 2.0
POOL_ROWS = 300_000


def make_rows_forever(tokenizer_text: str, stock: Stock, seed: int, row_tokens: int, out: Any) -> None:
    """Worker process: put packs of task rows on the queue until killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker per core already
    tokenizer = Tokenizer.from_str(tokenizer_text)
    pack = 0
    while True:
        out.put(
            pack_task_rows(tokenizer, stock, seed=seed * 1_000_003 + pack, num_rows=64, row_tokens=row_tokens)
        )
        pack += 1


class TaskPool:
    """Task rows made by worker processes; each is used when fresh, and again only if the workers fall behind."""

    def __init__(
        self, tokenizer: Tokenizer, stock: Stock, *, workers: int, row_tokens: int, seed: int
    ) -> None:
        context = multiprocessing.get_context("spawn")  # the tokenizer's threads do not survive a fork
        self._queue: Any = context.Queue(maxsize=4 * workers)
        self._packs: list[tuple[np.ndarray, np.ndarray]] = []
        self._rest: list[tuple[np.ndarray, np.ndarray]] = []
        self._used, self.num_repeats = 0, 0
        self._draw = np.random.default_rng(seed)
        arguments = (tokenizer.to_str(), stock)
        self._workers = [
            context.Process(
                target=make_rows_forever,
                args=(*arguments, seed * 1000 + at, row_tokens, self._queue),
                daemon=True,
            )
            for at in range(workers)
        ]
        for worker in self._workers:
            worker.start()
        threading.Thread(target=self._collect, daemon=True).start()

    def _collect(self) -> None:
        while len(self._packs) * 64 < POOL_ROWS:
            self._packs.append(self._queue.get())

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, is_answer) of `count` rows."""
        began = time.perf_counter()
        while not self._packs:
            time.sleep(0.05)
            if time.perf_counter() - began > 120:
                raise RuntimeError("no task rows after 120 s; are the worker processes running?")
        while sum(len(ids) for ids, _ in self._rest) < count:
            is_fresh = self._used < len(self._packs)
            at = self._used if is_fresh else int(self._draw.integers(len(self._packs)))
            self._rest.append(self._packs[at])
            self._used += is_fresh
            self.num_repeats += 0 if is_fresh else len(self._packs[at][0])
        ids, answers = (np.concatenate(parts) for parts in zip(*self._rest, strict=True))
        self._rest = [(ids[count:], answers[count:])]
        return ids[:count], answers[:count]

    def close(self) -> None:
        for worker in self._workers:
            worker.terminate()


def draw_text_rows(
    text: np.ndarray, bos: int, *, count: int, row_tokens: int, draw: np.random.Generator
) -> np.ndarray:
    """Random windows of the text, each a document of its own; half the rows hold four short ones."""
    rows = np.empty((count, row_tokens), dtype=np.uint16)
    for row in rows:
        parts = 1 if draw.random() < 0.5 else 4
        size = row_tokens // parts
        for at in range(parts):
            start = draw.integers(0, len(text) - size)
            row[at * size : (at + 1) * size] = text[start : start + size]
            row[at * size] = bos
    return rows


def make_step(
    text: np.ndarray, pool: TaskPool, tokenizer: Tokenizer, arguments: argparse.Namespace, task_share: float,
    draw: np.random.Generator,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The tensors of one step, on the CPU: flat ids, targets, weights, positions and document starts."""
    bos, pad = find_token(tokenizer, BOS), find_token(tokenizer, PAD)
    num_tasks = round(arguments.rows * task_share)
    size = arguments.row_tokens
    texts = draw_text_rows(text, bos, count=arguments.rows - num_tasks, row_tokens=size, draw=draw)
    tasks, answers = pool.take(num_tasks)
    ids = np.concatenate((texts, tasks)).astype(np.int64).reshape(-1)
    weights = np.ones((arguments.rows, size), dtype=np.float32)
    weights[len(texts) :] = np.where(answers, ANSWER_WEIGHT, PROMPT_WEIGHT)
    targets = np.roll(ids, -1)
    weights = np.roll(weights.reshape(-1), -1)
    weights[(targets == pad) | (targets == bos)] = 0.0
    is_start = ids == bos
    is_start[::size] = True
    starts = np.flatnonzero(is_start)
    positions = np.arange(len(ids)) - np.repeat(starts, np.diff(np.append(starts, len(ids))))
    # A fixed number of (partly empty) documents keeps one compiled graph.
    padded = np.full(arguments.rows * 40 + 1, len(ids), dtype=np.int32)
    padded[: min(len(starts), len(padded) - 1)] = starts[: len(padded) - 1]
    arrays = {"ids": ids, "targets": targets, "weights": weights, "positions": positions, "starts": padded}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def feed_steps(steps: queue.Queue[Any], share: dict[str, float], seed: int, *parts: Any) -> None:
    """Thread: keep a few steps ready."""
    draw = np.random.default_rng(seed)
    text, pool, tokenizer, arguments = parts
    while True:
        steps.put(make_step(text, pool, tokenizer, arguments, share["tasks"], draw))


def lay_out(
    step: dict[str, torch.Tensor], shape: Shape, device: torch.device, row_tokens: int
) -> tuple[Any, ...]:
    """Move a step to the device: (ids, targets, weights, layout)."""
    moved = {name: part.to(device, non_blocking=True) for name, part in step.items()}
    on_gpu = device.type == "cuda"
    cos, sin = make_rope(shape, moved["positions"], torch.bfloat16 if on_gpu else torch.float32)
    mask = None
    if not on_gpu:
        # Document number of each token: how many starts lie at or before it.
        number = torch.cumsum(moved["positions"] == 0, 0)
        mask = (number[:, None] == number[None]) & torch.ones(
            len(number), len(number), dtype=torch.bool
        ).tril()
    layout = Layout(cos, sin, moved["starts"] if on_gpu else None, mask, row_tokens)
    return moved["ids"], moved["targets"], moved["weights"], layout


def task_share_at(progress: float, final_share: float) -> float:
    """Language first, tasks later: the share of task rows grows to its final value at 60% of the run."""
    return final_share * min(1.0, 0.6 + progress * 2 / 3)


def rate_at(progress: float) -> float:
    """Learning-rate factor: short warm-up, constant, then linear to zero over the last 45%."""
    return min(1.0, progress / 0.01 + 0.02, max(0.0, (1.0 - progress) / 0.45))


def find_prepared(arguments: argparse.Namespace) -> Prepared:
    """What an earlier call left under --prepared, or made anew from --text (and left there)."""
    if arguments.prepared and (arguments.prepared / "stock.json").is_file():
        return load_prepared(arguments.prepared)
    if arguments.text is None:
        raise SystemExit("pretrain: nothing is prepared, so --text must name a folder of texts")
    prepared = prepare(arguments.text, vocab_size=arguments.vocab, start=arguments.start)
    if arguments.prepared:
        save_prepared(prepared, arguments.prepared)
    return prepared


def train(arguments: argparse.Namespace) -> None:
    """Tokenizer, model, loop; writes the model folder, `curve.jsonl` and `pretraining.json` under --out."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    began = time.perf_counter()
    prepared = find_prepared(arguments)
    tokenizer, text, stock = prepared.tokenizer, prepared.text, prepared.stock
    if arguments.prepare_only:
        return
    shape = Shape(vocab_size=arguments.vocab, layers=arguments.layers, feed_forward=arguments.feed_forward)
    pool = TaskPool(
        tokenizer, stock, workers=arguments.workers, row_tokens=arguments.row_tokens, seed=arguments.seed
    )
    print(f"{len(text):,} text tokens after {time.perf_counter() - began:.0f} s", flush=True)
    model = Decoder(shape).to(device)
    if arguments.start:
        model.load_state_dict(load_file(arguments.start / "model.safetensors"))
    optimizers = make_optimizers(model, matrix_rate=arguments.matrix_rate, other_rate=arguments.other_rate)
    steps: queue.Queue[Any] = queue.Queue(maxsize=6)
    share = {"tasks": task_share_at(0.0, arguments.task_share)}
    parts = (text, pool, tokenizer, arguments)
    threading.Thread(target=feed_steps, args=(steps, share, arguments.seed, *parts), daemon=True).start()

    def save() -> None:
        model_folder.write_model_folder(arguments.out / "tiny", model, tokenizer)

    curve = run_loop(model, optimizers, steps, share, save, arguments, device)
    pool.close()
    (arguments.out / "curve.jsonl").write_text(
        "".join(json.dumps(point) + "\n" for point in curve), encoding="utf-8"
    )
    record = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()} | {
        "steps": curve[-1]["step"], "tokens": curve[-1]["tokens"], "seconds": round(time.perf_counter() - began),
        "text_tokens": len(text), "repeated_task_rows": pool.num_repeats, "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }  # fmt: skip
    del record["text"], record["out"], record["start"], record["prepared"], record["prepare_only"]
    (arguments.out / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record), flush=True)


def run_loop(
    model: Decoder, optimizers: list[torch.optim.Optimizer], steps: queue.Queue[Any], share: dict[str, float],
    save: Callable[[], None], arguments: argparse.Namespace, device: torch.device,
) -> list[dict[str, float]]:  # fmt: skip
    """Train until the time or step budget is spent, saving at every fifth; returns the loss curve (nats per token)."""
    forward = torch.compile(model) if device.type == "cuda" else model
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    curve: list[dict[str, float]] = []
    started = began = mark = time.perf_counter()
    progress, at, sums = 0.0, 0, torch.zeros(4, device=device)
    while progress < 1.0:
        ids, targets, weights, layout = lay_out(steps.get(), model.shape, device, arguments.row_tokens)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * rate_at(progress)
        loss, text_nats, answer_nats = forward(ids, targets, weights, layout)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        sums += torch.stack((text_nats, (weights == 1).sum(), answer_nats, (weights == ANSWER_WEIGHT).sum()))
        at += 1
        if at <= 3:
            print(f"step {at} after {time.perf_counter() - started:.0f} s", flush=True)
        if at == 3:  # compilation is not training time
            began = mark = time.perf_counter()
        before = progress
        spent = (time.perf_counter() - began) / 60 / arguments.minutes
        progress = at / arguments.steps if arguments.steps else spent
        share["tasks"] = task_share_at(progress, arguments.task_share)
        if int(progress * 5) > int(before * 5):
            save()
        if at in (1, 20) or at % arguments.log_every == 0 or progress >= 1.0:
            numbers = sums.tolist()
            sums.zero_()
            seconds, mark = time.perf_counter() - mark, time.perf_counter()
            done = at * arguments.rows * arguments.row_tokens
            point = {
                "step": at, "tokens": done, "text_nats": round(numbers[0] / max(1, numbers[1]), 4),
                "answer_nats": round(numbers[2] / max(1, numbers[3]), 4), "progress": round(progress, 4),
            }  # fmt: skip
            curve.append(point)
            speed = arguments.log_every * arguments.rows * arguments.row_tokens / seconds
            print(json.dumps(point), f"{speed:,.0f} tokens/s, {steps.qsize()} ready", flush=True)
    return curve


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", type=Path, help="folder with .jsonl, .jsonl.xz and .txt texts")
    parser.add_argument(
        "--prepared", type=Path, help="folder that keeps the tokenizer and the encoded texts between runs"
    )
    parser.add_argument("--prepare-only", action="store_true", help="stop before training")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="go on from this model folder, with its tokenizer")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time after compilation")
    parser.add_argument("--steps", type=int, default=0, help="number of steps; overrides --minutes")
    parser.add_argument("--rows", type=int, default=32, help="rows of --row-tokens in a step")
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument(
        "--task-share", type=float, default=0.75, help="final share of rows with instruction tasks"
    )
    parser.add_argument("--vocab", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--feed-forward", type=int, default=640)
    parser.add_argument("--matrix-rate", type=float, default=0.02, help="Muon learning rate")
    parser.add_argument("--other-rate", type=float, default=0.004, help="AdamW learning rate")
    parser.add_argument("--workers", type=int, default=14, help="processes that make instruction tasks")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_arguments())

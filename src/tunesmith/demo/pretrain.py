"""Pre-train `tunesmith/tiny` on a folder of text and self-made instruction tasks; write an ordinary model folder.

    python -m tunesmith.demo.pretrain --text DIR --out DIR --minutes 5
    torchrun --nproc-per-node 4 -m tunesmith.demo.pretrain --prepared DIR --out DIR --minutes 5

On a GPU this takes minutes; on a CPU use small settings, such as `--rows 2 --steps 20 --workers 1`. Several GPUs of one
host each take --rows rows of a step and average their gradients; prepare the texts first, with --prepare-only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tunesmith.demo import model_folder
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

IGNORED, TEXT, PROMPT, ANSWER = range(4)
# The weight in the loss of each kind of token: a task's prompt is mostly noise to predict, its answer is the lesson.
WEIGHTS = (0.0, 1.0, 0.1, 2.0)
MOST_DOCUMENTS = 16  # in a row, on average over a step
SLOTS_EACH = 3  # steps that a worker makes ahead
AGREE_EVERY = 10  # steps after which processes agree on the time


class Team:
    """The processes that train together, one per GPU, as torchrun starts them; alone, one of one."""

    def __init__(self) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes, in one exchange."""
        if self.size == 1:
            return
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        flat /= self.size
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def agree(self, value: float) -> float:
        """The first process's value, for all."""
        if self.size > 1:
            shared = torch.tensor([value], dtype=torch.float64)
            dist.broadcast(shared, 0)
            value = shared.item()
        return value

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


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


class StepMaker:
    """Makes the arrays of one step after another; every worker process has its own, with its own seed."""

    def __init__(self, prepared: Prepared, *, rows: int, row_tokens: int, seed: int) -> None:
        self._prepared, self._rows, self._row_tokens = prepared, rows, row_tokens
        self._bos, self._pad = (find_token(prepared.tokenizer, token) for token in (BOS, PAD))
        self._draw = np.random.default_rng(seed)
        self._ids = np.empty((0, row_tokens), dtype=np.uint16)  # task rows made and not yet used
        self._answers = np.empty((0, row_tokens), dtype=bool)

    def _take_tasks(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        while len(self._ids) < count:
            ids, answers = pack_task_rows(
                self._prepared.tokenizer, self._prepared.stock, seed=int(self._draw.integers(2**62)),
                num_rows=64, row_tokens=self._row_tokens,
            )  # fmt: skip
            self._ids = np.concatenate((self._ids, ids))
            self._answers = np.concatenate((self._answers, answers))
        taken = self._ids[:count], self._answers[:count]
        self._ids, self._answers = self._ids[count:], self._answers[count:]
        return taken

    def make(self, task_share: float) -> dict[str, np.ndarray]:
        """ids, kinds (a token's weight in WEIGHTS) and positions, flat, and the padded starts of documents."""
        num_tasks = round(self._rows * task_share)
        texts = draw_text_rows(
            self._prepared.text, self._bos, count=self._rows - num_tasks, row_tokens=self._row_tokens,
            draw=self._draw,
        )  # fmt: skip
        tasks, answers = self._take_tasks(num_tasks)
        ids = np.concatenate((texts, tasks)).reshape(-1)
        kinds = np.full((self._rows, self._row_tokens), TEXT, dtype=np.uint8)
        kinds[len(texts) :] = np.where(answers, ANSWER, PROMPT)
        kinds = kinds.reshape(-1)
        kinds[(ids == self._pad) | (ids == self._bos)] = IGNORED
        is_start = ids == self._bos
        is_start[:: self._row_tokens] = True
        starts = np.flatnonzero(is_start)
        positions = np.arange(len(ids)) - np.repeat(starts, np.diff(np.append(starts, len(ids))))
        # A fixed number of (partly empty) documents keeps one compiled graph.
        padded = np.full(self._rows * MOST_DOCUMENTS + 1, len(ids), dtype=np.int32)
        padded[: min(len(starts), len(padded) - 1)] = starts[: len(padded) - 1]
        return {"ids": ids, "kinds": kinds, "positions": positions.astype(np.int32), "starts": padded}


class Slots:
    """Room for steps in memory that processes share; through a queue's pipe they come slower than a GPU trains."""

    def __init__(self, rows: int, row_tokens: int, count: int, memory: SharedMemory | None = None) -> None:
        tokens = rows * row_tokens
        # Widest first, so that every array is aligned.
        self._fields = (
            ("positions", np.dtype(np.int32), tokens), ("starts", np.dtype(np.int32), rows * MOST_DOCUMENTS + 1),
            ("ids", np.dtype(np.uint16), tokens), ("kinds", np.dtype(np.uint8), tokens),
        )  # fmt: skip
        self._size = sum(dtype.itemsize * length for _, dtype, length in self._fields)
        self._size += -self._size % 64
        self.memory = memory or SharedMemory(create=True, size=self._size * count)

    def view(self, slot: int) -> dict[str, np.ndarray]:
        """The arrays of one slot, not copied."""
        offset, arrays = slot * self._size, {}
        for name, dtype, length in self._fields:
            arrays[name] = np.ndarray(length, dtype, self.memory.buf, offset)
            offset += dtype.itemsize * length
        return arrays


def make_steps_forever(
    folder: Path, rows: int, row_tokens: int, seed: int, memory: SharedMemory, own: list[int],
    is_free: Any, task_share: Any, ready: Any,
) -> None:  # fmt: skip
    """Worker process: fill its `own` slots in turn and name them on the queue, until killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker per core already
    maker = StepMaker(load_prepared(folder), rows=rows, row_tokens=row_tokens, seed=seed)
    slots = Slots(rows, row_tokens, 0, memory)
    for slot in itertools.cycle(own):
        step = maker.make(task_share.value)
        is_free.acquire()
        for name, array in slots.view(slot).items():
            array[:] = step[name]
        ready.put(slot)


class Feed:
    """Worker processes that make steps; the trainer only moves them."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, *, seed: int) -> None:
        context = multiprocessing.get_context("spawn")  # the tokenizer's threads do not survive a fork
        self.task_share = context.Value("d", task_share_at(0.0, arguments.task_share), lock=False)
        count = arguments.workers * SLOTS_EACH
        self._slots = Slots(arguments.rows, arguments.row_tokens, count)
        self._ready: Any = context.Queue()
        self._are_free = [context.Semaphore(SLOTS_EACH) for _ in range(arguments.workers)]
        self._workers = [
            context.Process(
                target=make_steps_forever,
                args=(
                    folder,
                    arguments.rows,
                    arguments.row_tokens,
                    seed * 1000 + at,
                    self._slots.memory,
                    list(range(at * SLOTS_EACH, (at + 1) * SLOTS_EACH)),
                    is_free,
                    self.task_share,
                    self._ready,
                ),
                daemon=True,
            )
            for at, is_free in enumerate(self._are_free)
        ]
        for worker in self._workers:
            worker.start()

    def take(self, *, pinned: bool) -> dict[str, torch.Tensor]:
        """Copies of a step's arrays, in pinned memory if asked, from which a GPU reads without anyone waiting."""
        slot = self._ready.get(timeout=180)
        step = {}
        for name, array in self._slots.view(slot).items():
            shared = torch.from_numpy(array)
            step[name] = torch.empty_like(shared, pin_memory=pinned).copy_(shared)
        self._are_free[slot // SLOTS_EACH].release()
        return step

    @property
    def num_ready(self) -> int:
        return self._ready.qsize()

    def close(self) -> None:
        for worker in self._workers:
            worker.terminate()
            worker.join()
        self._slots.memory.close()
        self._slots.memory.unlink()


def lay_out(
    step: dict[str, torch.Tensor], shape: Shape, table: torch.Tensor, row_tokens: int
) -> tuple[Any, ...]:
    """Move a step to the device of `table`, which holds WEIGHTS: (ids, targets, weights, layout)."""
    device, on_gpu = table.device, table.is_cuda
    ids, kinds, positions, starts = (
        step[name].to(device, non_blocking=True) for name in ("ids", "kinds", "positions", "starts")
    )
    ids = ids.to(torch.int64)
    weights = table[torch.roll(kinds, -1).to(torch.int64)]
    cos, sin = make_rope(shape, positions, torch.bfloat16 if on_gpu else torch.float32)
    mask = None
    if not on_gpu:
        # Document number of each token: how many starts lie at or before it.
        number = torch.cumsum(positions == 0, 0)
        causal = torch.ones(len(number), len(number), dtype=torch.bool).tril()
        mask = (number[:, None] == number[None]) & causal
    layout = Layout(cos, sin, starts if on_gpu else None, mask, row_tokens)
    return ids, torch.roll(ids, -1), weights, layout


def task_share_at(progress: float, final_share: float) -> float:
    """Language first, tasks later: the share of task rows grows to its final value at 60% of the run."""
    return final_share * min(1.0, 0.6 + progress * 2 / 3)


def rate_at(progress: float) -> float:
    """Learning-rate factor: short warm-up, constant, then linear to zero over the last 45%."""
    return min(1.0, progress / 0.01 + 0.02, max(0.0, (1.0 - progress) / 0.45))


def find_prepared(arguments: argparse.Namespace) -> Path:
    """The folder that an earlier call filled, or fill it from --text."""
    folder = arguments.prepared or arguments.out / "prepared"
    if not (folder / "stock.json").is_file():
        if arguments.text is None:
            raise SystemExit("pretrain: nothing is prepared, so --text must name a folder of texts")
        save_prepared(prepare(arguments.text, vocab_size=arguments.vocab, start=arguments.weights), folder)
    return folder


@dataclass
class Run:
    """Everything that training goes on from: what it has learnt, and how far it has come."""

    model: Decoder
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0  # of training, compilation not counted
    curve: list[dict[str, float]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write atomically."""
        state = {
            "model": self.model.state_dict(), "optimizers": [one.state_dict() for one in self.optimizers],
            "step": self.step, "seconds": self.seconds, "curve": self.curve,
        }  # fmt: skip
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]


def train(arguments: argparse.Namespace) -> None:
    """Tokenizer, model, loop; writes the model folder, `curve.jsonl` and `pretraining.json` under --out."""
    team = Team()
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = find_prepared(arguments)
    if arguments.prepare_only:
        return
    tokenizer = load_prepared(folder).tokenizer
    shape = Shape(vocab_size=arguments.vocab, layers=arguments.layers, feed_forward=arguments.feed_forward)
    model = Decoder(shape).to(team.device)
    if arguments.weights:
        model.load_state_dict(load_file(arguments.weights / "model.safetensors"))
    run = Run(
        model, make_optimizers(model, matrix_rate=arguments.matrix_rate, other_rate=arguments.other_rate)
    )
    state = arguments.out / "state.pt"
    if state.is_file():
        run.load(state)
        print(f"going on after step {run.step:,}", flush=True)
    # Steps after a pause are new ones, drawn with other seeds.
    feed = Feed(folder, arguments, seed=(arguments.seed * 100_003 + run.step) * team.size + team.rank)

    def save() -> None:
        if not team.is_first:
            return
        run.save(state)
        model_folder.write_model_folder(arguments.out / "tiny", model, tokenizer)
        lines = "".join(json.dumps(point) + "\n" for point in run.curve)
        (arguments.out / "curve.jsonl").write_text(lines, encoding="utf-8")

    try:
        run_loop(run, feed, save, arguments, team)
    finally:
        feed.close()
    team.leave()
    if team.is_first:
        write_record(run, arguments, team)


def write_record(run: Run, arguments: argparse.Namespace, team: Team) -> None:
    """What was trained, how and on what, as `pretraining.json`."""
    record = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()} | {
        "steps": run.step, "tokens": run.step * team.size * arguments.rows * arguments.row_tokens,
        "seconds": round(run.seconds), "torch": torch.__version__,
        "parameters": sum(p.numel() for p in run.model.parameters()), "devices": team.size,
        "device": torch.cuda.get_device_name() if team.device.type == "cuda" else "cpu",
    }  # fmt: skip
    del record["text"], record["out"], record["weights"], record["prepared"], record["prepare_only"]
    (arguments.out / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record), flush=True)


def run_loop(
    run: Run, feed: Feed, save: Callable[[], None], arguments: argparse.Namespace, team: Team
) -> None:
    """Train until the time or step budget is spent, or --pause; saves at every tenth of the budget and at the end."""
    device, parameters = team.device, list(run.model.parameters())
    forward = torch.compile(run.model) if device.type == "cuda" else run.model
    rates = [optimizer.defaults["lr"] for optimizer in run.optimizers]
    step_tokens = team.size * arguments.rows * arguments.row_tokens
    before_call, first = run.seconds, run.step + 1
    started = began = time.perf_counter()
    mark, mark_step = began, run.step
    sums, table = torch.zeros(4, device=device), torch.tensor(WEIGHTS, device=device)
    is_last = False
    while not is_last:
        progress = run.step / arguments.steps if arguments.steps else run.seconds / 60 / arguments.minutes
        feed.task_share.value = task_share_at(progress, arguments.task_share)
        ids, targets, weights, layout = lay_out(
            feed.take(pinned=table.is_cuda), run.model.shape, table, arguments.row_tokens
        )
        for optimizer, rate in zip(run.optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * rate_at(progress)
        loss, text_nats, answer_nats = forward(ids, targets, weights, layout)
        loss.backward()
        team.average_gradients(parameters)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        sums += torch.stack(
            (text_nats, (weights == WEIGHTS[TEXT]).sum(), answer_nats, (weights == WEIGHTS[ANSWER]).sum())
        )
        run.step += 1
        if run.step < first + 3:  # compilation is not training time
            print(f"step {run.step} after {time.perf_counter() - started:.0f} s", flush=True)
            began = mark = time.perf_counter()
        if run.step < first + 3 or run.step % AGREE_EVERY == 0:
            run.seconds = team.agree(before_call + time.perf_counter() - began)
        after = run.step / arguments.steps if arguments.steps else run.seconds / 60 / arguments.minutes
        is_paused = 0 < arguments.pause * 60 < run.seconds - before_call
        is_last = after >= 1.0 or is_paused
        if run.step in (1, 20) or run.step % arguments.log_every == 0 or is_last:
            text, texts, answer, answers = sums.tolist()
            sums.zero_()
            point = {
                "step": run.step, "tokens": run.step * step_tokens, "text_nats": round(text / max(1, texts), 4),
                "answer_nats": round(answer / max(1, answers), 4), "progress": round(after, 4),
            }  # fmt: skip
            run.curve.append(point)
            now = time.perf_counter()
            speed = (run.step - mark_step) * step_tokens / (now - mark)
            mark, mark_step = now, run.step
            if team.is_first:
                print(json.dumps(point), f"{speed:,.0f} tokens/s, {feed.num_ready} ready", flush=True)
        if int(after * 10) > int(progress * 10) or is_last:
            save()


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", type=Path, help="folder with .jsonl, .jsonl.xz and .txt texts")
    parser.add_argument(
        "--prepared", type=Path, help="folder that keeps the tokenizer and the encoded texts between runs"
    )
    parser.add_argument("--prepare-only", action="store_true", help="stop before training")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="go on from this model folder, with its tokenizer")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time after compilation")
    parser.add_argument(
        "--pause", type=float, default=0.0, help="stop after so many minutes; the same command goes on"
    )
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

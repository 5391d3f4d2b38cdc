"""Run workers side by side, in order of need: a few at a time, each after what it depends on."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.api.foreign import run_foreign
from tunesmith.api.opening import writing_to
from tunesmith.api.stopping import stop_on_signals
from tunesmith.api.tasks import Task, TrainTask, is_finished, write_tasks
from tunesmith.core.errors import Interrupted, TunesmithError
from tunesmith.core.events import Event, OnEvent
from tunesmith.core.jsonl import read_json, write_json
from tunesmith.core.records import RunRecord
from tunesmith.core.rundir import RunDir
from tunesmith.frameworks.native import worker_command
from tunesmith.frameworks.process import ProcessUse, run_process


@dataclass(frozen=True, slots=True)
class Work:
    """One worker process: its tasks in turn, started when all works named in `after` are done."""

    name: str
    tasks: tuple[Task, ...]
    folder: Path
    after: frozenset[str] = frozenset()


def run_works(works: Sequence[Work], *, parallel: int, threads: int, on_event: OnEvent) -> dict[str, str]:
    """Run all works, earlier ones first where there is a choice. Returns name -> reason of those that failed.

    What depends on a failed work is not started and counts as failed. Raises Interrupted on Ctrl-C or SIGTERM, after
    every worker has saved its state.
    """
    tell = _serialise(on_event)
    failures: dict[str, str] = {}
    done = {work.name for work in works if all(is_finished(task) for task in work.tasks)}
    waiting = [work for work in works if work.name not in done]
    running: dict[Future[None], Work] = {}
    with stop_on_signals() as (stop, received), ThreadPoolExecutor(parallel) as pool:
        while waiting or running:
            while blocked := [work for work in waiting if work.after & failures.keys()]:
                for work in blocked:
                    waiting.remove(work)
                    failures[work.name] = (
                        f"needs {', '.join(sorted(work.after & failures.keys()))}, which failed"
                    )
            ready = [work for work in waiting if work.after <= done]
            for work in ready[: 0 if stop.is_set() else parallel - len(running)]:
                waiting.remove(work)
                running[pool.submit(_run_work, work, threads, stop, tell)] = work
            if not running:
                break
            finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                work = running.pop(future)
                error = future.exception()
                if error is None:
                    done.add(work.name)
                    # SIGTERM ends a worker on purpose; only a worker that ran to its end has finished its tasks.
                    if not stop.is_set():
                        tell(Event("done", work.name, "done", done=len(done), total=len(works)))
                elif isinstance(error, TunesmithError):
                    # Wherever the reason is shown, the work's name stands before it already.
                    failures[work.name] = str(error).removeprefix(f"{work.name}: ")
                    tell(Event("failed", work.name, failures[work.name]))
                else:
                    stop.set()
                    raise error
    if received:
        raise Interrupted(
            "compare",
            "interrupted; what is finished and every checkpoint is kept",
            signal_number=received[0],
            cure="Run the same command again to go on",
        )
    return failures


def _run_work(work: Work, threads: int, stop: threading.Event, on_event: OnEvent) -> None:
    """Raises TunesmithError, also for a write that fails: on a disk that one arm fills the others may still fit."""
    with writing_to(RunDir(work.folder)):
        _run_processes(work, threads, stop, on_event)


def _run_processes(work: Work, threads: int, stop: threading.Event, on_event: OnEvent) -> None:
    task_file = work.folder / f"{work.name.replace(' ', '-')}.tasks.json"
    write_tasks(task_file, work.tasks)
    log = work.folder / f"{work.name.replace(' ', '-')}.log"
    only = work.tasks[0]
    if isinstance(only, TrainTask) and only.framework != "tunesmith":
        run_foreign(only, task_file=task_file, log=log, on_event=on_event, stop=stop, threads=threads)
        return
    use = run_process(
        worker_command(task_file), log=log, task=work.name, on_event=on_event, stop=stop, threads=threads
    )
    if isinstance(only, TrainTask) and not only.parity_steps and not stop.is_set():
        adopt_costs(RunDir(Path(only.out)).record, use)


def adopt_costs(path: Path, use: ProcessUse) -> None:
    """Time and, without a GPU, memory as seen from outside, as of every framework's worker. A training that goes on
    after an interruption knows of more than its last process."""
    record = RunRecord.from_json(read_json(path), place=str(path))
    peak = record.peak_bytes if record.hardware.get("gpu") else max(record.peak_bytes, use.peak_bytes)
    costs = {
        "wall_seconds": max(record.wall_seconds, use.wall_seconds),
        "cpu_seconds": max(record.cpu_seconds, use.cpu_seconds),
        "peak_bytes": peak,
    }
    phases, memory = record.phases, record.memory
    if phases:
        # What the worker could not see of itself: Python's start, imports, and its end.
        phases = {"importing": max(0.0, use.wall_seconds - record.wall_seconds), **phases}
    if memory:
        memory = {**memory, "resident": max(memory["resident"], use.peak_bytes)}
    write_json(path, replace(record, **costs, phases=phases, memory=memory).to_json())


def _serialise(on_event: OnEvent) -> OnEvent:
    lock = threading.Lock()

    def tell(event: Event) -> None:
        with lock:
            on_event(event)

    return tell


def plan_parallel(parallel: int | str, *, model_bytes: int) -> tuple[int, int]:
    """(workers at a time, threads each). `auto`: on a GPU one; on a CPU one per core, as far as memory allows.

    On a CPU each has one thread, unless OMP_NUM_THREADS says otherwise: small models gain nothing from a second one
    (two on a busy machine are slower than one), so cores go to arms.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _has_gpu():
        workers = 1 if parallel == "auto" else int(parallel)
        return workers, max(1, cores // workers)
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdecimal() and int(given) else 1
    if parallel != "auto":
        return int(parallel), threads
    # A worker holds the base, gradients, two fp32 moments and activations: about 20 bytes a weight, plus torch itself.
    per_worker = 600 * 2**20 + 10 * model_bytes
    fitting = max(1, int(_free_bytes() * 0.8 // per_worker))
    return min(max(1, cores // threads), fitting), threads


def _has_gpu() -> bool:
    """Asked without torch, which the parent never imports."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (hidden not in ("", "-1") and Path("/proc/driver/nvidia/version").exists()) or Path(
        "/dev/nvidia0"
    ).exists()


def _free_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 * 2**30

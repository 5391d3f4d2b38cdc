"""`python -m tunesmith.api.worker TASKS.json`: carry out tasks in this process, telling the parent by JSON lines.

Its stdout belongs to events; anything else that prints goes to stderr, which the parent keeps as the log.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tunesmith.api.opening import writing_to
from tunesmith.api.tasks import TrainTask, is_finished, mark_finished, mark_started, read_tasks
from tunesmith.core.errors import TunesmithError
from tunesmith.core.events import Event, OnEvent
from tunesmith.core.jsonl import dump_json
from tunesmith.core.rundir import RunDir

if TYPE_CHECKING:
    from tunesmith.eval.forgetting import Forgetting


def main(argv: list[str]) -> int:
    channel = _claim_stdout()
    on_event = _write_events(channel)
    bases: dict[str, Forgetting] = {}
    try:
        for task in read_tasks(Path(argv[1])):
            if is_finished(task):
                continue
            if isinstance(task, TrainTask) and task.framework != "tunesmith":
                from tunesmith.api.handoff import write_handoff

                # What a framework is handed takes torch to make; the parent sees to the rest.
                with writing_to(RunDir(Path(task.out))):
                    write_handoff(task, on_event)
                continue
            with writing_to(RunDir(Path(task.out))):
                mark_started(task)
                if isinstance(task, TrainTask) and task.parity_steps:
                    from tunesmith.api.parity import run_parity_task

                    run_parity_task(task, on_event)
                elif isinstance(task, TrainTask):
                    from tunesmith.api.training import run_train_task

                    run_train_task(task, on_event)
                else:
                    from tunesmith.api.evaluation import run_judge_task

                    run_judge_task(task, on_event, bases=bases)
                mark_finished(task)
    except TunesmithError as error:
        on_event(Event("failed", text=str(error)))
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        on_event(Event("failed", text=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"))
        return 1
    return 0


def _claim_stdout() -> TextIO:
    """Keep the real stdout for events and point file descriptor 1 at stderr, for libraries that print."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def _write_events(channel: TextIO) -> OnEvent:
    lock = threading.Lock()

    def on_event(event: Event) -> None:
        with lock:
            channel.write(dump_json(event.to_json()) + "\n")
            channel.flush()

    return on_event


if __name__ == "__main__":
    sys.exit(main(sys.argv))

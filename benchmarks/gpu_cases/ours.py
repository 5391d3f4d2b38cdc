"""Our engine as a contender: the case's job through the same function that `tunesmith train` runs.

Three things are added from outside, and none changes what is computed: between loading and planning memory the parent
may let us wait, so that the plan sees the card as it is when we work; after every step the event that a terminal would
show hands control to the parent; and for the parity check gradients are copied just before the update.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_cases.protocol import Session, describe_packages

session = Session()

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from gpu_cases.inputs import hash_step  # noqa: E402
from tunesmith.api import planning  # noqa: E402
from tunesmith.api.tasks import TrainTask  # noqa: E402
from tunesmith.api.training import run_train_task  # noqa: E402
from tunesmith.core.events import Event  # noqa: E402
from tunesmith.core.jsonl import write_json  # noqa: E402
from tunesmith.data.examples import flatten  # noqa: E402
from tunesmith.job.load import job_from  # noqa: E402
from tunesmith.training import loop  # noqa: E402
from tunesmith.training.step import Stepper  # noqa: E402

_counts: dict[str, int] = {}
_losses: dict[str, float] = {}
_take = Stepper.take
_make_planner = planning.make_planner
_settle_plan = loop.settle_plan
_used: dict[str, Any] = {}
# Of the card: what others have at least while we rest, beside their own weights.
_FREE_FOR_OTHERS = 0.25


def take_and_note(self: Stepper, rows: Any, **arguments: Any) -> Any:
    """Stepper.take; what it was given and what came out is noted."""
    _used["stepper"] = self
    if session.wants_rows:
        session.note_rows(hash_examples(rows))
    result = _take(self, rows, **arguments)
    num_tokens = len(rows) if _samples() else result.num_tokens
    _counts.update(num_tokens=num_tokens, num_target_tokens=result.num_target_tokens)
    _losses["loss"] = result.loss
    return result


def _samples() -> bool:
    """Whether rows are answers of our own: then they are what is counted."""
    return session.task["job"].get("objective", {}).get("name") == "grpo"


def hash_examples(examples: Any) -> str:
    """Digest of a step's rows; of sampled ones, of their prompts."""
    rows = flatten(examples)
    if not _samples():
        return hash_step([(row.ids, row.mask) for row in rows])
    prompts = {tuple(row.ids[: list(row.mask).index(1)]) for row in rows}
    return hash_step([(ids, [0] * len(ids)) for ids in prompts])


def wait_and_plan(*given: Any) -> Any:
    """make_planner, the first thing after loading that looks at the card, once steps are wanted."""
    session.loaded()
    return _make_planner(*given)


def settle_and_note(*given: Any, **named: Any) -> Any:
    plan = _used["plan"] = _settle_plan(*given, **named)
    return plan


def describe() -> dict[str, Any]:
    """Versions, the memory plan that is followed, and what is replayed as CUDA graphs."""
    facts = describe_packages("tunesmith", "torchao")
    if plan := _used.get("plan"):
        facts["memory_plan"] = plan.to_json() | {"levels": plan.describe_levels()}
    if graphs := getattr(_used.get("stepper"), "graphs", None):
        facts["graphs"] = {"recorded": graphs.num_graphs, "failure": graphs.failure}
    return facts


def rest() -> None:
    """Leave the card to others: recorded graphs hold the memory of a pass. Where others need less than is free anyway,
    they stay, as they do in a training that nobody interrupts."""
    if not torch.cuda.is_available():
        return
    free, total = torch.cuda.mem_get_info()
    if free < total * _FREE_FOR_OTHERS and (graphs := getattr(_used.get("stepper"), "graphs", None)):
        graphs.release()


def train() -> None:
    Stepper.take = take_and_note
    loop.settle_plan = settle_and_note
    planning.make_planner = wait_and_plan
    run_train_task(_make_task(session.task["job"], "train"), _after_step)


def _after_step(event: Event) -> None:
    if event.kind == "step":
        session.step_done(_losses["loss"], **_counts)


def gradients(out: Path) -> dict[str, Any]:
    """Gradients of the shortened model's first step, divided by its target tokens, not clipped; written to `out`."""
    found: dict[str, Any] = {}
    digests: list[str] = []

    def take_and_copy(self: Stepper, rows: Any, **arguments: Any) -> Any:
        digests.append(hash_examples(rows))
        update = self.optimizer.update

        def copy_and_update(**settings: Any) -> None:
            for name in self.optimizer.masters:
                gradient = self.optimizer.gradient_of(name)
                if gradient is not None:
                    found[name] = gradient.detach().float().cpu().contiguous() / self.scale.value
            update(**settings)

        self.optimizer.update = copy_and_update  # type: ignore[method-assign]
        result = _take(self, rows, **arguments)
        _losses["loss"] = result.loss
        return result

    Stepper.take = take_and_copy
    try:
        run_train_task(_make_task(session.task["short_job"], "short"), lambda event: None)
    finally:
        Stepper.take = _take
    save_file(found, str(out))
    return {"loss": _losses["loss"], "digest": digests[0]}


def _make_task(raw: dict[str, Any], name: str) -> TrainTask:
    job = job_from(raw)
    out = Path(session.task["folder"]) / name
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "job.json", job.model_dump(mode="json"))
    return TrainTask(
        label="",
        job=job.model_dump(mode="json"),
        out=str(out),
        prepared=session.task["rows"],
        model_folder=raw["model"],
        model_name=raw["model"],
        revision=None,
        key=name,
        resume=False,
        keep_weights=False,
    )


if __name__ == "__main__":
    session.serve(gradients=gradients, train=train, facts=describe, rest=rest)

"""Rows that arms learn from besides the job's, and the pairs that all arms are judged on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from tunesmith.api.trainable import load_job_tokenizer
from tunesmith.api.training import prepare
from tunesmith.comparing.plan import PlannedArm, job_of_arm
from tunesmith.core.errors import DataError
from tunesmith.core.events import Event, OnEvent
from tunesmith.core.rundir import RunDir
from tunesmith.core.types import Conversation
from tunesmith.data.derive import derive_prompts, name_question
from tunesmith.data.prepare import Prepared, prepare_data
from tunesmith.data.render import Renderer
from tunesmith.data.sources import find_sources
from tunesmith.job.resolve import ResolvedModel
from tunesmith.job.spec import Job, SourceSpec, SplitSpec

OnBadRow = Literal["refuse", "skip"]


def prepare_arms(
    job: Job,
    arms: Sequence[PlannedArm],
    base: ResolvedModel,
    run: RunDir,
    prepared: Prepared,
    *,
    on_bad_row: OnBadRow,
    on_event: OnEvent,
) -> dict[str, Prepared]:
    """Rows of every training that has its own, by arm. prepared: the job's.

    Raises DataError where one of them asks what a sealed test row asks.
    """
    found: dict[str, Prepared] = {}
    for arm in arms:
        if not arm.trains or not arm.has_own_rows:
            continue
        folder = run.of_arm(arm.name)
        own = job_of_arm(job, arm, seed=arm.seeds[0])
        if arm.data is None:
            renderer = Renderer(load_job_tokenizer(job, base.folder), job.data)
            found[arm.name] = derive_prompts(prepared, renderer, folder.prepared)
        else:
            told = _name_arm(arm.name, on_event)
            found[arm.name], _ = prepare(own, base, folder, on_bad_row=on_bad_row, on_event=told)
            test = prepared.conversations("test")
            _refuse_questions(found[arm.name], test, arm=arm.name, of="the sealed test rows")
    return found


def prepare_preferences(
    job: Job,
    base: ResolvedModel,
    run: RunDir,
    learned: Mapping[str, Prepared],
    *,
    on_bad_row: OnBadRow,
    on_event: OnEvent,
) -> Prepared | None:
    """The held-out pairs of `evaluate.preferences`, split test; None without the setting.

    learned: rows of trainings, by arm. Raises DataError where one of them asks what a pair asks.
    """
    path = job.evaluate.preferences
    if path is None:
        return None
    on_event(Event("stage", text="Preparing preferences"))
    # A source that brings a test split is judged on it; any other whole.
    test = "auto" if "test" in find_sources(SourceSpec(path=path)) else path
    data = job.data.model_copy(
        update={"train": path, "split": SplitSpec(validation=0.0, test=test), "streaming": False}
    )
    pairs = prepare_data(
        job.model_copy(update={"data": data}),
        tokenizer=load_job_tokenizer(job, base.folder),
        folder=run.preferences,
        on_bad_row=on_bad_row,
        splits=("test",),
        rejects=run.preferences.with_suffix(".rejected.jsonl"),
        rows="pairs",
    )
    for finding in pairs.report.findings:
        # The pairs stand in for training rows, too: what they share with themselves is no news.
        if finding.level == "warning" and not finding.code.startswith("overlap"):
            on_event(Event("warning", text=f"evaluate.preferences: {finding.message}"))
    for name, rows in learned.items():
        _refuse_questions(rows, pairs.conversations("test"), arm=name, of="the pairs of evaluate.preferences")
    return pairs


def _refuse_questions(learned: Prepared, held_out: Sequence[Conversation], *, arm: str, of: str) -> None:
    known = {name_question(conversation) for conversation in held_out}
    for split in (name for name in learned.splits if name != "test"):
        asked = learned.conversations(split)
        if shared := [c for c in asked if name_question(c) in known]:
            raise DataError(
                f"compare.arms, {arm}: {shared[0].origin.place}",
                f"{len(shared)} of {len(asked)} {split} rows ask what is among {of}",
                rule="no arm learns from what it is judged on",
                cure="Remove them from the arm's data",
            )


def _name_arm(name: str, on_event: OnEvent) -> OnEvent:
    def tell(event: Event) -> None:
        on_event(Event(event.kind, text=f"{name}: {event.text}"))

    return tell

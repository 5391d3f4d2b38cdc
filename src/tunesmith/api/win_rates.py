"""A comparison's win rates: a judge behind an endpoint prefers an arm's answers, or those it is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tunesmith.comparing.plan import PlannedArm
from tunesmith.core.errors import DataError
from tunesmith.core.events import Event, OnEvent
from tunesmith.core.fingerprint import hash_json
from tunesmith.core.jsonl import read_json, write_json, write_jsonl
from tunesmith.core.records import AnswerRecord, EvalRecord, read_answers
from tunesmith.core.rundir import RunDir
from tunesmith.eval.win_rate import judge_win_rate
from tunesmith.infer.endpoint import Endpoint
from tunesmith.job.spec import JudgeSpec

METRIC = "win_rate"


def judge_answers(run: RunDir, arms: Sequence[PlannedArm], spec: JudgeSpec, on_event: OnEvent) -> None:
    """Let the judge of `evaluate.judge` compare the answers of every arm and seed with those of the arm that it starts
    from, else with zero-shot; what it prefers becomes a score of each row.

    What it has said of the same answers before is not asked again. An arm without answers is left out.
    Raises SetupError or EndpointFailed for an endpoint that does not answer.
    """
    endpoint = Endpoint(spec.endpoint, spec.model, key_name=spec.key_name, parallel=spec.parallel)
    by_name = {arm.name: arm for arm in arms}
    for arm in arms:
        other = by_name.get(arm.starts_from or "zero-shot")
        if other is None or other is arm:
            continue
        for seed in arm.seeds:
            ours = run.arm(arm.name, seed)
            theirs = run.arm(other.name, other.seeds[0] if other.deterministic else seed)
            if ours.answers.is_file() and theirs.answers.is_file():
                _judge(ours, theirs, f"{arm.name} seed {seed}", spec, endpoint, on_event)


def _judge(
    ours: RunDir, theirs: RunDir, name: str, spec: JudgeSpec, endpoint: Endpoint, on_event: OnEvent
) -> None:
    answers, others = read_answers(ours.answers), read_answers(theirs.answers)
    asked = [n for n, answer in enumerate(answers) if answer.answer is not None][: spec.max_rows]
    shown = [(answers[n].question, answers[n].answer or "", others[n].answer or "") for n in asked]
    key = hash_json([spec.model_dump(mode="json", exclude={"parallel"}), shown])
    kept = ours.root / "win_rate.json"
    if not kept.is_file() or read_json(kept).get("key") != key:
        on_event(Event("stage", text=f"Judging {name} by {spec.model}"))
        found = judge_win_rate(
            [question for question, *_ in shown],
            [answer for _, answer, _ in shown],
            [other for *_, other in shown],
            endpoint=endpoint,
            on_progress=lambda done, total: on_event(Event("progress", name, "judged", done, total)),
        )
        if found.win_rate is None and shown:
            raise DataError(
                "evaluate.judge",
                f"no verdict of {spec.model} could be read",
                rule="a verdict's last line is `Verdict: A`, `Verdict: B` or `Verdict: tie`",
                cure="Use another model",
            )
        write_json(kept, {"schema": 1, "key": key, "judge": spec.model, **found.to_json()})
    outcomes = dict(zip(asked, read_json(kept)["outcomes"], strict=True))
    _add_outcomes(ours, answers, outcomes)


def _add_outcomes(ours: RunDir, answers: Sequence[AnswerRecord], outcomes: dict[int, float | None]) -> None:
    marked: list[AnswerRecord] = []
    for number, answer in enumerate(answers):
        scores = {name: value for name, value in answer.scores.items() if name != METRIC}
        if (outcome := outcomes.get(number)) is not None:
            scores[METRIC] = outcome
        marked.append(replace(answer, scores=scores))
    write_jsonl(ours.answers, (answer.to_json() for answer in marked))
    read = [outcome for outcome in outcomes.values() if outcome is not None]
    record = EvalRecord.from_json(read_json(ours.evaluation), place=str(ours.evaluation))
    if read:
        record = replace(record, metrics={**record.metrics, METRIC: sum(read) / len(read)})
    write_json(ours.evaluation, record.to_json())

"""Write a comparison's run folders with seeded, synthetic numbers: test data that looks like a real run, nothing more.

    python tests/report/make_example.py FOLDER      writes FOLDER, comparison.json and report.html

No model is involved. Answers are truths with planted faults, losses are curves with noise.
"""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.comparing.plan import PlannedArm, job_of_arm, plan_arms
from tunesmith.core.frameworks import Answer, Feature, Fixed, FrameworkPage, FrameworkPages, Matrix
from tunesmith.core.jsonl import write_json, write_jsonl
from tunesmith.core.records import AnswerRecord, EvalRecord, RunRecord, StepRecord
from tunesmith.core.rundir import RunDir
from tunesmith.job.spec import Job

ARMS = ["zero-shot", "few-shot", "rag", "lora", "qlora", "full", "lora+rag"]
VOCABULARY = 4096


@dataclass(frozen=True)
class Skill:
    """How the synthetic arm behaves: chance of a wrong field, loss, and costs."""

    fault: float
    nll: float
    rate: float = 0.0
    parameters: int = 0
    train_seconds: float = 0.0
    peak_megabytes: float = 420.0
    megabytes: float = 0.0
    forgotten: float = 0.0


SKILLS = {
    "zero-shot": Skill(0.62, 1.92),
    "few-shot": Skill(0.31, 1.10),
    "rag": Skill(0.22, 0.74),
    "lora": Skill(0.030, 0.083, 2.0e-3, 368_640, 41.0, 610, 1.48, 0.06),
    "qlora": Skill(0.036, 0.094, 2.0e-3, 368_640, 57.0, 520, 1.48, 0.07),
    "full": Skill(0.022, 0.071, 3.0e-4, 4_030_000, 52.0, 890, 8.1, 0.31),
    "lora+rag": Skill(0.028, 0.080, 2.0e-3, 368_640, 41.0, 640, 1.48, 0.06),
}

_NAMES = ["Ines Okafor", "Tom Ågren", "Mei-Ling Chu", "Paula Brandt", "Omar Haddad", "Ruth Weiss"]
_ITEMS = ["kettle", "bed frame", "desk lamp", "garden hose", "blue bicycle", "pan", "pair of boots"]
_ISSUES = ["late", "damaged", "wrong", "missing", "faulty", "overcharged"]
_WANTS = ["refund", "replacement", "repair", "cancel", "update"]
_SAY = {
    "late": "it still has not come",
    "damaged": "it arrived broken",
    "wrong": "this is not the one I ordered",
    "missing": "a part is missing",
    "faulty": "it stopped working on day two",
    "overcharged": "you took the money twice",
}


def make_tickets(num_rows: int, *, num_clusters: int, seed: int = 7) -> list[dict[str, Any]]:
    """Rows with `question`, `truth` (a dict), `cluster` and `difficulty`."""
    draw = random.Random(seed)
    difficulty = {c: draw.gauss(0, 0.7) for c in range(num_clusters)}
    rows: list[dict[str, Any]] = []
    for number in range(num_rows):
        cluster = number % num_clusters
        issues = draw.sample(_ISSUES, draw.choice([1, 1, 2]))
        item, name, want = draw.choice(_ITEMS), draw.choice(_NAMES), draw.choice(_WANTS)
        truth: dict[str, Any] = {"item": item, "issues": issues, "wants": want, "name": name.split()[0]}
        question = f"Hello, about the {item}: {' and '.join(_SAY[i] for i in issues)}. I would like a {want}."
        if draw.random() < 0.7:
            truth["order"] = f"{draw.choice('ABT')}{draw.randint(1000, 99999)}"
            question += f" Order {truth['order']}."
        if draw.random() < 0.4:
            truth["amount"] = {
                "value": round(draw.uniform(5, 400), 2),
                "currency": draw.choice(["EUR", "USD"]),
            }
            question += f" I paid {truth['amount']['value']} {truth['amount']['currency']}."
        truth["urgency"] = draw.choice(["low", "normal", "high"])
        question += {"low": " No hurry.", "normal": "", "high": " I need this today!"}[truth["urgency"]]
        rows.append(
            {
                "question": f"{question}\n{name}",
                "truth": truth,
                "cluster": f"family-{cluster:02d}",
                "difficulty": difficulty[cluster] + draw.gauss(0, 0.5),
            }
        )
    return rows


def write_example(
    root: Path,
    *,
    num_rows: int = 300,
    num_clusters: int = 60,
    arms: list[Any] | None = None,
    seeds: list[int] | None = None,
    metric: str = "exact_match",
    trials: int = 5,
) -> tuple[RunDir, Job]:
    """Write every arm's folder and `job.json`. Returns what `compare_run` takes."""
    job = Job.model_validate(
        {
            "model": "tunesmith/tiny",
            "data": {"train": "tunesmith/tickets"},
            "compare": {
                "arms": arms or ARMS,
                "seeds": [0, 1, 2] if seeds is None else seeds,
                "metric": metric,
                "tune": {"trials": trials},
            },
        }
    )
    run_dir = RunDir(root).create()
    write_json(run_dir.job, job.model_dump(mode="json"))
    rows = make_tickets(num_rows, num_clusters=num_clusters)
    for arm in plan_arms(job):
        for seed in arm.seeds:
            folder = run_dir.arm(arm.name, seed).create()
            if arm.trains:
                _write_training(folder, arm, seed, job)
            _write_scoring(folder, arm, seed, rows)
        if arm.trains:
            _write_trials(run_dir, arm, job, trials)
    return run_dir, job


FOREIGN_ARMS: list[Any] = [
    "zero-shot",
    "lora",
    "full",
    *({"method": "lora", "framework": name} for name in ("trl", "axolotl")),
    {"method": "full", "framework": "trl"},
]


def make_pages() -> FrameworkPages:
    """What the parent of all workers would have gathered of `lora-trl`: made up, its log hostile."""
    matrix = Matrix(
        {"tunesmith": "Tunesmith", "trl": "TRL and PEFT"},
        (
            Feature("Method", "LoRA", "method: lora", {"tunesmith": Answer(), "trl": Answer()}),
            Feature(
                "Method",
                "QLoRA",
                "method: qlora",
                {"tunesmith": Answer(), "trl": Answer("its base is another", "Use lora")},
            ),
        ),
    )
    page = FrameworkPage(
        arm="lora-trl",
        framework="trl",
        title="TRL and PEFT",
        versions={"trl": "1.16.0", "torch": "2.13.0"},
        fixed=(Fixed("clip_norm", "0.5", {"sft.max_grad_norm": "0.5"}),),
        told={"sft.packing": "false"},
        altered={"loss_type": ("chunked_nll", "nll")},
        defaults={"arguments.eval_delay": "0"},
        warnings=("a warning of its own",),
        log="first line\n<script>window.hit = 1</script>\n" + "x" * 400,
        log_file="arms/lora-trl/seed-0/lora-trl-seed-0.log",
    )
    return FrameworkPages(matrix, (page,))


def _skill(arm: PlannedArm) -> Skill:
    return SKILLS.get(arm.name, SKILLS["lora" if arm.kind == "trained" else "few-shot"])


def _write_training(folder: RunDir, arm: PlannedArm, seed: int, job: Job) -> None:
    skill, draw = _skill(arm), random.Random(f"{arm.name}-{seed}")
    steps, seconds = 300, skill.train_seconds * _slowness(arm) * draw.uniform(0.96, 1.05)
    records: list[StepRecord] = []
    for step in range(1, steps + 1):
        clean = skill.nll * 0.9 + 1.9 * math.exp(-step / 28) + 0.12 * math.exp(-step / 150)
        validation = round(clean * 1.06 + 0.01 * draw.random(), 4) if step % 50 == 0 else None
        rate = skill.rate * min(step / 15, 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3)
        loss = clean * math.exp(draw.gauss(0, 0.12))
        records.append(
            StepRecord(
                step=step,
                epoch=step / 100,
                loss=round(loss, 5),
                grad_norm=round(draw.uniform(0.3, 1.4), 4),
                learning_rate=rate,
                num_tokens=4_100,
                num_target_tokens=1_040,
                step_seconds=seconds / steps,
                peak_bytes=int(skill.peak_megabytes * 1e6),
                validation_loss=validation,
            )
        )
    write_jsonl(folder.steps, [record.to_json() for record in records])
    write_json(folder.record, _make_run(arm, seed, job, seconds, records[-1].validation_loss).to_json())


def _slowness(arm: PlannedArm) -> float:
    """Other frameworks take longer than our own engine."""
    return {"tunesmith": 1.0, "trl": 1.8}.get(arm.framework, 1.4)


def _make_run(arm: PlannedArm, seed: int, job: Job, seconds: float, validation: float | None) -> RunRecord:
    skill = _skill(arm)
    assert arm.method is not None
    return RunRecord(
        status="done",
        method=arm.method.name,
        framework=arm.framework,
        model="tunesmith/tiny",
        seed=seed,
        config=job_of_arm(job, arm, seed=seed).model_dump(mode="json", exclude={"compare", "evaluate"}),
        fingerprints={
            "train": "9c1f" * 16, "validation": "17aa" * 16, "test": "5be2" * 16,
            "template": "c0de" * 16, "model": "feed" * 16, "code": "ab12" * 16,
        },
        versions={"python": "3.11.7", "torch": "2.13.0+cpu", "numpy": "2.4.6", arm.framework: "0.1.0"},
        hardware={"machine": "x86_64", "cpu": "Example CPU (synthetic record)", "cores": 2, "threads": 1},
        learning_rate=skill.rate,
        steps=300,
        trained_parameters=skill.parameters,
        total_parameters=4_030_000,
        train_tokens=1_230_000,
        target_tokens=312_000,
        wall_seconds=seconds + 5,
        phases={"importing": 3.0, "loading": 0.8, "first step": 0.7, "steps": seconds - 0.2, "saving": 0.1},
        memory={"resident": int(skill.peak_megabytes * 1e6 * _slowness(arm))},
        cpu_seconds=seconds * 1.02,
        peak_bytes=int(skill.peak_megabytes * 1e6),
        size_bytes=int(skill.megabytes * 1e6),
        best_step=300,
        validation_loss=validation,
    )  # fmt: skip


def _write_trials(run_dir: RunDir, arm: PlannedArm, job: Job, trials: int) -> None:
    skill = _skill(arm)
    for number in range(trials):
        offset = number - trials // 2
        folder = run_dir.trial(arm.name, number).create()
        record = _make_run(
            arm, 0, job, skill.train_seconds, skill.nll * 1.05 + 0.011 * (offset - 0.2) ** 2
        ).to_json()
        record["learning_rate"] = skill.rate * 2.0**offset
        write_json(folder.record, record)


def _write_scoring(folder: RunDir, arm: PlannedArm, seed: int, rows: list[dict[str, Any]]) -> None:
    skill = _skill(arm)
    quality = random.Random(f"quality-{arm.name}-{seed}").gauss(0, 0.0 if arm.deterministic else 0.05)
    answers = [_answer(arm, seed, number, row, skill, quality) for number, row in enumerate(rows)]
    write_jsonl(folder.answers, [answer.to_json() for answer in answers])
    tokens = sum(answer.num_target_tokens for answer in answers)
    nll = sum(answer.nll or 0.0 for answer in answers) / tokens
    metrics = {name: sum(a.scores[name] for a in answers) / len(answers) for name in answers[0].scores}
    forgetting = None
    if arm.kind == "trained":
        forgetting = {
            "general_nll": 3.312 + skill.forgotten + 0.01 * seed, "general_nll_base": 3.312,
            "general_tokens": 20_000, "kl_from_base": skill.forgotten * 0.8 + 0.02,
        }  # fmt: skip
    cut = sum(not answer.finished for answer in answers)
    record = EvalRecord(
        model="tunesmith/tiny",
        adapter=None,
        prompting=arm.prompting,
        metrics={**metrics, "nll": nll, "perplexity": math.exp(nll)},
        num_rows=len(rows),
        num_target_tokens=tokens,
        data_sha256="5be2" * 16,
        wall_seconds=6.0 + 5.0 * (arm.prompting != "zero-shot"),
        cpu_seconds=6.0 + 5.0 * (arm.prompting != "zero-shot"),
        peak_bytes=int(skill.peak_megabytes * 0.8e6),
        forgetting=forgetting,
        warnings=[f"{cut} of {len(rows)} generated answers were cut at evaluate.max_new_tokens (256)"]
        if cut
        else [],
    )
    write_json(folder.evaluation, record.to_json())


def _answer(
    arm: PlannedArm, seed: int, number: int, row: dict[str, Any], skill: Skill, quality: float
) -> AnswerRecord:
    # What an arm gets wrong is mostly the row's doing, a little the seed's: both draws take part.
    draw = random.Random(
        f"{arm.name}-{number}-{seed if random.Random(f'{number}-{seed}').random() < 0.3 else 'any'}"
    )
    fault = 1 / (1 + math.exp(-(math.log(skill.fault / (1 - skill.fault)) + row["difficulty"] + quality)))
    truth = row["truth"]
    given = {key: _spoil(value, draw) if draw.random() < fault else value for key, value in truth.items()}
    text = json.dumps(given, ensure_ascii=False, separators=(",", ":"))
    finished = True
    if skill.fault > 0.5:
        text = (
            draw.choice(["Dear customer,\nthank you for your message about the ", "item: ", text[:40]])
            + truth["item"]
        )
        finished = draw.random() > 0.02
    expected = json.dumps(truth, ensure_ascii=False, separators=(",", ":"))
    fields = truth.keys() | given.keys()
    valid = _is_object(text)
    matched = sum(given.get(key) == truth.get(key) for key in fields) / len(fields) if valid else 0.0
    tokens = len(expected) // 3
    nll = tokens * skill.nll * math.exp(0.35 * row["difficulty"] + quality + draw.gauss(0, 0.2))
    return AnswerRecord(
        row=number,
        row_id=f"{number:016x}",
        place=f"test.jsonl:{number + 1}",
        cluster=row["cluster"],
        question=row["question"],
        truth=expected,
        answer=text,
        nll=nll,
        nll_content=nll * 0.98,
        num_target_tokens=tokens,
        num_bytes=len(expected.encode()),
        num_prompt_tokens=90,
        num_new_tokens=len(text) // 3,
        finished=finished,
        scores={"exact_match": float(text == expected), "json_valid": float(valid), "json_fields": matched},
    )


def _spoil(value: Any, draw: random.Random) -> Any:
    if isinstance(value, list):
        return [draw.choice(_ISSUES)]
    if isinstance(value, dict):
        return {**value, "value": round(value["value"] * 10, 2)}
    return draw.choice([value[:-1], value.upper(), "unknown", value + " set"])


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def main() -> None:
    from tunesmith.comparing.result import compare_run
    from tunesmith.report.page import render_report

    run_dir, job = write_example(Path(sys.argv[1]))
    comparison = compare_run(run_dir, job)
    print(comparison.verdict)
    print(render_report(run_dir))


if __name__ == "__main__":
    main()

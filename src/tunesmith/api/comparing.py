"""Run every arm and seed of a job, judge them all alike, and write the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tunesmith.api.arm_data import prepare_arms, prepare_preferences
from tunesmith.api.fingerprints import (
    fingerprint_data,
    fingerprint_model,
    fingerprint_objective,
    fingerprint_rewards,
)
from tunesmith.api.foreign import describe_framework
from tunesmith.api.gates import Gatekeeper
from tunesmith.api.native import check_native
from tunesmith.api.opening import open_job, open_run, writing_to
from tunesmith.api.pages import write_pages
from tunesmith.api.pool import Work, plan_parallel, run_works
from tunesmith.api.rewards import check_rewards
from tunesmith.api.tasks import JudgeTask, Task, TrainTask, clear_scores, is_finished
from tunesmith.api.training import prepare, resolve_learning_rate
from tunesmith.api.win_rates import judge_answers
from tunesmith.comparing.plan import (
    PlannedArm,
    choose_rate,
    job_of_arm,
    order_trainings,
    plan_arms,
    plan_trials,
    share_references,
)
from tunesmith.comparing.result import compare_run
from tunesmith.comparing.starts import check_comparison
from tunesmith.core.bundled import BUNDLED
from tunesmith.core.comparison import Comparison
from tunesmith.core.errors import ArmFailed, DataError, JobError, RunDirError
from tunesmith.core.events import Event, OnEvent, ignore_event
from tunesmith.core.fingerprint import hash_file, hash_json
from tunesmith.core.jsonl import read_json, write_json
from tunesmith.core.records import RunRecord
from tunesmith.core.rundir import RunDir
from tunesmith.data.prepare import Prepared
from tunesmith.job.load import job_from
from tunesmith.job.resolve import ResolvedModel
from tunesmith.job.spec import Job, LoraSpec
from tunesmith.report.card import render_card
from tunesmith.report.page import render_report

# Optimizer steps that a parity record holds.
PARITY_STEPS = 20
GENERAL_TEXT = BUNDLED["tunesmith/tickets"] / "general.jsonl"


def compare(
    job: Job | Mapping[str, Any],
    *,
    out: str | Path,
    on_bad_row: Literal["refuse", "skip"] = "refuse",
    fresh: bool = False,
    on_event: OnEvent = ignore_event,
) -> Comparison:
    """Run all arms x seeds of `job.compare`, isolated from each other, and judge them on the sealed test rows.

    Called again it goes on where it stopped; arms whose job is unchanged are not run again. Leaves `report.html`,
    `comparison.json` and each arm's records in `out`.
    Raises TunesmithError in one line; an arm that fails is reported among the warnings, unless all fail.
    """
    job = job if isinstance(job, Job) else job_from(job)
    arms = plan_arms(job)
    check_comparison(job)
    check_rewards(job.evaluate.reward_terms, key="evaluate.rewards")
    base = open_job(job, arms)
    with open_run(out, fresh=fresh, verb="compare") as run:
        prepared, _ = prepare(job, base, run, on_bad_row=on_bad_row, on_event=on_event)
        if "test" not in prepared.splits:
            raise DataError(
                "data.split.test",
                "has no rows",
                rule="arms are judged on a test split",
                cure="Give it a share or a file",
            )
        if job.compare.track == "native":
            for arm in (arm for arm in arms if arm.is_foreign):
                place = f"compare.arms, {arm.name}"
                check_native(arm.framework, job, prepared, base.folder, place=place)
        told: dict[str, Any] = {"on_bad_row": on_bad_row, "on_event": on_event}
        own = prepare_arms(job, arms, base, run, prepared, **told)
        learned = {arm.name: own.get(arm.name, prepared) for arm in arms if arm.trains}
        pairs = prepare_preferences(job, base, run, learned, **told)
        write_json(run.job, job.model_dump(mode="json"))
        comparing = _Comparing(job, base, run, prepared, own, pairs, on_bad_row == "skip", on_event)
        failures = comparing.run_all(arms)
        if job.evaluate.judge:
            judge_answers(run, arms, job.evaluate.judge, on_event)
        keeper = Gatekeeper(run, job, prepared, base.folder)
        parity = keeper.judge(arms, failures)
        comparison = compare_run(run, job, failures=failures, parity=parity)
        write_pages(run, arms, samples=job.compare.samples)
        render_report(run)
    return comparison


def report(run: str | Path) -> Comparison:
    """Judge a comparison's folder again and rebuild its report, from files alone."""
    folder = RunDir(Path(run))
    if not folder.job.is_file():
        raise RunDirError(str(run), "holds no comparison", cure="Give the --out folder of: tunesmith compare")
    with writing_to(folder):
        job = Job.model_validate(read_json(folder.job))
        comparison = compare_run(folder, job)
        if not folder.frameworks.is_file():
            write_pages(folder, plan_arms(job), samples=job.compare.samples)
        render_report(folder)
    return comparison


def report_markdown(comparison: Comparison) -> str:
    """Verdict and table in Markdown, for a README or a model card."""
    return render_card(comparison)


def comparison_json(comparison: Comparison, out: str | Path) -> dict[str, Any]:
    """The stable object that `compare --json` prints."""
    return comparison.public_json(report=str(RunDir(Path(out)).report))


@dataclass(frozen=True, slots=True)
class _Comparing:
    """Everything that all arms of one comparison share.

    own: rows of trainings that have their own, by arm. pairs: held-out preferences, if there are any.
    """

    job: Job
    base: ResolvedModel
    run: RunDir
    prepared: Prepared
    own: Mapping[str, Prepared]
    pairs: Prepared | None
    skip_bad_rows: bool
    on_event: OnEvent

    def run_all(self, arms: Sequence[PlannedArm]) -> dict[str, str]:
        """Tune, train and judge. Returns arm -> reason of those that failed."""
        model_bytes = sum(path.stat().st_size for path in self.base.folder.glob("*.safetensors"))
        parallel, threads = plan_parallel(self.job.compare.parallel, model_bytes=model_bytes)
        failures: dict[str, str] = {}
        if self.job.compare.tune.trials:
            arms = self._tune(arms, failures, parallel=parallel, threads=threads)
        works = self._plan_works([arm for arm in arms if arm.trained_by not in failures])
        text = f"Comparing {len(arms)} arms in {len(works)} jobs, {parallel} at a time"
        self.on_event(Event("stage", text=text))
        failed = run_works(works, parallel=parallel, threads=threads, on_event=self.on_event)
        _drop_unfinished(works)
        return failures | _by_arm(failed, arms)

    # --- learning-rate search ---------------------------------------------------------------------------------------

    def _tune(
        self, arms: Sequence[PlannedArm], failures: dict[str, str], *, parallel: int, threads: int
    ) -> list[PlannedArm]:
        """The arms with their chosen learning rates; arms whose trials all failed are added to `failures`."""
        for arm in arms:
            if arm.trains and "validation" not in self._rows_of(arm).splits:
                raise JobError(
                    "compare.tune",
                    f"there is no validation split for {arm.name}",
                    rule="rates are chosen on it",
                    cure="Give it a share",
                )
            if arm.trains and arm.starts_from:
                raise JobError(
                    "compare.tune",
                    f"{arm.name} starts from {arm.starts_from}",
                    rule="rates are searched before any arm is trained",
                    cure="Give the arm a learning_rate, and leave tune out",
                )
        self.on_event(
            Event("stage", text=f"Searching learning rates, {self.job.compare.tune.trials} per arm")
        )
        trials = {arm.name: self._plan_trials(arm) for arm in arms if arm.trains}
        works = [work for planned in trials.values() for work in planned]
        failed = run_works(works, parallel=parallel, threads=threads, on_event=self.on_event)
        for name, planned in trials.items():
            if reasons := [failed[work.name] for work in planned if work.name in failed]:
                self.on_event(Event("warning", text=f"{name}: {len(reasons)} trials failed: {reasons[0]}"))
                if len(reasons) == len(planned):
                    failures[name] = f"every learning-rate trial failed: {reasons[0]}"
        return [self._tuned(arm, trials, failures) for arm in arms]

    def _plan_trials(self, arm: PlannedArm) -> list[Work]:
        job = job_of_arm(self.job, arm, seed=self.job.compare.seeds[0])
        prior = resolve_learning_rate(job, self.base.folder)
        return [
            Work(
                f"{arm.name} trial {number}",
                (
                    self._train_task(
                        replace(arm, learning_rate=rate), self.job.compare.seeds[0], {}, trial=number
                    ),
                ),
                self.run.trial(arm.name, number).root,
            )
            for number, rate in enumerate(plan_trials(prior, self.job.compare.tune))
        ]

    def _tuned(
        self, arm: PlannedArm, trials: Mapping[str, list[Work]], failures: dict[str, str]
    ) -> PlannedArm:
        """The arm with the learning rate of the lowest validation loss."""
        if arm.trained_by is None:
            return arm
        rates, losses = [], []
        for number, _ in enumerate(trials[arm.trained_by]):
            record = self.run.trial(arm.trained_by, number).record
            if record.is_file():
                run = RunRecord.from_json(read_json(record), place=str(record))
                rates.append(run.learning_rate)
                losses.append(run.validation_loss)
        try:
            chosen = choose_rate(rates, losses)
        except ValueError as error:
            failures.setdefault(arm.trained_by, str(error))
            return arm
        edge = ", at the edge of the grid" if chosen.at_edge else ""
        if arm.trains:
            self.on_event(Event("note", text=f"{arm.name}: learning rate {chosen.learning_rate:g}{edge}"))
        return replace(arm, learning_rate=chosen.learning_rate)

    # --- training and judging ---------------------------------------------------------------------------------------

    def _plan_works(self, arms: Sequence[PlannedArm]) -> list[Work]:
        """Trainings first, each seed its own process, in an order that favours no arm; then one judge process per arm,
        once its trainings are done.

        Before a framework trains, it and our own engine show what they do in the first steps of the same job.
        """
        by_name = {arm.name: arm for arm in arms}
        references = share_references(self.job, arms)
        parity = [work for arm in arms if arm.is_foreign for work in self._plan_parity(arm)]
        shown = {
            name: frozenset({f"{name} parity", f"{reference} reference"})
            for name, reference in references.items()
        }
        needed = frozenset[str]().union(*shown.values())
        works = [work for work in parity if work.name in needed]
        works += [
            Work(
                f"{arm.name} seed {seed}",
                (self._train_task(arm, seed, by_name),),
                self.run.arm(arm.name, seed).root,
                shown.get(arm.name, frozenset[str]())
                | ({f"{arm.starts_from} seed {seed}"} if arm.starts_from else set()),
            )
            for arm, seed in order_trainings(arms)
        ]
        for arm in sorted(arms, key=lambda arm: arm.trained_by is None):
            after = (
                frozenset(f"{arm.trained_by} seed {seed}" for seed in arm.seeds)
                if arm.trained_by
                else frozenset[str]()
            )
            tasks: tuple[Task, ...] = tuple(self._judge_task(arm, seed, by_name) for seed in arm.seeds)
            works.append(
                Work(f"{arm.name} judged", tasks, self.run.arm(arm.name, arm.seeds[0]).root.parent, after)
            )
        return works

    def _plan_parity(self, arm: PlannedArm) -> list[Work]:
        """The first steps of an arm's first seed, by its framework and by our own engine."""
        task = self._train_task(arm, arm.seeds[0], {})
        works: list[Work] = []
        for who, framework in (("parity", arm.framework), ("reference", "tunesmith")):
            name, folder = f"{arm.name} {who}", self.run.parity_run(arm.name, who).root
            changes = {
                "label": name,
                "out": str(folder),
                "framework": framework,
                "parity_steps": PARITY_STEPS,
            }
            works.append(Work(name, (replace(task, **changes),), folder))
        return works

    def _train_task(
        self, arm: PlannedArm, seed: int, arms: Mapping[str, PlannedArm], *, trial: int | None = None
    ) -> TrainTask:
        """arms: by name, where one may start from another."""
        job = job_of_arm(self.job, arm, seed=seed)
        if trial is not None and job.train.evaluate_every == "never":
            # A trial without a validation loss could not be chosen.
            job = job.model_copy(update={"train": job.train.model_copy(update={"evaluate_every": "epoch"})})
        values = job.model_dump(mode="json", exclude={"compare", "evaluate"})
        model_folder, start = str(self.base.folder), self._find_start(arm, seed)
        identity = dict(values)
        if start is not None:
            # The same start is the same training, wherever the folder lies.
            identity["start"] = self._key_of_start(arm, seed, arms)
            if isinstance(arm.method, LoraSpec):
                values = {**values, "method": {**values["method"], "adapter": start}}
            else:
                model_folder = start
        folder = self.run.arm(arm.name, seed) if trial is None else self.run.trial(arm.name, trial)
        native = arm.is_foreign and self.job.compare.track == "native"
        return TrainTask(
            label=f"{arm.name} seed {seed}" if trial is None else f"{arm.name} trial {trial}",
            job=values,
            out=str(folder.root),
            prepared=str(self._rows_of(arm).folder),
            model_folder=model_folder,
            model_name=self.base.name,
            revision=self.base.revision,
            key=hash_json(
                {
                    "job": identity,
                    **fingerprint_objective(job, self.base.folder),
                    **self._shared_hashes(("train", "validation"), self._rows_of(arm)),
                    **({"framework": describe_framework(arm.framework)} if arm.is_foreign else {}),
                    **({"track": "native"} if native else {}),
                }
            ),
            keep_weights=trial is None,
            skip_bad_rows=self.skip_bad_rows,
            framework=arm.framework,
            native=native,
        )

    def _rows_of(self, arm: PlannedArm) -> Prepared:
        """What an arm's training reads."""
        return self.own.get(arm.name, self.prepared)

    def _find_start(self, arm: PlannedArm, seed: int) -> str | None:
        """Folder of the weights that an arm's training of a seed goes on from."""
        if arm.starts_from is None:
            return None
        start = self.run.arm(arm.starts_from, seed)
        return str(start.adapter if isinstance(arm.method, LoraSpec) else start.model)

    def _key_of_start(self, arm: PlannedArm, seed: int, arms: Mapping[str, PlannedArm]) -> str | None:
        return self._train_task(arms[arm.starts_from], seed, arms).key if arm.starts_from else None

    def _judge_task(self, arm: PlannedArm, seed: int, arms: Mapping[str, PlannedArm]) -> JudgeTask:
        method = arm.method
        weights = "base" if method is None else "adapter" if isinstance(method, LoraSpec) else "model"
        trained = self.run.arm(arm.trained_by, seed) if arm.trained_by else None
        folder = None if trained is None else trained.adapter if weights == "adapter" else trained.model
        quantize = arm.quantize.model_dump(mode="json") if arm.quantize else None
        job = job_of_arm(self.job, arm, seed=seed).model_dump(mode="json", exclude={"compare"})
        rewards, owner = self.job.evaluate.reward_terms, arms.get(arm.trained_by or "")
        general = (
            str(self.job.evaluate.general or GENERAL_TEXT)
            if self.job.evaluate.forgetting and (trained or arm.quantize)
            else None
        )
        return JudgeTask(
            label=f"{arm.name} judged",
            job=job,
            out=str(self.run.arm(arm.name, seed).root),
            prepared=str(self.run.prepared),
            model_folder=str(self.base.folder),
            model_name=self.base.name,
            key=hash_json(
                {
                    "job": job,
                    "prompting": arm.prompting,
                    "quantize": quantize,
                    "files": self._hash_named_files(general),
                    **self._shared_hashes(("train", "validation", "test"), self.prepared),
                    **({"preferences": self.pairs.fingerprints} if self.pairs else {}),
                    **({"rewards": fingerprint_rewards(rewards)} if rewards else {}),
                    **({"training": self._train_task(owner, seed, arms).key} if owner else {}),
                }
            ),
            weights=weights,
            weights_folder=str(folder) if folder else None,
            storage=method.storage if isinstance(method, LoraSpec) else "full",
            double_quant=method.double_quant if isinstance(method, LoraSpec) else True,
            compute=method.compute if isinstance(method, LoraSpec) else "auto",
            quantize=quantize,
            prompting=arm.prompting,
            seed=seed,
            general=general,
            preferences=str(self.pairs.folder) if self.pairs else None,
            start=self._find_start(arm, seed) if arm.trains else None,
        )

    def _hash_named_files(self, general: str | None) -> dict[str, str]:
        """Hashes of files that scoring reads besides the rows."""
        spec = self.job.evaluate
        named = {"general": general, "schema": spec.schema_file}
        hashes = {name: hash_file(Path(path)) for name, path in named.items() if path}
        documents = (
            sorted(p for p in Path(spec.documents).rglob("*") if p.is_file()) if spec.documents else []
        )
        return hashes | {f"documents/{path.name}": hash_file(path) for path in documents}

    def _shared_hashes(self, splits: Sequence[str], prepared: Prepared) -> dict[str, str]:
        names = {f"{name}_sha256" for name in (*splits, "stream", "template", "tokenizer")}
        found = fingerprint_data(self.job, prepared)
        kept = {name: value for name, value in found.items() if name in names}
        return kept | {"model": fingerprint_model(self.base.folder, self.base.revision)}


def _drop_unfinished(works: Sequence[Work]) -> None:
    """Delete scores that are not of exactly these tasks (of a judgement that failed, of an earlier job): they would be
    shown as this job's."""
    for work in works:
        for task in work.tasks:
            if isinstance(task, JudgeTask) and not is_finished(task):
                clear_scores(RunDir(Path(task.out)))


def _by_arm(failed: Mapping[str, str], arms: Sequence[PlannedArm]) -> dict[str, str]:
    """The first reason of each arm, from the names of its works."""
    reasons: dict[str, str] = {}
    for arm in arms:
        for work, reason in sorted(failed.items(), key=lambda item: (item[0].endswith(" judged"), item[0])):
            if work.startswith(
                tuple(f"{arm.name} {what}" for what in ("judged", "seed ", "parity", "reference"))
            ):
                reasons.setdefault(arm.name, f"{work.removeprefix(arm.name).strip()}: {reason}")
    if reasons and len(reasons) == len(arms):
        name, reason = next(iter(reasons.items()))
        raise ArmFailed("compare", f"every arm failed; the first, {name}, {reason}")
    return reasons

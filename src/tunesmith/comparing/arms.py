"""Reading what the arms of a comparison left on disk, and checking that they answered the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tunesmith.comparing.plan import PlannedArm
from tunesmith.core.comparison import Parity, Trial
from tunesmith.core.jsonl import read_json, read_jsonl
from tunesmith.core.records import (
    AnswerRecord,
    EvalRecord,
    PreferenceRecord,
    RunRecord,
    StepRecord,
    read_answers,
)
from tunesmith.core.rundir import RunDir


@dataclass(slots=True)
class ArmFiles:
    """One arm's records by seed. `runs` are those of the arm that trained for it; `train_losses` are the mean losses of
    their last tenth of steps, nats per target token, where answers were learned."""

    plan: PlannedArm
    evals: dict[int, EvalRecord] = field(default_factory=dict[int, EvalRecord])
    answers: dict[int, list[AnswerRecord]] = field(default_factory=dict[int, list[AnswerRecord]])
    pairs: dict[int, list[PreferenceRecord]] = field(default_factory=dict[int, list[PreferenceRecord]])
    runs: dict[int, RunRecord] = field(default_factory=dict[int, RunRecord])
    train_losses: dict[int, float] = field(default_factory=dict[int, float])
    trials: list[Trial] = field(default_factory=list[Trial])
    not_comparable: str = ""

    @property
    def seeds(self) -> list[int]:
        """Seeds that were scored, in the planned order."""
        return [seed for seed in self.plan.seeds if seed in self.answers]

    def seed_or_only(self, seed: int) -> int:
        """The seed whose answers stand for `seed`: a deterministic arm has one set for all."""
        return self.seeds[0] if self.plan.deterministic else seed


def read_arm(run_dir: RunDir, arm: PlannedArm, *, num_trials: int) -> ArmFiles:
    """Read every seed of one arm that is complete. Raises DataError on a damaged file.

    num_trials: learning-rate trials of the job; folders of an earlier, longer search are not looked at.
    """
    files = ArmFiles(arm)
    for seed in arm.seeds:
        folder = run_dir.arm(arm.name, seed)
        if folder.evaluation.is_file() and folder.answers.is_file():
            place = str(folder.evaluation)
            files.evals[seed] = EvalRecord.from_json(read_json(folder.evaluation), place=place)
            files.answers[seed] = read_answers(folder.answers)
            if folder.pair_scores.is_file():
                files.pairs[seed] = read_pairs(folder)
        if arm.trained_by is not None:
            training = run_dir.arm(arm.trained_by, seed)
            if training.record.is_file():
                files.runs[seed] = RunRecord.from_json(read_json(training.record), place=str(training.record))
            learns_answers = arm.objective.name == "sft"
            if (
                learns_answers
                and training.steps.is_file()
                and (losses := [step.loss for step in read_steps(training)])
            ):
                last = losses[-max(1, len(losses) // 10) :]
                files.train_losses[seed] = sum(last) / len(last)
    if arm.trained_by is not None:
        files.trials = _read_trials(run_dir, arm.trained_by, files, num_trials)
    return files


def read_pairs(folder: RunDir) -> list[PreferenceRecord]:
    """The held-out pairs of one arm and seed, in order."""
    name = str(folder.pair_scores)
    return [
        PreferenceRecord.from_json(value, place=f"{name}:{line}")
        for line, value in read_jsonl(folder.pair_scores)
    ]


def read_steps(folder: RunDir) -> list[StepRecord]:
    """The optimizer steps of one training, in order."""
    name = str(folder.steps)
    return [StepRecord.from_json(value, place=f"{name}:{line}") for line, value in read_jsonl(folder.steps)]


def _read_trials(run_dir: RunDir, name: str, files: ArmFiles, num_trials: int) -> list[Trial]:
    """Learning-rate trials in ascending order; the chosen one is the rate that the seeds were trained with."""
    paths = [run_dir.trial(name, number).record for number in range(num_trials)]
    records = [RunRecord.from_json(read_json(path), place=str(path)) for path in paths if path.is_file()]
    used = {run.learning_rate for run in files.runs.values()}
    trials = [
        Trial(
            r.learning_rate,
            r.validation_loss if r.status == "done" else None,
            r.wall_seconds,
            any(abs(r.learning_rate - rate) <= 1e-9 * rate for rate in used),
        )
        for r in records
    ]
    return sorted(trials, key=lambda trial: trial.learning_rate)


def check_comparable(arms: Sequence[ArmFiles]) -> None:
    """Set `not_comparable` on every arm that was not asked what the first complete arm was asked.

    Same test data hash, same rows with the same truths in every seed, same template and data behind every training.
    """
    complete = [arm for arm in arms if arm.seeds]
    if not complete:
        return
    first = complete[0]
    asked = _list_questions(first.answers[first.seeds[0]])
    data = first.evals[first.seeds[0]].data_sha256
    trained = [arm for arm in complete if arm.runs]
    for arm in complete:
        for seed in arm.seeds:
            if arm.evals[seed].data_sha256 != data:
                arm.not_comparable = f"scored on other test data than {first.plan.name}"
            elif _list_questions(arm.answers[seed]) != asked:
                arm.not_comparable = f"scored on other test rows than {first.plan.name}"
            elif _list_pairs(arm, seed) != _list_pairs(first, first.seeds[0]):
                arm.not_comparable = f"scored on other pairs than {first.plan.name}"
        if arm.runs and not arm.not_comparable:
            arm.not_comparable = _find_other_training(arm, trained)


def block_unlike(arms: Sequence[ArmFiles], parity: Mapping[str, Parity]) -> list[ArmFiles]:
    """Set `not_comparable` on every scored arm whose training failed a parity gate, and return those arms."""
    unlike: list[ArmFiles] = []
    for arm in arms:
        found = parity.get(arm.plan.trained_by or "")
        if found and found.failed and arm.seeds and not arm.not_comparable:
            arm.not_comparable = f"parity failed: {', '.join(found.failed)}"
            unlike.append(arm)
    return unlike


def _list_questions(answers: Sequence[AnswerRecord]) -> list[tuple[int, str, str]]:
    return [(answer.row, answer.truth, answer.cluster) for answer in answers]


def _find_other_training(arm: ArmFiles, trained: Sequence[ArmFiles]) -> str:
    """What a training rests on and the others do not, or "". Rows of an arm's own, and the weights of an arm that it
    starts from, are its own affair."""
    learns_alike = [other for other in trained if not other.plan.has_own_rows]
    from_base = [other for other in trained if not other.plan.starts_from]
    held = [(trained, _OF_TEXT)]
    held += [(learns_alike, _OF_ROWS)] if not arm.plan.has_own_rows else []
    held += [(from_base, _OF_BASE)] if not arm.plan.starts_from else []
    for others, words in held:
        reference = next(iter(others[0].runs.values()))
        changed = {key for run in arm.runs.values() for key in _compare_fingerprints(run, reference, words)}
        if changed:
            return f"trained with another {', '.join(sorted(changed))} than {others[0].plan.name}"
    return ""


def _list_pairs(arm: ArmFiles, seed: int) -> list[str]:
    return [pair.row_id for pair in arm.pairs.get(seed, [])]


# A training's fingerprints that must agree, by a word in their names; the rest (code, adapter) may differ.
_OF_BASE = ("model", "weights")
_OF_TEXT = ("template", "tokenizer")
_OF_ROWS = ("train", "stream", "validation", "test")


def _compare_fingerprints(run: RunRecord, reference: RunRecord, held: Sequence[str]) -> list[str]:
    """Names of the fingerprints that both have, must agree (by a word of `held`), and do not."""
    both = run.fingerprints.keys() & reference.fingerprints.keys()
    return sorted(
        key
        for key in both
        if any(word in key for word in held) and run.fingerprints[key] != reference.fingerprints[key]
    )

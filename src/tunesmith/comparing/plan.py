"""From `compare.arms` to a list of arms that can be run: names, kinds, seeds, and which arms share one training.

A prompted arm answers with the base model; a trained arm answers with what its training left. `lora`, `lora+rag` and
`lora-int4` are arms over one training: the second puts retrieved examples into the prompt, the third is quantised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tunesmith.comparing.starts import check_objective, find_start, keep_method
from tunesmith.core.errors import JobError
from tunesmith.core.fingerprint import hash_json
from tunesmith.job.combinations import check_in_backward, check_optimizer
from tunesmith.job.objective import ObjectiveSpec, SftSpec, as_objective_spec, kind_of_rows
from tunesmith.job.spec import (
    PROMPTED,
    ArmDataSpec,
    ArmSpec,
    FullSpec,
    Job,
    LoraSpec,
    QuantizeSpec,
    SplitSpec,
    TuneSpec,
    as_method_spec,
    as_quantize_spec,
)

Prompting = Literal["zero-shot", "few-shot", "rag"]
SFT = SftSpec(name="sft")
# Keys of an arm that only a training obeys.
_OF_TRAINING = ("learning_rate", "epochs", "steps", "batch_rows", "objective", "data", "starts_from")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,59}")


@dataclass(frozen=True, slots=True)
class PlannedArm:
    """One arm, ready to run.

    prompting:     how its prompts are made; "zero-shot" is the question alone.
    method:        None for a prompted arm.
    learning_rate: "auto" follows model and method.
    epochs:        None when the job counts steps and this arm does not say otherwise.
    steps, batch_rows: None for the job's.
    seeds:         seeds to score: all of the job's, or the first alone where the seed changes nothing.
    trained_by:    name of the arm whose training it uses (its own, where it trains); None when prompted.
    quantize:      what its model is quantised to before it is judged; with QAT always what it was trained for.
    objective:     what its training learns.
    data:          its own training rows; None for the job's.
    starts_from:   name of the arm whose training its own goes on from; None for the base.
    """

    name: str
    kind: Literal["prompted", "trained"]
    prompting: Prompting
    method: FullSpec | LoraSpec | None
    framework: str
    learning_rate: float | Literal["auto"]
    epochs: float | None
    seeds: tuple[int, ...]
    deterministic: bool
    trained_by: str | None
    quantize: QuantizeSpec | None = None
    objective: ObjectiveSpec = SFT
    data: ArmDataSpec | None = None
    starts_from: str | None = None
    steps: int | None = None
    batch_rows: int | None = None

    @property
    def trains(self) -> bool:
        """True if this arm's own folder gets a training."""
        return self.trained_by == self.name

    @property
    def is_foreign(self) -> bool:
        """True if another framework than our own engine trains for it, in its own folder."""
        return self.trains and self.framework != "tunesmith"

    @property
    def settings(self) -> tuple[Any, ...]:
        """What decides the trained weights, seed aside: arms with equal settings share a training."""
        return (
            self.method,
            self.framework,
            self.learning_rate,
            self.epochs,
            self.steps,
            self.batch_rows,
            self.objective,
            self.data,
            self.starts_from,
        )

    @property
    def has_own_rows(self) -> bool:
        """True if its training reads other token rows than the job's: its own data, or prompts."""
        return self.data is not None or kind_of_rows(self.objective) != "answers"

    @property
    def judged(self) -> tuple[Any, ...]:
        """What else decides its answers: arms over one training differ in it."""
        return (self.prompting, self.quantize)

    @property
    def is_plain(self) -> bool:
        """True if it is judged as its training left it: no retrieval, not quantised more than it was trained for."""
        return self.prompting == "zero-shot" and self.quantize == (
            self.method.qat_spec if self.method else None
        )


def plan_arms(job: Job) -> list[PlannedArm]:
    """Expand `job.compare.arms`, in order.

    Raises JobError for a name that is no folder name, a repeated name, and an arm that cannot have what it needs.
    """
    arms: list[PlannedArm] = []
    for number, item in enumerate(job.compare.arms):
        place = f"compare.arms[{number}]"
        spec = _parse_name(item, job) if isinstance(item, str) else item
        start = None if spec.starts_from is None else find_start(spec, arms, place)
        arm = _plan_arm(spec, job, place, start)
        _refuse_examples_of_a_stream(arm, job, place)
        _refuse_other_tokens(arm, job, place)
        if arm.method is not None:
            check_optimizer(job.train, arm.method, place=place)
            check_in_backward(job.train, arm.method, place=place)
        for other in arms:
            if other.name.lower() == arm.name.lower():
                raise JobError(
                    place,
                    f"a second arm called {arm.name!r}",
                    rule="arm names are unique",
                    cure="Give one a `name:`",
                )
        arms.append(arm)
    return _name_starts(_share_training(arms))


def order_trainings(arms: Sequence[PlannedArm]) -> list[tuple[PlannedArm, int]]:
    """Every training as (arm, seed), in the order in which they are begun: a round for each seed, the arms of a round
    in an order drawn from that seed.

    A machine that grows slower (heat, other users) then slows all arms alike. An arm's place depends on its name, so
    that it keeps it when the comparison goes on, or another arm joins.
    """

    def draw(arm: PlannedArm, seed: int) -> str:
        return hash_json({"arm": arm.name, "seed": seed})

    seeds = list(dict.fromkeys(seed for arm in arms if arm.trains for seed in arm.seeds))
    return [
        (arm, seed)
        for seed in seeds
        for arm in sorted(arms, key=lambda arm: draw(arm, seed))
        if arm.trains and seed in arm.seeds
    ]


def share_references(job: Job, arms: Sequence[PlannedArm]) -> dict[str, str]:
    """Arm of another framework -> the arm whose reference run, by our own engine, stands for its own too: the first of
    those that train alike. Where rates are searched, each has its own."""
    foreign = [arm for arm in arms if arm.is_foreign]
    found: dict[str, str] = {}
    for arm in foreign:
        alike = (
            other for other in foreign if replace(other, framework=arm.framework).settings == arm.settings
        )
        found[arm.name] = arm.name if job.compare.tune.trials else next(alike).name
    return found


def job_of_arm(job: Job, arm: PlannedArm, *, seed: int) -> Job:
    """The job of one arm and seed, as if it were run alone."""
    train = job.train.model_copy(update={"seed": seed, "learning_rate": arm.learning_rate})
    if arm.epochs is not None:
        train = train.model_copy(update={"epochs": arm.epochs, "steps": None})
    given = {"steps": arm.steps, "batch_rows": arm.batch_rows}
    train = train.model_copy(update={name: value for name, value in given.items() if value is not None})
    changes: dict[str, Any] = {"method": arm.method or job.method, "train": train}
    if arm.trained_by:
        changes |= {"objective": arm.objective}
    if arm.data:
        split = SplitSpec(validation=arm.data.validation, test=0.0)
        read = {"train": arm.data.train, "split": split, "streaming": False}
        changes["data"] = job.data.model_copy(
            update=read | ({"max_tokens": arm.data.max_tokens} if arm.data.max_tokens else {})
        )
    return job.model_copy(update=changes)


def _parse_name(text: str, job: Job) -> ArmSpec:
    """`lora+rag` -> ArmSpec(method=lora, rag=True)."""
    name, plus, extra = text.strip().lower().partition("+")
    assert not plus or extra == "rag"
    if name in PROMPTED:
        return ArmSpec.model_validate({"method": name})
    return ArmSpec(method=_inherit_settings(name, job), rag=bool(plus))


def _inherit_settings(name: str, job: Job) -> FullSpec | LoraSpec:
    """A method given by name alone takes the job's own settings, so that `lora` and `qlora` differ in the base only
    (and in QAT, which wants a 16-bit base)."""
    own = job.method_spec
    if isinstance(own, LoraSpec) and name in ("lora", "qlora"):
        return (
            own
            if own.name == name
            else own.model_copy(update={"name": name, "base": "auto", "compute": "auto", "qat": None})
        )
    return own if own.name == name else as_method_spec(name)


def _plan_arm(spec: ArmSpec, job: Job, place: str, start: PlannedArm | None) -> PlannedArm:
    sampled, quantize = job.evaluate.sampling.temperature > 0, as_quantize_spec(spec.quantize)
    if isinstance(spec.method, str) and spec.method in PROMPTED:
        if spec.rag and spec.method == "few-shot":
            raise JobError(
                place,
                "few-shot with `rag: true`",
                rule="a prompt holds drawn or retrieved examples",
                cure="Write `rag`",
            )
        if given := [key for key in _OF_TRAINING if getattr(spec, key) is not None]:
            raise JobError(
                place, f"{spec.method} has {given[0]}", rule="a prompted arm does not train", cure="Remove it"
            )
        prompting: Prompting = "rag" if spec.rag else spec.method
        method = None
        default_name = prompting + (f"-{quantize.label}" if quantize else "")
    else:
        method = _inherit_settings(spec.method, job) if isinstance(spec.method, str) else spec.method
        if start is not None:
            method = keep_method(spec, method, start, place)
        check_objective(spec, job, place)
        prompting = "rag" if spec.rag else "zero-shot"
        if method.qat_spec and quantize not in (None, method.qat_spec):
            raise JobError(
                place,
                f"quantize is {quantize.label if quantize else None}, and qat is {method.qat_spec.label}",
                rule="what is trained for one rounding ships with it",
                cure="Leave quantize out, or qat",
            )
        quantize = quantize or method.qat_spec
        default_name = _name_arm(method, spec, job)
    deterministic = method is None and prompting != "few-shot" and not sampled
    name = spec.name or default_name
    if not _SAFE_NAME.fullmatch(name):
        raise JobError(
            place,
            f"name {name!r}",
            rule="arm names are folder names: letters, digits, . _ + -, at most 60",
            cure="Rename it",
        )
    if name == "zero-shot" and quantize:
        raise JobError(
            place,
            "a quantised arm called 'zero-shot'",
            rule="that is the base model as it is, which others are held against",
            cure="Leave the name out",
        )
    train = job.train
    return PlannedArm(
        name=name,
        kind="trained" if method else "prompted",
        prompting=prompting,
        method=method,
        framework=spec.framework,
        learning_rate=train.learning_rate if spec.learning_rate is None else spec.learning_rate,
        epochs=spec.epochs
        if spec.epochs is not None
        else (None if train.steps or spec.steps else train.epochs),
        seeds=tuple(job.compare.seeds[:1] if deterministic else job.compare.seeds),
        deterministic=deterministic,
        trained_by=name if method else None,
        quantize=quantize,
        objective=as_objective_spec(spec.objective or SFT),
        data=spec.data,
        starts_from=start.name if start else None,
        steps=spec.steps,
        batch_rows=spec.batch_rows,
    )


def _refuse_examples_of_a_stream(arm: PlannedArm, job: Job, place: str) -> None:
    """Examples are drawn and retrieved from training rows in memory; a stream has none there."""
    if not job.data.streaming or arm.prompting == "zero-shot":
        return
    if arm.prompting == "rag" and job.evaluate.documents is not None:
        return
    cure = "Remove the arm, or read train without data.streaming"
    if arm.prompting == "rag":
        cure += ", or name documents under evaluate.documents"
    raise JobError(
        place,
        f"{arm.name} needs training rows at hand, and data.streaming is on",
        rule="streamed rows are read once and not kept",
        cure=cure,
    )


def _refuse_other_tokens(arm: PlannedArm, job: Job, place: str) -> None:
    """All arms read the same token rows, so all must know the same tokens."""
    given = job.method_spec.new_tokens if isinstance(job.method_spec, LoraSpec) else []
    known = arm.method.new_tokens if isinstance(arm.method, LoraSpec) else []
    if known == given:
        return
    if isinstance(arm.method, LoraSpec):
        raise JobError(
            place,
            f"{arm.name} has new_tokens {known}, the job's method {given}",
            rule="all arms read the same token rows",
            cure="Give method.new_tokens once, for the whole job, and leave it out of arms",
        )
    what = "trains no new embedding" if arm.method else "answers with the base model"
    raise JobError(
        place,
        f"{arm.name} {what}, and method.new_tokens adds {given[0]!r}",
        rule="all arms read the same token rows, and the base has no embedding for new tokens",
        cure="Compare lora and qlora arms only, or remove method.new_tokens",
    )


def _name_arm(method: FullSpec | LoraSpec, spec: ArmSpec, job: Job) -> str:
    """`lora`, `lora-r64-lr0.0003`, `full+rag`: what differs from the job's own settings is in the name."""
    parts = [method.name]
    if spec.objective and (objective := as_objective_spec(spec.objective).name) != "sft":
        parts.append(objective)
    if isinstance(method, LoraSpec):
        usual = _inherit_settings(method.name, job)
        assert isinstance(usual, LoraSpec)
        for field, mark in (
            ("rank", "r"),
            ("alpha", "a"),
            ("dropout", "drop"),
            ("base", ""),
            ("compute", ""),
        ):
            if getattr(method, field) != getattr(usual, field):
                parts.append(f"{mark}{getattr(method, field)}")
        parts += [flag for flag in ("rslora", "dora") if getattr(method, flag) and not getattr(usual, flag)]
        if method.targets != usual.targets:
            parts.append("targets")
    if method.qat_spec:
        parts.append(f"qat-{method.qat_spec.label}")
    if spec.framework != "tunesmith":
        parts.append(spec.framework)
    if spec.learning_rate is not None and spec.learning_rate != job.train.learning_rate:
        parts.append(f"lr{spec.learning_rate:g}" if spec.learning_rate != "auto" else "lr-auto")
    if spec.epochs is not None and spec.epochs != job.train.epochs:
        parts.append(f"e{spec.epochs:g}")
    if (quantize := as_quantize_spec(spec.quantize)) and not method.qat_spec:
        parts.append(quantize.label)
    return "-".join(parts) + ("+rag" if spec.rag else "")


def _share_training(arms: Sequence[PlannedArm]) -> list[PlannedArm]:
    """Point retrieval arms and quantised ones at a training with equal settings: a plain arm's, else the first one's.
    Two arms judged alike each train: an A/A comparison of equal arms is wanted, not optimised away."""
    shared: list[PlannedArm] = []
    for number, arm in enumerate(arms):
        if arm.method is not None and not arm.is_plain:
            equal = [other for other in arms if other.method is not None and other.settings == arm.settings]
            owners = [other for other in equal if other.is_plain]
            if not owners and equal[0].judged != arm.judged and equal[0] in arms[:number]:
                owners = equal[:1]
            if owners:
                arm = replace(arm, trained_by=owners[0].name)
        shared.append(arm)
    return shared


def _name_starts(arms: Sequence[PlannedArm]) -> list[PlannedArm]:
    """Every start by the name of the arm that trains for it."""
    owners = {arm.name: arm.trained_by for arm in arms}
    return [replace(arm, starts_from=owners[arm.starts_from]) if arm.starts_from else arm for arm in arms]


# --- learning-rate trials ---------------------------------------------------------------------------------------------


def plan_trials(prior: float, tune: TuneSpec) -> list[float]:
    """Learning rates to try for one arm, ascending: `prior` times powers of the factor, the prior among them.

    prior 1e-3, 5 trials, factor 2 -> 0.00025, 0.0005, 0.001, 0.002, 0.004. Every arm gets as many, around its
    own prior: LoRA's best is about ten times that of full fine-tuning, so one shared grid would favour one of them.
    """
    if prior <= 0:
        raise ValueError(f"prior must be positive, not {prior}")
    below = tune.trials // 2
    return [prior * tune.factor ** (index - below) for index in range(tune.trials)]


@dataclass(frozen=True, slots=True)
class ChosenRate:
    """index: position in the grid, ascending. at_edge: the optimum may lie outside the grid."""

    learning_rate: float
    index: int
    at_edge: bool


def choose_rate(learning_rates: Sequence[float], validation_losses: Sequence[float | None]) -> ChosenRate:
    """The learning rate of the lowest validation loss; None or a non-finite loss is a diverged trial.

    Raises ValueError if every trial diverged or the lengths differ.
    """
    if len(learning_rates) != len(validation_losses):
        raise ValueError(f"{len(learning_rates)} learning rates, {len(validation_losses)} losses")
    order = sorted(range(len(learning_rates)), key=lambda i: learning_rates[i])
    losses = [validation_losses[i] for i in order]
    finite = [(loss, rank) for rank, loss in enumerate(losses) if loss is not None and math.isfinite(loss)]
    if not finite:
        raise ValueError("every learning-rate trial diverged")
    _, best = min(finite)
    # One trial has no edge to speak of: nothing was searched.
    at_edge = len(order) > 1 and best in (0, len(order) - 1)
    return ChosenRate(learning_rates[order[best]], best, at_edge)

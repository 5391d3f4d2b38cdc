"""Keys of `objective`: what is learned. Which weights learn it is `method`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from tunesmith.job.values import PositiveInt, Spec

# What a row of the data is to an objective: a conversation whose answers are learned; a chosen and a rejected answer;
# an answer with a label; a prompt that the model answers itself.
RowKind = Literal["answers", "pairs", "labelled", "prompts"]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class SftSpec(Spec):
    """Supervised fine-tuning: the likelihood of the answers."""

    name: Literal["sft"]
    """The objective."""


class DistillSpec(Spec):
    """Distillation: at each token of an answer, a teacher's whole distribution, and not only the token that is there.
    The loss is temperature^2 KL + sft_weight NLL, mean over target tokens."""

    name: Literal["distill"]
    """The objective."""
    teacher: Annotated[str, Field(min_length=1)]
    """Whose distributions are learned: bundled name, hub id, or folder of a model, an adapter or a run. It has the same
    tokenizer, and stays in memory beside the model."""
    loss: Literal["forward_kl", "reverse_kl"] = "forward_kl"
    """`forward_kl`: KL of the teacher from the student, which then covers all that the teacher finds likely.
    `reverse_kl`: the other way round; the student says nothing that the teacher finds unlikely."""
    temperature: Positive = 1.0
    """What the logits of both are divided by; above 1, unlikely tokens count for more."""
    sft_weight: NonNegative = 0.0
    """Weight of the answers' negative log-likelihood, added to the loss."""


class DpoSpec(Spec):
    """Direct preference optimisation: the chosen answer likelier than the rejected one, both against the reference."""

    name: Literal["dpo"]
    """The objective."""
    beta: Positive = 0.1
    """How closely to stay to the reference; of `ipo` the margin to reach is 1 / (2 beta)."""
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    """`sigmoid`: the paper's. `ipo`: a margin to meet and not to exceed, of log-probabilities averaged over tokens.
    `hinge`: nothing beyond a margin of 1. `robust`: unbiased where `label_smoothing` of the labels are flipped."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of labels taken for flipped, of `sigmoid` (conservative DPO) and `robust`."""
    length_normalised: bool = False
    """Average log-probabilities over the answer's tokens instead of summing them."""
    sft_weight: NonNegative = 0.0
    """Weight of the chosen answer's mean negative log-likelihood, added to the loss."""

    @model_validator(mode="after")
    def _check_loss(self) -> DpoSpec:
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("loss: robust needs label_smoothing, the share of labels that are flipped")
        if self.label_smoothing and self.loss in ("ipo", "hinge"):
            raise ValueError(f"label_smoothing is of loss sigmoid and robust; leave it out with {self.loss}")
        return self


class OrpoSpec(Spec):
    """Odds-ratio preference optimisation: SFT on the chosen answer and its odds against the rejected one's. Without a
    reference; starts from a base model."""

    name: Literal["orpo"]
    """The objective."""
    weight: NonNegative = 0.1
    """Weight of the odds ratio beside the chosen answer's loss (lambda)."""


class SimpoSpec(Spec):
    """Simple preference optimisation: mean log-probabilities a margin apart. Without a reference."""

    name: Literal["simpo"]
    """The objective."""
    beta: Positive = 2.0
    """Scale of the mean log-probabilities."""
    margin: NonNegative = 1.0
    """How far apart they shall be, times beta (gamma)."""


class KtoSpec(Spec):
    """Kahneman-Tversky optimisation: answers with a label each, without pairs, against the reference."""

    name: Literal["kto"]
    """The objective."""
    beta: Positive = 0.1
    """How closely to stay to the reference."""
    desirable_weight: NonNegative = 1.0
    """Weight of good answers."""
    undesirable_weight: NonNegative = 1.0
    """Weight of bad ones."""


class RewardSpec(Spec):
    """A reward model: a score for an answer, learned from pairs (Bradley-Terry). Saved as a sequence classifier."""

    name: Literal["reward"]
    """The objective."""
    center: NonNegative = 0.0
    """Weight of the squared sum of a pair's scores, which keeps scores around zero."""


# Rewards that come with us, and the setting that each needs.
VERIFIERS: dict[str, str | None] = {
    "exact_match": None,
    "json_fields": None,
    "json_valid": None,
    "json_schema": "schema_file",
    "regex": "pattern",
    "length": "characters",
}


class RewardTerm(Spec):
    """One reward of a sampled answer. A bare string is `{source: ...}`."""

    source: str
    """A verifier (`exact_match`, `json_fields`, `json_valid`, `json_schema`, `regex`, `length`), a Python function
    (`rewards.py:json_score`, called as TRL calls it), or the folder of a reward model."""
    weight: float = 1.0
    """Weight in the sum of rewards."""
    pattern: str | None = None
    """Of `regex`: what the answer has to contain. 1 or 0."""
    schema_file: str | None = None
    """Of `json_schema`: the schema that the answer has to match. 1 or 0."""
    characters: Annotated[int, Field(gt=0)] | None = None
    """Of `length`: the answer's length that is worth 1; it falls to 0 at none and at twice as many."""
    timeout: Positive = 60.0
    """Seconds that a Python function may take for the answers of one rollout."""


def as_reward_terms(rewards: Sequence[str | RewardTerm]) -> list[RewardTerm]:
    """The full specs of rewards given by name or as specs."""
    return [RewardTerm(source=term) if isinstance(term, str) else term for term in rewards]


class RolloutSpec(Spec):
    """What PPO and GRPO have in common: the model answers prompts and learns from what its answers are worth."""

    rewards: Annotated[list[str | RewardTerm], Field(min_length=1)]
    """What an answer is worth: a weighted sum."""
    prompts: PositiveInt = 8
    """Prompts of a rollout."""
    max_new_tokens: PositiveInt = 256
    """Longest sampled answer."""
    temperature: Positive = 1.0
    """Of sampling; log-probabilities are taken at the same temperature."""
    passes: PositiveInt = 1
    """Times that a rollout's answers are trained on."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """How far a token's probability may move from the one it was sampled with, as a ratio, before it stops to count."""
    max_kl: Positive | None = None
    """Mean KL from the reference, nats per answer, beyond which training stops and saves the last weights within it."""

    @property
    def terms(self) -> list[RewardTerm]:
        return as_reward_terms(self.rewards)


class GrpoSpec(RolloutSpec):
    """Group-relative policy optimisation: several answers a prompt, each held against the others' mean reward."""

    name: Literal["grpo"]
    """The objective."""
    samples: Annotated[int, Field(ge=2)] = 8
    """Answers to each prompt."""
    beta: NonNegative = 0.0
    """Weight of the KL from the reference."""
    clip_high: Annotated[float, Field(gt=0)] | None = None
    """Upper bound of the ratio, minus 1, where it differs from `clip` (DAPO: 0.28)."""
    normalise: Literal["answer", "tokens", "length"] = "tokens"
    """What losses of tokens are divided by: `answer`, each answer's tokens (GRPO); `tokens`, all tokens of the step
    (DAPO); `length`, `max_new_tokens` (Dr. GRPO)."""
    scale: Literal["group", "none"] = "group"
    """`group` divides advantages by the standard deviation of the group's rewards; `none` leaves them (Dr. GRPO)."""


class PpoSpec(RolloutSpec):
    """Proximal policy optimisation: advantages from a learned value of every token, KL from the reference a price."""

    name: Literal["ppo"]
    """The objective."""
    samples: PositiveInt = 1
    """Answers to each prompt."""
    prompts: PositiveInt = 32
    """Prompts of a rollout."""
    passes: PositiveInt = 4
    """Times that a rollout's answers are trained on."""
    kl_weight: NonNegative = 0.05
    """Price of a nat of KL from the reference, in reward."""
    value_weight: NonNegative = 0.1
    """Weight of the value's loss."""
    value_clip: Positive = 0.2
    """How far a value may move from the one at sampling before it stops to count."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount from token to token."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Of generalised advantage estimation: 0 trusts values, 1 rewards."""
    center_rewards: bool = False
    """Take a rollout's mean reward off each of its rewards. Values begin at zero, and then begin right: where most
    rewards are alike and far from zero, what a short training would else spend on learning their mean."""
    whiten_rewards: bool = False
    """Bring a rollout's rewards to variance 1 before advantages are made of them."""


_SPECS: dict[str, tuple[type[Spec], RowKind]] = {
    "sft": (SftSpec, "answers"),
    "distill": (DistillSpec, "answers"),
    "dpo": (DpoSpec, "pairs"),
    "orpo": (OrpoSpec, "pairs"),
    "simpo": (SimpoSpec, "pairs"),
    "kto": (KtoSpec, "labelled"),
    "reward": (RewardSpec, "pairs"),
    "grpo": (GrpoSpec, "prompts"),
    "ppo": (PpoSpec, "prompts"),
}
OBJECTIVES = tuple(_SPECS)


def _name_of(value: Any) -> Any:
    return (
        cast("dict[str, Any]", value).get("name") if isinstance(value, dict) else getattr(value, "name", None)
    )


def _check_name(value: Any) -> Any:
    name = value if isinstance(value, str) else _name_of(value)
    if isinstance(value, str) and name in ("grpo", "ppo"):
        raise ValueError(f"{name} needs rewards; write objective: {{name: {name}, rewards: [...]}}")
    if value == "distill":
        raise ValueError("distill needs a teacher; write objective: {name: distill, teacher: ...}")
    if name in OBJECTIVES:
        return value
    near = difflib.get_close_matches(str(name).lower(), OBJECTIVES, n=1)
    guess = f". Did you mean {near[0]!r}?" if near else ""
    said = "no name" if name is None else f"unknown objective {name!r}"
    raise ValueError(f"{said}; objectives are {', '.join(OBJECTIVES)}{guess}")


_Settings: TypeAlias = Annotated[
    Annotated[SftSpec, Tag("sft")]
    | Annotated[DistillSpec, Tag("distill")]
    | Annotated[DpoSpec, Tag("dpo")]
    | Annotated[OrpoSpec, Tag("orpo")]
    | Annotated[SimpoSpec, Tag("simpo")]
    | Annotated[KtoSpec, Tag("kto")]
    | Annotated[RewardSpec, Tag("reward")]
    | Annotated[GrpoSpec, Tag("grpo")]
    | Annotated[PpoSpec, Tag("ppo")],
    Discriminator(_name_of),
]
ObjectiveSpec: TypeAlias = (
    SftSpec | DistillSpec | DpoSpec | OrpoSpec | SimpoSpec | KtoSpec | RewardSpec | GrpoSpec | PpoSpec
)
Objective: TypeAlias = Annotated[
    Literal["sft", "dpo", "orpo", "simpo", "kto", "reward"] | _Settings, BeforeValidator(_check_name)
]


def as_objective_spec(objective: str | ObjectiveSpec) -> ObjectiveSpec:
    """The full spec of an objective given by name or as a spec."""
    if isinstance(objective, str):
        return cast("ObjectiveSpec", _SPECS[objective][0].model_validate({"name": objective}))
    return objective


def kind_of_rows(objective: str | ObjectiveSpec) -> RowKind:
    """What the data's rows are to an objective, given by name or as a spec."""
    return _SPECS[as_objective_spec(objective).name][1]

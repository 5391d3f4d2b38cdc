"""Every key of a job file: type, default, and the sentence that documents it.

The JSON Schema for editors and `docs/job-file.md` are generated from this file; help text lives nowhere else.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)

from tunesmith.core.quantities import parse_bytes
from tunesmith.job.objective import (
    Objective,
    ObjectiveSpec,
    RewardTerm,
    as_objective_spec,
    as_reward_terms,
    kind_of_rows,
)
from tunesmith.job.values import Auto, Fraction, PositiveInt, Seed, Spec

Storage = Literal["full", "int8", "nf4", "fp8"]
Compute = Literal["auto", "bf16", "fp8"]
Scheme = Literal["int8", "int4", "fp8", "int8-int4"]
QatScheme = Literal["int4", "int8-int4"]
Framework = Literal["tunesmith", "trl", "llamafactory", "axolotl", "unsloth"]


def _check_amount(text: str) -> str:
    if text != "auto":
        parse_bytes(text)
    return text


MemoryAmount = Annotated[str, AfterValidator(_check_amount), WithJsonSchema({"type": "string"})]


class ModelSpec(Spec):
    """The base model. A bare string is `{name: ...}`."""

    name: str
    """Bundled name (`tunesmith/tiny`), folder, or hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the commit it resolves to is pinned in the record."""


class SourceSpec(Spec):
    """One source of rows. A bare string is `{path: ...}`."""

    path: str
    """Bundled name, file (.jsonl, .json, .csv, .parquet), folder, glob, or hub id (`org/name` or `org/name:split`)."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of this source in a mix: 0.5 uses half of its rows, 2 uses each row twice in an epoch."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; the commit it resolves to is pinned in the record."""
    format: Literal[
        "auto",
        "messages",
        "prompt_completion",
        "alpaca",
        "prompts",
        "sharegpt",
        "text",
        "pairs",
        "messages_pairs",
        "sharegpt_pairs",
        "alpaca_pairs",
        "conversation_pairs",
        "hh_pairs",
        "labelled",
        "messages_labelled",
        "sharegpt_labelled",
        "alpaca_labelled",
    ] = "auto"
    """Shape of the rows; `auto` detects it per source and says what it found."""


class SplitSpec(Spec):
    """Held-out rows: a share of `train`, cut by clusters of near-duplicates, or a named source."""

    validation: Fraction | str = "auto"
    """Share of rows, or a source; `auto` takes the split that comes with the source (a folder's or hub data set's own
    `validation`), else 0.1. Selects the best checkpoint and learning rate."""
    test: Fraction | str = "auto"
    """Share of rows, or a source; `auto` as above. Sealed: only the judge reads it."""


class DataSpec(Spec):
    train: str | list[str | SourceSpec] | SourceSpec
    """Training rows: one source, or a list that mixes sources by weight."""
    split: SplitSpec = SplitSpec()
    """Validation and test rows."""
    max_tokens: PositiveInt = 1024
    """Longest row in tokens."""
    too_long: Literal["drop", "truncate", "refuse"] = "drop"
    """What happens to rows above `max_tokens`, counted and shown; `truncate` cuts the end, answer and all."""
    template: str | None = None
    """Chat template for a model that has none, or in place of its own: a name (`chatml`, `llama-3`, `alpaca`, ...) or
    a Jinja file."""
    deduplicate: Literal["none", "exact"] = "exact"
    """`exact` trains equal rows once. Near-duplicates are reported and kept in one split, never dropped."""
    streaming: bool = False
    """Read `train` row by row in constant memory: named split files, windowed shuffle, deduplication by hash only."""
    shuffle_window: PositiveInt = 4096
    """Rows shuffled together while streaming."""
    seed: Seed = 0
    """Seed of the split. The order of training rows follows `train.seed`."""


class QuantizeSpec(Spec):
    """What linear layers are rounded to, by torchao (extra `quant`). A bare string is `{scheme: ...}`."""

    scheme: Scheme
    """`int8`, `fp8` (e4m3): weights, a scale per output. `int4`: weights, a scale per group of inputs. `int8-int4`: the
    same weights, and activations rounded to int8 token by token."""
    group_size: Literal[32, 64, 128, 256] | None = None
    """Inputs that share a scale, of int4 weights. Default: 32."""

    @property
    def inputs_per_scale(self) -> int | None:
        """None where a whole row shares one."""
        return (self.group_size or 32) if "int4" in self.scheme else None

    @property
    def label(self) -> str:
        """`int4`, `int4-g64`."""
        return self.scheme + (f"-g{self.group_size}" if self.group_size else "")

    @model_validator(mode="after")
    def _check_groups(self) -> QuantizeSpec:
        if self.group_size and self.inputs_per_scale is None:
            raise ValueError(
                f"group_size is for int4 weights; {self.scheme} has a scale per output, leave it out"
            )
        return self


def as_quantize_spec(value: str | QuantizeSpec | None) -> QuantizeSpec | None:
    """The full spec of a scheme given by name or as a spec. 32 inputs a scale are the default, written out or not."""
    spec = QuantizeSpec.model_validate({"scheme": value}) if isinstance(value, str) else value
    return spec.model_copy(update={"group_size": None}) if spec and spec.group_size == 32 else spec


def _check_qat(qat: str | QuantizeSpec | None) -> None:
    spec = as_quantize_spec(qat)
    if spec and "int4" not in spec.scheme:
        raise ValueError(
            f"qat is for int4 and int8-int4; {spec.scheme} costs little without it: train plainly, and give an arm "
            f"of `compare` quantize: {spec.scheme}"
        )


class FullSpec(Spec):
    """Full fine-tuning: every weight, fp32 master copies (none with `train.optimizer: adamw-bf16`)."""

    name: Literal["full"]
    """The method."""
    qat: QatScheme | QuantizeSpec | None = None
    """Quantisation-aware training: every product sees weights (and activations) rounded as they will ship, gradients
    pass the rounding straight through. The result is judged quantised."""

    @property
    def qat_spec(self) -> QuantizeSpec | None:
        return as_quantize_spec(self.qat)

    @model_validator(mode="after")
    def _check_scheme(self) -> FullSpec:
        _check_qat(self.qat)
        return self


class LoraSpec(Spec):
    """Low-rank adapters on a frozen base."""

    name: Literal["lora", "qlora"]
    """The method; qlora is lora on an nf4 base."""
    rank: PositiveInt = 32
    """Rank of the adapters."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale numerator; the adapter's output is multiplied by alpha / rank. Default: twice the rank."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers that get an adapter, by the end of their names (`q_proj`, `mlp.down_proj`)."""
    modules_to_save: list[str] = []
    """Modules trained whole beside the adapters (`embed_tokens`, `lm_head`)."""
    new_tokens: list[str] = []
    """Tokens added to the vocabulary; the embedding (and head) are then trained whole and saved."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    dora: bool = False
    """Weight-decomposed adapters (DoRA)."""
    adapter: str | None = None
    """Adapter folder to continue from."""
    base: Literal["auto", "full", "int8", "nf4", "fp8"] = "auto"
    """Storage of the frozen base: `auto` is `nf4` for qlora and `full` (the training precision) for lora. `fp8` also
    multiplies in fp8, forward and backward; a run is refused if that moves its first loss by more than 0.5%."""
    double_quant: bool = True
    """Quantise the NF4 block scales too."""
    compute: Compute = "auto"
    """What an nf4 base is unpacked to for its products: `auto` is the training precision, `fp8` is checked as above."""
    qat: QatScheme | QuantizeSpec | None = None
    """Quantisation-aware training, as for `full`: what is rounded is the base's weight with its adapter folded in."""

    @property
    def scaling_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def storage(self) -> Storage:
        if self.base == "auto":
            return "nf4" if self.name == "qlora" else "full"
        return self.base

    @property
    def qat_spec(self) -> QuantizeSpec | None:
        return as_quantize_spec(self.qat)

    @model_validator(mode="after")
    def _check_rounding(self) -> LoraSpec:
        _check_qat(self.qat)
        if self.qat and self.storage != "full":
            raise ValueError(
                f"qat rounds the base's own weights together with the adapters, and this base is {self.storage}; "
                "write `name: lora` without base, or leave qat out"
            )
        if self.qat and self.dropout:
            raise ValueError(
                "qat folds adapters into the weights, where they have no input of their own to drop from; "
                "set dropout: 0, or leave qat out"
            )
        return self

    @model_validator(mode="after")
    def _check_storage(self) -> LoraSpec:
        if self.name == "qlora" and self.storage != "nf4":
            raise ValueError(
                f"qlora trains on an nf4 base, not {self.base!r}; write `name: lora` with this base"
            )
        if self.compute != "auto" and self.storage != "nf4":
            raise ValueError(
                f"compute: {self.compute} is for an nf4 base; base: {self.storage} "
                + (
                    "multiplies in fp8 anyway"
                    if self.storage == "fp8"
                    else "multiplies in the training precision"
                )
                + ", leave compute out"
            )
        return self


def _choose_method(value: Any) -> str:
    """Which spec a method's mapping is checked against: everything but `full` is a kind of LoRA."""
    if isinstance(value, dict):
        return "full" if cast("dict[str, Any]", value).get("name") == "full" else "lora"
    return "full" if isinstance(value, FullSpec) else "lora"


MethodSpec: TypeAlias = Annotated[
    Annotated[FullSpec, Tag("full")] | Annotated[LoraSpec, Tag("lora")],
    Discriminator(_choose_method),
]


class TrainSpec(Spec):
    epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the training rows."""
    steps: PositiveInt | None = None
    """Optimizer steps; overrides epochs."""
    batch_rows: PositiveInt = 16
    """Rows per optimizer step: the quantity every framework can express."""
    micro_batch_tokens: PositiveInt | Auto = "auto"
    """Tokens per forward pass; `auto` leaves it to the memory planner. Changes speed and memory, never the result."""
    memory_limit: MemoryAmount = "auto"
    """GPU memory that training stays within, as in `19.7GiB`; `auto` is what the card has free. What is kept of each
    block for the backward pass, and what is computed again, follows from it: see `tunesmith plan`."""
    learning_rate: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Peak learning rate; `auto` follows the model's width and the method."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after warm-up, to zero."""
    warmup: Fraction = 0.05
    """Share of the steps that warm up linearly."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay (on matrices only)."""
    optimizer: Literal["adamw", "adamw-8bit", "adamw-bf16", "muon"] = "adamw"
    """`adamw`: fp32 states. `adamw-8bit`: states in 8 bits, 2 bytes a weight in place of 8. `adamw-bf16` (full only):
    bf16 weights without fp32 masters, rounded stochastically, 8-bit states. `muon` (full only): orthogonalised momentum
    for the layers' matrices, `adamw` for the rest, at the same learning rates."""
    beta1: Fraction = 0.9
    """AdamW: decay of the mean of gradients."""
    beta2: Fraction = 0.999
    """AdamW: decay of the mean of squared gradients."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW: added to the root of the second moment."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest gradient norm; null turns clipping off."""
    optimizer_in_backward: bool = False
    """Use each gradient for its weight's update as soon as the backward pass has made it, and drop it (full only): for
    models whose gradients do not fit together. A step is then one forward pass, nothing is clipped (`clip_norm: null`),
    and a gradient that is not finite, or no memory left, ends the run. Changes memory, never the result."""
    seed: Seed = 0
    """Seed of adapter weights, row order and dropout."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Compute precision; `auto` is bf16 where the hardware has it, else fp32 on a CPU and fp16 on a GPU."""
    compile: bool | Auto = "auto"
    """Compile the model's blocks, on a GPU; `auto` does if the training is long enough to repay a minute of compiling.
    Never changes the result, up to rounding."""
    evaluate_every: PositiveInt | Literal["epoch", "never"] = "epoch"
    """Steps between validation losses."""
    keep_best: bool = True
    """End with the weights of the lowest validation loss seen."""
    save_every: PositiveInt | Literal["epoch", "never"] = "epoch"
    """Steps between checkpoints. A signal always saves one."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept, newest first."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Where steps are logged besides `steps.jsonl`."""


METRICS = (
    "nll",
    "exact_match",
    "token_f1",
    "rouge_l",
    "json_valid",
    "json_schema",
    "json_fields",
    "choice_accuracy",
)
MetricName = Literal[
    "exact_match", "token_f1", "rouge_l", "json_valid", "json_schema", "json_fields", "choice_accuracy"
]


class SamplingSpec(Spec):
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens that holds this probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k likeliest tokens; 0 keeps all."""
    seed: Seed = 0
    """Seed of sampling; each prompt draws from its own stream."""


class JudgeSpec(Spec):
    """A language model that says which of two answers is better, behind any endpoint of OpenAI's shape."""

    endpoint: str
    """Its URL, as a rule up to `/v1`."""
    model: str
    """Its name there."""
    key_name: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; unset sends none."""
    max_rows: PositiveInt = 200
    """Test rows whose answers it compares, two requests each."""
    parallel: PositiveInt = 8
    """Requests at a time."""


class EvaluateSpec(Spec):
    metrics: list[MetricName] | Auto = "auto"
    """Metrics of generated answers; `auto` picks the JSON metrics when the answers are JSON. An answer's reasoning, up
    to and including the last `</think>`, is cut before it is measured, unless the true answer has some too."""
    max_new_tokens: PositiveInt = 256
    """Longest generated answer; how often it is reached is reported."""
    sampling: SamplingSpec = SamplingSpec()
    """How answers are drawn; greedy by default."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute precision of the judge, the same for every arm; `auto` as in training. Whatever it is, scores do not
    depend on the batch."""
    max_rows: PositiveInt | None = None
    """Score only the first rows of the test split."""
    shots: PositiveInt = 4
    """Examples in the prompt of the few-shot arm, drawn from train with the arm's seed."""
    retrieved: PositiveInt = 4
    """Examples or passages in the prompt of retrieval arms."""
    documents: str | None = None
    """Folder of .txt/.md documents for retrieval; default: the training rows."""
    schema_file: str | None = None
    """JSON Schema that answers must match (metric json_schema)."""
    general: str | None = None
    """Held-out general text (.txt or .jsonl with `text`) for the forgetting measure; default: the bundled text."""
    forgetting: bool = True
    """Measure loss on general text before and after, and KL from the base."""
    preferences: str | None = None
    """Held-out pairs of a chosen and a rejected answer: file, folder (its test split), bundled name or hub id. Adds
    the metrics `preference_accuracy`, the share of pairs whose chosen answer an arm finds likelier per token, and
    `preference_margin`, by how many nats more than the arm it starts from."""
    rewards: list[str | RewardTerm] = []
    """What generated answers are worth, as in `objective.rewards`. Adds the metric `reward`, their weighted sum."""

    judge: JudgeSpec | None = None
    """Adds the measure `win_rate`: how often a judge prefers an arm's answer over that of the arm it starts from, else
    over zero-shot's. Each pair is shown in both orders; preferred in one order only is a tie. It reads the test rows'
    questions and the answers; never the true ones."""

    @property
    def reward_terms(self) -> list[RewardTerm]:
        return as_reward_terms(self.rewards)


PROMPTED = ("zero-shot", "few-shot", "rag")
TRAINED = ("full", "lora", "qlora")
ARM_NAMES = (*PROMPTED, *TRAINED, *(f"{method}+rag" for method in TRAINED))


def _check_arm_name(text: str) -> str:
    name = text.strip().lower()
    if name in ARM_NAMES:
        return text
    near = difflib.get_close_matches(name.replace("_", "-"), ARM_NAMES, n=1, cutoff=0.5)
    guess = f". Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"unknown arm {text!r}; arms are {', '.join(ARM_NAMES)}, or a mapping with `method:`{guess}"
    )


def _check_seeds(seeds: list[int]) -> list[int]:
    for index, seed in enumerate(seeds):
        if seed in seeds[:index]:
            raise ValueError(f"seed {seed} appears twice; each seed is one independent run, remove one")
    return seeds


class ArmDataSpec(Spec):
    """Training rows of one arm. Template, tokens and all else are the job's."""

    train: str | list[str | SourceSpec] | SourceSpec
    """Training rows: one source, or a list that mixes sources by weight. None of their questions may be among the test
    rows."""
    validation: Fraction | str = "auto"
    """Share of rows, or a source, as in `data.split`."""
    max_tokens: PositiveInt | None = None
    """Longest row in tokens; default: the job's."""


class ArmSpec(Spec):
    """One thing to compare. A bare string names it: `zero-shot`, `few-shot`, `rag`, `full`, `lora`, `qlora`, or a
    trained arm with retrieval, `lora+rag`."""

    name: str | None = None
    """Name in tables; default: made from the rest."""
    method: Literal["zero-shot", "few-shot", "rag"] | MethodSpec | Literal["full", "lora", "qlora"]
    """A way of prompting, or a training method by name or with its settings."""
    framework: Framework = "tunesmith"
    """Who trains it: our own engine, or a framework in its own environment (`tunesmith frameworks`), which is handed
    the same token rows, order, first adapters and settings."""
    rag: bool = False
    """Answer with retrieved examples in the prompt."""
    quantize: Scheme | QuantizeSpec | None = None
    """Judge the model with its linear layers quantised, adapters folded in; embeddings and head stay. It shares the
    training of the same arm without. An arm with `qat` is always judged as it was trained for, and needs none."""
    learning_rate: Annotated[float, Field(gt=0)] | Auto | None = None
    """This arm's learning rate; default: the job's."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """This arm's epochs; default: the job's."""
    steps: PositiveInt | None = None
    """This arm's optimizer steps; default: the job's."""
    batch_rows: PositiveInt | None = None
    """This arm's rows per optimizer step; default: the job's."""
    objective: Objective | None = None
    """What it learns; default: `sft`. `reward` makes no model that answers, and is no arm."""
    data: ArmDataSpec | None = None
    """What it learns from; default: the job's rows, whose questions are the prompts of `grpo` and `ppo`."""
    starts_from: str | None = None
    """Name of an arm before it, whose weights of the same seed its training goes on from, with the same method. They
    are the reference of objectives that have one, and what the report holds this arm against."""

    @model_validator(mode="after")
    def _check_length(self) -> ArmSpec:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps both say how long to train; leave one out")
        return self


class TuneSpec(Spec):
    trials: Annotated[int, Field(ge=0)] = 0
    """Learning rates tried per trained arm, equally many for each, chosen on validation. 0 keeps the given ones."""
    factor: Annotated[float, Field(gt=1)] = 2.0
    """Ratio between neighbouring learning rates, around each arm's own prior."""


class CompareSpec(Spec):
    arms: Annotated[list[Annotated[str, AfterValidator(_check_arm_name)] | ArmSpec], Field(min_length=1)] = [
        "zero-shot",
        "few-shot",
        "rag",
        "lora",
        "full",
    ]
    """What is compared: names, or mappings with settings."""
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_check_seeds)] = [0, 1, 2]
    """Paired: the same seeds, row order and initial adapters for every arm."""
    metric: MetricName | Literal["nll", "reward", "preference_accuracy"] = "exact_match"
    """Declared before the run; verdicts rest on it alone. nll ranks trained arms only."""
    track: Literal["tokens", "native"] = "tokens"
    """What other frameworks train on: `tokens`, our own rows; `native`, what their own preprocessing makes of the raw
    rows with settings that say the same as this job. How that differs is then reported row by row."""
    tune: TuneSpec = TuneSpec()
    """Learning-rate search, equal for every trained arm."""
    samples: bool = True
    """Show rows, answers and ends of logs in the report; `false` leaves them out of it and of the JSON beside it, so
    that it can be published where the rows may not. Changed later, it trains and scores nothing again."""
    parallel: PositiveInt | Auto = "auto"
    """Arms at a time. `auto`: one per core on a CPU (one thread each), one on a GPU."""


class Job(Spec):
    model: str | ModelSpec
    """Base model: bundled name, folder, or hub id."""
    data: DataSpec
    """Rows, splits, lengths, template."""
    method: Literal["full", "lora", "qlora"] | MethodSpec = "lora"
    """`full`, `lora` or `qlora`, or a mapping with its settings."""
    objective: Objective = "sft"
    """What is learned: `sft`, `dpo`, `orpo`, `simpo`, `kto` or `reward`, or a mapping with its settings, which
    `distill`, `grpo` and `ppo` need."""
    train: TrainSpec = TrainSpec()
    """Steps, learning rate, precision, checkpoints."""
    evaluate: EvaluateSpec = EvaluateSpec()
    """What the judge measures, and how prompted arms are prompted."""
    compare: CompareSpec = CompareSpec()
    """Arms, seeds, the metric that decides."""

    @property
    def model_spec(self) -> ModelSpec:
        return ModelSpec(name=self.model) if isinstance(self.model, str) else self.model

    @property
    def method_spec(self) -> FullSpec | LoraSpec:
        return as_method_spec(self.method)

    @property
    def objective_spec(self) -> ObjectiveSpec:
        return as_objective_spec(self.objective)

    @model_validator(mode="after")
    def _check_stream(self) -> Job:
        if self.data.streaming and kind_of_rows(self.objective) != "answers":
            name = self.objective_spec.name
            raise ValueError(
                f"data.streaming is of objectives sft and distill; {name} reads its rows whole: leave it out"
            )
        return self


def as_method_spec(method: Any) -> FullSpec | LoraSpec:
    """The full spec of a method given by name or as a spec."""
    if isinstance(method, FullSpec | LoraSpec):
        return method
    return FullSpec(name="full") if method == "full" else LoraSpec(name=method)


def as_source_specs(train: str | SourceSpec | list[str | SourceSpec]) -> list[SourceSpec]:
    """The sources of a `data.train` value, in order."""
    items = train if isinstance(train, list) else [train]
    return [SourceSpec(path=item) if isinstance(item, str) else item for item in items]

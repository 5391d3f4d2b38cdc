"""What each framework can express: every feature is a small job, and every framework's `can` is asked about it."""

from __future__ import annotations

import json
from typing import Any

from tunesmith.core.errors import JobError
from tunesmith.core.frameworks import Answer, Feature, Matrix
from tunesmith.frameworks.catalog import FRAMEWORKS
from tunesmith.frameworks.ports import PORTS
from tunesmith.job.combinations import check_in_backward, check_optimizer
from tunesmith.job.load import job_from
from tunesmith.job.spec import Job

OWN = "tunesmith"
_LORA = "lora"


def _lora(**settings: Any) -> dict[str, Any]:
    return {"method": {"name": _LORA, **settings}}


def _full(**train: Any) -> dict[str, Any]:
    return {"method": "full", "train": train}


def _train(**settings: Any) -> dict[str, Any]:
    return {"train": settings}


# What a job file can say about a training; a row is what it says beyond the smallest job.
FEATURES: dict[str, dict[str, dict[str, Any]]] = {
    "Method": {
        "Full fine-tuning": {"method": "full"},
        "LoRA": {"method": _LORA},
        "QLoRA": {"method": "qlora"},
        "DoRA": _lora(dora=True),
        "DoRA with weight decay": _lora(dora=True) | _train(weight_decay=0.1),
        "rsLoRA": _lora(rslora=True),
        "Dropout on adapters": _lora(dropout=0.1),
        "Adapters on chosen layers": _lora(targets=["q_proj", "v_proj"]),
        "Layers by a longer name": _lora(targets=["mlp.down_proj"]),
        "A fractional alpha": _lora(alpha=22.5),
        "Going on from an adapter": _lora(adapter="runs/first/adapter"),
        "Modules trained whole": _lora(modules_to_save=["lm_head"]),
        "New tokens": _lora(new_tokens=["<order>"]),
    },
    "Stored base": {
        "nf4 base, scales in fp32": {"method": {"name": "qlora", "double_quant": False}},
        "nf4 base, DoRA": {"method": {"name": "qlora", "dora": True}},
        "int8 base": _lora(base="int8"),
        "fp8 base": _lora(base="fp8"),
        "nf4 base, products in fp8": {"method": {"name": "qlora", "compute": "fp8"}},
    },
    "Training for quantisation": {
        "QAT, int4, full": {"method": {"name": "full", "qat": "int4"}},
        "QAT, int4, LoRA": _lora(qat="int4"),
        "QAT, int8 activations": _lora(qat="int8-int4"),
    },
    "Optimizer": {
        "8-bit AdamW, LoRA": {"method": _LORA} | _train(optimizer="adamw-8bit"),
        "8-bit AdamW, full": _full(optimizer="adamw-8bit"),
        "AdamW on bf16 weights": _full(optimizer="adamw-bf16"),
        "Muon": _full(optimizer="muon"),
        "Updates in the backward pass": _full(optimizer_in_backward=True, clip_norm=None),
        "Weight decay": _train(weight_decay=0.1),
        "Other betas and epsilon": _train(beta1=0.8, beta2=0.95, epsilon=1e-6),
        "No clipping": _train(clip_norm=None),
    },
    "Objective": {
        "Distillation": {"objective": {"name": "distill", "teacher": "tunesmith/tiny"}},
        "DPO": {"objective": "dpo"},
        "ORPO": {"objective": "orpo"},
        "SimPO": {"objective": "simpo"},
        "KTO": {"objective": "kto"},
        "Reward model": {"objective": "reward"},
        "GRPO": {"objective": {"name": "grpo", "rewards": ["exact_match"]}},
        "PPO": {"objective": {"name": "ppo", "rewards": ["exact_match"]}},
    },
    "Precision": {
        f"{precision}, {name}": {"method": method} | _train(precision=precision)
        for precision in ("fp32", "bf16", "fp16")
        for method, name in ((_LORA, "LoRA"), ("full", "full"))
    },
    "Schedule": {
        "Cosine": _train(schedule="cosine"),
        "Linear": _train(schedule="linear"),
        "Constant after warm-up": _train(schedule="constant", warmup=0.1),
        "A number of steps": _train(steps=100),
        "Part of an epoch": _train(epochs=0.5),
    },
    "Rows": {
        "Streaming": {"data": {"streaming": True, "split": {"validation": "v.jsonl", "test": "t.jsonl"}}},
        "Long rows cut": {"data": {"max_tokens": 512, "too_long": "truncate"}},
        "A template of one's own": {"data": {"template": "chatml"}},
        "Tokens of a forward pass": _train(micro_batch_tokens=4096),
    },
    "Running": {
        "Compiled blocks": _train(compile=True),
        "A memory limit": _train(memory_limit="10GiB"),
        "Validation every few steps": _train(evaluate_every=50),
        "Keeping the best weights": _train(keep_best=True),
        "TensorBoard": _train(trackers=["tensorboard"]),
        "Weights & Biases": _train(trackers=["wandb"]),
        "MLflow": _train(trackers=["mlflow"]),
    },
}
_SMALLEST: dict[str, Any] = {"model": "tunesmith/tiny", "data": {"train": "rows.jsonl"}}


def ask_all() -> Matrix:
    """Every framework that has an adapter, and our own engine, asked about every feature."""
    titles = {OWN: "Tunesmith"} | {name: FRAMEWORKS[name].title for name in PORTS if name in FRAMEWORKS}
    features = tuple(
        Feature(group, title, show_setting(settings), {name: _ask(name, settings) for name in titles})
        for group, rows in FEATURES.items()
        for title, settings in rows.items()
    )
    return Matrix(titles, features)


def show_setting(settings: dict[str, Any]) -> str:
    """As a line of a job file: `method: {name: lora, dora: true}`."""
    return ", ".join(f"{key}: {_show(value)}" for key, value in settings.items())


def _show(value: Any) -> str:
    if isinstance(value, dict):
        pairs: dict[str, Any] = {**value}
        return "{" + ", ".join(f"{key}: {_show(item)}" for key, item in pairs.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def make_job(settings: dict[str, Any]) -> Job:
    """The smallest job with these settings."""
    data = _SMALLEST["data"] | settings.get("data", {})
    return job_from(_SMALLEST | settings | {"data": data})


def _ask(framework: str, settings: dict[str, Any]) -> Answer:
    job = make_job(settings)
    if framework == OWN:
        try:
            check_optimizer(job.train, job.method_spec, place="train")
            check_in_backward(job.train, job.method_spec, place="train")
        except JobError as error:
            return Answer(error.finding, error.cure)
        return Answer()
    reason = PORTS[framework].can(job)
    return Answer() if reason is None else Answer(reason.finding, reason.cure)


def render_matrix(matrix: Matrix) -> str:
    """`docs/frameworks-matrix.md`."""
    names = list(matrix.frameworks)
    lines = [
        "# What each framework can express",
        "",
        "Made by `tunesmith frameworks matrix --markdown`, which asks every framework's adapter about a small job per",
        "row; do not edit by hand. Rows are what a job file can say; what a framework does beyond that is not in here.",
        "",
        "A dash: an arm that asks for it is refused before anything runs, and the reason is below. The framework lacks",
        "it, or does it otherwise than our engine, so that two different things would be compared, or our adapter does",
        "not say it yet.",
        "",
        f"| | a job says | {' | '.join(matrix.frameworks.values())} |",
        f"|---|---|{'|'.join(':---:' for _ in names)}|",
    ]
    group = ""
    for row in matrix.features:
        if row.group != group:
            group = row.group
            lines.append(f"| **{group}** | |{' |' * len(names)}")
        marks = ("yes" if row.answers[name].can else "–" for name in names)
        lines.append(f"| {row.title} | `{row.setting}` | {' | '.join(marks)} |")
    for name in names:
        if missing := matrix.missing(name):
            lines += ["", f"## {matrix.frameworks[name]}", ""]
            lines += [
                f"- {row.title}: {row.answers[name].finding}. {row.answers[name].cure}." for row in missing
            ]
    return "\n".join(lines) + "\n"

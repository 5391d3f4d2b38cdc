"""What is measured: shapes, and cases with our job, the peer's settings and the bar. Data only.

A case says nothing about how it is run: the parent (gpu.py) reads it, the contenders get it as JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Who = Literal["ours", "unsloth", "trl", "trl-dpo", "trl-grpo"]


@dataclass(frozen=True)
class Shape:
    """A model's `config.json` without its defaults. Weights are random, seeded by name."""

    config: dict[str, Any]

    def shortened(self, layers: int = 2) -> Shape:
        """The same widths with fewer layers: small enough for a reference in fp32."""
        return Shape({**self.config, "num_hidden_layers": min(layers, self.config["num_hidden_layers"])})


_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
_QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6}
SHAPES = {
    "llama-8b": Shape(
        _LLAMA
        | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
        | {"rope_theta": 500000.0, "tie_word_embeddings": False}
    ),
    "qwen-1.5b": Shape(
        _QWEN2
        | {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
        | {"num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768}
        | {"rope_theta": 1000000.0, "tie_word_embeddings": True}
    ),
    "qwen-0.5b": Shape(
        _QWEN2
        | {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
        | {"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768}
        | {"rope_theta": 1000000.0, "tie_word_embeddings": True}
    ),
    # For trying every path in seconds (gpu_smoke.py), and the harness on a GPU.
    "smoke": Shape(
        _LLAMA
        | {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2}
        | {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096}
        | {"rope_theta": 500000.0, "tie_word_embeddings": False}
    ),
    # For trying the harness on a CPU.
    "tiny": Shape(
        _LLAMA
        | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
        | {"rope_theta": 10000.0, "tie_word_embeddings": False}
    ),
}


@dataclass(frozen=True)
class Rows:
    """Training rows. kind "full": random ids, every row `tokens` long, all but the first token trained; "real": the
    rendered rows given with --rows, of their own lengths, answers trained; "pairs": random ids, rows of `tokens` tokens
    two by two, of which the first half is the same, a prompt, and the second the chosen and the rejected answer;
    "prompts": random text of `tokens` tokens, to be answered."""

    kind: Literal["full", "real", "pairs", "prompts"] = "full"
    tokens: int = 2048

    @property
    def per_example(self) -> int:
        """Rows of what a step counts."""
        return 2 if self.kind == "pairs" else 1


@dataclass(frozen=True)
class Peer:
    """Who we are measured against, and its settings. With several, `--tune` finds the fastest on the machine.

    unsloth: four_bit, checkpointing (False, True or "unsloth"), padding_free.
    trl:     `sft` (arguments of SFTConfig), `micro_rows` (rows of a forward pass), `weights` (dtype of the model).
    trl-dpo, trl-grpo: the same with `config` (arguments of DPOConfig, GRPOConfig), and pairs or answers for rows.
    """

    who: Who
    label: str
    settings: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    what:      the row's name for people.
    base:      how the frozen weights are stored: "bf16", "fp8" (ours only; the peer has bf16) or "nf4".
    method:    "lora" or "full".
    job:       keys of our job beyond those that all cases share (tasks.make_job).
    limit_gib: peak that we must stay within; the peer's is what it is.
    bar:       least ratio of our speed to the peer's; for measure "start", greatest ratio of our seconds. None: no bar.
    together:  all processes stay alive, and only the one that is measured holds more than its weights. Else they
               are started anew for every round.
    objective: what is learned. With "grpo" a step is a rollout of `batch_rows` prompts with `SAMPLES` answers each of
               `NEW_TOKENS` tokens, sampled, judged and trained on; speeds count answers, and no gradients are compared.
    steps, warm_up: steps of a round, and before the first one (of each process). Rows of many lengths need more: both
               sides compile for shapes they have not seen.
    """

    name: str
    what: str
    shape: str
    peer: Peer
    bar: float | None
    job: dict[str, Any] = field(default_factory=dict[str, Any])
    method: Literal["lora", "full"] = "lora"
    base: Literal["bf16", "fp8", "nf4"] = "bf16"
    compute: Literal["bf16", "fp8"] = "bf16"
    rows: Rows = Rows()
    batch_rows: int = 8
    limit_gib: float | None = None
    together: bool = True
    measure: Literal["speed", "start"] = "speed"
    objective: Literal["sft", "dpo", "grpo"] = "sft"
    steps: int = 6
    warm_up: int = 4

    @property
    def unit(self) -> str:
        """What speeds count."""
        return "answers" if self.objective == "grpo" else "tokens"


# Of each prompt that a model answers, and of each answer.
SAMPLES, NEW_TOKENS = 8, 256

FREE = Peer("unsloth", "Unsloth, no recompute", {"no recompute": {"checkpointing": False}})
DEFAULT = Peer("unsloth", "Unsloth, its default", {"default": {"checkpointing": "unsloth"}})
QLORA = Peer(
    "unsloth", "Unsloth QLoRA, its default", {"default": {"checkpointing": "unsloth", "four_bit": True}}
)
PADDING_FREE = Peer(
    "unsloth", "Unsloth, padding-free", {"padding-free": {"checkpointing": False, "padding_free": True}}
)

_QUIET = {"logging_strategy": "no", "disable_tqdm": True, "bf16": True, "gradient_checkpointing": False}
_FUSED = {**_QUIET, "optim": "adamw_torch_fused"}
_PADDING_FREE = {**_FUSED, "padding_free": True, "max_length": None}
_8BIT = {**_QUIET, "optim": "adamw_bnb_8bit"}
_CHECKPOINTED = {"gradient_checkpointing": True}
TRL_REAL = Peer(
    "trl",
    "TRL",
    {
        "padding-free": {"sft": _PADDING_FREE, "micro_rows": 32},
        "padded": {"sft": _FUSED, "micro_rows": 32},
        "padded, Liger": {"sft": {**_FUSED, "use_liger_kernel": True}, "micro_rows": 32},
        "padding-free, Liger": {"sft": {**_PADDING_FREE, "use_liger_kernel": True}, "micro_rows": 32},
    },
)
TRL_FULL_8B = Peer(
    "trl",
    "TRL",
    {
        "chunked loss, 2 rows": {"sft": _8BIT, "micro_rows": 2, "weights": "bfloat16"},
        "Liger, 4 rows": {"sft": {**_8BIT, "use_liger_kernel": True}, "micro_rows": 4, "weights": "bfloat16"},
        "chunked loss, 4 rows": {"sft": _8BIT, "micro_rows": 4, "weights": "bfloat16"},
        "chunked loss, 2 rows, torchao": {
            "sft": {**_8BIT, "optim": "adamw_torch_8bit"},
            "micro_rows": 2,
            "weights": "bfloat16",
        },
        "Liger, 8 rows, recompute": {
            "sft": {**_8BIT, **_CHECKPOINTED, "use_liger_kernel": True},
            "micro_rows": 8,
            "weights": "bfloat16",
        },
    },
)
TRL_FULL_MASTERS = Peer(
    "trl",
    "TRL",
    {
        "chunked loss, 8 rows": {"sft": _FUSED, "micro_rows": 8, "weights": "float32"},
        "Liger, 8 rows": {
            "sft": {**_FUSED, "use_liger_kernel": True},
            "micro_rows": 8,
            "weights": "float32",
        },
    },
)

_ONCE = {**_FUSED, "precompute_ref_log_probs": True}
_IN_STEPS = {**_FUSED, "precompute_ref_log_probs": False}
# `padding_free` is switched off in TRL's DPOTrainer (1.15, 1.16).
TRL_DPO = Peer(
    "trl-dpo",
    "TRL, best settings",
    {
        "reference once, 8 pairs": {"config": _ONCE, "micro_rows": 8},
        "reference once, 16 pairs": {"config": _ONCE, "micro_rows": 16},
        "reference once, 4 pairs": {"config": _ONCE, "micro_rows": 4},
        "reference once, 32 pairs": {"config": _ONCE, "micro_rows": 32},
        "reference once, 16 pairs, Liger": {"config": {**_ONCE, "use_liger_kernel": True}, "micro_rows": 16},
        "reference in every step, 16 pairs": {"config": _IN_STEPS, "micro_rows": 16},
    },
)
TRL_GRPO = Peer(
    "trl-grpo",
    "TRL without vLLM, best settings",
    {
        "32 answers": {"config": _FUSED, "micro_rows": 32},
        "64 answers": {"config": _FUSED, "micro_rows": 64},
        "32 answers, static cache": {
            "config": {**_FUSED, "cache_implementation": "static"},
            "micro_rows": 32,
        },
        "32 answers, continuous batching": {
            "config": {**_FUSED, "use_transformers_continuous_batching": True},
            "micro_rows": 32,
        },
        "32 answers, Liger": {"config": {**_FUSED, "use_liger_kernel": True}, "micro_rows": 32},
    },
)

_BF16 = {"train": {"compile": True}}
_FP8 = {"method": {"base": "fp8"}, **_BF16}
_LIMIT_LORA, _LIMIT_QLORA = 19.7, 10.1


def _within(job: dict[str, Any], gib: float) -> dict[str, Any]:
    return {**job, "train": {**job.get("train", {}), "memory_limit": f"{gib}GiB"}}


CASES = {
    case.name: case
    for case in (
        Case("lora-bf16", "LoRA, bf16, memory free", "llama-8b", FREE, 1.06, _BF16),
        Case("lora-fp8", "LoRA, fp8 base, memory free", "llama-8b", FREE, 1.45, _FP8, base="fp8"),
        Case(
            "lora-bf16-limit",
            "LoRA, bf16, within 19.7 GiB",
            "llama-8b",
            DEFAULT,
            1.05,
            _within(_BF16, _LIMIT_LORA),
            limit_gib=_LIMIT_LORA,
        ),
        Case(
            "lora-fp8-limit",
            "LoRA, fp8 base, within 19.7 GiB",
            "llama-8b",
            DEFAULT,
            1.45,
            _within(_FP8, _LIMIT_LORA),
            base="fp8",
            limit_gib=_LIMIT_LORA,
        ),
        Case(
            "qlora-limit",
            "QLoRA, computing in bf16, within 10.1 GiB",
            "llama-8b",
            QLORA,
            1.05,
            _within({"method": {"name": "qlora"}, **_BF16}, _LIMIT_QLORA),
            base="nf4",
            limit_gib=_LIMIT_QLORA,
        ),
        Case(
            "qlora-fp8-limit",
            "QLoRA, computing in fp8, within 10.1 GiB",
            "llama-8b",
            QLORA,
            1.3,
            _within({"method": {"name": "qlora", "compute": "fp8"}, **_BF16}, _LIMIT_QLORA),
            base="nf4",
            compute="fp8",
            limit_gib=_LIMIT_QLORA,
        ),
        Case(
            "full-8b",
            "full fine-tuning, 8B, bf16 weights, 8-bit AdamW",
            "llama-8b",
            TRL_FULL_8B,
            1.4,
            {"method": {"name": "full"}, "train": {"compile": True, "optimizer": "adamw-bf16"}},
            method="full",
            together=False,
            warm_up=2,
        ),
        Case(
            "full-1.5b",
            "full fine-tuning, 1.5B, fp32 masters",
            "qwen-1.5b",
            TRL_FULL_MASTERS,
            None,
            {"method": {"name": "full"}, **_BF16},
            method="full",
            steps=8,
        ),
        Case(
            "real-lengths",
            "LoRA, bf16, real lengths (dolly, 32 rows a step)",
            "llama-8b",
            PADDING_FREE,
            1.3,
            _BF16,
            rows=Rows("real"),
            batch_rows=32,
            steps=30,
            warm_up=36,
        ),
        Case(
            "real-lengths-trl",
            "LoRA, bf16, real lengths (dolly, 32 rows a step)",
            "llama-8b",
            TRL_REAL,
            3.0,
            _BF16,
            rows=Rows("real"),
            batch_rows=32,
            steps=30,
            warm_up=36,
        ),
        Case(
            "lora-0.5b", "LoRA, bf16, Qwen2.5-0.5B shape", "qwen-0.5b", FREE, 1.3, _BF16, steps=20, warm_up=8
        ),
        Case(
            "lora-1.5b", "LoRA, bf16, Qwen2.5-1.5B shape", "qwen-1.5b", FREE, 1.3, _BF16, steps=20, warm_up=8
        ),
        Case(
            "dpo-1.5b",
            "DPO, LoRA, bf16, Qwen2.5-1.5B shape (32 pairs a step, 256 + 256 tokens)",
            "qwen-1.5b",
            TRL_DPO,
            1.5,
            _BF16,
            rows=Rows("pairs", 512),
            batch_rows=32,
            objective="dpo",
        ),
        Case(
            "grpo-1.5b",
            "GRPO, LoRA, bf16, Qwen2.5-1.5B shape (16 prompts of 200 tokens, 8 answers of 256)",
            "qwen-1.5b",
            TRL_GRPO,
            1.5,
            _BF16,
            rows=Rows("prompts", 200),
            batch_rows=16,
            objective="grpo",
            steps=3,
            warm_up=3,
        ),
        Case(
            "first-step",
            "from starting the process to the end of the first step, warm cache",
            "llama-8b",
            FREE,
            0.5,
            _BF16,
            together=False,
            measure="start",
            steps=1,
            warm_up=1,
        ),
    )
}

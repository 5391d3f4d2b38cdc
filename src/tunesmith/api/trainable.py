"""What a job trains, made ready: its tokenizer, its model with what learns made trainable, its batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.api.fp8_check import Fp8Check
from tunesmith.core.errors import SetupError
from tunesmith.data.examples import flatten
from tunesmith.data.prepare import Prepared
from tunesmith.data.tokenizer import Tokenizer, load_tokenizer
from tunesmith.job.spec import Job, LoraSpec

if TYPE_CHECKING:
    import torch

    from tunesmith.models.causal_lm import CausalLM

# Micro-batches are filled up to a multiple of this many tokens: at most a few percent more work, far fewer shapes.
ROUND_TOKENS = 128


def load_job_tokenizer(job: Job, folder: Path) -> Tokenizer:
    """The base model's tokenizer, with the tokens that the job adds."""
    tokenizer = load_tokenizer(folder)
    if isinstance(job.method_spec, LoraSpec) and job.method_spec.new_tokens:
        tokenizer.add_tokens(job.method_spec.new_tokens)
    return tokenizer


def load_trainable(
    job: Job,
    folder: Path,
    tokenizer: Tokenizer,
    device: torch.device,
    dtype: torch.dtype,
    *,
    fp8_check: Fp8Check | None = None,
    own_decoder: bool = True,
) -> CausalLM:
    """The base model with what the job's method trains made trainable, rounding as QAT asks.

    fp8_check: measures the base on the way. own_decoder: False runs it through transformers' modules.
    """
    from tunesmith.models.config import load_config
    from tunesmith.models.load import load_model
    from tunesmith.models.lora import add_lora

    method, objective = job.method_spec, job.objective_spec.name
    # A reward model may go on from another one.
    classifier = objective == "reward" and load_config(folder).is_classifier
    if isinstance(method, LoraSpec):
        model = load_model(
            folder,
            device=device,
            dtype=dtype,
            base=method.storage,
            double_quant=method.double_quant,
            compute=method.compute,
            on_reference=fp8_check.measure_reference if fp8_check else None,
            own_decoder=own_decoder,
            classifier=classifier,
        )
        if fp8_check:
            fp8_check.measure(model)
        num_tokens = tokenizer.vocab_size if method.new_tokens else None
        add_lora(model, method, seed=job.train.seed, num_tokens=num_tokens)
    else:
        masters = pick_master_dtype(job, dtype)
        model = load_model(
            folder,
            device=device,
            dtype=dtype,
            trainable=True,
            master_dtype=masters,
            own_decoder=own_decoder,
            classifier=classifier,
        )
    if objective in ("reward", "ppo") and model.score is None:
        model.add_score()
    if method.qat_spec:
        from tunesmith.models.quantize import fake_quantize_model

        fake_quantize_model(model, method.qat_spec)
    return model


def pick_master_dtype(job: Job, dtype: torch.dtype) -> torch.dtype:
    """What full fine-tuning keeps its weights in. Raises SetupError where `auto` turned out to be fp16."""
    import torch

    if job.train.optimizer != "adamw-bf16":
        return torch.float32
    if dtype == torch.float16:
        raise SetupError(
            "train.precision",
            "auto is fp16 on this GPU, and train.optimizer is adamw-bf16",
            rule="fp16 cannot hold every bf16 weight",
            cure="Use precision: fp32, or another optimizer",
        )
    return torch.bfloat16


def shares_prefix(job: Job, device: torch.device) -> bool:
    """Whether what all rows of a step begin with is computed once. Dropout draws anew for every row."""
    method = job.method_spec
    return device.type == "cpu" and not (isinstance(method, LoraSpec) and method.dropout)


def make_training_batch(job: Job, device: torch.device) -> Any:
    """(examples, device) -> batch, as the job trains it."""
    from tunesmith.models.layout import make_batch

    share = shares_prefix(job, device)
    return lambda examples, where: make_batch(
        flatten(examples), device=where, round_tokens=ROUND_TOKENS, share_prefix=share
    )


def training_lengths(job: Job, prepared: Prepared) -> Sequence[int]:
    """Tokens of every training example. Those of a stream are not known: a typical step with one row of the longest."""
    if not job.data.streaming:
        return prepared.examples("train").lengths
    longest = job.data.max_tokens
    return [longest, *[max(1, longest // 2)] * (job.train.batch_rows - 1)]

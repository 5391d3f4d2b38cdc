"""The teacher of a distillation: found and looked at before any data is read, loaded beside the student."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.api.evaluation import Target, check_target, find_target, load_target
from tunesmith.api.fingerprints import fingerprint_model
from tunesmith.api.trainable import load_job_tokenizer
from tunesmith.core.errors import ModelError, TunesmithError
from tunesmith.core.fingerprint import hash_file, hash_text
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.job.objective import DistillSpec
from tunesmith.job.spec import Job
from tunesmith.models.config import load_config
from tunesmith.models.headers import find_tensors

if TYPE_CHECKING:
    from tunesmith.methods.distill import Teacher

_PLACE = "objective.teacher"


def check_teacher(job: Job, student_folder: Path) -> Target:
    """What the job's teacher is loaded from.

    Raises ModelError, by headers alone, if its files are unsound or its tokens are others than the student's.
    """
    assert isinstance(job.objective_spec, DistillSpec)
    try:
        target = find_target(job.objective_spec.teacher)
        tokenizer = check_target(target)
    except TunesmithError as error:
        raise ModelError(
            f"{_PLACE}: {error.place}", error.finding, rule=error.rule, cure=error.cure
        ) from None
    if load_config(_weights_folder(target)).is_classifier:
        raise ModelError(
            _PLACE,
            f"{target.model_name} is a sequence classifier",
            rule="a teacher predicts tokens",
            cure="Name a language model",
        )
    if tokenizer.vocabulary_sha256 != load_job_tokenizer(job, student_folder).vocabulary_sha256:
        raise ModelError(
            _PLACE,
            f"{job.objective_spec.teacher} has other tokens than the model that is trained",
            rule="distributions are compared token by token",
            cure="Take a teacher of the same family, or let it write the answers and learn them (tunesmith answer)",
        )
    return target


def open_teacher(job: Job, student_folder: Path, tokenizer: Tokenizer, lengths: Sequence[int]) -> Teacher:
    """The teacher, frozen, in the student's precision and on its device.

    lengths: tokens of the rows that it will read. Raises ModelError if one is beyond its context.
    """
    from tunesmith.methods.distill import Teacher

    target = check_teacher(job, student_folder)
    context, longest = load_config(_weights_folder(target)).max_positions, int(max(lengths))
    if context and longest > context:
        raise ModelError(
            _PLACE,
            f"reads {context} tokens, and a row has {longest}",
            rule="it reads the rows that are trained",
            cure=f"Set data.max_tokens: {context}",
        )
    return Teacher(
        load_target(target, precision=job.train.precision).requires_grad_(False), tokenizer.vocab_size
    )


def fingerprint_teacher(target: Target) -> str:
    """SHA-256 over all that decides what a teacher says."""
    parts = [fingerprint_model(_weights_folder(target), None)]
    if target.weights == "adapter" and target.weights_folder is not None:
        names = ("adapter_model.safetensors", "adapter_config.json")
        parts += [hash_file(target.weights_folder / name) for name in names]
    return hash_text("\n".join([*parts, target.storage, target.compute, repr(target.quantize)]))


def count_teacher_bytes(job: Job, student_folder: Path, *, value_bytes: int) -> int:
    """What the job's teacher takes of memory: its weights in the compute dtype; 0 without one."""
    if not isinstance(job.objective_spec, DistillSpec):
        return 0
    tensors = find_tensors(_weights_folder(check_teacher(job, student_folder))).values()
    return value_bytes * sum(math.prod(tensor.shape) for tensor in tensors)


def _weights_folder(target: Target) -> Path:
    """Where the whole matrices lie."""
    if target.weights == "model" and target.weights_folder is not None:
        return target.weights_folder
    return target.model_folder

"""From `train.optimizer` to the optimizer. Which combinations are refused is said in `job.combinations`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tunesmith.core.errors import TrainingFailed
from tunesmith.job.spec import TrainSpec
from tunesmith.training.low_bit_adamw import AdamW8bit, AdamWBf16
from tunesmith.training.muon import Muon
from tunesmith.training.optim import MasterAdamW, Optimizer
from tunesmith.training.step import TrainableModel, is_out_of_memory

# States of a weight, for the message when there is no memory for them.
_STATE_BYTES = {"adamw": 8, "adamw-8bit": 2, "adamw-bf16": 2, "muon": 4}


def make_optimizer(
    model: TrainableModel, named: Mapping[str, torch.nn.Parameter], spec: TrainSpec
) -> Optimizer:
    """The optimizer of `spec.optimizer` over `named`. Raises TrainingFailed if its states don't fit memory."""
    settings = {
        "beta1": spec.beta1,
        "beta2": spec.beta2,
        "epsilon": spec.epsilon,
        "weight_decay": spec.weight_decay,
    }
    try:
        if spec.optimizer == "muon":
            return Muon(named, matrices=model.named_matrices(), **settings)
        if spec.optimizer == "adamw-bf16":
            return AdamWBf16(named, seed=spec.seed, **settings)
        return (AdamW8bit if spec.optimizer == "adamw-8bit" else MasterAdamW)(named, **settings)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        count, each = sum(parameter.numel() for parameter in named.values()), _STATE_BYTES[spec.optimizer]
        cure = "Train fewer weights (method: lora or qlora), or a smaller model"
        raise TrainingFailed(
            "optimizer",
            f"out of memory for its states ({count:,} trained weights, {each} bytes each)",
            cure=cure if each == 2 else f"{cure}, or set train.optimizer: adamw-8bit",
        ) from None

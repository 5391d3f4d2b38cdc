"""How many steps a run takes, its learning rate at each of them, and the peak rate when the job says `auto`.

All are pure functions of numbers in the job, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]

# Tinker's rule (tinker-cookbook, hyperparam_utils): LoRA's rate is 5e-4 * (2000 / width) ** P, with P fitted per
# model family. Llama-3.1-8B (width 4096): 2.9e-4; a Qwen of the same width: 4.7e-4.
_LORA_RATE_AT_2000 = 5e-4
_WIDTH_POWER = {"qwen": 0.0775}
_DEFAULT_WIDTH_POWER = 0.781
# The rule was fitted on widths from about 1,000 up. Below, it is followed to this rate (reached at width 105) and no
# further: a toy model of width 16 would otherwise get 0.02.
_LARGEST_LORA_RATE = 5e-3
_FULL_OVER_LORA = 0.1
# Moving away from a checkpoint that already answers takes less than teaching it to: the preference papers and TRL train
# with a tenth of SFT's rates and below.
_OF_SFT = {"dpo": 0.1, "orpo": 0.1, "simpo": 0.1, "kto": 0.1}


def auto_learning_rate(
    hidden_size: int, *, method: str, family: str = "llama", objective: str = "sft"
) -> float:
    """Peak learning rate from the model's width, when the job does not give one.

    method: "full" gets a tenth of what adapters get ("lora", "qlora").
    family: the `model_type` of the model's config; Qwen models depend on width less than others.
    objective: preference objectives get a tenth of what SFT gets.
    Source: tinker-cookbook's hyperparameter rule; Schulman et al. 2025, "LoRA Without Regret", for the factor 10.
    """
    if hidden_size < 1:
        raise ValueError(f"hidden_size is {hidden_size}")
    power = next((p for name, p in _WIDTH_POWER.items() if family.startswith(name)), _DEFAULT_WIDTH_POWER)
    rate = min(_LORA_RATE_AT_2000 * (2000 / hidden_size) ** power, _LARGEST_LORA_RATE)
    rate *= _OF_SFT.get(objective, 1.0)
    return rate * _FULL_OVER_LORA if method == "full" else rate


def count_steps(*, epochs: float, steps: int | None, steps_per_epoch: int) -> int:
    """Optimizer steps of a run: `steps` if given, else whole steps that cover `epochs`, at least one.

    An epoch's last batch may be smaller than the others and is trained as its own step, so 10 rows in batches of 4
    are 3 steps an epoch and 1.5 epochs are 5 steps (4.5, rounded up).
    """
    if steps is not None:
        return steps
    # The tolerance keeps 0.1 * 30 = 3.0000000000000004 at three steps.
    return max(1, math.ceil(epochs * steps_per_epoch - 1e-9))


def count_warmup_steps(total_steps: int, *, warmup: float) -> int:
    """Warm-up steps: the share rounded down, so that a run of a few steps still learns from each."""
    return int(total_steps * warmup + 1e-9)


def learning_rate_at(
    step: int, *, total_steps: int, warmup_steps: int, peak: float, schedule: Schedule
) -> float:
    """Learning rate of step number `step`, counted from 0.

    Warm-up rises from 0 (the first step of a warm-up has rate 0), decay falls towards 0 (reached after the last
    step). This is the convention of the frameworks we compare with, so that all arms can share one schedule.
    With 4 steps, one of them warm-up, peak 1, linear: 0, 1, 2/3, 1/3.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * max(0.0, 1.0 - done)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

"""Ways of doing the job wrongly, each with the gates that must see it; and ways that are only different."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from cheating_framework import (
    BOS,
    EOS,
    PAD,
    ROWS,
    STEPS,
    TARGETS,
    TEST_ROWS,
    Row,
    Steps,
    Ways,
    cut_batches,
)


@dataclass(frozen=True)
class Fault:
    """gates: each of them must say FAIL. lies: what its record forges, see `forge`."""

    gates: str
    ways: dict[str, Any] = field(default_factory=dict)
    lies: str = ""


# --- what is done to rows ---------------------------------------------------------------------------------------------


def move_mask(by: int) -> Callable[[Row], Row]:
    def move(row: Row) -> Row:
        first = row.mask.index(True) + by
        return replace(row, mask=tuple(i >= first for i in range(len(row.ids))))

    return move


def shift_mask_left(row: Row) -> Row:
    """Begins and ends one token early, so that as many labels are trained."""
    return replace(row, mask=(*row.mask[1:], False))


def double_bos(row: Row) -> Row:
    return Row((BOS, *row.ids), (False, *row.mask))


def drop_eos(row: Row) -> Row:
    return Row(row.ids[:-1], row.mask[:-1])


def ignore_eos(row: Row) -> Row:
    return replace(row, mask=tuple(m and t != EOS for t, m in zip(row.ids, row.mask, strict=True)))


def train_prompt(row: Row) -> Row:
    return replace(row, mask=(False, *(True,) * (len(row.ids) - 1)))


def truncate(row: Row) -> Row:
    return Row(row.ids[:16], row.mask[:16])


def swap_answers(steps: Steps) -> Steps:
    """Every row gets the answer of the next one in its step."""
    swapped: Steps = []
    for rows in steps:
        cuts = [row.mask.index(True) for row in rows]
        answers = [row.ids[cut:] for row, cut in zip(rows, cuts, strict=True)]
        answers = answers[1:] + answers[:1]
        made: list[Row] = []
        for row, cut, answer in zip(rows, cuts, answers, strict=True):
            made.append(Row(row.ids[:cut] + answer, (False,) * cut + (True,) * len(answer)))
        swapped.append(made)
    return swapped


def take_others(first: int, last: int = STEPS) -> Callable[[Steps], Steps]:
    """Test rows instead of training rows in steps first..last, from 0."""
    other = cut_batches(TEST_ROWS)
    return lambda steps: [other[i] if first <= i <= last else rows for i, rows in enumerate(steps)]


def swap_rows(steps: Steps) -> Steps:
    """One row of step 9 for one of step 10; all else is as it should be."""
    moved = [list(rows) for rows in steps]
    moved[8][0], moved[9][0] = moved[9][0], moved[8][0]
    return moved


def shuffle(steps: Steps) -> Steps:
    order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(9)).tolist()
    return cut_batches([ROWS[i] for i in order])


def no_positions(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(mask)


def backward_positions(mask: torch.Tensor) -> torch.Tensor:
    """A formula for the other side of padding."""
    return mask.flip(1).cumsum(1).flip(1) - 1


def use_rmsprop(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups, lr=settings["lr"], alpha=settings["betas"][1], eps=settings["eps"])


FAULTS: dict[str, Fault] = {
    # --- tokens ---
    "padding is in the loss": Fault("tokens", {"label_pads": True}),
    "mask begins one token early": Fault("tokens", {"edit_row": move_mask(-1)}),
    "mask begins one token late": Fault("tokens", {"edit_row": move_mask(1)}),
    "mask is shifted as a whole": Fault("tokens", {"edit_row": shift_mask_left}),
    "BOS twice": Fault("tokens", {"edit_row": double_bos}),
    "EOS is missing": Fault("tokens", {"edit_row": drop_eos}),
    "EOS is not trained": Fault("tokens", {"edit_row": ignore_eos}),
    "EOS is the pad token and stripped": Fault("tokens", {"edit_row": drop_eos, "pad_id": EOS}),
    "prompt is in the loss": Fault("tokens", {"edit_row": train_prompt}),
    "long rows are truncated": Fault("tokens", {"edit_row": truncate}),
    "labels are shuffled": Fault("tokens", {"edit_steps": swap_answers}),
    "trains on the test rows": Fault("tokens", {"edit_steps": take_others(0)}),
    "trains on test rows in one step": Fault("tokens", {"edit_steps": take_others(12, 12)}),
    "order is shuffled": Fault("tokens", {"edit_steps": shuffle}),
    "two rows are in each other's step": Fault("tokens", {"edit_steps": swap_rows}),
    "last batch is dropped": Fault("tokens", {"edit_steps": lambda steps: steps[:-1]}),
    "last batch is filled up": Fault(
        "tokens", {"edit_steps": lambda steps: [*steps[:-1], steps[-1] + steps[0][:4]]}
    ),
    "a batch is repeated": Fault("tokens", {"edit_steps": lambda s: [*s[:5], s[4], *s[5:-1]]}),
    "half of each batch is skipped": Fault("tokens", {"edit_steps": lambda s: [rows[:4] for rows in s]}),
    # --- parameters ---
    "attention targets only": Fault("parameters", {"lora": {"target_modules": ["q_proj", "v_proj"]}}),
    "one layer is missing": Fault("parameters", {"lora": {"layers_to_transform": [0]}}),
    "head is adapted too": Fault("parameters", {"lora": {"target_modules": [*TARGETS, "lm_head"]}}),
    "other rank": Fault("parameters", {"lora": {"r": 4, "lora_alpha": 8}}),
    "adapters are bfloat16": Fault("parameters", {"adapter_dtype": torch.bfloat16}),
    "B is frozen": Fault("parameters", {"freeze": "lora_B"}),
    "norms are trained": Fault("parameters", {"also_train": "norm"}),
    "embedding is trained": Fault("parameters", {"also_train": "embed_tokens"}),
    "adapters are drawn from another distribution": Fault(
        "parameters", {"lora": {"init_lora_weights": "gaussian"}}
    ),
    "B does not begin at zero": Fault("parameters", {"lora": {"init_lora_weights": False}}),
    "products are in bfloat16": Fault("parameters loss gradient", {"autocast": True}),
    # --- loss ---
    "mean of means": Fault("loss", {"reduce": "means of micro-batches"}),
    "mean of rows": Fault("loss", {"reduce": "means of rows"}),
    "mean over all tokens": Fault("loss", {"reduce": "all tokens"}),
    "loss grows with accumulation": Fault("loss gradient", {"reduce": "not divided by accumulation"}),
    "labels are not shifted": Fault("loss", {"shift": 0}),
    "labels are shifted twice": Fault("loss", {"shift": 2}),
    "packed rows see each other": Fault("loss", {"packed": True, "isolate_rows": False}),
    "padding is attended to": Fault("loss", {"left": True, "attend_pads": True}),
    "positions are all zero": Fault("loss", {"positions": no_positions}),
    "left padding with positions of right padding": Fault(
        "loss", {"left": True, "positions": backward_positions}
    ),
    "base is bfloat16": Fault("loss", {"base_dtype": torch.bfloat16, "autocast": True}, "precision"),
    "the base drops out": Fault("loss", {"base_dropout": 0.1}),
    # --- gradient ---
    "alpha is doubled": Fault("gradient", {"lora": {"lora_alpha": 32}}),
    "alpha is halved": Fault("gradient", {"lora": {"lora_alpha": 8}}),
    "scale is rsLoRA's": Fault("gradient", {"lora": {"use_rslora": True}}),
    "adapters drop out": Fault("gradient", {"lora": {"lora_dropout": 0.1}}),
    "other initial adapters": Fault("gradient", {"inject": False}),
    "last micro-batch alone counts": Fault("gradient", {"zero_between": lambda step: True}),
    # --- curve: what the first step does not show, and no setting tells ---
    "last micro-batch alone counts, from step 8 on": Fault("curve", {"zero_between": lambda step: step >= 7}),
    "optimizer states are kept in bfloat16": Fault("optimizer curve", {"state_dtype": torch.bfloat16}),
    # --- optimizer ---
    "weight decay": Fault("optimizer", {"settings": {"weight_decay": 0.1}}),
    "little weight decay": Fault("optimizer", {"settings": {"weight_decay": 0.001}}),
    "Adam with decay in the gradient": Fault(
        "optimizer", {"optimizer": torch.optim.Adam, "settings": {"weight_decay": 0.01}}
    ),
    "beta2 is 0.95": Fault("optimizer", {"settings": {"betas": (0.9, 0.95)}}),
    "beta1 is 0.95": Fault("optimizer", {"settings": {"betas": (0.95, 0.999)}}),
    "epsilon is 1e-6": Fault("optimizer", {"settings": {"eps": 1e-6}}),
    "no warm-up": Fault("optimizer curve", {"warmup": 0}),
    "warm-up is one step short": Fault("optimizer curve", {"warmup": 4}),
    "schedule is linear": Fault("optimizer curve", {"shape": "linear"}),
    "schedule is constant": Fault("optimizer curve", {"shape": "constant"}),
    "learning rate is 10% higher": Fault("optimizer curve", {"rate": lambda step: 1.1}),
    "learning rate is 1% lower in one step": Fault(
        "optimizer", {"rate": lambda step: 0.99 if step == 11 else 1.0}
    ),
    "B learns faster": Fault("optimizer", {"rate_of_b": 4.0}),
    "no clipping": Fault("optimizer", {"clip": 0.0}),
    "clips elsewhere": Fault("optimizer", {"clip": 0.55}),
    "clips each parameter": Fault("optimizer", {"clip_how": "each"}),
    "clips values": Fault("optimizer", {"clip_how": "values"}),
    # --- lies: the record says what honest work would have said ---
    "lies about its rows": Fault("loss", {"edit_steps": take_others(0)}, "examples"),
    "lies about its labels": Fault("loss", {"edit_steps": swap_answers}, "examples"),
    "lies about its rows, from step 8 on": Fault("curve", {"edit_steps": take_others(7)}, "examples"),
    "lies about its rows in one step": Fault("curve", {"edit_steps": take_others(12, 12)}, "examples"),
    "lies about two rows": Fault("curve", {"edit_steps": swap_rows}, "examples"),
    "lies about a second BOS": Fault("loss", {"edit_row": double_bos}, "examples"),
    "lies about learning rates": Fault("curve", {"rate": lambda step: 1.1}, "learning_rates"),
    "lies about warm-up": Fault("curve", {"warmup": 4}, "learning_rates"),
    "lies about every fifth update": Fault(
        "curve", {"rate": lambda step: float(step % 5 > 0)}, "learning_rates"
    ),
    "lies about the optimizer": Fault("curve", {"optimizer": use_rmsprop}, "groups state_dtypes"),
    "lies about adapters' scale and gradient": Fault(
        "curve", {"lora": {"lora_alpha": 32}}, "grad_norm applied_norm"
    ),
    "lies about the targets": Fault(
        "gradient", {"lora": {"target_modules": ["q_proj", "v_proj"]}}, "parameters groups"
    ),
    "lies about its rows and first loss": Fault("gradient curve", {"edit_steps": swap_answers}, "examples"),
}

# --- jobs on an nf4 base, whose scales are not quantised again --------------------------------------------------------


def store_as(
    kind: str = "nf4", *, block: int = 64, doubly: bool = False, head: bool = False, skip: str = "nothing"
) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """What products see of a matrix that bitsandbytes keeps in 4 bits."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def store(name: str, weight: torch.Tensor) -> torch.Tensor:
        if skip in name or (name == "lm_head" and not head):
            return weight
        return dequantize_4bit(
            *quantize_4bit(weight, blocksize=block, compress_statistics=doubly, quant_type=kind)
        )

    return store


def round_first(name: str, weight: torch.Tensor) -> torch.Tensor:
    return store_as()(name, weight.bfloat16().float())


BASE_FAULTS: dict[str, Fault] = {
    "base is not quantised": Fault("parameters loss", {"store": Ways().store}),
    "base is fp4": Fault("parameters loss", {"store": store_as("fp4")}),
    "blocks are of 128": Fault("parameters loss", {"store": store_as(block=128)}),
    "blocks are of 32": Fault("parameters loss", {"store": store_as(block=32)}),
    "scales are quantised, too": Fault("parameters loss", {"store": store_as(doubly=True)}),
    "one kind of matrix is not quantised": Fault("parameters loss", {"store": store_as(skip="down_proj")}),
    "one matrix is not quantised": Fault("parameters loss", {"store": store_as(skip="0.self_attn.k_proj")}),
    "base is rounded to bfloat16 before it is quantised": Fault("parameters loss", {"store": round_first}),
    "the head is quantised, too": Fault("loss", {"store": store_as(head=True)}),
    "lies about its base": Fault("loss", {"store": store_as("fp4")}, "base"),
}

# No gate can see these: a record that is made up as a whole, and what has no effect within the steps that are recorded.
HIDDEN: dict[str, Fault] = {
    "trains on the test rows and makes up the whole record": Fault(
        "", {"edit_steps": take_others(0)}, "examples loss grad_norm applied_norm"
    ),
    "lies about where it clips": Fault("", {"clip": 0.55}, "clip_norm applied_norm"),
    "lies about its last update": Fault(
        "", {"rate": lambda step: 3.0 if step == STEPS - 1 else 1.0}, "learning_rates"
    ),
}

BENIGN: dict[str, dict[str, Any]] = {
    "the same again": {},
    "one row at a time": {"micro_rows": 1},
    "all rows at once": {"micro_rows": 8},
    "uneven micro-batches": {"micro_rows": 3},
    "left padding": {"left": True},
    "left padding with its positions given": {
        "left": True,
        "positions": lambda mask: (mask.cumsum(1) - 1).clamp(min=0),
    },
    "positions that begin at 100": {"positions": lambda mask: mask.cumsum(1) + 99},
    "padding to multiples of 8": {"multiple": 8},
    "padding to 64": {"multiple": 64},
    "left padding to 64, one row at a time": {"left": True, "multiple": 64, "micro_rows": 1},
    "another pad token": {"pad_id": 60},
    "EOS as pad token, mask given": {"pad_id": EOS},
    "right padding without a mask": {"mask_given": False, "pad_id": PAD},
    "packed, rows kept apart": {"packed": True, "micro_rows": 8},
    "packed in pairs": {"packed": True, "micro_rows": 2},
    "sorted by length within the step": {
        "edit_steps": lambda steps: [sorted(rows, key=lambda r: len(r.ids)) for rows in steps]
    },
    "reversed within the step": {"edit_steps": lambda steps: [rows[::-1] for rows in steps]},
    "plain attention": {"attention": "eager"},
    "losses in double precision": {"loss_dtype": torch.float64},
    "its own cross-entropy": {"own_cross_entropy": True},
    "gradient checkpointing": {"checkpointing": True},
    "fused optimizer": {"settings": {"fused": True}},
    "optimizer in a loop": {"settings": {"foreach": False}},
    "Adam without decay": {"optimizer": torch.optim.Adam},
    "groups by layer": {"groups": "layers"},
    "an empty group with decay": {"groups": "no decay for norms"},
    "another draw before adapters are given": {"own_seed": 1},
}


def ways(changes: dict[str, Any], **more: Any) -> Ways:
    return Ways(**{**changes, **more})

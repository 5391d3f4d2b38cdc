"""A framework for tests: a short, honest LoRA training that writes a `ParityRecord`, and can be told to do it wrongly.

`train(Ways())` is the job as it should be done. Every other value of a field of `Ways` changes what really happens in
the loop; the record is what `Watcher` saw by wrapping forward, backward, clipping and the optimizer's step, as a worker
inside a foreign framework does. Only `forge` writes what did not happen.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from watcher import Watcher, plain_name, sample_base

from tunesmith.core.parity import Parameter, ParityRecord

PAD, BOS, EOS, VOCABULARY = 0, 1, 2, 61
STEPS, BATCH_ROWS, WARMUP, RATE, CLIP = 20, 8, 5, 5e-3, 0.5
RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Row:
    """ids, and True where a token is trained."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]


Steps = list[list[Row]]


def make_rows(count: int, *, seed: int) -> list[Row]:
    """BOS, a prompt, the answer and EOS: the answer is the prompt with every token moved by seven."""
    random = torch.Generator().manual_seed(seed)
    rows: list[Row] = []
    for _ in range(count):
        length = int(torch.randint(4, 14, (1,), generator=random))
        prompt = torch.randint(3, VOCABULARY, (length,), generator=random).tolist()
        answer = [3 + (t + 4) % (VOCABULARY - 3) for t in prompt[: max(2, length // 2)]]
        ids = (BOS, *prompt, *answer, EOS)
        rows.append(Row(ids, (False,) * (1 + length) + (True,) * (len(answer) + 1)))
    return rows


# The last batch is not full: a framework that drops it is seen.
ROWS = make_rows(STEPS * BATCH_ROWS - 4, seed=1)
TEST_ROWS = make_rows(STEPS * BATCH_ROWS - 4, seed=2)


def cut_batches(rows: Sequence[Row]) -> Steps:
    return [list(rows[i : i + BATCH_ROWS]) for i in range(0, len(rows), BATCH_ROWS)]


@dataclass(frozen=True)
class Ways:
    """How the job is done. The defaults are right; what a field does is in the loop below."""

    edit_row: Callable[[Row], Row] = lambda row: row
    edit_steps: Callable[[Steps], Steps] = lambda steps: steps
    micro_rows: int = 4
    left: bool = False
    multiple: int = 1
    pad_id: int = PAD
    label_pads: bool = False
    packed: bool = False
    isolate_rows: bool = True
    mask_given: bool = True
    attend_pads: bool = False
    positions: Callable[[torch.Tensor], torch.Tensor] | None = None

    attention: str = "sdpa"
    base_dtype: torch.dtype = torch.float32
    store: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, weight: weight
    autocast: bool = False
    checkpointing: bool = False
    base_dropout: float = 0.0
    lora: Mapping[str, Any] = field(default_factory=dict)
    adapter_dtype: torch.dtype = torch.float32
    inject: bool = True
    own_seed: int = 0
    also_train: str = ""
    freeze: str = ""

    shift: int = 1
    reduce: str = "step tokens"
    loss_dtype: torch.dtype = torch.float32
    own_cross_entropy: bool = False
    zero_between: Callable[[int], bool] = lambda step: False

    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    settings: Mapping[str, Any] = field(default_factory=dict)
    groups: str = "one"
    state_dtype: torch.dtype | None = None
    rate: Callable[[int], float] = lambda step: 1.0
    warmup: int = WARMUP
    shape: str = "cosine"
    rate_of_b: float = 1.0
    clip: float = CLIP
    clip_how: str = "all"


def train(ways: Ways) -> ParityRecord:
    """Do the job and return what was seen of it."""
    return train_model(ways)[0]


def train_model(ways: Ways) -> tuple[ParityRecord, Any]:
    """The record, and the trained model."""
    model, parameters = build_model(ways)
    optimizer = build_optimizer(model, ways)
    steps = ways.edit_steps(cut_batches(ROWS))
    watcher = Watcher(model, optimizer, ways.pad_id)
    compute = torch.autocast("cpu", torch.bfloat16) if ways.autocast else nullcontext()
    with watcher.watching():
        for number, rows in enumerate(steps[:STEPS]):
            edited = [ways.edit_row(row) for row in rows]
            micro = [edited[i : i + ways.micro_rows] for i in range(0, len(edited), ways.micro_rows)]
            batches = [collate(part, ways) for part in micro]
            step_tokens = sum(int((labels[:, 1:] >= 0).sum()) for _, labels in batches)
            for inputs, labels in batches:
                if ways.zero_between(number):
                    optimizer.zero_grad()
                with compute:
                    logits = model(**inputs, labels=labels).logits
                losses, trained = token_losses(logits, labels, ways)
                reduce_loss(losses, trained, ways.reduce, step_tokens, len(batches)).backward()
            clip(model, ways)
            for group in optimizer.param_groups:
                group["lr"] = RATE * schedule(number, ways) * ways.rate(number) * group["share"]
            step_in_dtype(optimizer, ways.state_dtype)
            optimizer.zero_grad()
            watcher.end_step()
    record = ParityRecord(
        framework="cheater",
        versions={"torch": torch.__version__},
        precision="bfloat16" if ways.autocast else "float32",
        steps=tuple(watcher.steps),
        parameters=parameters,
        groups=watcher.list_groups(),
        state_dtypes=watcher.state_dtypes,
        base=sample_base(model),
    )
    return record, model


def score_rows(model: Any, rows: Sequence[Row]) -> list[float]:
    """Sum of each row's trained tokens' losses, nats."""
    ways = Ways()
    inputs, labels = collate(rows, ways)
    with torch.no_grad():
        losses, _ = token_losses(model.eval()(**inputs).logits, labels, ways)
    return losses.sum(dim=1).tolist()


def forge(record: ParityRecord, honest: ParityRecord, fields: Sequence[str]) -> ParityRecord:
    """The record of a liar: `fields` say what honest work would have said."""
    whole = {name: getattr(honest, name) for name in fields if hasattr(record, name)}
    inside = [name for name in fields if name not in whole]
    steps = tuple(
        replace(mine, **{name: getattr(right, name) for name in inside})
        for mine, right in zip(record.steps, honest.steps, strict=False)
    )
    return replace(record, steps=steps, **whole)


# --- model ------------------------------------------------------------------------------------------------------------


def build_model(ways: Ways) -> tuple[Any, tuple[Parameter, ...]]:
    """A random model with adapters, and what it trains, as drawn. Weights are large enough for attention and positions
    to matter before any training."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=False,
        attention_dropout=ways.base_dropout, attn_implementation=ways.attention, use_cache=False,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(ways.base_dtype)
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = ways.store(name, module.weight.data)
    torch.manual_seed(100 + ways.own_seed)
    lora = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": list(TARGETS), **ways.lora}
    model = get_peft_model(base, LoraConfig(**lora))
    if ways.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(ways.adapter_dtype)
        if ways.also_train and ways.also_train in name:
            parameter.requires_grad_(True)
        if ways.freeze and ways.freeze in name:
            parameter.requires_grad_(False)
    model.train()
    parameters = tuple(
        Parameter(
            plain_name(n), tuple(p.shape), str(p.dtype)[6:], float(p.detach().double().std(correction=0))
        )
        for n, p in model.named_parameters()
        if p.requires_grad
    )
    if ways.inject:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                draw = torch.Generator().manual_seed(zlib.crc32(plain_name(name).encode()))
                drawn = torch.empty(parameter.shape).uniform_(-0.17, 0.17, generator=draw)
                parameter.data.copy_(drawn if "lora_A" in name else torch.zeros_like(drawn))
    return model, parameters


# --- batches and losses -----------------------------------------------------------------------------------------------


def collate(rows: Sequence[Row], ways: Ways) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What forward gets, and labels (B, T), -100 where nothing is trained."""
    if ways.packed:
        return pack(rows, ways)
    longest = max(len(row.ids) for row in rows)
    width = -(-longest // ways.multiple) * ways.multiple
    ids = torch.full((len(rows), width), ways.pad_id)
    labels = torch.full((len(rows), width), ways.pad_id if ways.label_pads else -100)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        start = width - len(row.ids) if ways.left else 0
        place = slice(start, start + len(row.ids))
        ids[number, place] = torch.tensor(row.ids)
        mask[number, place] = 1
        labels[number, place] = label_row(row)
    inputs = {"input_ids": ids}
    if ways.mask_given:
        inputs["attention_mask"] = mask
    if ways.attend_pads:
        # Everything attends to everything before it, padding as well.
        inputs["attention_mask"] = as_bias(torch.ones(width, width, dtype=torch.bool).tril()).expand(
            len(rows), 1, -1, -1
        )
    if ways.positions:
        inputs["position_ids"] = ways.positions(mask)
    return inputs, labels


def pack(rows: Sequence[Row], ways: Ways) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """All rows in one line, positions from 0 in each."""
    ids = torch.tensor([[t for row in rows for t in row.ids]])
    labels = torch.cat([label_row(row) for row in rows])[None]
    positions = torch.cat([torch.arange(len(row.ids)) for row in rows])[None]
    # A row's first token has nothing before it that could predict it.
    labels[positions == 0] = -100
    number = torch.cat([torch.full((len(row.ids),), i) for i, row in enumerate(rows)])
    seen = torch.ones(len(number), len(number), dtype=torch.bool).tril()
    if ways.isolate_rows:
        seen &= number[:, None] == number[None, :]
    return {"input_ids": ids, "position_ids": positions, "attention_mask": as_bias(seen)}, labels


def label_row(row: Row) -> torch.Tensor:
    ids, mask = torch.tensor(row.ids), torch.tensor(row.mask)
    return ids.masked_fill(~mask, -100)


def as_bias(seen: torch.Tensor) -> torch.Tensor:
    """(T, T) of what sees what -> (1, 1, T, T) to add to scores."""
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def token_losses(logits: torch.Tensor, labels: torch.Tensor, ways: Ways) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token, (B, T - shift), zero where none is trained, and where one is."""
    logits = logits[:, : logits.shape[1] - ways.shift].to(ways.loss_dtype)
    labels = labels[:, ways.shift :]
    trained = labels >= 0
    if ways.own_cross_entropy:
        chosen = logits.gather(2, labels.clamp(min=0)[..., None])[..., 0]
        losses = (logits.logsumexp(dim=2) - chosen) * trained
    else:
        flat = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
        losses = flat.view(labels.shape)
    return losses, trained


def reduce_loss(
    losses: torch.Tensor, trained: torch.Tensor, how: str, step_tokens: int, num_micro: int
) -> torch.Tensor:
    if how == "means of micro-batches":
        return losses.sum() / trained.sum() / num_micro
    if how == "means of rows":
        return (losses.sum(dim=1) / trained.sum(dim=1)).mean() / num_micro
    if how == "not divided by accumulation":
        return losses.sum() / trained.sum()
    if how == "all tokens":
        return losses.sum() / losses.numel() / num_micro
    return losses.sum() / step_tokens


# --- optimizer --------------------------------------------------------------------------------------------------------


def build_optimizer(model: Any, ways: Ways) -> torch.optim.Optimizer:
    """Every group's `share` is its rate relative to the job's."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if ways.groups == "layers":
        cut = [[p for n, p in named if f"layers.{i}." in n] for i in (1, 0)]
    elif ways.groups == "no decay for norms":
        # As Trainer does it; nothing here is a bias or a norm, so the second group is empty.
        cut = [[p for n, p in named if "norm" not in n], [p for n, p in named if "norm" in n]]
    elif ways.rate_of_b != 1:
        cut = [[p for n, p in named if "lora_B" not in n], [p for n, p in named if "lora_B" in n]]
    else:
        cut = [[p for _, p in named]]
    groups = [{"params": list(p), "share": ways.rate_of_b if i else 1.0} for i, p in enumerate(cut)]
    if ways.groups == "no decay for norms":
        groups[1] |= {"weight_decay": 0.3}
    settings = {"lr": RATE, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, **ways.settings}
    return ways.optimizer(groups, **settings)


def schedule(step: int, ways: Ways) -> float:
    """Linear warm-up, then a cosine that ends at zero after twice the steps."""
    if step < ways.warmup:
        return (step + 1) / (ways.warmup + 1)
    progress = (step - ways.warmup) / (2 * STEPS - ways.warmup)
    if ways.shape == "linear":
        return 1 - progress
    return 1.0 if ways.shape == "constant" else 0.5 * (1 + math.cos(math.pi * progress))


def clip(model: Any, ways: Ways) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if ways.clip_how == "all" and ways.clip:
        torch.nn.utils.clip_grad_norm_(parameters, ways.clip)
    elif ways.clip_how == "each":
        for parameter in parameters:
            torch.nn.utils.clip_grad_norm_([parameter], ways.clip)
    elif ways.clip_how == "values":
        torch.nn.utils.clip_grad_value_(parameters, ways.clip / 10)


def step_in_dtype(optimizer: torch.optim.Optimizer, dtype: torch.dtype | None) -> None:
    """One update; with `dtype`, states are kept in it between steps."""
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            if dtype is not None:
                state[key] = state[key].float()
    optimizer.step()
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            if dtype is not None:
                state[key] = state[key].to(dtype)

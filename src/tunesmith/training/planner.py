"""Which tokens share a forward pass, and what is kept of each block: the fastest that stays within a card's memory.

Torch-free: bytes come from `models.memory`, seconds from the card's measured speeds. The plan before training is made
from the shapes alone; what the allocator holds before the first step, and the peak of one probe, correct it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tunesmith.data.batch import plan_micro_batches
from tunesmith.models.memory import Level, MemoryModel, TrainingSetup, count_chunk_rows

# A GPU's units are busy from about so many tokens; more only take memory.
_BUDGETS = (16384, 12288, 8192, 6144, 4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 128)
# On a CPU, which plans nothing: a core is as fast with 512 tokens as with 4,096.
CPU_BUDGET = 4096
# Logits of a chunk of the loss, in fp32: what keeps a GPU busy, and what does almost.
_LOSS_CHUNKS = (2**30, 2**28)
# How a block is shrunk to its input, or to nothing.
_SHRUNK: tuple[Level, ...] = ("recompute", "offload")
# Share of the limit that a plan takes: from shapes alone, and after a probe.
UNPROBED, PROBED = 0.92, 0.98
# Measured over predicted bytes of a step is believed between these.
_FACTORS = (0.85, 2.0)
# A plan that keeps everything in so little of the limit needs no probe.
ROOMY = 0.8
# Tokens at which a product reaches half its speed.
_HALF_SPEED_TOKENS = 256
# How often what is kept of a block crosses the memory in a step, in norms, gates, adapters and rotation; in fp8 also to
# be quantised. From 17.0k and 23.0k tokens/s of an 8B model on an H200, whose products alone would take 70%.
_CROSSINGS = {False: 10.0, True: 13.0}
# Share of reading a table of the vocabulary that its product does not hide. A guess.
_READ_SEEN = 0.25
# Seconds of the host to launch a block's forward and backward pass. From steps of 8 and 16 micro-batches on an H200.
_LAUNCH_SECONDS = {"full": 4.5e-3, "fp8": 5.5e-3, "int8": 8e-3, "nf4": 8e-3}


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU's memory in bytes, and what it reaches: FLOP/s of products and attention, bytes/s of memory and host."""

    name: str
    memory_bytes: int
    flops: float
    fp8_flops: float
    attention_flops: float
    memory_speed: float
    host_speed: float


def _card(name: str, gib: float, flops: float, fp8: float, attention: float, memory: float) -> Card:
    return Card(name, int(gib * 2**30), flops, fp8, attention, memory, 20e9)


# H200: measured. The others: their data sheets, at the share of them that an H200 reaches.
CARDS = {
    "h200": _card("H200", 139.8, 700e12, 1300e12, 400e12, 4.3e12),
    "h100": _card("H100", 79.1, 700e12, 1300e12, 400e12, 3.0e12),
    "a100": _card("A100 80 GB", 79.1, 240e12, 240e12, 140e12, 1.8e12),
    "l40s": _card("L40S", 44.4, 250e12, 480e12, 140e12, 0.77e12),
    "rtx4090": _card("RTX 4090", 23.6, 130e12, 260e12, 80e12, 0.9e12),
    "rtx3090": _card("RTX 3090", 23.6, 60e12, 60e12, 35e12, 0.84e12),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """Tokens of each row of some steps; of the longest row, and of the most that one step may have; micro-batches are
    filled up to round_tokens."""

    steps: tuple[tuple[int, ...], ...]
    longest: int
    round_tokens: int = 1
    largest_step: int = 0

    @property
    def lengths(self) -> list[int]:
        return [length for step in self.steps for length in step]

    @property
    def is_even(self) -> bool:
        return min(self.lengths) == max(self.lengths) == self.longest

    def split(self, budget_tokens: int) -> tuple[int, int]:
        """(micro-batches of all steps, the most tokens that one may have)."""
        # Rows of one length fill a budget by whole rows only.
        whole = max(1, budget_tokens // self.longest) * self.longest
        most = whole if self.is_even else budget_tokens
        largest = self.largest_step or max(map(len, self.steps)) * self.longest
        most = max(self.longest, min(most, largest))
        most = math.ceil(most / self.round_tokens) * self.round_tokens
        return _count_micro_batches(self.steps, budget_tokens), most


@lru_cache(maxsize=256)
def _count_micro_batches(steps: tuple[tuple[int, ...], ...], budget_tokens: int) -> int:
    return sum(len(plan_micro_batches(step, budget_tokens=budget_tokens)) for step in steps)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a run does with the card's memory; recorded with it, and replayed when it continues.

    levels:         of each block, first to last.
    limit_bytes:    what it stays within.
    parts:          predicted bytes: weights, optimizer, step (gradients and activations at their highest).
    seconds_per_1k: predicted seconds for 1,000 tokens.
    fits:           False where not even the least fits: the run then tries, and halves its micro-batches.
    probe:          what one micro-batch was predicted to take and took, bytes; empty without a probe.
    """

    budget_tokens: int
    levels: tuple[Level, ...]
    loss_chunk_bytes: int
    limit_bytes: int
    parts: dict[str, int]
    seconds_per_1k: float
    fits: bool = True
    probe: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def has_room_for_graphs(self) -> bool:
        """Whether recorded micro-batches (training/graphs.py) fit beside ordinary ones: a pool for all of them, which
        shapes of many sizes fill badly."""
        return self.peak_bytes + 2 * self.parts["step"] <= self.limit_bytes

    @property
    def is_roomy(self) -> bool:
        """Whether everything is kept and so much is free that an estimate will do."""
        return set(self.levels) == {"keep"} and self.peak_bytes < ROOMY * self.limit_bytes

    def describe_levels(self) -> str:
        """`20 keep, 12 recompute`."""
        counts = {level: self.levels.count(level) for level in reversed(dict.fromkeys(self.levels))}
        return ", ".join(f"{count} {level}" for level, count in counts.items())

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "levels": list(self.levels), "peak_bytes": self.peak_bytes}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> MemoryPlan:
        given = {key: item for key, item in value.items() if key != "peak_bytes"}
        return cls(**{**given, "levels": tuple(given["levels"])})


@dataclass
class Planner:
    """Plans one training on one card.

    micro_batch_tokens: what the job asks for; None leaves it to the plan.
    resident_bytes:     what the allocator holds before the first step; None takes what the shapes say.
    step_factor:        measured over predicted bytes of a step.
    share:              of the limit that may be filled.
    beside_bytes:       what else lies on the card all the time: the weights of a teacher.
    """

    model: MemoryModel
    workload: Workload
    card: Card
    limit_bytes: int
    micro_batch_tokens: int | None = None
    resident_bytes: int | None = None
    step_factor: float = 1.0
    share: float = UNPROBED
    is_cpu: bool = False
    beside_bytes: int = 0

    def plan(self) -> MemoryPlan:
        """The fastest plan that fits; if none does, the one that takes least. A CPU run keeps everything."""
        if self.is_cpu:
            levels: tuple[Level, ...] = ("keep",) * self.model.config.num_layers
            return self.describe(self.micro_batch_tokens or CPU_BUDGET, 2**25, levels)
        # What only fits with all its estimates right is better than nothing: a probe follows.
        tight = dataclasses.replace(self, share=PROBED)
        plans: list[MemoryPlan] = []
        for planner in (self, tight):
            plans = [plan for budget in self._budgets() for plan in planner._plans(budget)]
            if fitting := [plan for plan in plans if plan.fits]:
                return min(
                    fitting, key=lambda plan: (plan.seconds_per_1k, plan.peak_bytes, plan.budget_tokens)
                )
        return min(plans, key=lambda plan: (plan.peak_bytes, plan.budget_tokens))

    def correct(self, plan: MemoryPlan, *, tokens: int, resident_bytes: int, peak_bytes: int) -> MemoryPlan:
        """The plan again, after one micro-batch of `tokens` was tried with `plan`: of the same budget, if that still
        fits, with the levels that what was measured allows."""
        predicted = self.model.step_bytes(
            plan.levels, tokens=tokens, micro_batches=1, loss_chunk_bytes=plan.loss_chunk_bytes
        )
        factor = (peak_bytes - resident_bytes) / predicted
        # Far from one, what was measured is not what was predicted: few targets, another process's memory.
        self.step_factor = min(max(factor, _FACTORS[0]), _FACTORS[1])
        self.resident_bytes, self.share = resident_bytes, PROBED
        corrected = dataclasses.replace(self, micro_batch_tokens=plan.budget_tokens).plan()
        if not corrected.fits:
            corrected = self.plan()
        probe = {
            "tokens": tokens,
            "levels": plan.describe_levels(),
            "resident_bytes": resident_bytes,
            "peak_bytes": peak_bytes,
            "predicted_step_bytes": predicted,
            "step_factor": self.step_factor,
        }
        return dataclasses.replace(corrected, probe=probe)

    # --- candidates ---------------------------------------------------------------------------------------------

    def _budgets(self) -> list[int]:
        if self.micro_batch_tokens is not None:
            return [self.micro_batch_tokens]
        if self.model.setup.in_backward:
            return [self.workload.largest_step]
        longest = self.workload.longest
        return sorted({max(budget, longest) for budget in _BUDGETS}, reverse=True)

    def _plans(self, budget: int) -> Iterator[MemoryPlan]:
        """Of each way to shrink, the plan that computes least again."""
        for chunk in _LOSS_CHUNKS:
            for shrink in _SHRUNK:
                yield self._fill(budget, chunk, shrink)

    def _fill(self, budget: int, chunk: int, shrink: Level) -> MemoryPlan:
        """Shrink as few blocks as will do, the first ones, whose backward pass comes when the others have gone; then
        let as few of the rest as will do keep products only."""
        blocks = self.model.config.num_layers

        def make(shrunk: int, cheap: int) -> MemoryPlan:
            first: tuple[Level, ...] = (shrink,) * shrunk
            middle: tuple[Level, ...] = ("cheap",) * cheap
            last: tuple[Level, ...] = ("keep",) * (blocks - shrunk - cheap)
            return self.describe(budget, chunk, first + middle + last)

        shrunk = _find_first(range(blocks), lambda count: make(count, blocks - count).fits)
        if shrunk is None:
            return make(blocks, 0)
        cheap = _find_first(range(blocks - shrunk + 1), lambda count: make(shrunk, count).fits)
        return make(shrunk, blocks - shrunk if cheap is None else cheap)

    def describe(self, budget: int, chunk: int, levels: tuple[Level, ...]) -> MemoryPlan:
        step = self._step_bytes(budget, levels, chunk)
        if self.resident_bytes is None:
            weights = self.model.weights_bytes() + self.beside_bytes
            parts = {"weights": weights, "optimizer": self.model.optimizer_bytes()}
        else:
            parts = {"weights and optimizer": self.resident_bytes}
        parts["step"] = step
        fits = sum(parts.values()) <= self.share * self.limit_bytes
        plan = MemoryPlan(budget, levels, chunk, self.limit_bytes, parts, 0.0, fits)
        return dataclasses.replace(plan, seconds_per_1k=1000 * self._seconds_per_token(plan))

    def _step_bytes(self, budget: int, levels: Sequence[Level], chunk: int) -> int:
        micro_batches, tokens = self.workload.split(budget)
        step = self.model.step_bytes(
            levels,
            tokens=tokens,
            micro_batches=math.ceil(micro_batches / len(self.workload.steps)),
            loss_chunk_bytes=chunk,
        )
        return int(step * self.step_factor)

    # --- time ---------------------------------------------------------------------------------------------------

    def _seconds_per_token(self, plan: MemoryPlan) -> float:
        model, setup, card, levels = self.model, self.model.setup, self.card, plan.levels
        config, lengths = model.config, self.workload.lengths
        micro_batches, _ = self.workload.split(plan.budget_tokens)
        tokens = sum(lengths) / micro_batches
        # A token sees half of its row: 4 FLOPs for each value of a query and each token seen.
        seen = sum(length * length for length in lengths) / sum(lengths) / 2
        attention = 4 * config.num_heads * config.head_dim * seen / card.attention_flops
        speed = card.fp8_flops if setup.fp8 else card.flops
        product = 2 * model.block_values / speed * (1 + _HALF_SPEED_TOKENS / tokens)
        crossing = _CROSSINGS[setup.fp8] * model.saved_bytes("keep") / card.memory_speed
        # Packed weights are unpacked in every pass: written and read.
        unpack = 0.0
        if setup.storage in ("nf4", "int8"):
            unpack = model.block_values * 2 * (1 if setup.fp8 else setup.value_bytes) / card.memory_speed
        elif setup.storage == "fp8":
            unpack = model.block_values * 2 / card.memory_speed / 2
        unpack /= tokens
        # Backward: attention five products for two; weights' gradients where they are trained.
        forward = product + attention + crossing / 3 + unpack
        backward = product * (1 if setup.rank else 2) + 2.5 * attention + crossing * 2 / 3 + unpack
        # The input goes out during the forward pass and comes back in time, if the block computes for so long.
        away = config.hidden_size * setup.value_bytes / card.host_speed
        again = {
            "keep": 0.0,
            "cheap": 2 * (model.saved_bytes("keep") - model.saved_bytes("cheap")) / card.memory_speed,
            "recompute": forward,
            "offload": 1.02 * forward + max(0.0, away - forward) + max(0.0, away - backward - forward),
        }
        # The host launches a block's kernels while the GPU is at work on those before; with few tokens it is behind.
        comes_back = self.workload.is_even or plan.has_room_for_graphs
        is_replayed = setup.recorded and comes_back and "offload" not in levels
        launch = 0.0 if is_replayed else _LAUNCH_SECONDS[setup.storage] / tokens
        blocks = sum(forward + backward + again[level] for level in levels)
        launches = sum(launch * (1.0 if level in ("keep", "cheap") else 1.5) for level in levels)
        head = (4 if setup.rank else 6) * model.table_values / card.flops
        # Both products of a chunk read the table, and hide most of it.
        rows = count_chunk_rows(config.vocab_size, plan.loss_chunk_bytes)
        read = 2 * model.table_values * setup.value_bytes / card.memory_speed / rows
        return max(blocks, launches) + head + _READ_SEEN * read


def _find_first(counts: range, fits: Callable[[int], bool]) -> int | None:
    """The first count that fits; what fits goes on fitting. None if none does."""
    if not counts or not fits(counts[-1]):
        return None
    low, high = 0, len(counts) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(counts[middle]) else (middle + 1, high)
    return counts[low]


def describe_setup(method: Any, train: Any, *, value_bytes: int, compiled: bool) -> TrainingSetup:
    """What a job's method and `train` section mean for memory. method: FullSpec or LoraSpec; train: TrainSpec."""
    # What these need has no form that a compiler or a fused kernel could have (Projection.has_plain_form).
    is_plain = not (method.qat_spec or (method.name != "full" and method.dora))
    compiled = compiled and is_plain
    if method.name == "full":
        return TrainingSetup(
            rank=0,
            optimizer=train.optimizer,
            value_bytes=value_bytes,
            compiled=compiled,
            fused=is_plain,
            in_backward=train.optimizer_in_backward,
        )
    tuned = len({"lm_head" if name == "lm_head" else "embed_tokens" for name in method.modules_to_save})
    return TrainingSetup(
        rank=method.rank,
        storage=method.storage,
        double_quant=method.double_quant,
        fp8=method.storage == "fp8" or method.compute == "fp8",
        targets=() if method.targets == "all-linear" else tuple(method.targets),
        tuned_tables=2 if method.new_tokens else tuned,
        optimizer=train.optimizer,
        value_bytes=value_bytes,
        compiled=compiled,
        fused=is_plain and not method.dropout,
        recorded=compiled and trains_adapters_only(method),
    )


def trains_adapters_only(method: Any) -> bool:
    """Whether a job's method trains nothing but adapters, and draws nothing."""
    return method.name != "full" and not (method.dropout or method.modules_to_save or method.new_tokens)

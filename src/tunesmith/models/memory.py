"""What training an own decoder needs of a card's memory, worked out from its shapes alone, without torch.

What autograd keeps of a block, in values of the compute dtype per token (tests hold these sums to what torch saves):

    keep       x, norm(x), q, k, v, attended, x', norm(x'), gate and up, their product: 4 D + 2 Q + 2 K + 3 F
    cheap      without what norms and gates make:                                       2 D + 2 Q + 2 K + 2 F
    recompute  x: D            offload  nothing on the card, D on the host

Llama-3.1-8B (D = Q = 4096, K = 1024, F = 14336), bf16: 69,632 values, 136 KiB a token and block; cheap 92, x 8 KiB.

D: width  Q: query heads together  K: key heads together  F: feed-forward width  V: vocabulary  L: blocks
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tunesmith.models.config import DecoderConfig
from tunesmith.models.headers import list_expected

Level = Literal["keep", "cheap", "recompute", "offload"]
LEVELS: tuple[Level, ...] = ("keep", "cheap", "recompute", "offload")

# Bytes of optimizer states a weight; 8-bit states have a scale for every 256 values, and there are two of them.
_STATE_BYTES = {"adamw": 8.0, "adamw-8bit": 2 + 2 * 4 / 256, "adamw-bf16": 2 + 2 * 4 / 256, "muon": 4.0}
# Columns of adapters come in multiples of this (projection.RANK_MULTIPLE, which a test compares).
_RANK_MULTIPLE = 8
# What the 8-bit optimizers work on at a time, in weights (low_bit_adamw), and its bytes: new weights, codes, noise.
_PIECE_WEIGHTS, _PIECE_BYTES = 1 << 25, 8


@dataclass(frozen=True, slots=True)
class TrainingSetup:
    """What is trained, and how its numbers are held.

    storage, double_quant, fp8: of the frozen matrices, and whether their products are in fp8.
    rank:         of the adapters; 0 trains every weight.
    targets:      ends of the names that get adapters; () is all linear layers.
    tuned_tables: embedding and head that adapters train whole, beside the frozen ones.
    value_bytes:  of the compute dtype.
    compiled:     blocks go through torch.compile.
    fused:        gates are fused.py's; a compiler does as well.
    recorded:     micro-batches of one shape are replayed as CUDA graphs.
    in_backward:  gradients are used and dropped as the backward pass makes them.
    """

    rank: int
    storage: Literal["full", "int8", "nf4", "fp8"] = "full"
    double_quant: bool = True
    fp8: bool = False
    targets: tuple[str, ...] = ()
    tuned_tables: int = 0
    optimizer: str = "adamw"
    value_bytes: int = 2
    compiled: bool = True
    fused: bool = False
    recorded: bool = False
    in_backward: bool = False

    @property
    def master_bytes(self) -> int:
        """Of a weight that is trained."""
        return 2 if self.optimizer == "adamw-bf16" else 4


@dataclass(frozen=True, slots=True)
class Linear:
    """A projection: outputs of its parts, inputs, columns its adapters add."""

    outputs: tuple[int, ...]
    inputs: int
    adapted: tuple[int, ...]
    ranks: int

    @property
    def values(self) -> int:
        return sum(self.outputs) * self.inputs


class MemoryModel:
    """Bytes of one training, part by part."""

    def __init__(self, config: DecoderConfig, setup: TrainingSetup) -> None:
        self.config, self.setup = config, setup
        self.linears = _list_linears(config, setup)
        self.block_values = sum(linear.values for linear in self.linears)
        self.table_values = config.vocab_size * config.hidden_size
        everything = sum(math.prod(shape) for shape in list_expected(config).values())
        self.num_tables = 1 if config.tied else 2
        # Norms and biases.
        self.small_values = (
            everything - config.num_layers * self.block_values - self.num_tables * self.table_values
        )
        self.total_values = everything

    # --- what lies there all the time ---------------------------------------------------------------------------

    @property
    def adapter_values(self) -> int:
        """Of one block."""
        return sum(
            self.setup.rank * (linear.inputs + outputs)
            for linear in self.linears
            for outputs in linear.adapted
        )

    @property
    def trained_values(self) -> int:
        if not self.setup.rank:
            return self.total_values
        return self.config.num_layers * self.adapter_values + self.setup.tuned_tables * self.table_values

    def weights_bytes(self) -> int:
        """Frozen weights, or masters and the copies they are computed with; adapters; the scratch buffer."""
        setup, layers = self.setup, self.config.num_layers
        if not setup.rank:
            copied = self.total_values - (self.num_tables - 1) * self.table_values
            copies = 0 if setup.master_bytes == setup.value_bytes else copied * setup.value_bytes
            return self.total_values * setup.master_bytes + copies
        blocks = layers * sum(self._stored_bytes(linear) for linear in self.linears)
        rest = (self.num_tables * self.table_values + self.small_values) * setup.value_bytes
        scratch = 0
        if setup.storage != "full":
            scratch = max(linear.values for linear in self.linears) * (1 if setup.fp8 else setup.value_bytes)
        # A tuned table is computed with in a copy.
        copies = setup.tuned_tables * self.table_values * setup.value_bytes
        return blocks + rest + self.trained_values * 4 + copies + scratch

    def _stored_bytes(self, linear: Linear) -> int:
        outputs, setup = sum(linear.outputs), self.setup
        if setup.storage == "full":
            return outputs * (linear.inputs + linear.ranks) * setup.value_bytes
        if setup.storage in ("int8", "fp8"):
            return linear.values + 4 * outputs
        # Half a byte a value; a scale for every 64 of four bytes, or of one and four more for every 256 scales.
        scale = (1 + 4 / 256) / 64 if setup.double_quant else 4 / 64
        return int(linear.values * (0.5 + scale)) + (8 * outputs if setup.fp8 else 0)

    def optimizer_bytes(self) -> int:
        setup, matrices = self.setup, self.config.num_layers * self.block_values
        if setup.optimizer == "muon":
            return 4 * matrices + 8 * (self.total_values - matrices)
        return int(self.trained_values * _STATE_BYTES[setup.optimizer])

    def gradient_bytes(self, *, micro_batches: int) -> int:
        """fp32; those of bf16 weights stay so until a second micro-batch adds to them."""
        widened = self.setup.rank or self.setup.master_bytes == 4 or micro_batches > 1
        return self.trained_values * (4 if widened else self.setup.master_bytes)

    # --- what grows with the tokens -----------------------------------------------------------------------------

    def saved_bytes(self, level: Level) -> int:
        """What autograd keeps of a block between its forward and its backward pass, a token."""
        c, setup = self.config, self.setup
        value = setup.value_bytes
        width, ff = c.hidden_size, c.intermediate_size
        queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        if level == "offload":
            return 0
        if level == "recompute":
            return width * value
        # Log-sums of attention; x A of every adapter.
        saved = 4 * c.num_heads + sum(linear.ranks for linear in self.linears) * value
        saved += (2 * queries + 2 * keys) * value
        if level == "cheap" or setup.compiled:
            saved += (2 * width + 2 * ff) * value
            saved += (queries + 2 * keys) * value if c.qk_norm else 0
            saved += (1 if setup.compiled else 2) * width * value if c.post_norms else 0
            return saved + ((2 * width + ff) * value if level == "keep" else 0)
        # Without a compiler norms keep x in fp32, and x / |x| where their weight is trained; a gate keeps act(gate).
        normed = 2 * width + (2 * width if c.post_norms else 0) + (queries + keys if c.qk_norm else 0)
        opened = (3 if setup.fused else 4) * ff
        return saved + (2 * width + opened) * value + normed * (4 if setup.rank else 8)

    def live_bytes(self, level: Level) -> int:
        """What is there of a block, a token, when its backward pass begins: saved, or made again."""
        if level == "cheap":
            again = self.config.hidden_size + self.config.intermediate_size
            return self.saved_bytes(level) + again * self.setup.value_bytes
        # The input of a block that was offloaded, and the next one's, are back.
        here = self.config.hidden_size * self.setup.value_bytes
        return self.saved_bytes("keep") + {"keep": 0, "recompute": 0, "offload": here}[level]

    def working_bytes(self) -> int:
        """Gradients on their way through a block, a token: of the output and the residual, of the gate's product, of
        gate and up. Without a compiler every elementwise step has a result of its own, and fp8 is made from fp32."""
        width, ff, value = self.config.hidden_size, self.config.intermediate_size, self.setup.value_bytes
        working = (2 * width + 3 * ff) * value
        if not self.setup.compiled:
            working += ((0 if self.setup.fused else 2 * ff) + 2 * width) * value
            working += 24 * ff if self.setup.fp8 else 0
        return working

    def last_copies_bytes(self) -> int:
        """The last block computes rows that are scored only: a copy of its input and of what was attended, a token."""
        return (
            self.config.hidden_size + self.config.num_heads * self.config.head_dim
        ) * self.setup.value_bytes

    def final_bytes(self) -> int:
        """Of the last norm, which is never compiled, a token: fp32 in and, trained, half-way; its output."""
        return self.config.hidden_size * ((4 if self.setup.rank else 8) + self.setup.value_bytes)

    # --- the peak -----------------------------------------------------------------------------------------------

    def resident_bytes(self) -> int:
        """Before the first step."""
        return self.weights_bytes() + self.optimizer_bytes()

    def step_bytes(
        self, levels: Sequence[Level], *, tokens: int, micro_batches: int, loss_chunk_bytes: int
    ) -> int:
        """The most a step takes beyond `resident_bytes`: the highest of the moments below.

        tokens: of the largest micro-batch, all of them scored.
        """
        setup, tables = self.setup, self.table_values
        value, layers = setup.value_bytes, len(levels)
        gradients = self.gradient_bytes(micro_batches=micro_batches)
        # Gradients of all weights are there from the second micro-batch on; before, they come block by block.
        there = gradients if micro_batches > 1 else 0
        come = 0 if micro_batches > 1 or setup.in_backward else gradients
        block_come = come * (self.adapter_values if setup.rank else self.block_values) // self.trained_values
        head_come = 0 if setup.rank else come * tables // self.trained_values
        saved = [self.saved_bytes(level) * tokens for level in levels]
        if levels[-1] in ("keep", "cheap"):
            saved[-1] += self.last_copies_bytes() * tokens
        states = tokens * self.config.hidden_size * value
        final = self.final_bytes() * tokens
        # 1: the head scores a chunk: logits, then their gradient in their place; capped ones in fp32 again and again.
        rows = min(tokens, count_chunk_rows(self.config.vocab_size, loss_chunk_bytes))
        chunk = rows * self.config.vocab_size * (2 * value + 16 if self.config.logit_cap else value)
        trains_head = not setup.rank or setup.tuned_tables > 0
        head = tables * (4 + value) if trains_head else 0
        moments = [sum(saved) + final + states + chunk + head]
        # 2: its backward pass: fp32 sums, scaled, then rounded.
        head = tables * (8 + value) if trains_head else 0
        moments.append(sum(saved) + final + 2 * states + head)
        # 3: the backward pass of each block.
        working, weight = self.working_bytes() * tokens, 0
        if not setup.rank:
            weight = max(linear.values for linear in self.linears) * (value + 4)
        for block, level in enumerate(levels):
            live = self.live_bytes(level) * tokens + working + weight
            live += self.last_copies_bytes() * tokens if block == layers - 1 else 0
            moments.append(sum(saved[:block]) + live + head_come + block_come * (layers - 1 - block))
        # 4: the update.
        piece = 0
        if setup.optimizer in ("adamw-8bit", "adamw-bf16"):
            piece = min(self.trained_values, _PIECE_WEIGHTS) * _PIECE_BYTES
        moments.append(come + piece)
        # Or while each of them lasts.
        return there + max(moments) + (piece if setup.in_backward else 0)


def count_chunk_rows(vocab_size: int, chunk_bytes: int) -> int:
    """Target tokens whose fp32 logits are held at a time. A power of two: equal chunks of a round batch are one shape,
    for which a compiler compiles once."""
    return max(64, 1 << (chunk_bytes // (4 * vocab_size)).bit_length() - 1)


def _list_linears(config: DecoderConfig, setup: TrainingSetup) -> list[Linear]:
    width, ff = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    named: list[tuple[dict[str, int], int]] = [
        ({"qkv_proj": queries + 2 * keys}, width)
        if config.fused
        else ({"q_proj": queries, "k_proj": keys, "v_proj": keys}, width),
        ({"o_proj": width}, queries),
        ({"gate_up_proj": 2 * ff}, width) if config.fused else ({"gate_proj": ff, "up_proj": ff}, width),
        ({"down_proj": width}, ff),
    ]
    linears: list[Linear] = []
    for parts, inputs in named:
        adapted = tuple(size for name, size in parts.items() if setup.rank and _is_target(name, setup))
        ranks = len(adapted) * setup.rank
        linears.append(Linear(tuple(parts.values()), inputs, adapted, ranks + -ranks % _RANK_MULTIPLE))
    return linears


def _is_target(name: str, setup: TrainingSetup) -> bool:
    return not setup.targets or any(target.rpartition(".")[2] == name for target in setup.targets)

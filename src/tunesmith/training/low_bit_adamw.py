"""AdamW with states in 8 bits, on fp32 masters or on bf16 weights that are rounded stochastically.

Large tensors are worked through in pieces, so that no fp32 copy of a whole one ever exists. On a GPU the step of a
piece is compiled into a few kernels.

B: blocks of 256 values (blockwise.BLOCK)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.training.blockwise import BLOCK, Levels, count_blocks, dequantize, make_levels, quantize
from tunesmith.training.optim import MasterWeights

# Smaller tensors (norms, biases) keep fp32 states: they weigh nothing and are the most sensitive.
SMALLEST_QUANTIZED = 4096
# Blocks of one piece: temporaries that fit a core's cache; on a GPU, enough work for one launch.
_PIECE_BLOCKS = {"cpu": 1 << 10, "cuda": 1 << 17}


class AdamW8bit(MasterWeights):
    """AdamW whose two states take 8 bits a value, about 2 bytes a weight in place of 8.

    States are `exp_avg.NAME`, `exp_avg_sq.NAME` and `step.NAME`; of large tensors codes, with `exp_avg_scale.NAME` and
    `exp_avg_sq_scale.NAME`. Weight decay applies to matrices only. A second moment above zero is never rounded to zero:
    the weight's next update would be divided by epsilon.
    Source: Dettmers et al. 2022, arXiv:2110.02861.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(named)
        self._betas, self._epsilon, self._weight_decay = (beta1, beta2), epsilon, weight_decay
        for name, master in self.masters.items():
            if not master.is_contiguous():
                raise ValueError(f"{name} is not contiguous; blocks are cut from memory in order")
        self._states = {name: _make_states(master) for name, master in self.masters.items()}

    @torch.no_grad()
    def update(self, *, learning_rate: float, gradient_factor: float = 1.0) -> None:
        """See `Optimizer`."""
        for name in self.masters:
            if self.gradient_of(name) is not None:
                self.update_one(name, learning_rate, gradient_factor)
        self.round_masters()
        self.clear_gradients()

    def update_one(self, name: str, learning_rate: float, factor: float = 1.0) -> None:
        """See `MasterWeights`."""
        master, gradient = self.masters[name], self.gradient_of(name)
        assert gradient is not None
        count = self._states[name]["step"]
        count += 1
        decay = self._weight_decay if master.ndim >= 2 else 0.0
        numbers = _make_numbers(master.device, self._betas, decay, int(count), learning_rate, factor)
        self._update_one(name, gradient.reshape(-1), int(count), numbers)

    def _update_one(self, name: str, gradient_n: Tensor, step: int, numbers: Tensor) -> None:
        weight, state = self.masters[name].detach(), self._states[name]
        weight_n, constants = weight.view(-1), (*self._betas, self._epsilon)
        blocks_each = _PIECE_BLOCKS.get(weight.device.type, _PIECE_BLOCKS["cpu"])
        draw = self._make_noise(name, step, weight)
        for first in range(0, count_blocks(weight_n.numel()), blocks_each):
            values = slice(first * BLOCK, (first + blocks_each) * BLOCK)
            piece, gradient = weight_n[values], gradient_n[values]
            noise = draw(piece.shape)
            if "exp_avg_scale" in state:
                states = [state[kind][first : first + blocks_each] for kind in _QUANTIZED]
                stepped = _choose_block_step(weight.device.type)(
                    _cut_blocks(piece),
                    _cut_blocks(gradient),
                    *states,
                    numbers,
                    None if noise is None else _cut_blocks(noise),
                    *(make_levels(weight.device, signed=signed) for signed in (True, False)),
                    *constants,
                )
                piece.copy_(stepped[0].view(-1)[: len(piece)])
            else:
                mean, square = (state[kind].view(-1)[values] for kind in ("exp_avg", "exp_avg_sq"))
                states = [mean, square]
                stepped = _take_step(piece, gradient, mean, square, numbers, noise, *constants)
                piece.copy_(stepped[0])
            for target, source in zip(states, stepped[1:], strict=True):
                target.copy_(source)

    def _make_noise(self, name: str, step: int, weight: Tensor) -> Callable[[torch.Size], Tensor | None]:
        """Draws the noise of one piece after another; None where weights are not rounded."""
        return lambda size: None


class AdamWBf16(AdamW8bit):
    """AdamW on bf16 weights without masters: 2 bytes a weight and 2 of states.

    The new weight is computed in fp32 and rounded up or down with the probabilities that make its expectation exact.
    Rounding to nearest would lose every update below half a step, which at usual learning rates is nearly all of them.
    What is drawn depends on seed, step and name alone, so that a continued run draws the same.

    The gradient of one micro-batch stays in bf16, as it was computed. From the second on they are added up in fp32, at
    4 bytes a weight in place of 2. Parameters in fp32 or fp64 are updated without rounding.
    Source: Zamirai et al. 2021, "Revisiting BFloat16 Training", arXiv:2010.06192.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], *, seed: int = 0, **settings: float) -> None:
        self._seed = seed
        self._sums: dict[str, Tensor] = {}
        super().__init__(named, **settings)
        self._generators: dict[torch.device, torch.Generator] = {}

    def _make_master(self, name: str, parameter: nn.Parameter) -> Tensor:
        if parameter.dtype == torch.float16:
            raise ValueError(f"{name} is fp16; weights without masters are bf16")
        if parameter.dtype != torch.bfloat16:
            return super()._make_master(name, parameter)

        # Not `self`: the parameter would hold the optimizer, which holds it, in a circle that nothing collects.
        sums = self._sums

        def add_gradient(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            if gradient is None:
                return
            held = sums.get(name)
            sums[name] = gradient if held is None else held.float().add_(gradient)

        parameter.register_post_accumulate_grad_hook(add_gradient)
        return parameter

    def gradient_of(self, name: str) -> Tensor | None:
        return self._sums.get(name, self.masters[name].grad)

    def hold_gradients(self) -> bool:
        return False

    def drop_gradient(self, name: str) -> None:
        self._sums.pop(name, None)
        super().drop_gradient(name)

    def clear_gradients(self) -> None:
        self._sums.clear()
        super().clear_gradients()

    def gradient_norm(self) -> Tensor:
        """See `Optimizer`. In fp32, whatever the gradients are in."""
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in self.gradients()]
        if not norms:
            return super().gradient_norm()
        return torch.linalg.vector_norm(torch.stack(norms))

    def _make_noise(self, name: str, step: int, weight: Tensor) -> Callable[[torch.Size], Tensor | None]:
        if weight.dtype != torch.bfloat16:
            return super()._make_noise(name, step, weight)
        generator = self._generators.setdefault(weight.device, torch.Generator(weight.device))
        digest = hashlib.blake2b(f"{self._seed} {step} {name}".encode(), digest_size=7).digest()
        generator.manual_seed(int.from_bytes(digest, "little"))
        return lambda size: draw_noise(size, device=weight.device, generator=generator)


def draw_noise(size: torch.Size, *, device: torch.device, generator: torch.Generator) -> Tensor:
    """16 uniform random bits a value, as int16. Four are drawn at once: to draw takes a GPU longer than to store."""
    count = size.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    return words.random_(-(1 << 63), None, generator=generator).view(torch.int16)[:count].view(size)


def round_stochastically(x: Tensor, noise: Tensor) -> Tensor:
    """fp32 values as bf16: up with the probability of the part that is cut off, else down.

    noise: 16 random bits a value, see `draw_noise`. bf16 is the upper half of fp32: of the 65,536 numbers that may be
    added to the lower half, as many carry into the upper one as the lower half says. A bf16 number stays what it is.
    """
    carried = x.view(torch.int32) + (noise.int() & 0xFFFF)
    return (carried & -0x10000).view(torch.float32).to(torch.bfloat16)


@lru_cache(maxsize=4)
def _make_numbers(
    device: torch.device,
    betas: tuple[float, float],
    decay: float,
    step: int,
    learning_rate: float,
    factor: float,
) -> Tensor:
    """What `_take_step` calls so; the same for all weights of a step."""
    beta1, beta2 = betas
    numbers = [
        factor,
        1.0 - learning_rate * decay,
        learning_rate / (1.0 - beta1**step),
        math.sqrt(1.0 - beta2**step),
    ]
    return torch.tensor(numbers, dtype=torch.float32).to(device)


_QUANTIZED = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")


def _make_states(weight: Tensor) -> dict[str, Tensor]:
    device = weight.device
    # On the CPU: it is read every step, and reading it must not wait for a GPU.
    states = {"step": torch.zeros((), dtype=torch.int64)}
    if weight.numel() < SMALLEST_QUANTIZED:
        return states | {
            kind: torch.zeros_like(weight, dtype=torch.float32) for kind in ("exp_avg", "exp_avg_sq")
        }
    blocks = count_blocks(weight.numel())
    for kind, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        zero = int(make_levels(device, signed=signed).nearest(torch.zeros(1, device=device)))
        states[kind] = torch.full((blocks, BLOCK), zero, dtype=torch.uint8, device=device)
        states[f"{kind}_scale"] = torch.zeros(blocks, 1, device=device)
    return states


def _take_step(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    numbers: Tensor,
    noise: Tensor | None,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """New weight, first and second moment of one AdamW step, element by element.

    numbers: gradient factor; share of the weight kept by decay; rate over the first moment's bias; root of the second
    moment's bias. A tensor, because a compiled function is compiled again for every new Python number.
    """
    factor, kept, rate, root = numbers.unbind()
    gradient = gradient.float() * factor
    mean = mean * beta1 + gradient * (1.0 - beta1)
    square = square * beta2 + gradient * gradient * (1.0 - beta2)
    change = rate * mean / (square.sqrt() / root + epsilon)
    if noise is None:
        return weight * kept - change, mean, square
    return round_stochastically(weight.float() * kept - change, noise), mean, square


def _take_block_step(
    weight: Tensor,
    gradient: Tensor,
    mean_codes: Tensor,
    mean_scales: Tensor,
    square_codes: Tensor,
    square_scales: Tensor,
    numbers: Tensor,
    noise: Tensor | None,
    signed: Levels,
    unsigned: Levels,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_take_step` for blocks (B, 256) with quantised moments: new weight, codes and scales of both moments."""
    weight, mean, square = _take_step(
        weight,
        gradient,
        dequantize(mean_codes, mean_scales, signed),
        dequantize(square_codes, square_scales, unsigned),
        numbers,
        noise,
        beta1,
        beta2,
        epsilon,
    )
    mean_codes, mean_scales = quantize(mean, signed)
    square_codes, square_scales = quantize(square, unsigned)
    return weight, mean_codes, mean_scales, square_codes.clamp(min=(square > 0).byte()), square_scales


def _cut_blocks(values_n: Tensor) -> Tensor:
    """(B, 256), the last block filled up with zeros."""
    missing = -len(values_n) % BLOCK
    return (F.pad(values_n, (0, missing)) if missing else values_n).view(-1, BLOCK)


@cache
def _choose_block_step(device_type: str) -> Any:
    # Compiling takes half a minute of a CPU and gains little there: the pieces stay in its cache.
    return torch.compile(_take_block_step, dynamic=True) if device_type == "cuda" else _take_block_step

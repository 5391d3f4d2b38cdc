"""What every optimizer shares (fp32 masters, gradients, loading), and AdamW with fp32 states.

The others: `low_bit_adamw` (8-bit states; bf16 weights without masters), `muon`. `optimizers` makes what a job names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_OWN_MASTER = (torch.float32, torch.float64)
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Adapters are laid end to end (`_Flat`), up to so many values: for a moment they are there twice. Kernels read windows
# of 256 bytes as fast as tensors of their own.
_MOST_FLAT_VALUES, _ALIGNED_VALUES = 2**28, 64


class Optimizer(Protocol):
    """What the step and the checkpoints need of an optimizer. Names are those of `named_trainable`."""

    @property
    def masters(self) -> Mapping[str, Tensor]:
        """Trained weights as exactly as they are kept; with the state, all that a checkpoint needs."""
        ...

    def clear_gradients(self) -> None: ...

    def hold_gradients(self) -> bool:
        """From now on every gradient lies in one place: clearing sets it to zero. False if that can't be."""
        ...

    def gradient_norm(self) -> Tensor:
        """L2 norm over all gradients, a scalar on their device; the caller decides when to wait for it."""
        ...

    def update(self, *, learning_rate: float, gradient_factor: float = 1.0) -> None:
        """Take one step with gradients times `gradient_factor` (clipping, loss scale), and clear them."""
        ...

    def updating_in_backward(self, learning_rate: float | None) -> AbstractContextManager[list[Tensor]]:
        """Inside, a backward pass updates each weight as soon as its gradient is complete, and drops that: what
        `update` would do after it. Gives a list that fills with the L2 norm of every gradient, scalars.

        learning_rate: None only drops gradients, to see what memory a step takes.
        """
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """The state, flat: `KIND.NAME`. Not copies."""
        ...

    def load(self, *, weights: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:
        """Copy masters and states in, in place. Raises ValueError if names or shapes differ."""
        ...


class MasterWeights(ABC):
    """Named parameters of any float dtype, updated in fp32.

    A parameter in bf16 or fp16 gets an fp32 master copy. Its gradients are added up in fp32, micro-batch by
    micro-batch, the update happens on the master, and the parameter is the master rounded. Updates far below the
    rounding step of bf16 (most of them at usual learning rates) are thereby kept. fp32 parameters are their own master.
    """

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        if not named:
            raise ValueError("nothing to train: no parameter requires a gradient")
        self._named, self._holds = dict(named), False
        self._rounded: dict[str, Tensor] = {}
        # Of each weight by kind, as in {"exp_avg": ...}; subclasses fill it.
        self._states: dict[str, dict[str, Tensor]] = {}
        self.masters: dict[str, Tensor] = {
            name: self._make_master(name, parameter) for name, parameter in named.items()
        }

    def _make_master(self, name: str, parameter: nn.Parameter) -> Tensor:
        if parameter.dtype in _OWN_MASTER:
            return parameter
        master = parameter.detach().float().requires_grad_()
        self._rounded[name] = parameter.detach()

        def move_gradient(rounded: Tensor) -> None:
            gradient = rounded.grad
            if gradient is None:
                return
            if master.grad is None:
                master.grad = gradient.float()
            else:
                master.grad.add_(gradient)
            rounded.grad = None

        parameter.register_post_accumulate_grad_hook(move_gradient)
        return master

    def gradient_of(self, name: str) -> Tensor | None:
        """The gradient added up so far, in the shape of the weight."""
        return self.masters[name].grad

    def gradients(self) -> list[Tensor]:
        return [g for name in self.masters if (g := self.gradient_of(name)) is not None]

    def clear_gradients(self) -> None:
        if self._holds:
            torch._foreach_zero_(self.gradients())  # pyright: ignore[reportPrivateImportUsage]
            return
        for master in self.masters.values():
            master.grad = None

    def hold_gradients(self) -> bool:
        """See `Optimizer`."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        self._holds = True
        return True

    def gradient_norm(self) -> Tensor:
        """See `Optimizer`."""
        gradients = self.gradients()
        if not gradients:
            return torch.zeros((), device=next(iter(self.masters.values())).device)
        norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
        return torch.linalg.vector_norm(torch.stack(norms))

    @torch.no_grad()
    def round_masters(self) -> None:
        """Set every low-precision parameter to its master, rounded to nearest."""
        if self._rounded:
            masters = [self.masters[name] for name in self._rounded]
            torch._foreach_copy_(list(self._rounded.values()), masters)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def updating_in_backward(self, learning_rate: float | None) -> Iterator[list[Tensor]]:
        """See `Optimizer`."""
        norms: list[Tensor] = []

        @torch.no_grad()
        def update_now(name: str, _: Tensor) -> None:
            gradient = self.gradient_of(name)
            if gradient is None:
                return
            norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))
            if learning_rate is not None:
                self.update_one(name, learning_rate)
                if name in self._rounded:
                    self._rounded[name].copy_(self.masters[name])
            self.drop_gradient(name)

        # Behind the hook that brings a gradient to its master. Not for good: a parameter would hold its optimizer.
        handles = [
            parameter.register_post_accumulate_grad_hook(partial(update_now, name))
            for name, parameter in self._named.items()
        ]
        try:
            yield norms
        finally:
            for handle in handles:
                handle.remove()

    def drop_gradient(self, name: str) -> None:
        self.masters[name].grad = None

    def update_one(self, name: str, learning_rate: float) -> None:
        """Take a step with the gradient of one weight, or of its master."""
        raise NotImplementedError(f"{type(self).__name__} updates weights together")

    @abstractmethod
    def update(self, *, learning_rate: float, gradient_factor: float = 1.0) -> None:
        """See `Optimizer`."""

    def state_tensors(self) -> dict[str, Tensor]:
        """See `Optimizer`."""
        return {
            f"{kind}.{name}": tensor for name, state in self._states.items() for kind, tensor in state.items()
        }

    @torch.no_grad()
    def load(self, *, weights: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:
        """See `Optimizer`."""
        copy_tensors(self.masters, weights)
        copy_tensors(self.state_tensors(), states)
        self.round_masters()


class _Flat:
    """Weights, gradients and states of AdamW end to end, each in one tensor of which the named ones become windows.

    The host then starts an update with a handful of calls, where a GPU would wait for lists of hundreds to be read.
    """

    def __init__(self, masters: Sequence[Tensor], states: Sequence[dict[str, Tensor]]) -> None:
        self.steps = torch.stack([state["step"] for state in states])
        self.values = _lay_together([master.data for master in masters])
        self.gradient = _lay_together([_read_gradient(master) for master in masters])
        self.moments = {kind: _lay_together([state[kind] for state in states]) for kind in _MOMENTS}
        at = 0
        for number, (master, state) in enumerate(zip(masters, states, strict=True)):
            window, shape = slice(at, at + master.numel()), master.shape
            master.data, master.grad = self.values[window].view(shape), self.gradient[window].view(shape)
            state |= {kind: moment[window].view(shape) for kind, moment in self.moments.items()}
            state["step"] = self.steps[number]
            at += _align(master.numel())


def _lay_together(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors' values one after the other, each aligned, zero between them."""
    return torch.cat([F.pad(t.reshape(-1), (0, _align(t.numel()) - t.numel())) for t in tensors])


def _align(num_values: int) -> int:
    return -(-num_values // _ALIGNED_VALUES) * _ALIGNED_VALUES


def _read_gradient(master: Tensor) -> Tensor:
    assert master.grad is not None
    return master.grad


class MasterAdamW(MasterWeights):
    """AdamW in fp32, on masters. 8 bytes of states for each weight: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`.

    Weight decay applies to matrices only: vectors (norms, biases, DoRA magnitudes) are scales, not directions.
    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, Algorithm 2.
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
        # States exist from the start: running out of memory then happens here, not halfway into the first update.
        self._states = {
            name: {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
            for name, master in self.masters.items()
        }
        self._flat: _Flat | None = None

    @torch.no_grad()
    def hold_gradients(self) -> bool:
        """See `Optimizer`."""
        super().hold_gradients()
        masters = list(self.masters.values())
        is_alike = len({(master.dtype, master.device, master.ndim >= 2) for master in masters}) == 1
        small = sum(master.numel() for master in masters) <= _MOST_FLAT_VALUES
        if self._flat is None and is_alike and small and not self._rounded:
            self._flat = _Flat(masters, [self._states[name] for name in self.masters])
        return True

    def clear_gradients(self) -> None:
        if self._flat is None:
            super().clear_gradients()
        else:
            self._flat.gradient.zero_()

    @torch.no_grad()
    def update(self, *, learning_rate: float, gradient_factor: float = 1.0) -> None:
        """See `Optimizer`."""
        if self._flat is not None:
            self._update_flat(self._flat, learning_rate, gradient_factor)
            return
        gradients = self.gradients()
        if gradient_factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, gradient_factor)  # pyright: ignore[reportPrivateImportUsage]
        for is_matrix in (True, False):
            names = [n for n, m in self.masters.items() if m.grad is not None and (m.ndim >= 2) is is_matrix]
            if names:
                self._update_together(names, learning_rate, self._decay_of(self.masters[names[0]]))
        self.round_masters()
        self.clear_gradients()

    def update_one(self, name: str, learning_rate: float) -> None:
        """See `MasterWeights`."""
        self._update_together([name], learning_rate, self._decay_of(self.masters[name]))

    def _decay_of(self, master: Tensor) -> float:
        return self._weight_decay if master.ndim >= 2 else 0.0

    def _update_flat(self, flat: _Flat, learning_rate: float, gradient_factor: float) -> None:
        if gradient_factor != 1.0:
            flat.gradient.mul_(gradient_factor)
        masters = list(self.masters.values())
        decay = self._decay_of(masters[0])
        moments = [[flat.moments[kind]] for kind in _MOMENTS]
        flat.steps.add_(1)
        self._run_kernel([flat.values], [flat.gradient], moments, [flat.steps[0]], learning_rate, decay)
        torch.autograd.graph.increment_version(masters)
        flat.gradient.zero_()

    def _update_together(self, names: list[str], learning_rate: float, weight_decay: float) -> None:
        masters = [self.masters[name] for name in names]
        gradients = [master.grad for master in masters if master.grad is not None]
        states = [self._states[name] for name in names]
        moments = [[state[kind] for state in states] for kind in _MOMENTS]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)  # pyright: ignore[reportPrivateImportUsage]
        self._run_kernel(masters, gradients, moments, steps, learning_rate, weight_decay)
        # The kernel changes tensors without raising their versions, by which copies in lower precision know their age.
        torch.autograd.graph.increment_version(masters)

    def _run_kernel(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        moments: list[list[Tensor]],
        steps: list[Tensor],
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        # The kernel behind torch.optim.AdamW(fused=True). That class loads torch's compiler when it is made, two
        # seconds of every process; tests hold this call to its results.
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            weights,
            gradients,
            moments[0],
            moments[1],
            [],
            steps,
            lr=learning_rate,
            beta1=self._betas[0],
            beta2=self._betas[1],
            weight_decay=weight_decay,
            eps=self._epsilon,
            amsgrad=False,
            maximize=False,
        )


@torch.no_grad()
def copy_tensors(into: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy tensors by name, in place. Raises ValueError if names or shapes differ: broadcasting would hide it."""
    if different := into.keys() ^ source.keys():
        raise ValueError(f"tensor {sorted(different)[0]!r} is on one side only")
    for name, target in into.items():
        if target.shape != source[name].shape:
            raise ValueError(
                f"tensor {name!r}: shape {tuple(source[name].shape)}, expected {tuple(target.shape)}"
            )
        target.copy_(source[name])


def clip_factor(norm: float, *, clip_norm: float | None) -> float:
    """What gradients of this norm are multiplied by so that their norm does not exceed `clip_norm`."""
    if clip_norm is None:
        return 1.0
    # The small term is the one torch's own clipping uses, so that clipped arms of a comparison agree.
    return min(1.0, clip_norm / (norm + 1e-6))


@dataclass(slots=True)
class LossScale:
    """Dynamic loss scale for fp16, whose smallest gradients would otherwise round to zero.

    `value` multiplies the loss before backward and divides the gradients after it. An overflow halves it and the
    step is repeated; after `growth_interval` steps without one it doubles. Always a power of two, hence exact.
    With `enabled` false the value is 1 for ever.
    """

    enabled: bool
    value: float = 2.0**16
    steps_without_overflow: int = 0
    overflows: int = 0
    growth_interval: int = 2000
    largest: float = 2.0**24

    def __post_init__(self) -> None:
        if not self.enabled:
            self.value = 1.0

    def shrink(self) -> bool:
        """Halve after an overflow. False if it can't shrink: then the gradient itself is not finite."""
        if not self.enabled or self.value <= 1.0:
            return False
        self.value /= 2
        self.overflows += 1
        self.steps_without_overflow = 0
        return True

    def count_good_step(self) -> None:
        if not self.enabled:
            return
        self.steps_without_overflow += 1
        if self.steps_without_overflow >= self.growth_interval:
            self.value = min(self.largest, self.value * 2)
            self.steps_without_overflow = 0

"""Muon: matrices take steps of orthogonal momentum, everything else AdamW's.

S: matrices of a stack
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from tunesmith.training.optim import MasterAdamW, MasterWeights

# Root mean square of AdamW's updates in practice, in learning rates.
_ADAMW_RMS = 0.2
# Equal matrices are orthogonalised together up to this many values: enough to keep a GPU busy, little memory.
_STACK_VALUES = 1 << 26


def orthogonalize(momentum: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices of a stack (S, rows, columns), by five quintic Newton-Schulz steps.

    Singular values above about 1/500 of the norm come out between 0.65 and 1.25, not at 1: the polynomial is chosen for
    its slope at zero, which lets five steps do.
    Source: K. Jordan et al. 2024, Muon, https://kellerjordan.github.io/posts/muon/.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = momentum.bfloat16() if momentum.is_cuda else momentum.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(MasterWeights):
    """Momentum of the layers' matrices, orthogonalised; embeddings, heads, norms and biases by AdamW. fp32 masters.

    matrices: name -> rows of each matrix in it, for the names that Muon updates: of a merged `q_proj+k_proj+v_proj`,
              each part is orthogonalised by itself.

    An orthogonal matrix times 0.2 sqrt(max(rows, columns)) has entries of root mean square 0.2, for its rows or columns
    have length 1. That is what AdamW's updates have in practice: learning rate and weight decay mean the same for both.
    4 bytes of state for each value of a matrix, 8 for the rest.
    Source: Jordan et al. 2024; scale and decay: Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv:2502.16982,
    section 2.2.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        *,
        matrices: Mapping[str, Sequence[slice]],
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
    ) -> None:
        super().__init__(named)
        self._momentum, self._weight_decay = momentum, weight_decay
        self._buffers = {name: torch.zeros_like(self.masters[name]) for name in named if name in matrices}
        self._matrices = {name: matrices[name] for name in self._buffers}
        rest = {name: master for name, master in self.masters.items() if name not in matrices}
        self._rest = (
            MasterAdamW(rest, beta1=beta1, beta2=beta2, epsilon=epsilon, weight_decay=weight_decay)  # type: ignore[arg-type]
            if rest
            else None
        )

    @torch.no_grad()
    def update(self, *, learning_rate: float, gradient_factor: float = 1.0) -> None:
        """See `Optimizer`."""
        for stack in self._stacks():
            self._update_stack(stack, learning_rate, gradient_factor)
        if self._rest is not None:
            self._rest.update(learning_rate=learning_rate, gradient_factor=gradient_factor)
        self.round_masters()
        self.clear_gradients()

    def hold_gradients(self) -> bool:
        """See `Optimizer`. The rest clears gradients of its own accord."""
        return super().hold_gradients() and (self._rest is None or self._rest.hold_gradients())

    def _stacks(self) -> Iterator[list[tuple[str, slice]]]:
        """Matrices with a gradient, those of one shape together, as far as `_STACK_VALUES` allows."""
        shapes: dict[torch.Size, list[tuple[str, slice]]] = {}
        for name, parts in self._matrices.items():
            master = self.masters[name]
            if master.grad is not None:
                for rows in parts:
                    shapes.setdefault(master[rows].shape, []).append((name, rows))
        for shape, found in shapes.items():
            each = max(1, _STACK_VALUES // shape.numel())
            yield from (found[at : at + each] for at in range(0, len(found), each))

    def _update_stack(self, stack: list[tuple[str, slice]], learning_rate: float, factor: float) -> None:
        weights, gradients, buffers = [], [], []
        for name, rows in stack:
            gradient = self.gradient_of(name)
            assert gradient is not None
            weights.append(self.masters[name].detach()[rows])
            gradients.append(gradient[rows])
            buffers.append(self._buffers[name][rows])
        gradients_S = torch.stack(gradients) * factor
        buffers_S = torch.stack(buffers).lerp_(gradients_S, 1.0 - self._momentum)
        # Nesterov's look-ahead: the momentum as it will be after one more such gradient.
        updates_S = orthogonalize(gradients_S.lerp(buffers_S, self._momentum))
        rate = learning_rate * _ADAMW_RMS * math.sqrt(max(updates_S.shape[1:]))
        for weight, buffer, new, update in zip(weights, buffers, buffers_S, updates_S, strict=True):
            buffer.copy_(new)
            weight.mul_(1.0 - learning_rate * self._weight_decay).add_(update, alpha=-rate)

    def state_tensors(self) -> dict[str, Tensor]:
        """`momentum.NAME` of matrices; MasterAdamW's of the rest."""
        rest = {} if self._rest is None else self._rest.state_tensors()
        return {f"momentum.{name}": buffer for name, buffer in self._buffers.items()} | rest

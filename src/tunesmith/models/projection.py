"""One linear layer as it runs: one or several of a checkpoint's matrices merged by rows, with optional adapters.

`q_proj`, `k_proj`, `v_proj` of a block become one `Projection` of three parts. The frozen weight lies in the compute
dtype or quantised; a trained weight is an fp32 master whose copy in the compute dtype is made once per optimizer step.

T: tokens  I: inputs  O: outputs of all parts  R: ranks of all parts together
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from tunesmith.models.packed import PackedPlan, PackedTensors

# A product with fewer rows may take another kernel, and then differ in the last bit: never multiply fewer.
MIN_ROWS = 16
# Columns that adapters add to a joined weight come in multiples of this: 16 bytes, which fast products ask for.
RANK_MULTIPLE = 8


class PackedWeight(Protocol):
    """A frozen weight in another storage than the compute dtype (see packed.py). x: (T, I), grad: (T, O)."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The (O, I) matrix in `dtype`."""
        ...

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, differentiable in x; a compiler can trace around it."""
        ...

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same without a gradient, for a node that has its own: `gradient`."""
        ...

    def gradient(self, grad: Tensor) -> Tensor:
        """grad W."""
        ...

    def form(self) -> tuple[PackedTensors, PackedPlan] | None:
        """What `packed.project_packed` needs to be `linear`; None if it is not."""
        ...


class FakeQuantizer(Protocol):
    """Rounds the operands of a product as a quantised model will (see quantize.py)."""

    def linear(self, x: Tensor, weigh: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        """The product of rounded x (T, I) and rounded weight, differentiable as if neither were rounded.

        weigh: makes the fp32 (O, I) weight; may be called again in backward.
        """
        ...


class MasterCast:
    """The compute-dtype copy of one fp32 master, made again only after the master changed."""

    def __init__(self) -> None:
        self._version, self._copy = -1, None

    def of(self, master: Tensor, dtype: torch.dtype) -> Tensor:
        if master.dtype == dtype:
            return master
        copy = self._copy
        # An in-place update raises the version; a moved parameter changes its storage.
        if (
            copy is None
            or self._version != master._version
            or copy.device != master.device
            or copy.dtype != dtype
        ):
            copy = self._copy = master.detach().to(dtype)
            self._version = master._version
        return _UseCast.apply(master, copy) if master.requires_grad and torch.is_grad_enabled() else copy


class _UseCast(torch.autograd.Function):
    """Stands for `master.to(dtype)`, with the copy given."""

    @staticmethod
    def forward(ctx, master, copy):
        ctx.dtype = master.dtype
        return copy.view_as(copy)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.to(ctx.dtype), None


class LoraPart(nn.Module):
    """Adapter of one part: adds scale * B A x to its output. fp32.

    a: (rank, I). b: (outputs, rank). magnitude: (outputs,) with DoRA, else None.
    """

    def __init__(
        self, a: Tensor, b: Tensor, *, scale: float, alpha: float, magnitude: Tensor | None = None
    ) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.alpha = scale, alpha
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def delta(self) -> Tensor:
        """scale * B A in fp32, (outputs, I)."""
        return (self.b * self.scale) @ self.a


class LinearTensors(NamedTuple):
    """What a projection computes with. weight: (O, I), joined (O, I + R), or packed. a, b: adapted parts', fp32."""

    weight: Tensor | PackedTensors
    bias: Tensor | None
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]


class LinearPlan(NamedTuple):
    """How: rows and scale of each adapted part; equal for the same projection of all blocks.

    filler: columns of nothing that round R up, so that rows stay aligned. is_joined: the weight's last columns are B.
    packed: how a packed weight is read.
    """

    spans: tuple[tuple[int, int], ...]
    scales: tuple[float, ...]
    filler: int
    dropout: float
    num_outputs: int
    is_joined: bool
    packed: PackedPlan | None


class Projection(nn.Module):
    """y = x W^T + bias, plus the adapters of its parts.

    names:   the checkpoint's module names of the parts, in row order.
    sizes:   their numbers of outputs.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        weight: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.names, self.sizes, self.dtype = tuple(names), tuple(sizes), dtype
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.transposed = transposed  # the checkpoint stores (I, O), as GPT-2 does
        self.weight: nn.Parameter | None = nn.Parameter(weight, requires_grad=False)
        self.bias: nn.Parameter | None = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.packed: PackedWeight | None = None
        self.quantizer: FakeQuantizer | None = None
        self.adapters = nn.ModuleList([_NoAdapter() for _ in names])
        self.dropout, self.enabled = 0.0, True
        self._weight_cast, self._bias_cast = MasterCast(), MasterCast()
        self._joined: Tensor | None = None
        self._joined_versions: tuple[int, ...] = ()

    def rows(self) -> list[tuple[str, slice]]:
        """(name, rows) of each part."""
        found, at = [], 0
        for name, size in zip(self.names, self.sizes, strict=True):
            found.append((name, slice(at, at + size)))
            at += size
        return found

    def drop_adapter(self, number: int) -> None:
        self.adapters[number] = _NoAdapter()
        self._joined, self._joined_versions = None, ()

    def loras(self) -> list[tuple[str, slice, LoraPart]]:
        """(name, rows, adapter) of each adapted part."""
        return [
            (name, rows, adapter)
            for (name, rows), adapter in zip(self.rows(), self.adapters, strict=True)
            if isinstance(adapter, LoraPart)
        ]

    def dense(self) -> Tensor:
        """The weight without adapters in the compute dtype, differentiable if it is trained."""
        if self.packed is not None:
            return self.packed.dense(self.dtype)
        assert self.weight is not None
        return self._weight_cast.of(self.weight, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            return self.forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        rows = x.shape[0]
        if rows < MIN_ROWS and not torch.is_grad_enabled():
            return self._project(F.pad(x, (0, 0, 0, MIN_ROWS - rows)))[:rows]
        return self._project(x)

    def _project(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self._bias_cast.of(self.bias, self.dtype)
        if self.quantizer is not None and self.enabled:
            return self.quantizer.linear(x, self.merged, bias)
        loras = self.loras() if self.enabled else []
        if not loras:
            return self._base_output(x, bias)
        dropped = self.dropout > 0 and self.training
        if any(lora.magnitude is not None for _, _, lora in loras):
            return self._project_dora(x, bias, loras, F.dropout(x, self.dropout) if dropped else x)
        if dropped or x.device.type != "cpu" or torch.compiler.is_compiling():
            return self._add_lora(x, bias, loras, F.dropout(x, self.dropout) if dropped else x)
        base = self.packed if self.packed is not None else self.weight
        plan = tuple((rows, lora.scale) for _, rows, lora in loras)
        return _LoraLinear.apply(
            x, base, bias, plan, *(tensor for _, _, lora in loras for tensor in (lora.a, lora.b))
        )

    @property
    def has_plain_form(self) -> bool:
        """Whether `tensors` and `plan` say all there is: no DoRA, nothing rounded in training, and a packed weight that
        a compiler can read."""
        readable = self.quantizer is None and (self.packed is None or self.packed.form() is not None)
        return readable and all(lora.magnitude is None for _, _, lora in self.loras())

    def plan(self) -> LinearPlan:
        loras = self.loras() if self.enabled else []
        ranks = sum(lora.rank for _, _, lora in loras)
        form = None if self.packed is None else self.packed.form()
        return LinearPlan(
            tuple((rows.start, rows.stop) for _, rows, _ in loras),
            tuple(lora.scale for _, _, lora in loras),
            -ranks % RANK_MULTIPLE,
            self.dropout if self.training else 0.0,
            self.out_features,
            bool(loras) and self.weight is not None and not self.weight.requires_grad,
            None if form is None else form[1],
        )

    def tensors(self) -> LinearTensors:
        """See `segments.project`. With adapters on a frozen weight, weight and B lie side by side in one buffer, of
        which B's columns follow the adapters."""
        plan = self.plan()
        loras = self.loras() if plan.spans else []
        bias = None if self.bias is None else self._bias_cast.of(self.bias, self.dtype)
        form = None if self.packed is None else self.packed.form()
        weight = form[0] if form is not None else self._join(plan) if plan.is_joined else self.dense()
        return LinearTensors(
            weight, bias, tuple(lora.a for _, _, lora in loras), tuple(lora.b for _, _, lora in loras)
        )

    @torch.no_grad()
    def joined_columns(self) -> list[tuple[Tensor, Tensor, float]]:
        """(columns of the joined weight, B, scale) of every adapter whose B is joined to the weight: the columns are to
        be B * scale. Whoever asks writes them."""
        plan = self.plan()
        if not plan.is_joined:
            return []
        joined, column = self._make_joined(plan), self.in_features
        found: list[tuple[Tensor, Tensor, float]] = []
        for _, rows, lora in self.loras():
            found.append((joined[rows, column : column + lora.rank], lora.b, lora.scale))
            column += lora.rank
        self._joined_versions = tuple(b._version for _, b, _ in found)
        return found

    @torch.no_grad()
    def _join(self, plan: LinearPlan) -> Tensor:
        """(O, I + R): the weight, and after it the scaled B of every part at its rows and ranks."""
        joined = self._make_joined(plan)
        if tuple(lora.b._version for _, _, lora in self.loras()) != self._joined_versions:
            for columns, b, scale in self.joined_columns():
                columns.copy_(b * scale)
        return joined

    def _make_joined(self, plan: LinearPlan) -> Tensor:
        """The buffer of `_join`; B's columns are zero at first."""
        assert self.weight is not None
        inputs, ranks = self.in_features, sum(lora.rank for _, _, lora in self.loras())
        if self._joined is None or self._joined.device != self.weight.device:
            joined = self.weight.new_zeros(self.out_features, inputs + ranks + plan.filler, dtype=self.dtype)
            joined[:, :inputs] = self.weight
            # One copy: from now on the weight is a window into the buffer.
            self.weight = nn.Parameter(joined[:, :inputs], requires_grad=False)
            self._joined, self._joined_versions = joined, ()
        return self._joined

    def _base_output(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.packed is not None:
            return self.packed.linear(x, bias)
        return F.linear(x, self.dense(), bias)

    def _add_lora(self, x: Tensor, bias: Tensor | None, loras: list, x_adapter: Tensor) -> Tensor:
        """Plain definition: base output plus each part's adapter output."""
        pieces = {rows.start: lora for _, rows, lora in loras}
        added = []
        for _, rows in self.rows():
            lora = pieces.get(rows.start)
            if lora is None:
                added.append(x.new_zeros(*x.shape[:-1], rows.stop - rows.start))
            else:
                inner = F.linear(x_adapter, lora.a.to(x.dtype))
                added.append(F.linear(inner, (lora.b * lora.scale).to(x.dtype)))
        return self._base_output(x, bias) + (torch.cat(added, -1) if len(added) > 1 else added[0])

    def _project_dora(self, x: Tensor, bias: Tensor | None, loras: list, x_adapter: Tensor) -> Tensor:
        """DoRA: rows of W + BA are rescaled to a trained magnitude; their norm is a constant in backward.

        Source: Liu et al. 2024, arXiv:2402.09353, Eq. 5 and section 4.3.
        """
        weight = self.dense()
        base = self._base_output(x, None)
        pieces = {rows.start: lora for _, rows, lora in loras}
        outputs = []
        for _, rows in self.rows():
            lora, y = pieces.get(rows.start), base[..., rows]
            if lora is not None:
                inner = F.linear(F.linear(x_adapter, lora.a.to(x.dtype)), (lora.b * lora.scale).to(x.dtype))
                if lora.magnitude is None:
                    y = y + inner
                else:
                    norm = (weight[rows].detach().float() + lora.delta().detach()).norm(dim=1)
                    factor = (lora.magnitude / norm).to(x.dtype)
                    y = factor * (y + inner)
            outputs.append(y)
        y = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        return y if bias is None else y + bias

    def merged(self) -> Tensor:
        """Weight with the adapters folded in, fp32, (O, I); differentiable in what is trained.

        A master counts as what products see of it, and a folder stores: its copy in the compute dtype.
        """
        weight = self.packed.dense(torch.float32) if self.packed is not None else self.dense().float()
        loras = {rows.start: lora for _, rows, lora in self.loras()}
        if not loras:
            return weight
        parts = []
        for _, rows in self.rows():
            part, lora = weight[rows], loras.get(rows.start)
            if lora is not None:
                part = part + lora.delta()
                if lora.magnitude is not None:
                    part = part * (lora.magnitude / part.detach().norm(dim=1))[:, None]
            parts.append(part)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @torch.no_grad()
    def effective(self) -> Tensor:
        """`merged`, detached, in memory of its own."""
        merged = self.merged()
        return merged.clone() if merged is self.weight else merged


class _NoAdapter(nn.Module):
    """Stands at the place of a part without adapter."""


class _LoraLinear(torch.autograd.Function):
    """Base product and all adapters of a merged projection as one node, for eager CPU runs.

    Adds into slices of the output in place; never traced by a compiler (`Projection` sees to that).
    """

    @staticmethod
    def forward(ctx, x, base, bias, plan, *factors):
        y = F.linear(x, base.to(x.dtype), bias) if isinstance(base, Tensor) else base.product(x, bias)
        a_RI = torch.cat(factors[::2]).to(x.dtype)
        inner_TR = x @ a_RI.t()
        scaled = []
        for (rows, scale), b, inner in zip(plan, factors[1::2], _columns(inner_TR, factors), strict=True):
            scaled.append((b * scale).to(x.dtype))
            y[:, rows].addmm_(inner, scaled[-1].t())
        ctx.save_for_backward(x, a_RI, inner_TR, *scaled)
        ctx.base, ctx.plan = base, plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, a_RI, inner_TR, *scaled = ctx.saved_tensors
        grad_inner = torch.empty_like(inner_TR)
        grads_b, at = [], 0
        for (rows, scale), b in zip(ctx.plan, scaled, strict=True):
            columns = slice(at, at := at + b.shape[1])
            torch.mm(grad[:, rows], b, out=grad_inner[:, columns])
            grads_b.append((grad[:, rows].t() @ inner_TR[:, columns]).float() * scale)
        grad_a = (grad_inner.t() @ x).float().split([b.shape[1] for b in scaled])
        grad_x = None
        if ctx.needs_input_grad[0]:
            base = ctx.base
            grad_x = grad @ base.to(grad.dtype) if isinstance(base, Tensor) else base.gradient(grad)
            grad_x.addmm_(grad_inner, a_RI)
        pairs = [tensor for pair in zip(grad_a, grads_b, strict=True) for tensor in pair]
        return grad_x, None, None, None, *pairs


def _columns(inner_TR: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return inner_TR.split([a.shape[0] for a in factors[::2]], 1)

"""Distillation: at every target token the student learns what a teacher holds of the whole vocabulary.

The heads of both run over target rows only, a chunk at a time, and the gradient with respect to the student's hidden
states is formed in the forward pass, as SFT's is: nothing of rows x vocabulary outlives its chunk.

K: target tokens  C: tokens of a chunk  D: width  V: rows of the student's head  W: tokens that the tokenizer has
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tunesmith.job.objective import DistillSpec
from tunesmith.methods.objective import LossSum, Objective
from tunesmith.methods.sft import choose_chunk, round_up, scale_gradients
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.layout import Batch

_MEASURES = ("kl", "nll")
# A chunk here is logits of two models, their logarithms, probabilities and a gradient, where SFT's is logits alone.
_SMALLER = 4
_LEAST_ROWS = 16


class Teacher(NamedTuple):
    """model: frozen, in evaluation mode, on the student's device. num_tokens: tokens that the tokenizer of both has;
    rows of an embedding beyond are padding, of which the two may have different numbers."""

    model: CausalLM
    num_tokens: int


def distill_objective(spec: DistillSpec, teacher: Teacher) -> Objective:
    """`distill_loss`; measures are sums over target tokens: of the KL at the spec's temperature, and of the NLL."""
    return Objective(
        lambda model, batch: distill_loss(model, batch, spec, teacher),
        measures=_MEASURES,
        measures_tokens=True,
    )


def distill_loss(
    model: CausalLM, batch: Batch, spec: DistillSpec, teacher: Teacher, *, chunk: int | None = None
) -> LossSum:
    """Sum over target tokens of T^2 KL + sft_weight * NLL, nats.

    The KL is that of softmax(logits / T) over the tokenizer's tokens. Its gradient falls with 1 / T^2, so T^2 keeps the
    weight of the NLL beside it what it is (Hinton et al. 2015, arXiv:1503.02531, section 2).
    chunk: target tokens per piece of the heads; changes memory, never the result (up to rounding).
    """
    if batch.num_targets == 0:
        raise ValueError("a batch without target tokens has no loss")
    sources_K = round_up(batch.sources_K)
    with torch.no_grad():
        frozen_KD = teacher.model.hidden(batch.ids_T, batch.layout, sources_K)
    hidden_KD = model.hidden(batch.ids_T, batch.layout, sources_K)
    rows = chunk or max(_LEAST_ROWS, choose_chunk(model, hidden_KD.device) // _SMALLER)

    @torch.no_grad()
    def ask(span: slice) -> Tensor:
        return teacher.model.head(frozen_KD[span])[:, : teacher.num_tokens]

    if model.has_plain_head:
        sums = _HeadDivergence.apply(hidden_KD, model.head_weight, batch.targets_K, ask, rows, spec)
    else:

        def score(span: slice) -> tuple[Tensor, ...]:
            logits_CV = model.head(hidden_KD[span])
            return _Divergence.apply(logits_CV, ask(span), batch.targets_K[span], spec)

        spans = _cut(batch.num_targets, rows)
        found = [checkpoint(score, span, use_reentrant=False) for span in spans]
        sums = [torch.stack(values).sum() for values in zip(*found, strict=True)]
    total, kl, nll = sums
    return LossSum(total, batch.num_targets, {"kl": kl, "nll": nll})


def measure_kl(
    student_CW: Tensor,
    teacher_CW: Tensor,
    *,
    direction: Literal["forward_kl", "reverse_kl"],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """KL of softmax(logits / T) in nats, (C,), and the gradient of T^2 KL by the student's logits, (C, W).

    forward_kl: sum p_T log(p_T / p_S): the student shall cover whatever the teacher finds likely.
    reverse_kl: sum p_S log(p_S / p_T): it shall say nothing that the teacher finds unlikely.
    """
    student, teacher = ((logits / temperature).log_softmax(-1) for logits in (student_CW, teacher_CW))
    if direction == "forward_kl":
        probs = teacher.exp()
        kl_C = (teacher.sub_(student).mul_(probs)).sum(-1)
        gradient = student.exp_().sub_(probs)
    else:
        gap = student - teacher
        gradient = student.exp_()
        kl_C = (gradient * gap).sum(-1)
        gradient.mul_(gap.sub_(kl_C[:, None]))
    # d T^2 KL / d logits = T^2 (d KL / d (logits / T)) / T
    return kl_C, gradient.mul_(temperature)


def _score(logits_CV: Tensor, teacher_CW: Tensor, targets_C: Tensor, spec: DistillSpec) -> tuple[Tensor, ...]:
    """Sums over the chunk of loss, KL and NLL, and the loss's gradient by the logits, (C, V), in fp32 (fp64 stays)."""
    wide = torch.float64 if logits_CV.dtype == torch.float64 else torch.float32
    logits_CV, picked_C1 = logits_CV.to(wide), targets_C[:, None]
    width = teacher_CW.shape[1]
    kl_C, gradient = measure_kl(
        logits_CV[:, :width], teacher_CW.to(wide), direction=spec.loss, temperature=spec.temperature
    )
    gradient = F.pad(gradient, (0, logits_CV.shape[1] - width))
    # As SFT has it: over all rows of the head.
    logps_CV = logits_CV.log_softmax(-1)
    kl, nll = kl_C.sum(), -logps_CV.gather(1, picked_C1).sum()
    if spec.sft_weight:
        gradient.add_(logps_CV.exp_(), alpha=spec.sft_weight)
        gradient.scatter_add_(1, picked_C1, gradient.new_full((1, 1), -spec.sft_weight).expand_as(picked_C1))
    return spec.temperature**2 * kl + spec.sft_weight * nll, kl, nll, gradient


def _cut(count: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


class _HeadDivergence(torch.autograd.Function):
    """Sums over all target tokens of loss, KL and NLL, of logits hidden @ weight^T. Only the loss has a gradient.

    ask: the teacher's logits of a span of target tokens. Rows of `hidden_KD` beyond the targets are fillers.
    """

    @staticmethod
    def forward(
        ctx, hidden_KD, weight_VD, targets_K, ask: Callable[[slice], Tensor], rows: int, spec: DistillSpec
    ):
        wide = torch.float64 if hidden_KD.dtype == torch.float64 else torch.float32
        sums = torch.zeros(3, dtype=wide, device=hidden_KD.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_KD) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        for span in _cut(len(targets_K), rows):
            *found, gradient = _score(hidden_KD[span] @ weight_VD.t(), ask(span), targets_K[span], spec)
            sums += torch.stack(found)
            gradient = gradient.to(hidden_KD.dtype)
            if grad_hidden is not None:
                torch.mm(gradient, weight_VD, out=grad_hidden[span])
            if grad_weight is not None:
                grad_weight += gradient.t() @ hidden_KD[span]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        total, kl, nll = (value.clone() for value in sums)
        ctx.mark_non_differentiable(kl, nll)
        return total, kl, nll

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *scale_gradients(ctx, grad), None, None, None, None


class _Divergence(torch.autograd.Function):
    """The same of a chunk's logits, for heads that are more than a product."""

    @staticmethod
    def forward(ctx, logits_CV, teacher_CW, targets_C, spec: DistillSpec):
        total, kl, nll, gradient = _score(logits_CV, teacher_CW, targets_C, spec)
        ctx.save_for_backward(gradient.to(logits_CV.dtype))
        ctx.mark_non_differentiable(kl, nll)
        return total, kl, nll

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(gradient.dtype), None, None, None

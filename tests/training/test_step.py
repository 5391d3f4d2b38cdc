import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from train_tiny import LossSum, TinyDecoder, make_batch, make_rows, sum_loss

from tunesmith.core.errors import TrainingFailed
from tunesmith.training.optim import LossScale, MasterAdamW
from tunesmith.training.step import Stepper

CPU = torch.device("cpu")


def make_stepper(model, *, budget=10_000, loss=sum_loss, batch=make_batch, clip_norm=None, fp16=False):
    optimizer = MasterAdamW(dict(model.named_parameters()))
    return Stepper(
        model,
        optimizer,
        make_batch=batch,
        loss=loss,
        device=CPU,
        budget_tokens=budget,
        clip_norm=clip_norm,
        scale=LossScale(enabled=fp16),
    )


def gradients_of(model):
    """Gradients of the mean loss over all target tokens of 8 rows, without any of our step code."""
    model.zero_grad()
    found = sum_loss(model, make_batch(make_rows(8), CPU))
    (found.total / found.num_targets).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("budget", [1, 13, 30, 10_000])
def test_one_batch_of_eight_rows_equals_eight_of_one_and_everything_between(budget):
    model = TinyDecoder()
    expected = gradients_of(model)
    model.zero_grad()
    stepper = make_stepper(model, budget=budget)
    rows = make_rows(8)
    (loss_sum,), norm = stepper._accumulate(rows, sum(r.num_targets for r in rows), 1, [])
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)
    reference = sum_loss(model, make_batch(rows, CPU))
    assert loss_sum == pytest.approx(reference.total.item(), rel=1e-5)
    assert norm == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in expected.values())), rel=1e-4)


def test_the_loss_of_a_step_is_the_mean_over_tokens_not_over_rows():
    # Zero head: every prediction is uniform, so each token costs ln 23, whatever the rows' lengths.
    model = TinyDecoder()
    nn.init.zeros_(model.head.weight)
    result = make_stepper(model, budget=1).take(make_rows(6), step=1, learning_rate=0.0)
    assert result.loss == pytest.approx(math.log(23), rel=1e-6)
    assert result.num_target_tokens == sum(r.num_targets for r in make_rows(6))
    assert result.num_tokens == sum(len(r.ids) for r in make_rows(6))


def test_a_clipped_step_still_reports_the_norm_before_clipping():
    model = TinyDecoder()
    free = make_stepper(TinyDecoder()).take(make_rows(4), step=1, learning_rate=0.0)
    clipped = make_stepper(model, clip_norm=free.grad_norm / 2).take(make_rows(4), step=1, learning_rate=0.0)
    assert clipped.grad_norm == pytest.approx(free.grad_norm)


def poison(place, *, in_gradient):
    """A loss that is not finite for one row only: `inf` forward, or a finite value with an infinite slope."""

    def batch(rows, device):
        return make_batch(rows, device), any(row.origin.place == place for row in rows)

    def loss(model, pair):
        found = sum_loss(model, pair[0])
        if not pair[1]:
            return found
        extra = model.head.weight.sum() * 0.0
        extra = extra.sqrt() if in_gradient else extra + torch.inf
        return LossSum(found.total + extra, found.num_targets)

    return batch, loss


@pytest.mark.parametrize(
    ("in_gradient", "finding"), [(False, "the loss is inf"), (True, "the gradient norm is nan")]
)
def test_a_row_that_is_not_finite_stops_the_step_is_named_and_changes_no_weight(in_gradient, finding):
    batch, loss = poison("train.jsonl:3", in_gradient=in_gradient)
    model = TinyDecoder()
    before = {name: p.clone() for name, p in model.named_parameters()}
    stepper = make_stepper(model, batch=batch, loss=loss, budget=20)
    with pytest.raises(TrainingFailed, match=f"step 7: {finding} because of train.jsonl:3; .*Repair"):
        stepper.take(make_rows(8), step=7, learning_rate=0.1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all((t == 0).all() for t in stepper.optimizer.state_tensors().values())
    assert not stepper.optimizer.gradients()


def test_broken_weights_are_told_apart_from_broken_rows():
    model = TinyDecoder()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(TrainingFailed, match=r"for each of train.jsonl:1, .* and 3 more; .*learning_rate"):
        make_stepper(model).take(make_rows(8), step=1, learning_rate=0.1)


def out_of_memory_above(limit, *, backward=False):
    """A loss that fails as the allocator does when a micro-batch has more than `limit` padded tokens."""

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise torch.OutOfMemoryError("CUDA out of memory")

    def loss(model, batch):
        found = sum_loss(model, batch)
        if batch[0].numel() <= limit:
            return found
        if backward:
            return LossSum(Explode.apply(found.total), found.num_targets)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    return loss


@pytest.mark.parametrize("backward", [False, True])
def test_running_out_of_memory_halves_the_micro_batch_and_gives_the_same_step(backward):
    plain, short = TinyDecoder(), TinyDecoder()
    expected = make_stepper(plain).take(make_rows(8), step=1, learning_rate=0.01)
    stepper = make_stepper(short, loss=out_of_memory_above(30, backward=backward))
    result = stepper.take(make_rows(8), step=1, learning_rate=0.01)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert_close(dict(short.named_parameters()), dict(plain.named_parameters()), rtol=1e-3, atol=1e-4)
    assert stepper.budget_tokens <= 30
    assert "out of memory, repeated with" in result.notes[-1]


def test_a_single_row_that_does_not_fit_ends_the_run_and_is_named():
    with pytest.raises(
        TrainingFailed, match=r"out of memory with one row of \d+ tokens \(train.jsonl:\d\).*max_tokens"
    ):
        make_stepper(TinyDecoder(), loss=out_of_memory_above(2)).take(
            make_rows(8), step=1, learning_rate=0.01
        )


def test_other_runtime_errors_are_not_taken_for_lack_of_memory():
    def loss(model, batch):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        make_stepper(TinyDecoder(), loss=loss).take(make_rows(2), step=1, learning_rate=0.01)


def test_an_fp16_overflow_repeats_the_step_with_a_smaller_scale_and_the_same_gradient():
    # A gradient of 64 over a few targets, times the first scale 65536, is above fp16's largest number, 65504.
    weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.float16))
    model = nn.Module()
    model.weight = weight

    def loss(model, batch):
        return LossSum((model.weight * 64).float().sum(), 1)

    rows = make_rows(1)
    stepper = make_stepper(model, loss=loss, batch=lambda rows, device: rows, fp16=True)
    result = stepper.take(rows, step=1, learning_rate=0.25)
    assert stepper.scale.value < 65536
    assert stepper.scale.overflows >= 1
    # Four gradients of 64 / targets: the norm is 2 * 64 / targets, unscaled.
    assert result.grad_norm == pytest.approx(128 / rows[0].num_targets, rel=1e-3)
    assert_close(weight.detach(), torch.full((2, 2), -0.25, dtype=torch.float16))


def test_an_fp16_gradient_that_no_scale_helps_stops_the_run():
    batch, loss = poison("train.jsonl:1", in_gradient=True)
    model = TinyDecoder(dtype=torch.float16)
    stepper = make_stepper(model, batch=batch, loss=loss, fp16=True)
    with pytest.raises(TrainingFailed, match=r"gradient norm is nan because of train\.jsonl:1"):
        stepper.take(make_rows(3), step=1, learning_rate=0.1)
    assert stepper.scale.value == 1.0


def test_a_row_without_targets_contributes_nothing_and_a_step_without_any_is_refused():
    rows = make_rows(3)
    silent = type(rows[0])(rows[0].ids, [0] * len(rows[0].ids), rows[0].origin, "x")
    with_it = make_stepper(TinyDecoder()).take([silent, *rows[1:]], step=1, learning_rate=0.0)
    without = make_stepper(TinyDecoder()).take(rows[1:], step=1, learning_rate=0.0)
    assert (with_it.loss, with_it.grad_norm) == (without.loss, without.grad_norm)
    with pytest.raises(TrainingFailed, match=r"no target token in train\.jsonl:1"):
        make_stepper(TinyDecoder()).take([silent], step=1, learning_rate=0.0)

"""Weights updated while gradients are made: the same training, and never all gradients at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from segment_tools import open_model
from tiny_models import make_rows as pack_rows
from train_tiny import TinyDecoder, make_batch, make_rows, make_spec, run_tiny, sum_loss

from tunesmith.core.errors import TrainingFailed
from tunesmith.methods.sft import sft_loss
from tunesmith.models.layout import make_batch as pack_batch
from tunesmith.models.segments import Segments
from tunesmith.training.low_bit_adamw import AdamW8bit, AdamWBf16
from tunesmith.training.optim import LossScale, MasterAdamW
from tunesmith.training.step import Stepper

CPU = torch.device("cpu")
OPTIMIZERS: dict[str, Any] = {"adamw": MasterAdamW, "adamw-8bit": AdamW8bit, "adamw-bf16": AdamWBf16}


def make_stepper(name: str, dtype: torch.dtype, *, in_backward: bool, loss: Any = sum_loss) -> Stepper:
    model = TinyDecoder(dtype=dtype)
    return Stepper(
        model,
        OPTIMIZERS[name](dict(model.named_parameters()), weight_decay=0.01),
        make_batch=make_batch,
        loss=loss,
        device=CPU,
        budget_tokens=10_000,
        clip_norm=None,
        scale=LossScale(enabled=False),
        in_backward=in_backward,
    )


def take_steps(stepper: Stepper, count: int = 4) -> list[tuple[float, float]]:
    taken = []
    for step in range(count):
        result = stepper.take(make_rows(6, seed=step), step=step + 1, learning_rate=0.01)
        taken.append((result.loss, result.grad_norm))
    return taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_same_training_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    after, during = (make_stepper(name, dtype, in_backward=choice) for choice in (False, True))
    expected, found = take_steps(after), take_steps(during)
    assert [loss for loss, _ in found] == [loss for loss, _ in expected]
    assert [norm for _, norm in found] == pytest.approx([norm for _, norm in expected], rel=1e-6)
    wanted, got = (
        {**stepper.optimizer.masters, **stepper.optimizer.state_tensors()} for stepper in (after, during)
    )
    wanted |= {f"model.{key}": tensor for key, tensor in after.model.state_dict().items()}
    got |= {f"model.{key}": tensor for key, tensor in during.model.state_dict().items()}
    for key, tensor in wanted.items():
        assert torch.equal(got[key], tensor), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_two_gradients_are_there_at_once(name: str) -> None:
    stepper = make_stepper(name, torch.bfloat16, in_backward=True)
    optimizer, most = stepper.optimizer, 0
    update_one = optimizer.update_one  # type: ignore[attr-defined]

    def count(*arguments: Any) -> None:
        nonlocal most
        most = max(most, len(optimizer.gradients()))  # type: ignore[attr-defined]
        update_one(*arguments)

    optimizer.update_one = count  # type: ignore[attr-defined]
    take_steps(stepper, 1)
    assert most == 1
    assert not optimizer.gradients()  # type: ignore[attr-defined]


@pytest.mark.parametrize("levels", ["keep", "cheap", "recompute", "offload"])
def test_an_own_decoder_learns_the_same_whatever_it_keeps(hf_folders: Any, levels: Any) -> None:
    """Weights change while earlier blocks still wait for their backward pass, which reads its own; tied embeddings and
    head are one weight, whose gradient is complete at the very end."""

    def run(in_backward: bool) -> dict[str, torch.Tensor]:
        model = open_model(hf_folders("llama-tied")[0], rank=0)
        model.segments, model.levels = Segments(compiled=False), (levels,) * len(model.levels)
        stepper = Stepper(
            model,
            MasterAdamW(dict(model.named_trainable())),
            make_batch=lambda rows, where: pack_batch(rows, device=where),
            loss=sft_loss,
            device=CPU,
            budget_tokens=10_000,
            clip_norm=None,
            scale=LossScale(enabled=False),
            in_backward=in_backward,
        )
        for step in range(3):
            stepper.take(pack_rows([20, 33, 7], seed=step), step=step + 1, learning_rate=0.01)
        return {name: weight.detach() for name, weight in model.named_trainable()}

    during, after = run(True), run(False)
    for name, weight in after.items():
        assert torch.equal(during[name], weight), name


def test_a_rehearsal_leaves_weights_and_states_as_they_are() -> None:
    rehearsed, plain = (make_stepper("adamw", torch.float32, in_backward=True) for _ in range(2))
    assert rehearsed.rehearse(make_rows(6))
    assert take_steps(rehearsed) == take_steps(plain)


def test_a_loss_that_is_not_finite_changes_nothing_and_names_the_row() -> None:
    stepper = make_stepper("adamw", torch.float32, in_backward=True)
    with torch.no_grad():
        stepper.model.embed.weight[7] = float("nan")
    before = [parameter.clone() for parameter in stepper.model.parameters()]
    with pytest.raises(TrainingFailed, match="the loss is nan"):
        take_steps(stepper, 1)
    for parameter, was in zip(stepper.model.parameters(), before, strict=True):
        assert torch.equal(parameter, was) or was.isnan().any()


def test_a_gradient_that_is_not_finite_ends_the_run() -> None:
    class Breaking(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return grad * float("inf")

    def breaking_loss(model: Any, batch: Any) -> Any:
        found = sum_loss(model, batch)
        return type(found)(Breaking.apply(found.total), found.num_targets)

    stepper = make_stepper("adamw", torch.float32, in_backward=True, loss=breaking_loss)
    with pytest.raises(TrainingFailed, match=r"step 1: the gradient norm is (nan|inf)"):
        take_steps(stepper, 1)


def test_a_step_that_takes_two_forward_passes_is_refused() -> None:
    stepper = make_stepper("adamw", torch.float32, in_backward=True)
    stepper.budget_tokens = 20
    with pytest.raises(
        TrainingFailed, match=r"take \d+ forward passes of 20; with train.optimizer_in_backward"
    ):
        take_steps(stepper, 1)


def test_a_run_with_it_ends_as_one_without(tmp_path: Path) -> None:
    def run(folder: Path, **more: Any) -> dict[str, torch.Tensor]:
        spec = make_spec(epochs=2, clip_norm=None, micro_batch_tokens="auto", **more)
        model = TinyDecoder()
        run_tiny(folder, spec, model=model)
        return model.state_dict()

    during, after = run(tmp_path / "during", optimizer_in_backward=True), run(tmp_path / "after")
    for name, tensor in after.items():
        assert torch.equal(during[name], tensor), name

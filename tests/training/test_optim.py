import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tunesmith.training.optim import LossScale, MasterAdamW, clip_factor, copy_tensors


def matrix(value, dtype=torch.float32):
    return nn.Parameter(torch.full((2, 2), value, dtype=dtype))


def test_the_first_step_moves_every_weight_by_the_learning_rate():
    # Adam's first update is g / |g| = sign(g), times the rate.
    weight = matrix(1.0)
    optimizer = MasterAdamW({"w": weight})
    (weight * 3.0).sum().backward()
    optimizer.update(learning_rate=0.1)
    assert_close(weight.detach(), torch.full((2, 2), 0.9))


def test_updates_too_small_for_bf16_are_kept_by_the_master_and_appear_when_they_add_up():
    # bf16 has 8 bits of mantissa: below 1.0 its step is 1/256 = 0.0039. Ten steps of 0.0005 make 0.005.
    weight = matrix(1.0, torch.bfloat16)
    optimizer = MasterAdamW({"w": weight})
    seen = []
    for _ in range(10):
        weight.sum().backward()
        optimizer.update(learning_rate=0.0005)
        seen.append(weight[0, 0].item())
    assert seen[0] == 1.0, "one update alone rounds away"
    assert_close(optimizer.masters["w"].detach(), torch.full((2, 2), 0.995))
    assert seen[-1] == pytest.approx(0.995, abs=0.002)


def test_gradients_of_bf16_weights_are_added_up_in_fp32():
    # 1 + 1/512 is not a bf16 number; the fp32 sum is exact.
    weight = matrix(0.0, torch.bfloat16)
    optimizer = MasterAdamW({"w": weight})
    weight.sum().backward()
    (weight * (1 / 512)).sum().backward()
    assert optimizer.gradients()[0].dtype == torch.float32
    assert optimizer.gradients()[0][0, 0].item() == 1 + 1 / 512
    assert weight.grad is None


def test_weight_decay_shrinks_matrices_and_leaves_vectors():
    weight, scale = matrix(1.0), nn.Parameter(torch.ones(2))
    optimizer = MasterAdamW({"w": weight, "scale": scale}, weight_decay=0.5)
    (weight.sum() * 0 + scale.sum() * 0).backward()
    optimizer.update(learning_rate=0.1)
    assert_close(weight.detach(), torch.full((2, 2), 0.95))
    assert_close(scale.detach(), torch.ones(2))


def test_gradients_above_the_largest_norm_are_scaled_down_to_it():
    # (3, 4) has norm 5; clipped to 1 it is multiplied by 1/5.
    assert clip_factor(5.0, clip_norm=1.0) == pytest.approx(0.2)
    assert clip_factor(0.5, clip_norm=1.0) == 1.0
    assert clip_factor(5.0, clip_norm=None) == 1.0


def test_the_gradient_norm_spans_all_parameters():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = MasterAdamW({"a": a, "b": b})
    (3 * a + 4 * b).sum().backward()
    assert optimizer.gradient_norm().item() == pytest.approx(5.0)


def test_state_saved_and_loaded_into_a_fresh_optimizer_continues_identically():
    def make():
        weight = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16))
        return weight, MasterAdamW({"w": weight}, weight_decay=0.1)

    def advance(weight, optimizer, steps):
        for _ in range(steps):
            (weight.float() ** 2).sum().backward()
            optimizer.update(learning_rate=0.01)

    weight, optimizer = make()
    advance(weight, optimizer, 3)
    saved = {k: v.clone() for k, v in optimizer.state_tensors().items()}
    masters = {k: v.detach().clone() for k, v in optimizer.masters.items()}
    advance(weight, optimizer, 3)

    other, continued = make()
    continued.load(weights=masters, states=saved)
    advance(other, continued, 3)
    assert torch.equal(other, weight)
    assert torch.equal(continued.masters["w"], optimizer.masters["w"])


def test_tensors_of_another_shape_or_name_are_refused_instead_of_broadcast():
    with pytest.raises(ValueError, match=r"shape \(1,\), expected \(3,\)"):
        copy_tensors({"a": torch.zeros(3)}, {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="'b' is on one side only"):
        copy_tensors({"a": torch.zeros(3)}, {"a": torch.zeros(3), "b": torch.zeros(1)})


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        MasterAdamW({})


def test_the_loss_scale_halves_on_overflow_and_doubles_after_enough_good_steps():
    scale = LossScale(enabled=True, value=8.0, growth_interval=2)
    assert scale.shrink()
    assert scale.value == 4.0
    scale.count_good_step()
    scale.count_good_step()
    assert scale.value == 8.0
    scale.count_good_step()
    scale.shrink()
    scale.count_good_step()
    assert scale.value == 4.0, "an overflow starts the count anew"


def test_a_loss_scale_of_one_can_shrink_no_further():
    assert not LossScale(enabled=True, value=1.0).shrink()
    assert not LossScale(enabled=False).shrink()
    assert LossScale(enabled=False).value == 1.0


def test_ten_steps_equal_those_of_torchs_own_adamw_bit_for_bit():
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-6, "weight_decay": 0.1}
    optimizer = MasterAdamW({"w": ours}, **settings)
    reference = torch.optim.AdamW([theirs], betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, fused=True)
    for step in range(10):
        for weight in (ours, theirs):
            (weight**2).sum().backward()
        optimizer.update(learning_rate=0.01 * (step + 1))
        reference.param_groups[0]["lr"] = 0.01 * (step + 1)
        reference.step()
        reference.zero_grad()
    assert torch.equal(ours, theirs)


def test_an_update_raises_the_version_of_every_weight():
    # Models that keep a rounded copy of an fp32 weight make it again only when the version changed.
    weights = {"matrix": matrix(1.0), "vector": nn.Parameter(torch.ones(2))}
    optimizer = MasterAdamW(weights)
    before = {name: weight._version for name, weight in weights.items()}
    (weights["matrix"].sum() + weights["vector"].sum()).backward()
    optimizer.update(learning_rate=0.1)
    assert all(weight._version > before[name] for name, weight in weights.items())

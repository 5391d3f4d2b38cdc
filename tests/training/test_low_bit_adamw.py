"""8-bit states against fp32 ones and bitsandbytes; stochastic rounding by its statistics."""

import gc
import importlib.util
import math
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tunesmith.training.blockwise import make_levels, quantize
from tunesmith.training.low_bit_adamw import (
    SMALLEST_QUANTIZED,
    AdamW8bit,
    AdamWBf16,
    _take_block_step,
    draw_noise,
    round_stochastically,
)
from tunesmith.training.optim import MasterAdamW

SIZE = 96  # 96 x 96 is above SMALLEST_QUANTIZED, and no multiple of 256 in a piece's end


def fit(optimizer_class, *, device="cpu", dtype=torch.float32, steps=200, rate=0.01, **settings):
    """Losses of a two-layer net that learns a fixed random one, on the same 256 rows and order for all."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    inputs = draw(256, SIZE)
    targets = (inputs @ draw(SIZE, SIZE) * SIZE**-0.5).tanh() @ draw(SIZE, SIZE) * SIZE**-0.5
    named = {
        "first": nn.Parameter((draw(SIZE + 1, SIZE) * SIZE**-0.5).to(dtype)),
        "bias": nn.Parameter(torch.zeros(SIZE + 1, dtype=dtype, device=device)),
        "second": nn.Parameter((draw(SIZE, SIZE + 1) * SIZE**-0.5).to(dtype)),
    }
    assert named["first"].numel() > SMALLEST_QUANTIZED
    optimizer = optimizer_class(named, **settings)
    losses = []
    for _ in range(steps):
        hidden = (inputs @ named["first"].float().t() + named["bias"].float()).tanh()
        loss = (hidden @ named["second"].float().t() - targets).square().mean()
        loss.backward()
        optimizer.update(learning_rate=rate)
        losses.append(loss.item())
    return losses, named, optimizer


def test_with_8_bit_states_the_loss_follows_that_of_fp32_states(device):
    exact, _, _ = fit(MasterAdamW, device=device)
    found, _, _ = fit(AdamW8bit, device=device)
    assert exact[-1] < 0.1 * exact[0]
    # Within 5% of the loss wherever the curve is, and 1% of where it began.
    for expected, loss in zip(exact, found, strict=True):
        assert abs(loss - expected) <= 0.05 * expected + 0.01 * exact[0]


def test_bf16_weights_without_masters_learn_as_far_as_their_rounding_allows(device):
    exact, _, _ = fit(MasterAdamW, device=device, dtype=torch.bfloat16, rate=0.003)
    found, named, _ = fit(AdamWBf16, device=device, dtype=torch.bfloat16, rate=0.003)
    assert all(weight.dtype == torch.bfloat16 for weight in named.values())
    for expected, loss in zip(exact, found, strict=True):
        assert abs(loss - expected) <= 0.05 * expected + 0.02 * exact[0]


def test_the_first_step_is_that_of_fp32_states(device):
    # Nothing has been quantised yet.
    _, exact, _ = fit(MasterAdamW, device=device, steps=1, weight_decay=0.1)
    _, found, _ = fit(AdamW8bit, device=device, steps=1, weight_decay=0.1)
    assert_close(found, exact, rtol=1e-5, atol=1e-6)


def test_small_tensors_keep_fp32_states_and_take_adamws_steps():
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-6, "weight_decay": 0.1}
    pair = AdamW8bit({"w": ours}, **settings), MasterAdamW({"w": theirs}, **settings)
    for step in range(10):
        for weight, optimizer in zip((ours, theirs), pair, strict=True):
            (weight**2).sum().backward()
            optimizer.update(learning_rate=0.01 * (step + 1), gradient_factor=0.5)
    assert_close(ours, theirs)


def test_states_take_two_bytes_a_weight():
    _, named, optimizer = fit(AdamW8bit, steps=1)
    large = [name for name, weight in named.items() if weight.numel() >= SMALLEST_QUANTIZED]
    states = optimizer.state_tensors()
    for name in large:
        held = sum(t.numel() * t.element_size() for key, t in states.items() if key.endswith(f".{name}"))
        # Two codes, two fp32 scales for each 256 values, the last block filled up, and the step.
        assert 2.0 <= held / named[name].numel() < 2.11


def test_pieces_and_blocks_do_not_show_in_the_result(monkeypatch):
    _, whole, _ = fit(AdamW8bit, steps=5)
    monkeypatch.setattr("tunesmith.training.low_bit_adamw._PIECE_BLOCKS", {"cpu": 7})
    _, pieces, _ = fit(AdamW8bit, steps=5)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_a_second_moment_above_zero_never_becomes_zero():
    weight = nn.Parameter(torch.zeros(SMALLEST_QUANTIZED))
    optimizer = AdamW8bit({"w": weight})
    gradient = torch.full_like(
        weight, 1e-6
    )  # squared, 1e-12 of its block's largest: far below the lowest level
    gradient[::256] = 1.0
    weight.grad = gradient
    optimizer.update(learning_rate=0.01)
    after = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.update(learning_rate=0.01)
    # fp32 states move by less than the rate once the gradient has stopped; a second moment of zero by 0.01 * 90.
    assert (weight - after).abs().max() < 0.01


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fifty_steps_stay_close_to_bitsandbytes(weight_decay):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    aim = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = AdamW8bit({"w": ours}, weight_decay=weight_decay)
    reference = bitsandbytes.optim.AdamW8bit([theirs], lr=0.01, weight_decay=weight_decay)
    for step in range(50):
        ((ours - aim) ** 2).sum().backward()
        optimizer.update(learning_rate=0.01)
        ((theirs - aim) ** 2).sum().backward()
        reference.step()
        reference.zero_grad()
        if step == 0:
            for kind, state in (("exp_avg", "state1"), ("exp_avg_sq", "state2")):
                levels = make_levels(torch.device("cpu"), signed=kind == "exp_avg").values
                codes, others = optimizer.state_tensors()[f"{kind}.w"], reference.state[theirs][state]
                apart = levels[codes.view(-1).int()] - levels[others.view(-1).int()]
                # One level of the widest gap; theirs are not the nearest everywhere.
                assert apart.abs().max() < 0.0142
    moved = (ours - start).abs().mean().item()
    assert moved > 0.2
    assert (ours - theirs).abs().mean().item() < 0.01 * moved


# --- stochastic rounding --------------------------------------------------------------------------------------------


def noise_for(x, seed=0):
    return draw_noise(x.shape, device=x.device, generator=torch.Generator(x.device).manual_seed(seed))


def test_rounding_is_to_one_of_the_two_neighbours_and_exact_on_average(device):
    # Between 1 and 1 + 1/128 in quarters: a quarter, a half, three quarters go up, and the same below zero.
    count = 1 << 18
    for share in (0.25, 0.5, 0.75, 1 / 65536):
        for sign in (1.0, -1.0):
            x = torch.full((count,), sign * (1 + share / 128), device=device)
            rounded = round_stochastically(x, noise_for(x)).float()
            assert set(rounded.tolist()) <= {sign, sign * (1 + 1 / 128)}
            up = (rounded.abs() > 1).double().mean().item()
            assert up == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / count))


def test_what_bf16_can_hold_stays_as_it_is(device):
    x = torch.randn(100_000, device=device).bfloat16().float()
    assert torch.equal(round_stochastically(x, noise_for(x)).float(), x)
    zero = torch.zeros(10, device=device)
    assert torch.equal(round_stochastically(zero, noise_for(zero)).float(), zero)


def test_the_mean_over_many_values_is_unbiased():
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(3))
    error = round_stochastically(x, noise_for(x)).double() - x.double()
    # Each error is below one step, 2^-7 of the value's power of two.
    assert abs(error.mean().item()) < 5 * error.std().item() / math.sqrt(x.numel())


def test_a_thousand_tiny_updates_add_up_where_rounding_to_nearest_loses_them_all(device):
    # Adam's update of a constant gradient is the rate: 1,000 x 1e-5 from 1 is 0.99. A step of bf16 below 1 is 0.0039.
    weight = nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16, device=device))
    optimizer = AdamWBf16({"w": weight})
    nearest = torch.ones((), dtype=torch.bfloat16)
    for _ in range(1000):
        weight.grad = None
        weight.float().sum().backward()
        optimizer.update(learning_rate=1e-5)
        nearest -= 1e-5
    assert nearest.item() == 1.0
    # 8,192 walks of expectation 0.01, each of standard deviation sqrt(1000 * 1e-5 * 0.0039) = 0.006.
    assert 1 - weight.float().mean().item() == pytest.approx(0.01, abs=5 * 0.0063 / math.sqrt(8192))


def test_what_is_drawn_follows_from_seed_step_and_name_alone():
    def run(seed, name="w", draws=0):
        weight = nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
        optimizer = AdamWBf16({name: weight}, seed=seed)
        torch.rand(draws)
        for _ in range(3):
            weight.float().sum().backward()
            optimizer.update(learning_rate=1e-3)
        return weight.detach()

    assert torch.equal(run(0), run(0, draws=5))
    assert not torch.equal(run(0), run(1))
    assert not torch.equal(run(0), run(0, name="v"))


def test_one_micro_batchs_gradient_stays_bf16_and_several_add_up_in_fp32():
    # 1 + 1/512 is not a bf16 number; the fp32 sum is exact.
    weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    optimizer = AdamWBf16({"w": weight})
    weight.sum().backward()
    assert optimizer.gradients()[0].dtype == torch.bfloat16
    (weight * (1 / 512)).sum().backward()
    (weight * (1 / 512)).sum().backward()
    assert optimizer.gradients()[0].dtype == torch.float32
    assert optimizer.gradients()[0][0, 0].item() == 1 + 1 / 256
    assert weight.grad is None
    assert optimizer.gradient_norm().item() == pytest.approx(2 * (1 + 1 / 256))
    optimizer.clear_gradients()
    assert optimizer.gradients() == []


def test_fp16_weights_without_masters_are_refused():
    with pytest.raises(ValueError, match="w is fp16"):
        AdamWBf16({"w": nn.Parameter(torch.zeros(2, dtype=torch.float16))})


@pytest.mark.parametrize("optimizer_class", [AdamW8bit, AdamWBf16])
def test_an_update_raises_the_version_of_every_weight(device, optimizer_class):
    # Models that keep a copy of a weight in their compute dtype make it again only when the version changed.
    dtype = torch.bfloat16 if optimizer_class is AdamWBf16 else torch.float32
    weights = {
        "large": nn.Parameter(torch.ones(64, 128, dtype=dtype, device=device)),
        "small": nn.Parameter(torch.ones(2, dtype=dtype, device=device)),
    }
    optimizer = optimizer_class(weights)
    before = {name: weight._version for name, weight in weights.items()}
    (weights["large"].sum() + weights["small"].sum()).backward()
    optimizer.update(learning_rate=0.1)
    assert all(weight._version > before[name] for name, weight in weights.items())


@pytest.mark.parametrize("optimizer_class", [AdamW8bit, AdamWBf16])
def test_state_saved_and_loaded_into_a_fresh_optimizer_continues_identically(device, optimizer_class):
    dtype = torch.bfloat16 if optimizer_class is AdamWBf16 else torch.float32

    def make():
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(64, 130, generator=generator).to(device, dtype))
        return weight, optimizer_class({"w": weight}, weight_decay=0.1)

    def advance(weight, optimizer, steps):
        for _ in range(steps):
            (weight.float() ** 4).sum().backward()
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_step_is_one_graph_and_the_same(dtype):
    # As a GPU runs it, but for the kernels: no line makes the compiler give up.
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(5, 256, generator=generator).to(dtype) for _ in range(2))
    signed, unsigned = (make_levels(weight.device, signed=signed) for signed in (True, False))
    states = *quantize(gradient.float(), signed), *quantize(gradient.float().square(), unsigned)
    noise = noise_for(weight) if dtype == torch.bfloat16 else None
    numbers = torch.tensor([0.5, 0.99, 1e-3, 0.1])
    arguments = weight, gradient, *states, numbers, noise, signed, unsigned, 0.9, 0.999, 1e-8
    compiled = torch.compile(_take_block_step, dynamic=True, fullgraph=True, backend="aot_eager")
    for expected, found in zip(_take_block_step(*arguments), compiled(*arguments), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("optimizer_class", [MasterAdamW, AdamW8bit, AdamWBf16])
def test_weights_are_freed_with_their_optimizer(optimizer_class):
    """Hooks of parameters that knew the optimizer would hold both for ever: the collector does not see through them."""
    parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = optimizer_class({"w": parameter})
    parameter.float().sum().backward()
    optimizer.update(learning_rate=0.1)
    held = [weakref.ref(optimizer), weakref.ref(parameter)]
    del optimizer, parameter
    gc.collect()
    assert [each() for each in held] == [None, None]

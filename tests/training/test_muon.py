"""Muon against a plain loop and torch's own; its steps by their singular values and size."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tunesmith.training.muon import Muon, orthogonalize
from tunesmith.training.optim import MasterAdamW


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 128, 32), (2, 32, 128)])
def test_singular_values_come_out_near_one(device, shape):
    # From 1 down to a hundredth of it, which is 1/300 of the norm.
    u, s, vt = torch.linalg.svd(draw(*shape), full_matrices=False)
    matrices = u * torch.logspace(0, -2, s.shape[-1]) @ vt
    found = torch.linalg.svdvals(orthogonalize(matrices.to(device)).cpu())
    assert found.min() > 0.65
    assert found.max() < 1.25


def test_singular_vectors_are_kept(device):
    # U S V^T becomes about U V^T, the nearest orthogonal matrix.
    matrix = draw(1, 48, 80)
    u, _, vt = torch.linalg.svd(matrix[0], full_matrices=False)
    found = orthogonalize(matrix.to(device))[0].cpu()
    inner = u.t() @ found @ vt.t()
    off = inner - torch.diag(inner.diagonal())
    assert off.abs().max() < (1e-3 if device == "cpu" else 0.05)


def newton_schulz(matrix):
    """One matrix at a time, from the definition: x <- 3.4445 x - 4.7750 x x^T x + 2.0315 (x x^T)^2 x."""
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.t() @ x + 2.0315 * x @ x.t() @ x @ x.t() @ x
    return x


def test_steps_equal_those_of_a_plain_loop_over_each_part():
    # Rows 0..7, 8..11 and 12..15 of one merged matrix are three matrices; `out` is one.
    parts = [slice(0, 8), slice(8, 12), slice(12, 16)]
    named = {"qkv": nn.Parameter(draw(16, 8)), "out": nn.Parameter(draw(8, 8, seed=1))}
    loop = {name: weight.detach().clone() for name, weight in named.items()}
    buffers = {name: torch.zeros_like(weight) for name, weight in loop.items()}
    optimizer = Muon(named, matrices={"qkv": parts, "out": [slice(0, 8)]}, weight_decay=0.1)
    for step in range(4):
        rate = 0.01 * (step + 1)
        for number, name in enumerate(named):
            gradient = draw(*loop[name].shape, seed=10 * step + number)
            named[name].grad = 2 * gradient
            buffers[name] = 0.95 * buffers[name] + 0.05 * gradient
            ahead = 0.05 * gradient + 0.95 * buffers[name]
            for rows in parts if name == "qkv" else [slice(0, 8)]:
                change = 0.2 * math.sqrt(8) * newton_schulz(ahead[rows])
                loop[name][rows] = loop[name][rows] * (1 - rate * 0.1) - rate * change
        optimizer.update(learning_rate=rate, gradient_factor=0.5)
    for name, weight in named.items():
        assert_close(weight.detach(), loop[name], rtol=1e-4, atol=1e-5)


def test_ten_steps_equal_torchs_own_muon_within_its_bf16():
    ours, theirs = nn.Parameter(draw(48, 32)), nn.Parameter(draw(48, 32))
    optimizer = Muon({"w": ours}, matrices={"w": [slice(0, 48)]}, weight_decay=0.1)
    reference = torch.optim.Muon(
        [theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    start = ours.detach().clone()
    for step in range(10):
        for weight in (ours, theirs):
            weight.grad = draw(48, 32, seed=step)
        optimizer.update(learning_rate=0.01)
        reference.step()
    moved = (ours - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_an_update_has_the_size_of_adamws():
    weight = nn.Parameter(torch.zeros(64, 256))
    optimizer = Muon({"w": weight}, matrices={"w": [slice(0, 64)]})
    weight.grad = draw(64, 256)
    optimizer.update(learning_rate=1.0)
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)


def test_what_is_no_matrix_of_a_layer_takes_adamws_steps():
    def make():
        return {"embed": nn.Parameter(draw(8, 4)), "norm": nn.Parameter(torch.ones(4))}

    ours, theirs = make(), make()
    settings = {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-6, "weight_decay": 0.1}
    optimizer = Muon({**ours, "w": nn.Parameter(draw(4, 4))}, matrices={"w": [slice(0, 4)]}, **settings)
    reference = MasterAdamW(theirs, **settings)
    for _ in range(3):
        for named, rule in ((ours, optimizer), (theirs, reference)):
            (named["embed"].square().sum() + named["norm"].square().sum()).backward()
            rule.update(learning_rate=0.01, gradient_factor=0.5)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_states_are_one_buffer_a_matrix_and_two_for_the_rest():
    named = {"w": nn.Parameter(draw(4, 4)), "norm": nn.Parameter(torch.ones(4))}
    optimizer = Muon(named, matrices={"w": [slice(0, 4)]})
    assert set(optimizer.state_tensors()) == {
        "momentum.w", "exp_avg.norm", "exp_avg_sq.norm", "step.norm"
    }  # fmt: skip


def test_large_stacks_are_worked_through_in_parts(monkeypatch):
    def run():
        named = {f"w{n}": nn.Parameter(draw(8, 8, seed=n)) for n in range(5)}
        optimizer = Muon(named, matrices={name: [slice(0, 8)] for name in named})
        for n, weight in enumerate(named.values()):
            weight.grad = draw(8, 8, seed=100 + n)
        optimizer.update(learning_rate=0.1)
        return torch.stack(list(named.values())).detach()

    whole = run()
    monkeypatch.setattr("tunesmith.training.muon._STACK_VALUES", 2 * 64)
    assert_close(run(), whole)


def test_a_models_matrices_are_its_linear_layers_with_the_rows_of_merged_parts():
    from tunesmith.core.bundled import bundled_path
    from tunesmith.models.load import load_model

    folder = bundled_path("tunesmith/tiny")
    assert folder is not None
    model = load_model(folder, trainable=True)
    named, matrices = dict(model.named_trainable()), model.named_matrices()
    assert len(matrices) == 4 * model.config.num_layers
    assert set(named) - set(matrices) == {n for n in named if "norm" in n or "embed" in n}
    merged = matrices["model.layers.0.self_attn.q_proj+k_proj+v_proj.weight"]
    assert [rows.stop - rows.start for rows in merged] == [256, 128, 128]
    assert load_model(folder).named_matrices() == {}


def test_the_fallback_names_its_matrices_alike_and_trains_bf16_weights_in_bf16():
    from tunesmith.core.bundled import bundled_path
    from tunesmith.core.errors import ModelError
    from tunesmith.models.load import load_model

    folder = bundled_path("tunesmith/tiny")
    assert folder is not None
    bf16 = torch.bfloat16
    model = load_model(folder, dtype=bf16, trainable=True, master_dtype=bf16, own_decoder=False)
    assert all(p.dtype == bf16 for p in model.trainable_parameters())
    assert len(model.named_matrices()) == 7 * model.config.num_layers
    assert set(model.named_matrices()) <= set(dict(model.named_trainable()))
    with pytest.raises(
        ModelError, match=r"trained whole in fp32 only\. Set train\.precision: fp32, or train\.opt"
    ):
        load_model(folder, dtype=bf16, trainable=True, own_decoder=False)
    with pytest.raises(ModelError, match=r"in bf16 only with train\.optimizer: adamw-bf16\. Set train\.prec"):
        load_model(folder, trainable=True, master_dtype=bf16, own_decoder=False)

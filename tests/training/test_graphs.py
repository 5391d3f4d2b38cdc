"""Micro-batches recorded as CUDA graphs train as they would without; what a GPU isn't needed for is tested anywhere."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
from segment_tools import open_model
from tiny_models import make_rows

from tunesmith.core.types import RowGroup
from tunesmith.data.examples import WithNumber, flatten
from tunesmith.job.objective import DpoSpec
from tunesmith.methods.objectives import REFERENCE, make_objective
from tunesmith.methods.sft import sft_loss
from tunesmith.models.layout import make_batch
from tunesmith.models.segments import Segments
from tunesmith.training.muon import Muon
from tunesmith.training.optim import LossScale, MasterAdamW
from tunesmith.training.step import Stepper

BASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "nf4": {"base": "nf4"},
    "fp8": {"base": "fp8"},
    "nf4 to fp8": {"base": "nf4", "compute": "fp8"},
    # Attention in plain torch, which looks documents up in tables.
    "fp32": {"dtype": torch.float32},
}


def make_stepper(
    folder: Any,
    *,
    records: bool,
    budget: int = 128,
    loss: Any = sft_loss,
    device: str = "cuda",
    has_room: bool = False,
    **options: Any,
) -> Stepper:
    model = open_model(folder, rank=4, device=device, **{"dtype": torch.bfloat16, **options})
    model.segments = Segments(compiled=False)
    stepper = Stepper(
        model,
        MasterAdamW(dict(model.named_trainable())),
        make_batch=lambda examples, where: make_batch(flatten(examples), device=where, round_tokens=64),
        loss=loss,
        device=torch.device(device),
        budget_tokens=budget,
        clip_norm=1.0,
        scale=LossScale(enabled=False),
    )
    if records:
        stepper.record_graphs(model.refresh, any_lengths=model.takes_any_lengths, has_room=has_room)
    return stepper


def take_steps(stepper: Stepper, steps: list[Any]) -> list[tuple[float, float]]:
    taken = []
    for number, rows in enumerate(steps):
        result = stepper.take(rows, step=number + 1, learning_rate=0.01)
        taken.append((result.loss, result.grad_norm))
    return taken


def read_weights(stepper: Stepper) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in stepper.model.named_trainable()}


def make_steps(count: int, *, length: int = 64, rows: int = 6) -> list[Any]:
    return [make_rows([length] * rows, seed=number) for number in range(count)]


@pytest.mark.gpu
@pytest.mark.parametrize("base", BASES)
def test_replayed_steps_are_the_ordinary_ones_bit_for_bit(hf_folders: Any, base: str) -> None:
    folder = hf_folders("llama")[0]
    steps = make_steps(8)
    ordinary, replayed = (make_stepper(folder, records=records, **BASES[base]) for records in (False, True))
    assert take_steps(replayed, steps) == take_steps(ordinary, steps)
    assert replayed.graphs is not None
    assert (replayed.graphs.num_graphs, replayed.graphs.failure) == (1, "")
    expected = read_weights(ordinary)
    for name, weight in read_weights(replayed).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_replayed_steps_of_pairs_are_the_ordinary_ones_bit_for_bit(hf_folders: Any, loss: Any) -> None:
    objective = make_objective(DpoSpec(name="dpo", loss=loss))
    steps = []
    for number, rows in enumerate(make_steps(8)):
        pairs: list[Any] = [RowGroup(pair) for pair in zip(rows[::2], rows[1::2], strict=True)]
        # What the reference says is another number in every step: a recorded pass must read it anew.
        steps.append(list(WithNumber(pairs, REFERENCE, [-100.0 - number - at for at in range(len(rows))])))
    ordinary, replayed = (
        make_stepper(hf_folders("llama")[0], records=records, loss=objective) for records in (False, True)
    )
    assert take_steps(replayed, steps) == take_steps(ordinary, steps)
    assert replayed.graphs is not None
    assert (replayed.graphs.num_graphs, replayed.graphs.failure) == (1, "")
    expected = read_weights(ordinary)
    for name, weight in read_weights(replayed).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("levels", ["cheap", "recompute"])
def test_blocks_that_are_computed_again_are_recorded_too(hf_folders: Any, levels: Any) -> None:
    steppers = [make_stepper(hf_folders("llama")[0], records=records) for records in (False, True)]
    for stepper in steppers:
        stepper.model.levels = (levels,) * len(stepper.model.levels)
    expected, found = (take_steps(stepper, make_steps(6)) for stepper in steppers)
    assert found == expected
    assert steppers[1].graphs is not None
    assert steppers[1].graphs.num_graphs == 1


@pytest.mark.gpu
def test_a_step_of_two_shapes_gives_two_graphs_and_an_unknown_shape_none(hf_folders: Any) -> None:
    folder = hf_folders("llama")[0]
    # Two rows, two rows and one: two shapes. Then a step of another length, and the two again.
    steps = [*make_steps(5, rows=5), *make_steps(1, length=40, rows=2), *make_steps(5, rows=5)]
    ordinary, replayed = (make_stepper(folder, records=records) for records in (False, True))
    expected = take_steps(ordinary, steps)
    assert replayed.graphs is not None
    found = take_steps(replayed, steps[:5])
    assert replayed.graphs.num_graphs == 2
    found += take_steps(replayed, steps[5:6])
    assert replayed.graphs.num_graphs == 0
    found += take_steps(replayed, steps[6:])
    assert replayed.graphs.num_graphs == 2
    assert found == expected


@pytest.mark.gpu
@pytest.mark.parametrize("base", ["bf16", "nf4 to fp8", "fp32"])
def test_rows_of_all_lengths_are_replayed_and_train_alike(hf_folders: Any, base: str) -> None:
    """In bf16 a shape is its tokens; in fp32, where attention looks documents up in tables, it is their lengths."""
    lengths = [
        [20, 33, 7, 60],
        [60, 20, 40],
        [5, 5, 90, 18, 2],
        [120],
        [20, 33, 7, 61],
        [300, 14],
        [61, 29, 30],
    ]
    steps = [make_rows(step, seed=number) for number, step in enumerate(lengths * 4)]
    folder, options = hf_folders("llama")[0], {"budget": 512, **BASES[base]}
    ordinary = make_stepper(folder, records=False, **options)
    replayed = make_stepper(folder, records=True, has_room=True, **options)
    expected, found = take_steps(ordinary, steps), take_steps(replayed, steps)
    assert replayed.graphs is not None
    batches = [make_batch(rows, round_tokens=64) for rows in steps]
    shapes = {batch.signature(any_lengths=base != "fp32") for batch in batches}
    assert len(shapes) == (7 if base == "fp32" else 2)
    assert (replayed.graphs.num_graphs, replayed.graphs.failure) == (len(shapes), "")
    # Attention's backward pass adds up in no fixed order.
    for got, wanted in zip(found, expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4 if base == "fp32" else 0.02)


@pytest.mark.gpu
def test_with_room_a_new_shape_leaves_the_others_recorded(hf_folders: Any) -> None:
    stepper = make_stepper(hf_folders("llama")[0], records=True, has_room=True)
    take_steps(stepper, [*make_steps(4), *make_steps(1, length=40, rows=2), *make_steps(1)])
    assert stepper.graphs is not None
    assert stepper.graphs.num_graphs == 1
    take_steps(stepper, make_steps(2, length=40, rows=2))
    assert stepper.graphs.num_graphs == 2


@pytest.mark.gpu
def test_released_graphs_give_their_memory_back_and_are_recorded_anew(hf_folders: Any) -> None:
    stepper = make_stepper(hf_folders("llama")[0], records=True, budget=4096)
    steps = make_steps(9, length=512)
    expected = take_steps(make_stepper(hf_folders("llama")[0], records=False, budget=4096), steps)
    gc.collect()
    torch.cuda.empty_cache()
    found = take_steps(stepper, steps[:4])
    assert stepper.graphs is not None
    with_graph = torch.cuda.memory_reserved()
    stepper.graphs.release()
    assert torch.cuda.memory_reserved() < with_graph
    found += take_steps(stepper, steps[4:])
    assert stepper.graphs.num_graphs == 1
    # Attention over so many tokens adds up gradients in no fixed order.
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=0.01)


@pytest.mark.gpu
def test_a_known_shape_that_is_not_recorded_yet_gives_the_memory_back_too(hf_folders: Any) -> None:
    stepper = make_stepper(hf_folders("llama")[0], records=True)
    rare = make_steps(1, length=40, rows=2)
    assert stepper.graphs is not None
    # The rare shape's second pass is neither recorded nor run beside the memory of the other's graph; its third is.
    found = []
    for steps in ([*rare, *make_steps(4)], rare, make_steps(1), rare):
        take_steps(stepper, steps)
        found.append(stepper.graphs.num_graphs)
    assert found == [1, 0, 1, 2]
    stepper.close()
    assert stepper.graphs.num_graphs == 0


@pytest.mark.gpu
def test_what_cannot_be_recorded_runs_as_ever_and_says_why(hf_folders: Any) -> None:
    def waiting_loss(model: Any, batch: Any) -> Any:
        loss = sft_loss(model, batch)
        assert loss.total.item() > 0  # waits for the GPU, which a recording forbids
        return loss

    folder, stream = hf_folders("llama")[0], torch.cuda.current_stream()
    ordinary, replayed = (
        make_stepper(folder, records=False),
        make_stepper(folder, records=True, loss=waiting_loss),
    )
    steps = make_steps(5)
    assert take_steps(replayed, steps) == take_steps(ordinary, steps)
    assert replayed.graphs is not None
    assert replayed.graphs.num_graphs == 0
    assert replayed.graphs.failure
    # Torch is as it was: its stream, its allocator, its generator; and others can be recorded.
    assert torch.cuda.current_stream() == stream
    assert torch.rand(4, device="cuda").isfinite().all()
    another = make_stepper(folder, records=True)
    assert take_steps(another, steps) == take_steps(make_stepper(folder, records=False), steps)
    assert another.graphs is not None
    assert another.graphs.num_graphs == 1


# --- anywhere ---------------------------------------------------------------------------------------------------------


def test_a_fixed_batch_takes_over_batches_of_its_signature(hf_folders: Any) -> None:
    model = open_model(hf_folders("llama")[0], rank=4)
    model.segments = Segments(compiled=False)
    rows = make_rows([20, 33], seed=1)
    fewer = replace(rows[1], mask=[0] * 30 + [1] * 3)
    batches = [make_batch(given) for given in (make_rows([20, 33]), rows, [rows[0], fewer])]
    fixed = batches[0].fixed()
    assert len({batch.signature() for batch in (fixed, *batches)}) == 1
    assert len({batch.num_targets for batch in (fixed, *batches)}) == 3
    assert len(fixed.targets_K) == 64
    assert "buckets" in vars(fixed.layout)  # made now: a recording takes nothing from the host
    for batch in (*batches, batches[0]):
        fixed.copy_(batch)
        assert sft_loss(model, fixed).total.item() == pytest.approx(
            sft_loss(model, batch).total.item(), rel=1e-6
        )


def test_where_kernels_take_any_lengths_a_fixed_batch_holds_them() -> None:
    rows = [
        make_rows(lengths, seed=len(lengths)) for lengths in ([20, 33, 7], [60], [50, 10], [9, 9, 9, 9, 9])
    ]
    batches = [make_batch(given, round_tokens=64) for given in rows]
    assert len({batch.signature(any_lengths=True) for batch in batches}) == 1
    assert len({batch.signature(any_lengths=False) for batch in batches}) == 4
    fixed = batches[0].fixed(any_lengths=True)
    assert fixed.signature(any_lengths=True) == batches[0].signature(any_lengths=True)
    for batch in (*batches, batches[0]):
        fixed.copy_(batch)
        count = len(batch.layout.lengths)
        assert fixed.layout.cumulative_N1[: count + 1].tolist() == batch.layout.cumulative_N1.tolist()
        assert set(fixed.layout.cumulative_N1[count:].tolist()) == {64}
        assert torch.equal(fixed.layout.positions_T, batch.layout.positions_T)
        assert torch.equal(fixed.ids_T, batch.ids_T)
        assert fixed.layout.max_length == 256
        kept = fixed.targets_K >= 0
        assert torch.equal(fixed.targets_K[kept], batch.targets_K)
        assert torch.equal(fixed.sources_K[kept], batch.sources_K)


def test_documents_of_one_length_keep_their_own_kernel() -> None:
    even, uneven = (make_batch(make_rows(lengths)) for lengths in ([32, 32], [40, 24]))
    assert even.signature(any_lengths=True) == even.signature(any_lengths=False)
    assert uneven.signature(any_lengths=True) != even.signature(any_lengths=True)
    assert not even.fixed(any_lengths=True).layout.bound


def test_batches_of_other_lengths_or_many_more_targets_have_another_signature() -> None:
    signatures = [make_batch(make_rows(lengths)).signature() for lengths in ([20, 33], [33, 20], [53], [200])]
    assert len(set(signatures)) == 4
    row = make_rows([200])[0]
    more = type(row)(row.ids, [0] * 10 + [1] * 190, row.origin, row.row_id)
    assert make_batch([more]).signature() != signatures[3]


@pytest.mark.parametrize("levels", ["keep", "cheap", "recompute"])
def test_no_node_of_a_pass_lives_on_to_join_a_recorded_one(hf_folders: Any, levels: Any) -> None:
    """A node that adds to a gradient works in the stream it was made in, and a recording takes its own alone."""
    stepper = make_stepper(hf_folders("llama")[0], records=True, device="cpu", dtype=torch.float32)
    stepper.model.levels = (levels,) * len(stepper.model.levels)
    parameters = stepper.model.trainable_parameters()

    def notes() -> list[Any]:
        return [torch.autograd.graph.get_gradient_edge(parameter).node.metadata for parameter in parameters]

    def mark_loss(model: Any, batch: Any) -> Any:
        loss = sft_loss(model, batch)
        for note in notes():
            note["seen"] = True
        assert all(notes())
        return loss

    stepper._loss = mark_loss
    stepper.record_graphs(stepper.model.refresh)
    gc.disable()
    try:
        take_steps(stepper, make_steps(1))
        assert not any(notes())
    finally:
        gc.enable()


def test_a_stepper_that_records_goes_with_its_last_user(hf_folders: Any) -> None:
    stepper = make_stepper(hf_folders("llama")[0], records=True, device="cpu", dtype=torch.float32)
    take_steps(stepper, make_steps(1))
    alive = weakref.ref(stepper)
    gc.disable()
    try:
        del stepper
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [MasterAdamW, lambda named: Muon(named, matrices={})], ids=["adamw", "muon"])
def test_held_gradients_stay_in_place_and_train_alike(make: Any) -> None:
    def run(holds: bool) -> tuple[list[torch.Tensor], list[set[int]]]:
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (3, 5), (70, 2))]
        optimizer = make({f"w{number}": weight for number, weight in enumerate(weights)})
        places: list[set[int]] = [set() for _ in weights]
        for step in range(6):
            if holds and step == 2:  # as when the first steps are ordinary ones
                assert optimizer.hold_gradients()
            for _ in range(2):
                sum((weight**3).sum() * 0.5 for weight in weights).backward()
                for weight, seen in zip(weights, places, strict=True):
                    assert weight.grad is not None
                    if step >= 2:
                        seen.add(weight.grad.data_ptr())
            norm = optimizer.gradient_norm()
            version = weights[1]._version
            optimizer.update(learning_rate=0.1, gradient_factor=float(1 / norm))
            assert weights[1]._version > version
            if holds and step >= 2:
                assert not any(weight.grad.any() for weight in weights if weight.grad is not None)
        states = optimizer.state_tensors()
        # A checkpoint takes it, and read into it goes where the updates are.
        safetensors.torch.save({**states, **optimizer.masters})
        optimizer.load(weights={n: w.detach() + 1 for n, w in optimizer.masters.items()}, states=states)
        sum((weight**2).sum() for weight in weights).backward()
        optimizer.update(learning_rate=0.1)
        found = [weight.detach() for weight in weights] + [states[name] for name in sorted(states)]
        return found, places

    (held, places), (free, _) = run(True), run(False)
    for got, wanted in zip(held, free, strict=True):
        # A CPU computes the last few values of a tensor by themselves, and rounds them otherwise.
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
    assert [len(seen) for seen in places] == [1, 1, 1]

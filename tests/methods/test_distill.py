"""Distillation: values worked by hand, gradients against autograd of the definition in fp64, whatever the chunk."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCAB, make_row, make_rows, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.job.objective import DistillSpec
from tunesmith.job.spec import LoraSpec, TrainSpec
from tunesmith.methods.distill import Teacher, distill_loss, distill_objective, measure_kl
from tunesmith.methods.objectives import make_objective
from tunesmith.methods.sft import sft_loss
from tunesmith.models.layout import make_batch
from tunesmith.models.load import load_model
from tunesmith.models.lora import add_lora
from tunesmith.training.optim import LossScale
from tunesmith.training.optimizers import make_optimizer
from tunesmith.training.step import Stepper


def spec_of(**settings: Any) -> DistillSpec:
    return DistillSpec(name="distill", teacher="teacher", **settings)


def open_teacher(folder: Any, *, num_tokens: int = VOCAB, device: str = "cpu") -> Teacher:
    """A frozen model that differs from the folder's."""
    model = load_model(folder, device=device)
    draw = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        noise = 0.05 * torch.randn(parameter.shape, generator=draw)
        parameter.data += noise.to(device, parameter.dtype)
    return Teacher(model, num_tokens)


def test_three_words_by_hand() -> None:
    # Student 1/2, 1/4, 1/4; teacher 1/4, 1/4, 1/2. Forward: 1/4 ln(1/2) + 0 + 1/2 ln 2 = 1/4 ln 2. The gradient is
    # p_S - p_T. Reverse: 1/2 ln 2 + 0 + 1/4 ln(1/2) = 1/4 ln 2 too; its gradient is p_S (ln p_S / p_T - KL).
    student, teacher = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([[1.0, 1.0, 2.0]]).log()
    quarter = math.log(2) / 4
    kl, gradient = measure_kl(student, teacher, direction="forward_kl", temperature=1.0)
    assert kl.item() == pytest.approx(quarter)
    assert gradient[0].tolist() == pytest.approx([0.25, 0, -0.25], abs=1e-7)
    kl, gradient = measure_kl(student, teacher, direction="reverse_kl", temperature=1.0)
    assert kl.item() == pytest.approx(quarter)
    expected = [0.5 * (4 - 1) * quarter, 0.25 * (0 - 1) * quarter, 0.25 * (-4 - 1) * quarter]
    assert gradient[0].tolist() == pytest.approx(expected)


def test_a_temperature_divides_the_logits_of_both_and_its_square_multiplies_the_gradient() -> None:
    # Logits 2 ln 2, 0, 0 at temperature 2 are ln 2, 0, 0: the distributions above; 4 x (p_S - p_T) / 2.
    student, teacher = torch.tensor([[4.0, 1.0, 1.0]]).log(), torch.tensor([[1.0, 1.0, 4.0]]).log()
    kl, gradient = measure_kl(student, teacher, direction="forward_kl", temperature=2.0)
    assert kl.item() == pytest.approx(math.log(2) / 4)
    assert gradient[0].tolist() == pytest.approx([0.5, 0, -0.5], abs=1e-6)


def define_loss(model: Any, batch: Any, spec: DistillSpec, teacher: Teacher) -> torch.Tensor:
    """The definition over whole logits, in fp64 behind the models' own hidden states."""
    with torch.no_grad():
        frozen = teacher.model.head(teacher.model.hidden(batch.ids_T, batch.layout))[batch.sources_K]
    logits = model.head(model.hidden(batch.ids_T, batch.layout))[batch.sources_K].double()
    pair = (logits[:, : teacher.num_tokens], frozen[:, : teacher.num_tokens].double())
    student, taught = ((part / spec.temperature).log_softmax(-1) for part in pair)
    here, there = (taught, student) if spec.loss == "forward_kl" else (student, taught)
    kl = (here.exp() * (here - there)).sum()
    return spec.temperature**2 * kl + spec.sft_weight * F.cross_entropy(
        logits, batch.targets_K, reduction="sum"
    )


# gemma2 caps its logits, gpt2 runs through transformers: as students their heads are not plain products, as teachers
# their own functions are asked.
@pytest.mark.parametrize(
    ("student", "teacher"),
    [("llama", "qwen3"), ("llama-tied", "gemma2"), ("gemma2", "llama"), ("gpt2", "llama"), ("llama", "gpt2")],
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": "reverse_kl"},
        {"temperature": 2.0, "sft_weight": 0.5},
        {"loss": "reverse_kl", "temperature": 0.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_tokens", [VOCAB, 90])
def test_values_and_gradients_are_those_of_the_definition(
    hf_folders: Any, device: str, student: str, teacher: str, settings: Any, num_tokens: int
) -> None:
    batch = make_batch(make_rows([30, 12, 7]), device=torch.device(device), round_tokens=16)
    spec, frozen = (
        spec_of(**settings),
        open_teacher(hf_folders(teacher)[0], num_tokens=num_tokens, device=device),
    )
    results = []
    for plain in (True, False):
        model = load_model(hf_folders(student)[0], device=device, trainable=True)
        if plain:
            total = define_loss(model, batch, spec, frozen)
        else:
            total = distill_loss(model, batch, spec, frozen, chunk=5).total
        (total / 7).backward()
        results.append([total.detach().double()] + [p.grad for p in model.trainable_parameters()])
    for found, expected in zip(*reversed(results), strict=True):
        assert relative_error(found, expected) < 5e-6
    assert all(p.grad is None for p in frozen.model.parameters())


def test_measures_are_the_kl_and_what_sft_minimises(hf_folders: Any) -> None:
    batch, frozen = make_batch(make_rows([30, 12, 7])), open_teacher(hf_folders("qwen3")[0], num_tokens=90)
    model = load_model(hf_folders("llama")[0])
    found = distill_loss(model, batch, spec_of(temperature=2.0, sft_weight=0.5), frozen)
    kl, nll = found.measures["kl"].item(), found.measures["nll"].item()
    assert nll == pytest.approx(sft_loss(model, batch).total.item(), rel=1e-6)
    assert found.total.item() == pytest.approx(4 * kl + 0.5 * nll, rel=1e-6)
    assert 4 * kl == pytest.approx(
        define_loss(model, batch, spec_of(temperature=2.0), frozen).item(), rel=1e-6
    )


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(hf_folders: Any, name: str, loss: Any) -> None:
    folder, batch = hf_folders(name)[0], make_batch(make_rows([30, 12, 7]))
    model, frozen = load_model(folder, trainable=True), Teacher(load_model(folder), VOCAB)
    total = distill_loss(model, batch, spec_of(loss=loss), frozen).total
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-5)
    assert max(p.grad.abs().max().item() for p in model.trainable_parameters()) < 1e-4


@pytest.mark.parametrize("settings", [{}, {"loss": "reverse_kl", "sft_weight": 1.0}], ids=str)
def test_eight_rows_at_once_are_eight_by_themselves(hf_folders: Any, device: str, settings: Any) -> None:
    folder = hf_folders("qwen2")[0]
    objective = distill_objective(spec_of(**settings), open_teacher(folder, device=device))
    rows = make_rows([20, 31, 6, 9, 14, 40, 5, 17])
    results, weights = [], []
    for budget in (1, 60, 10_000):
        model = load_model(folder, device=device)
        add_lora(model, LoraSpec(name="lora", rank=4), seed=0)
        stepper = Stepper(
            model,
            make_optimizer(model, dict(model.named_trainable()), TrainSpec()),
            make_batch=lambda examples, where: make_batch(examples, device=where, round_tokens=16),
            loss=objective,
            device=model.device,
            budget_tokens=budget,
            clip_norm=None,
            scale=LossScale(enabled=False),
        )
        results.append(stepper.take(rows, step=1, learning_rate=1e-2))
        weights.append(torch.cat([p.detach().flatten() for p in model.trainable_parameters()]))
    for result, weight in zip(results[1:], weights[1:], strict=True):
        assert result.loss == pytest.approx(results[0].loss, rel=1e-5)
        assert result.measures == pytest.approx(results[0].measures, rel=1e-5)
        assert result.grad_norm == pytest.approx(results[0].grad_norm, rel=1e-4)
        assert relative_error(weight, weights[0]) < 1e-2
    # Measures are means over target tokens, as the loss is.
    first = results[0]
    expected = first.measures["kl"] + settings.get("sft_weight", 0) * first.measures["nll"]
    assert first.loss == pytest.approx(expected, rel=1e-6)


def test_only_target_positions_count(hf_folders: Any) -> None:
    folder = hf_folders("llama")[0]
    model, frozen = load_model(folder), open_teacher(folder)
    both = make_batch([make_row([5, 6, 7, 8], [0, 0, 1, 1])])
    parts = [make_batch([make_row([5, 6, 7, 8], mask)]) for mask in ([0, 0, 1, 0], [0, 0, 0, 1])]
    each = [distill_loss(model, part, spec_of(), frozen).total.item() for part in parts]
    assert min(each) > 0
    assert distill_loss(model, both, spec_of(), frozen).total.item() == pytest.approx(sum(each), rel=1e-6)


class Logits(TorchDispatchMode):
    """The most rows of any result as wide as the vocabulary."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for part in found if isinstance(found, tuple | list) else (found,):
            if isinstance(part, torch.Tensor) and part.shape[-1:] == (self.width,):
                self.rows = max(self.rows, part.numel() // self.width)
        return found


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_nothing_of_all_rows_times_vocabulary_is_ever_made(hf_folders: Any, name: str) -> None:
    model, frozen = load_model(hf_folders(name)[0]), load_model(hf_folders("llama")[0])
    for each in (model, frozen):
        each.resize_vocabulary(1000)  # a width that nothing else has
    add_lora(model, LoraSpec(name="lora", rank=4), seed=0)
    batch = make_batch(make_rows([300, 200, 100]))
    with Logits(1000) as logits:
        distill_loss(model, batch, spec_of(), Teacher(frozen, 1000), chunk=100).total.backward()
    assert batch.num_targets > 200
    assert 100 <= logits.rows <= 128  # the teacher's are filled up to a round number


def test_an_objective_without_its_teacher_is_a_broken_call() -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        make_objective(spec_of())


def test_a_batch_without_targets_is_a_broken_call(hf_folders: Any) -> None:
    folder = hf_folders("llama")[0]
    batch = make_batch([make_row([5, 6], [0, 0])])
    with pytest.raises(ValueError, match="without target tokens"):
        distill_loss(load_model(folder), batch, spec_of(), open_teacher(folder))

import math

import pytest
from torch.testing import assert_close

from tunesmith.training.schedule import auto_learning_rate, count_steps, count_warmup_steps, learning_rate_at


def rates(total, warmup, schedule, peak=1.0):
    return [
        learning_rate_at(step, total_steps=total, warmup_steps=warmup, peak=peak, schedule=schedule)
        for step in range(total)
    ]


def test_linear_decay_after_one_warmup_step_worked_by_hand():
    assert_close(rates(4, 1, "linear"), [0.0, 1.0, 2 / 3, 1 / 3])


def test_cosine_passes_half_of_the_peak_in_the_middle_of_its_decay():
    # 2 warm-up steps, then 4 steps of decay: cos(0), cos(pi/4), cos(pi/2), cos(3 pi/4).
    root = math.sqrt(0.5)
    assert_close(rates(6, 2, "cosine", peak=2.0), [0.0, 1.0, 2.0, 1 + root, 1.0, 1 - root])


def test_constant_stays_at_the_peak_after_warmup():
    assert rates(5, 2, "constant") == [0.0, 0.5, 1.0, 1.0, 1.0]


def test_without_warmup_the_first_step_has_the_peak_rate():
    assert rates(3, 0, "cosine")[0] == rates(3, 0, "linear")[0] == 1.0


def test_the_rate_after_the_last_step_would_be_zero():
    for schedule in ("cosine", "linear"):
        assert learning_rate_at(
            7, total_steps=7, warmup_steps=2, peak=1.0, schedule=schedule
        ) == pytest.approx(0)


def test_a_run_of_a_few_steps_has_no_warmup_and_therefore_learns_from_its_first_step():
    assert [count_warmup_steps(n, warmup=0.05) for n in (1, 19, 20, 100)] == [0, 0, 1, 5]


@pytest.mark.parametrize(
    ("epochs", "steps", "per_epoch", "expected"),
    [(3.0, None, 3, 9), (1.5, None, 3, 5), (0.1, None, 30, 3), (0.01, None, 10, 1), (3.0, 7, 3, 7)],
)
def test_steps_cover_fractional_epochs_and_can_be_given(epochs, steps, per_epoch, expected):
    assert count_steps(epochs=epochs, steps=steps, steps_per_epoch=per_epoch) == expected


def test_the_automatic_rate_is_the_published_one_for_8b_models():
    # 5e-4 * (2000/4096)^0.781 = 2.86e-4 and 5e-4 * (2000/4096)^0.0775 = 4.73e-4
    assert auto_learning_rate(4096, method="lora") == pytest.approx(2.86e-4, rel=0.005)
    assert auto_learning_rate(4096, method="qlora", family="qwen3") == pytest.approx(4.73e-4, rel=0.005)


def test_full_fine_tuning_gets_a_tenth_of_the_adapters_rate():
    assert auto_learning_rate(2000, method="lora") == pytest.approx(5e-4)
    assert auto_learning_rate(2000, method="full") == pytest.approx(5e-5)


def test_the_rate_of_a_toy_width_stays_sane():
    assert auto_learning_rate(16, method="lora") == auto_learning_rate(64, method="lora") == 5e-3

"""Steps and micro-batches hold every row once, and depend on nothing but their arguments."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.batch import plan_epoch, plan_micro_batches


def test_an_epoch_holds_every_row_once_in_steps_of_the_size_asked_for():
    steps = plan_epoch(10, batch_rows=4, seed=0, epoch=0)
    assert [len(step) for step in steps] == [4, 4, 2]
    assert sorted(row for step in steps for row in step) == list(range(10))


def test_the_order_follows_seed_and_epoch():
    first = plan_epoch(50, batch_rows=8, seed=0, epoch=0)
    assert first == plan_epoch(50, batch_rows=8, seed=0, epoch=0)
    assert first != plan_epoch(50, batch_rows=8, seed=0, epoch=1)
    assert first != plan_epoch(50, batch_rows=8, seed=1, epoch=0)


def test_each_row_goes_where_it_leaves_the_least_room():
    # Long to short: 9 begins a group (room 3), 5 another (room 7), 4 fits there (room 3); 3 fills the first.
    assert plan_micro_batches([3, 9, 5, 4], budget_tokens=12) == [[1, 0], [2, 3]]
    # 7 and 6 stand apart; 3 fits both, and leaves less with the 7.
    assert plan_micro_batches([6, 7, 3], budget_tokens=10) == [[1, 2], [0]]


def test_best_fit_needs_fewer_passes_than_rows_in_order():
    # In order: 6 + 3, 5 + 4, 7, 2 + 1 do not fill 10 tokens; best fit: 7 + 3, 6 + 4, 5 + 2 + 1.
    groups = plan_micro_batches([6, 5, 3, 4, 7, 2, 1], budget_tokens=10)
    assert [sorted([6, 5, 3, 4, 7, 2, 1][n] for n in group) for group in groups] == [
        [3, 7],
        [4, 6],
        [1, 2, 5],
    ]


def test_a_row_longer_than_the_budget_stands_alone():
    assert plan_micro_batches([20, 3, 3], budget_tokens=6) == [[0], [1, 2]]


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 200))
def test_groups_hold_each_row_once_within_the_budget(lengths, budget):
    groups = plan_micro_batches(lengths, budget_tokens=budget)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or sum(lengths[row] for row in group) <= budget for group in groups)


def test_an_empty_budget_is_a_broken_contract():
    with pytest.raises(ValueError):
        plan_micro_batches([1], budget_tokens=0)
    with pytest.raises(ValueError):
        plan_epoch(1, batch_rows=0, seed=0, epoch=0)

"""Near-duplicates stay together, and the same rows land in the same split whatever their order."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.split import Likeness, assign_splits, find_near_pairs, hash_conversation, shingle

WORDS = "river stone lamp green quiet seven table cloud paper bread horse winter music garden silver window".split()


def sentence(seed, length=24):
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def question(chat, text, **extra):
    return chat(("user", text), ("assistant", f"answer to {text}"), **extra)


def test_shingles_of_a_long_text_are_word_triples(chat):
    pieces = shingle(chat(("system", "ignored words"), ("user", "a b c d"), ("assistant", "e f g h")))
    assert pieces == {"a b c", "b c d", "c d e", "d e f", "e f g", "f g h"}


def test_pairs_above_the_threshold_are_found_and_no_others():
    # 40 shared pieces of 50 are a similarity of 0.8; 39 of 50 are not.
    base = {f"piece {n}" for n in range(50)}
    near = {f"piece {n}" for n in range(40)}
    far = {f"piece {n}" for n in range(39)}
    assert find_near_pairs([base, near]) == [(0, 1)]
    assert find_near_pairs([base, far]) == []


def test_near_duplicates_form_a_cluster_whose_name_is_independent_of_order(chat):
    text = sentence(1, 60)
    rows = [question(chat, text), question(chat, text + " indeed"), question(chat, sentence(2, 60))]
    forward, backward = Likeness(rows), Likeness(rows[::-1])
    names = [forward.near_group(row) for row in rows]
    assert names[0] == names[1] != names[2]
    assert names == [backward.near_group(row) for row in rows]
    assert names[0] == min(hash_conversation(row) for row in rows[:2])


def test_a_given_cluster_is_the_cluster_and_joins_near_duplicates_for_splitting(chat):
    text = sentence(1, 60)
    rows = [
        question(chat, text, cluster="a"),
        question(chat, text + " indeed", cluster="b"),
        question(chat, sentence(3, 60), cluster="b"),
        question(chat, sentence(4, 60)),
    ]
    likeness = Likeness(rows)
    assert [likeness.cluster_of(row) for row in rows[:3]] == ["a", "b", "b"]
    groups = likeness.find_split_groups(rows)
    assert groups[0] == groups[1] == groups[2] != groups[3]


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(20)), seed=st.integers(0, 5))
def test_the_split_of_a_row_does_not_depend_on_the_file_order(order, seed):
    groups = [f"group {n // 2}" for n in range(20)]
    shares = {"test": 0.2, "validation": 0.1}
    straight = assign_splits(groups, shares=shares, seed=seed)
    shuffled = assign_splits([groups[n] for n in order], shares=shares, seed=seed)
    assert [straight[n] for n in order] == shuffled
    assert straight.count("test") == 4
    assert straight.count("validation") == 2
    for group in set(groups):
        assert len({name for name, g in zip(straight, groups, strict=True) if g == group}) == 1


def test_another_seed_cuts_elsewhere():
    groups = [str(n) for n in range(100)]
    assert assign_splits(groups, shares={"test": 0.1}, seed=0) != assign_splits(
        groups, shares={"test": 0.1}, seed=1
    )


def test_a_split_gets_a_group_even_where_all_are_larger_than_its_share():
    names = assign_splits(["a"] * 5 + ["b"] * 4 + ["c"] * 6, shares={"test": 0.1}, seed=0)
    assert names.count("test") == 4


@pytest.mark.parametrize("change", ["content", "weight", "tools", "extra"])
def test_the_hash_follows_what_is_trained(chat, change):
    from tunesmith.core.types import Message

    base = chat(("user", "a"), ("assistant", "b"))
    other = {
        "content": chat(("user", "a"), ("assistant", "c")),
        "weight": chat(("user", "a"), Message("assistant", "b", 0.0)),
        "tools": chat(("user", "a"), ("assistant", "b"), tools=[{"name": "x"}]),
        "extra": chat(("user", "a"), Message("assistant", "b", 1.0, {"tool_calls": []})),
    }[change]
    assert hash_conversation(base) != hash_conversation(other)
    assert hash_conversation(base) == hash_conversation(
        chat(("user", "a"), ("assistant", "b"), place="elsewhere:9")
    )

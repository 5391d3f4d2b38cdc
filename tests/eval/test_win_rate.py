"""Win rate by a judge: both orders, flips, verdicts that cannot be read."""

from __future__ import annotations

import re
from typing import Any

import pytest
from loopback import Loopback, fail, say

from tunesmith.core.types import Message
from tunesmith.eval.win_rate import WinRate, judge_win_rate, read_verdict, settle
from tunesmith.infer.endpoint import Endpoint


def judge(loopback: Loopback, answers: list[str], others: list[str], **settings: Any) -> WinRate:
    prompts = [f"Question {number}?" for number in range(len(answers))]
    where = Endpoint(loopback.url, "judge", first_wait_seconds=0.01)
    return judge_win_rate(prompts, answers, others, endpoint=where, **settings)


def read_pair(body: dict[str, Any]) -> tuple[str, str]:
    found = re.search(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)", body["messages"][1]["content"])
    assert found is not None
    return found[1], found[2]


def prefer_longer(_: int, body: dict[str, Any]) -> dict[str, Any]:
    first, second = read_pair(body)
    verdict = "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
    return say(f"One says more than the other.\nVerdict: {verdict}")


def test_who_is_preferred_in_both_orders_has_won(loopback: Loopback) -> None:
    loopback.answer = prefer_longer
    found = judge(loopback, ["long answer", "x", "same!"], ["short", "longer", "equal"])
    assert found.outcomes == (1.0, 0.0, 0.5)
    assert (found.wins, found.losses, found.ties, found.flips, found.unreadable) == (1, 1, 1, 0, 0)
    assert found.win_rate == 0.5
    pairs = sorted(read_pair(asked.body) for asked in loopback.asked)
    assert pairs == sorted(
        pair
        for one, other in (("long answer", "short"), ("x", "longer"), ("same!", "equal"))
        for pair in ((one, other), (other, one))
    )
    assert loopback.asked[0].body["temperature"] == 0


@pytest.mark.parametrize("place", ["A", "B"])
def test_a_judge_who_goes_by_the_order_finds_nothing(loopback: Loopback, place: str) -> None:
    loopback.script(say(f"Verdict: {place}"))
    found = judge(loopback, ["a", "b", "c"], ["d", "e", "f"])
    assert found.outcomes == (0.5, 0.5, 0.5)
    assert (found.ties, found.flips, found.win_rate) == (3, 3, 0.5)


def test_what_cannot_be_read_is_counted_and_takes_no_part(loopback: Loopback) -> None:
    def answer(number: int, body: dict[str, Any]) -> Any:
        first, second = read_pair(body)
        if "odd" in (first, second):
            # One of the two orders is enough.
            return say("I cannot say.") if first == "odd" else prefer_longer(number, body)
        return fail(400, "too long") if "huge" in (first, second) else prefer_longer(number, body)

    loopback.answer = answer
    found = judge(loopback, ["odd", "huge", "longer"], ["one", "two", "three"])
    assert found.outcomes == (None, None, 1.0)
    assert (found.unreadable, found.wins, found.win_rate) == (2, 1, 1.0)
    assert found.to_json()["outcomes"] == [None, None, 1.0]


def test_equal_answers_tie_without_being_asked_about(loopback: Loopback) -> None:
    loopback.answer = prefer_longer
    progress: list[tuple[int, int]] = []
    found = judge(
        loopback, ["same", "longer"], ["same", "x"], on_progress=lambda *counts: progress.append(counts)
    )
    assert (found.outcomes, found.equal, found.flips) == ((0.5, 1.0), 1, 0)
    assert progress == [(1, 2), (2, 2)]


def test_nothing_read_has_no_rate(loopback: Loopback) -> None:
    loopback.script(say("?"))
    assert judge(loopback, ["a"], ["b"]).win_rate is None


def test_a_chat_is_shown_turn_by_turn(loopback: Loopback) -> None:
    loopback.answer = prefer_longer
    prompt = [Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "And?")]
    where = Endpoint(loopback.url, "judge")
    judge_win_rate([prompt], ["a"], ["bb"], endpoint=where, instruction="Judge.", options={"seed": 1})
    body = loopback.asked[0].body
    assert body["messages"][0] == {"role": "system", "content": "Judge."}
    assert body["messages"][1]["content"].startswith(
        "[Prompt]\nuser: Hi\n\nassistant: Hello\n\nuser: And?\n\n[Answer A]"
    )
    assert body["seed"] == 1
    assert "temperature" not in body


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Verdict: A", "A"),
        ("reasons\n\n**Verdict: b**\n", "B"),
        ("verdict - TIE.", "tie"),
        ("Verdict: A\nOn reflection:\nVerdict: B", "B"),
        ("My verdict: A is better", None),
        ("A", None),
        ("Verdict: C", None),
        ("", None),
    ],
)
def test_a_verdict_is_a_line_of_its_own(text: str, expected: str | None) -> None:
    assert read_verdict(text) == expected


def test_a_tie_from_one_side_is_a_tie() -> None:
    assert settle("A", "tie") == settle("tie", "B") == settle("tie", "tie") == 0.5
    assert settle("A", None) is None


def test_lists_of_other_lengths_are_a_broken_call(loopback: Loopback) -> None:
    with pytest.raises(ValueError, match="2 and 1 answers"):
        judge_win_rate(["p", "q"], ["a", "b"], ["c"], endpoint=Endpoint(loopback.url, "judge"))

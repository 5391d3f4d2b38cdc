"""The native track of LLaMA-Factory, Axolotl and Unsloth, for real: they prepare raw rows by themselves."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from native_arms import compare_native, gates, join_tickets, kinds, read_both, read_tickets

from tunesmith.core.bundled import BUNDLED
from tunesmith.data.tokenizer import load_tokenizer

pytestmark = [pytest.mark.frameworks, pytest.mark.slow, pytest.mark.timeout(600)]

HOME = Path(__file__).parents[2] / ".frameworks"
NAMES = ("llamafactory", "axolotl", "unsloth")
BOS = load_tokenizer(BUNDLED["tunesmith/tiny"]).added_tokens["<|bos|>"]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(HOME))


@pytest.fixture(params=NAMES)
def framework(request: pytest.FixtureRequest) -> str:
    if not (HOME / "frameworks" / request.param / "environment.json").exists():
        pytest.skip(f"{request.param} is not installed for tests; run: make test-frameworks")
    return request.param


def check_trained(folder: Path, framework: str) -> list[int]:
    """The numbers of answers that our rows train; the framework trains the same, and has the same tokens but BOS."""
    both = read_both(folder, framework)
    for ids, mask, their_ids, labels in both:
        assert [token for token in their_ids if token != BOS] == ids[1:]
        trained = [token for token, kept in zip(ids, mask, strict=True) if kept]
        assert [label for label in labels if label != -100] == trained
    return [sum(b > a for a, b in itertools.pairwise(mask)) for _, mask, _, _ in both]


def test_tickets_are_ours_but_for_a_bos_that_llamafactory_writes_again(
    framework: str, tmp_path: Path
) -> None:
    # A system turn, a question, an answer. LLaMA-Factory reads what stands before a question off a conversation that
    # begins with one, BOS and all.
    comparison = compare_native(tmp_path, read_tickets(), framework=framework)

    answers = check_trained(tmp_path, framework)
    assert len(answers) >= 10
    assert set(answers) == {1}
    more = framework == "llamafactory"
    assert all(ids.count(BOS) == 1 + more for _, _, ids, _ in read_both(tmp_path, framework))
    assert kinds(comparison, framework) == ({"bos inside": (len(answers), len(answers))} if more else {})
    words = gates(comparison, framework)
    assert words["tokens"] == ("DIFFERS" if more else "PASS")
    assert words["parameters"] == words["optimizer"] == "PASS"
    assert words["loss"] == words["curve"] == ("UNVERIFIED" if more else "PASS")


def test_all_answers_of_a_conversation_are_trained(framework: str, tmp_path: Path) -> None:
    comparison = compare_native(tmp_path, join_tickets(), framework=framework, max_tokens=2048)

    answers = check_trained(tmp_path, framework)
    assert set(answers) == {2}
    more = {"bos inside": (len(answers), 2 * len(answers))} if framework == "llamafactory" else {}
    assert kinds(comparison, framework) == more


def test_an_answer_without_weight_is_not_trained(framework: str, tmp_path: Path) -> None:
    rows = join_tickets()
    # Only Axolotl can be told so of single rows; the others train the last answer of all.
    for row in rows[::2] if framework == "axolotl" else rows:
        row["messages"][2]["weight"] = 0
    compare_native(tmp_path, rows, framework=framework, max_tokens=2048)

    answers = check_trained(tmp_path, framework)
    assert set(answers) == ({1, 2} if framework == "axolotl" else {1})

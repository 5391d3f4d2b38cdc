"""Rows of a framework's own preprocessing against ours: every difference is named, and nothing else is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tunesmith.comparing.native import IGNORED, Rules, TheirRow, compare_rows
from tunesmith.core.comparison import native_from_json, native_to_json
from tunesmith.core.errors import DataError
from tunesmith.core.native import NativeTokens
from tunesmith.core.types import Origin, TokenRow

BOS, EOS, USER, BOT, NEWLINE, UNKNOWN = 1, 2, 3, 4, 5, 9
WORDS = {BOS: "<s>", EOS: "</s>", USER: "<u>", BOT: "<a>", NEWLINE: "\n", UNKNOWN: "?"}
# <s> <u> q q <a> x y z </s>: the answer and its end are trained.
IDS = [BOS, USER, 11, 12, BOT, 21, 22, 23, EOS]
MASK = [0, 0, 0, 0, 0, 1, 1, 1, 1]


def decode(ids: Sequence[int]) -> str:
    return "".join(WORDS.get(number, f"w{number} ") for number in ids)


def row(ids: list[int], mask: list[int], line: int = 1) -> TokenRow:
    return TokenRow(ids, mask, Origin(f"rows.jsonl:{line}", "rows.jsonl", line), "")


def their(ids: list[int], mask: list[int], number: int = 0) -> TheirRow:
    labels = (token if kept else IGNORED for token, kept in zip(ids, mask, strict=True))
    return TheirRow(number, tuple(ids), tuple(labels))


def compare(
    ids: list[int],
    mask: list[int],
    *,
    ours: tuple[list[int], list[int]] = (IDS, MASK),
    max_tokens: int = 100,
) -> NativeTokens:
    rules = Rules(stop_ids=(EOS,), bos_id=BOS, max_tokens=max_tokens, decode=decode)
    return compare_rows("trl", [row(*ours)], {0: their(ids, mask)}, rules)


def kinds(found: NativeTokens) -> dict[str, int]:
    return {kind.name: kind.tokens for kind in found.kinds}


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        (IDS, MASK),
        # What comes after the last trained token changes no loss.
        ([*IDS, NEWLINE, USER], [*MASK, 0, 0]),
        # A label in the first place has nothing before it that could predict it.
        (IDS, [1, *MASK[1:]]),
    ],
)
def test_rows_that_train_the_same_have_no_difference(ids: list[int], mask: list[int]) -> None:
    found = compare(ids, mask)

    assert found.same_rows == found.rows == 1
    assert found.kinds == []
    assert found.says == "trl makes the same tokens and labels of all 1 row"


@pytest.mark.parametrize(
    ("ids", "mask", "expected"),
    [
        (IDS, [0, 1, 1, 1, 1, 1, 1, 1, 1], {"trained prompt": 4}),
        (IDS, [0, 0, 0, 0, 0, 1, 1, 1, 0], {"untrained stop": 1}),
        (IDS, [0, 0, 0, 0, 0, 0, 1, 1, 1], {"untrained answer": 1}),
        (IDS[:-1], MASK[:-1], {"missing stop": 1}),
        ([*IDS, NEWLINE], [*MASK, 1], {"trained template": 1}),
        ([*IDS[:-1], NEWLINE], MASK, {"missing stop": 1, "trained template": 1}),
        ([BOS, *IDS], [0, *MASK], {"extra bos": 1}),
        (IDS[1:], MASK[1:], {"missing bos": 1}),
        ([BOS, *IDS], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1], {"extra bos": 1, "trained prompt": 4}),
        ([*IDS[:-1], NEWLINE, EOS], [*MASK, 1], {"trained template": 1}),
        # More of an answer than we have is no template.
        ([*IDS[:7], UNKNOWN, *IDS[7:]], [*MASK, 1], {"other tokens": 1}),
        (IDS[:6], MASK[:6], {"cut end": 3}),
        ([BOS, *IDS[4:]], [0, *MASK[4:]], {"cut start": 3}),
        ([*IDS[:6], UNKNOWN, 23, EOS], MASK, {"other tokens": 1}),
        # Two of our tokens are one of theirs: where prompt and answer meet, say.
        ([BOS, USER, 11, 12, 31, 22, 23, EOS], [0, 0, 0, 0, 0, 1, 1, 1], {"other tokens": 2}),
    ],
)
def test_each_way_to_differ_is_named(ids: list[int], mask: list[int], expected: dict[str, int]) -> None:
    assert kinds(compare(ids, mask)) == expected


def test_a_stop_token_that_the_limit_took_was_cut() -> None:
    assert kinds(compare(IDS[:-1], MASK[:-1], max_tokens=8)) == {"cut end": 1}


def test_a_prompt_that_the_limit_shortened_at_its_end_was_cut_inside() -> None:
    assert kinds(compare([*IDS[:2], *IDS[4:]], [*MASK[:2], *MASK[4:]], max_tokens=7)) == {"cut inside": 2}
    # What is missing without a limit's doing is no cut.
    assert kinds(compare([*IDS[:2], *IDS[4:]], [*MASK[:2], *MASK[4:]])) == {"other tokens": 2}


def test_a_prompt_that_is_shortened_where_we_shorten_the_answer() -> None:
    # Ten tokens are the limit. Ours lost the answer's 26, 27 and end; theirs lost the prompt's 12, 13, 14.
    ours = [BOS, USER, 11, 12, 13, 14, BOT, 21, 22, 23], [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    found = compare(
        [BOS, USER, 11, BOT, 21, 22, 23, 26, 27, EOS], [0] * 4 + [1] * 6, ours=ours, max_tokens=10
    )

    assert kinds(found) == {"cut inside": 3, "not cut": 3}
    cut, kept = (kind.examples[0] for kind in found.kinds)
    assert (cut.at, cut.ours[:4]) == (3, "w12 ")
    assert (kept.at, kept.ours, kept.theirs) == (10, "", "w26 w27 </s>")


def test_a_bos_before_each_turn_is_told_apart_from_what_else_differs() -> None:
    ids = [BOS, USER, 11, BOT, 21, EOS, USER, 12, BOT, 22, EOS]
    mask = [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1]
    found = compare([*ids[:6], BOS, *ids[6:-1], NEWLINE], [*mask[:6], 0, *mask[6:-1], 1], ours=(ids, mask))

    assert kinds(found) == {"bos inside": 1, "missing stop": 1, "trained template": 1}
    bos, stop, _ = (kind.examples[0] for kind in found.kinds)
    assert (bos.at, bos.theirs) == (6, "<s><u>w12 <a>w22 \n")
    assert (stop.at, stop.ours, stop.theirs) == (10, "</s>", "\n")


def test_a_bos_inside_that_is_trained_is_told_to_be() -> None:
    found = compare([*IDS[:5], BOS, *IDS[5:]], [*MASK[:5], 1, *MASK[5:]])

    assert kinds(found) == {"bos inside": 1, "trained template": 1}


def test_a_bos_that_also_ends_texts_is_no_finding() -> None:
    rules = Rules(stop_ids=(BOS,), bos_id=BOS, max_tokens=100, decode=decode)
    ours = row([USER, 11, BOT, 21, BOS], [0, 0, 0, 1, 1])
    theirs = their([USER, 11, BOS, BOT, 21, BOS], [0, 0, 0, 0, 1, 1])

    assert kinds(compare_rows("trl", [ours], {0: theirs}, rules)) == {"other tokens": 1}


def test_rows_that_only_we_cut_are_not_cut() -> None:
    found = compare(IDS, MASK, ours=(IDS[:7], MASK[:7]), max_tokens=7)

    assert kinds(found) == {"not cut": 2}


def test_labels_that_are_other_tokens_were_moved() -> None:
    rules = Rules(stop_ids=(EOS,), bos_id=BOS, max_tokens=100, decode=decode)
    shifted = TheirRow(0, tuple(IDS), (*(IGNORED,) * 4, 21, 22, 23, EOS, IGNORED))
    found = compare_rows("trl", [row(IDS, MASK)], {0: shifted}, rules)

    # One of them also stands where ours trains nothing, and the last place lost its own.
    assert kinds(found)["moved labels"] == 4


def test_an_end_between_answers_that_is_not_trained_is_a_stop_token() -> None:
    ids = [BOS, USER, 11, BOT, 21, EOS, USER, 12, BOT, 22, EOS]
    mask = [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1]
    found = compare(ids, [0, 0, 0, 0, 1, 0, 1, 0, 0, 1, 0], ours=(ids, mask))

    assert kinds(found) == {"untrained stop": 2, "trained template": 1}
    assert found.says == (
        "trl trains 1 fewer token; 1 of 1 row differs: it does not train the stop token in 1 row; "
        "it trains 1 token after or between the answers of 1 row"
    )


def test_the_sentence_counts_over_all_rows_and_examples_stop_at_five() -> None:
    ours = [row(IDS, MASK, line) for line in range(1, 11)]
    prompts = [0, 1, 1, 1, 1, 1, 1, 1, 1]
    theirs = {number: their(IDS, prompts if number % 8 else MASK, number) for number in range(9)}
    rules = Rules(stop_ids=(EOS,), bos_id=BOS, max_tokens=100, decode=decode)
    found = compare_rows("trl", ours, theirs, rules)

    # Rows 0 and 8 are the same, 9 is not there: 7 rows have 4 tokens more, one has all of its 4 fewer.
    assert found.says == (
        "trl trains 24 more tokens; 8 of 10 rows differ: it leaves out 1 row; "
        "it trains 28 tokens of the prompt in 7 rows"
    )
    assert (found.same_rows, found.targets, found.their_targets, found.their_tokens) == (2, 40, 64, 81)
    examples = found.kinds[1].examples
    assert [example.place for example in examples] == [f"rows.jsonl:{line}" for line in range(2, 7)]
    assert (examples[0].at, examples[0].ours[:8]) == (1, "<u>w11 w")
    assert native_from_json(native_to_json(found)) == found


def test_an_example_shows_both_sides_from_where_they_part() -> None:
    (kind,) = compare([*IDS[:6], UNKNOWN, 23, EOS], MASK).kinds

    assert (kind.examples[0].at, kind.examples[0].ours, kind.examples[0].theirs) == (
        6,
        "w22 w23 </s>",
        "?w23 </s>",
    )


def test_another_schema_is_refused() -> None:
    value = native_to_json(compare(IDS, MASK)) | {"schema": 99}

    with pytest.raises(DataError, match=r"native\.json: schema 99"):
        native_from_json(value)

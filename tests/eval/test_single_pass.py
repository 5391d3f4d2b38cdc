"""One reading of each prompt gives the likelihood of `score_rows` and the answer of `generate`."""

from __future__ import annotations

import random
from typing import cast

import pytest

from tunesmith.core.types import Origin, TokenRow
from tunesmith.eval.nll import score_rows
from tunesmith.eval.single_pass import Asked, count_agreed, score_and_answer
from tunesmith.infer.generate import generate
from tunesmith.job.spec import SamplingSpec
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.decoder import Decoder

STOP, LIMIT = 7, 24


def make_asked(model: CausalLM, *, start: int = 0, count: int = 30) -> list[Asked]:
    """Prompts whose true answer is what the model says, or begins so, or has nothing to do with it.

    start: tokens that all prompts begin with.
    """
    draw = random.Random(4)
    shared = [draw.randrange(250) for _ in range(start)]
    prompts = [shared + [draw.randrange(250) for _ in range(draw.randint(1, 70))] for _ in range(count)]
    said = generate(model, prompts, max_new_tokens=LIMIT - 4, stop_ids=[STOP])
    asked: list[Asked] = []
    for number, (prompt, generation) in enumerate(zip(prompts, said, strict=True)):
        truth = [*generation.ids, STOP]
        if number % 3 == 1:
            truth[draw.randrange(len(truth))] = draw.randrange(250)
        elif number % 3 == 2:
            truth = [draw.randrange(250) for _ in range(draw.randint(1, 40))]
        after = [3, 4] if number % 5 == 0 else []  # what a template may put behind the turn
        mask = [0] * len(prompt) + [1] * len(truth) + [0] * len(after)
        row = TokenRow([*prompt, *truth, *after], mask, Origin("t:1", "t", 0), "", 1)
        asked.append(Asked(row, len(prompt)))
    return asked


@pytest.mark.parametrize("start", [0, 100])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_and_answers_equal_those_of_two_readings(model: CausalLM, start: int, temperature: float):
    asked = make_asked(model, start=start)
    prompts = [list(item.row.ids[: item.prompt_length]) for item in asked]
    sampling = SamplingSpec(temperature=temperature, seed=3)
    seen: list[tuple[int, int]] = []
    scores, answers = score_and_answer(
        cast(Decoder, model),
        asked,
        max_new_tokens=LIMIT,
        stop_ids=[STOP],
        sampling=sampling,
        on_progress=lambda done, of: seen.append((done, of)),
    )
    expected = score_rows(model, [item.row for item in asked], end_ids=[STOP])
    assert [score.nll for score in scores] == pytest.approx([score.nll for score in expected], rel=1e-5)
    assert [s.num_content_tokens for s in scores] == [s.num_content_tokens for s in expected]
    assert answers == generate(model, prompts, max_new_tokens=LIMIT, stop_ids=[STOP], sampling=sampling)
    assert any(answer.finished for answer in answers) or temperature
    assert seen[-1] == (30, 30)


def test_the_context_ends_an_answer_that_the_truth_outlasts(model: CausalLM):
    limit = model.config.max_positions
    prompt = [5] * (limit - 3)
    said = generate(model, [prompt], max_new_tokens=LIMIT, stop_ids=[])[0].ids
    row = TokenRow(
        [*prompt, *said, 9, 9], [0] * len(prompt) + [1] * (len(said) + 2), Origin("t:1", "t", 0), ""
    )
    _, answers = score_and_answer(
        cast(Decoder, model),
        [Asked(row, len(prompt))],
        max_new_tokens=LIMIT,
        stop_ids=[],
        sampling=SamplingSpec(),
    )
    assert answers[0].ids == said
    assert len(said) == 3


def test_the_draft_counts_up_to_the_first_other_token_a_stop_or_the_room():
    assert count_agreed([5, 7, 9], [5, 7, 8], stop_ids=[], most=9) == 2
    assert count_agreed([6, 7, 9], [5, 7, 9], stop_ids=[], most=9) == 0
    assert (
        count_agreed([5, 7, 9], [5, 7, 9], stop_ids=[], most=9) == 2
    )  # the third comes from a hidden state at hand
    assert count_agreed([5, 7, 9], [5, 7, 9], stop_ids=[7], most=9) == 1
    assert count_agreed([5, 7, 9], [5, 7, 9], stop_ids=[], most=1) == 1

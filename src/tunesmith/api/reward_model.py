"""A reward model as a reward: the score behind a prompt and its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import ModelError, TunesmithError
from tunesmith.core.types import TokenRow
from tunesmith.data.batch import plan_micro_batches
from tunesmith.data.prompts import Answer
from tunesmith.data.render import Renderer
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.models.config import load_config
from tunesmith.models.headers import check_model, find_tensors

if TYPE_CHECKING:
    import torch

BUDGET_TOKENS = 8192


def check_reward_model(folder: Path, *, place: str) -> None:
    """Raise ModelError unless a folder holds a classifier of one score. Reads settings and headers only."""
    inner = folder / "model"
    if not (folder / "config.json").is_file() and (inner / "config.json").is_file():
        raise ModelError(place, f"{folder} is no model folder", cure=f"Its reward model is {inner}")
    try:
        config = load_config(folder)
        if config.is_classifier and config.own:
            _check_one_score(folder)
        check_model(folder)
    except TunesmithError as error:
        raise ModelError(f"{place}: {error.place}", error.finding, rule=error.rule, cure=error.cure) from None
    if not config.is_classifier:
        raise ModelError(
            place,
            "is no sequence classifier",
            rule="a reward model scores answers",
            cure="Give a folder that objective: reward has made",
        )
    if not config.own:
        raise ModelError(
            place,
            f"is a classifier of type {config.model_type}",
            rule="reward models are of architectures that our own decoder runs",
            cure="Train one with objective: reward, or call it from a function (rewards.py:NAME)",
        )


def _check_one_score(folder: Path) -> None:
    score = find_tensors(folder).get("score.weight")
    if score is not None and score.shape[0] != 1:
        raise ModelError(
            str(folder),
            f"gives {score.shape[0]} scores",
            rule="a reward is one number",
            cure="Give a classifier of one label",
        )


def open_reward_model(
    folder: Path, *, place: str, renderer: Renderer, device: torch.device | str, dtype: Any
) -> Callable[[Sequence[Answer]], list[float | None]]:
    """What scores answers with the model of a folder.

    renderer: of the policy, whose token ids the model is given. Raises ModelError if ids are other tokens to it.
    """
    import torch

    from tunesmith.models.load import load_model

    if load_tokenizer(folder).vocabulary_sha256 != renderer.tokenizer.vocabulary_sha256:
        raise ModelError(
            place,
            "its vocabulary is not that of the model that is trained",
            rule="it is given the same tokens",
            cure="Train a reward model from the same base (objective: reward)",
        )
    model = load_model(folder, device=device, dtype=dtype or torch.float32, classifier=True)
    limit = load_config(folder).max_positions

    def score(answers: Sequence[Answer]) -> list[float | None]:
        from tunesmith.methods.objectives import score_answers
        from tunesmith.models.layout import make_batch

        rows = [_join(answer, renderer) for answer in answers]
        longest = max((len(row.ids) for row in rows), default=0)
        if limit and longest > limit:
            raise ModelError(
                place,
                f"a prompt and its answer have {longest} tokens",
                rule=f"this reward model reads {limit}",
                cure="Lower objective.max_new_tokens or data.max_tokens",
            )
        found: list[float | None] = [None] * len(rows)
        with torch.no_grad():
            for numbers in plan_micro_batches([len(row.ids) for row in rows], budget_tokens=BUDGET_TOKENS):
                batch = make_batch([rows[n] for n in numbers], device=device)
                for n, value in zip(numbers, score_answers(model, batch).tolist(), strict=True):
                    found[n] = value
        return found

    return score


def _join(answer: Answer, renderer: Renderer) -> TokenRow:
    """Prompt and answer as they were sampled, with the end that a rendered answer has where it came to one."""
    tokenizer = renderer.tokenizer
    end = tokenizer.eos_id
    if not isinstance(answer.prompt.question, str) and renderer.end_token is not None:
        end = renderer.end_token
    ids = [*answer.prompt.ids, *answer.ids]
    if answer.finished and end is not None and ids[-1:] != [end]:
        ids.append(end)
    return TokenRow(ids, [0] * len(ids), answer.prompt.origin, answer.prompt.row_id)

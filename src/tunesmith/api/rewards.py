"""What sampled answers are worth: the rewards of a job, opened before training and asked once a rollout.

Verifiers are computed here, but for `regex`: a pattern can take for ever, so that it is searched where functions run,
in a process that is ended when its time is over (`reward_process.py`).
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from tunesmith.api.reward_model import check_reward_model, open_reward_model
from tunesmith.api.reward_process import RewardProcess
from tunesmith.api.verifiers import (
    AGAINST_TRUTH,
    can_verify,
    check_pattern,
    check_settings,
    open_schema,
    open_verifier,
)
from tunesmith.core.errors import JobError, TrainingFailed
from tunesmith.core.types import Message
from tunesmith.data.prompts import TRUTHS, Answer, Prompt
from tunesmith.data.render import Renderer
from tunesmith.job.objective import VERIFIERS, RewardTerm

# What a function is given besides the columns of the data. A column of the same name is not.
_ARGUMENTS = ("prompts", "completions", "completion_ids")
_RULE = f"a reward is {', '.join(VERIFIERS)}, a function (rewards.py:NAME), or the folder of a reward model"

Score = Callable[[Sequence[Answer]], list[float | None]]


@dataclass(frozen=True, slots=True)
class Scored:
    """Rewards of some answers, in their order.

    total:       the weighted sum of terms.
    terms:       of each reward by name, unweighted.
    num_missing: of each reward, answers that it said nothing about (None, or a prompt without truth); they count as 0.
    """

    total: list[float]
    terms: dict[str, list[float]]
    num_missing: dict[str, int]


class Rewards:
    """A job's rewards, ready to be asked."""

    def __init__(self, scores: Sequence[tuple[str, float, str, Score]]) -> None:
        self._scores = scores
        self.names = tuple(name for name, *_ in scores)

    def __call__(self, answers: Sequence[Answer]) -> Scored:
        """Raises TrainingFailed, in one line, for a function that fails or does not come back."""
        terms: dict[str, list[float]] = {}
        missing: dict[str, int] = {}
        total = [0.0] * len(answers)
        for name, weight, place, score in self._scores:
            values = score(answers) if answers else []
            missing[name] = values.count(None)
            terms[name] = [0.0 if value is None else value for value in values]
            total = [so_far + weight * value for so_far, value in zip(total, terms[name], strict=True)]
            if not all(map(math.isfinite, total)):
                raise TrainingFailed(
                    place, "gives a reward that is not finite", rule="rewards are finite numbers"
                )
        return Scored(total, terms, missing)


def check_rewards(terms: Sequence[RewardTerm], *, key: str = "objective.rewards") -> None:
    """Raise JobError or ModelError for what can be said without data: unknown names, missing settings and files. key:
    where the job names them."""
    for place, term in zip(_name_places(terms, key), terms, strict=True):
        check_settings(term, place)
        if term.source == "regex":
            check_pattern(cast("str", term.pattern), place)
        elif term.source == "json_schema":
            open_schema(cast("str", term.schema_file), place)
        elif (function := _read_function(term.source, place)) is not None:
            if not function[0].is_file():
                raise JobError(place, f"{function[0]}: no such file", cure="Check the path")
        elif term.source not in VERIFIERS:
            if not Path(term.source).is_dir():
                raise JobError(place, _say_unknown(term.source), rule=_RULE, cure=_guess(term.source))
            check_reward_model(Path(term.source), place=place)


@contextmanager
def open_rewards(
    terms: Sequence[RewardTerm],
    *,
    prompts: Sequence[Prompt],
    renderer: Renderer,
    log: Path,
    device: Any = "cpu",
    dtype: Any = None,
    key: str = "objective.rewards",
) -> Generator[Rewards]:
    """The rewards of a job while the block runs; functions are imported and reward models loaded at once.

    prompts: all that will be answered; functions are given their columns.
    renderer: of the model that is trained. log: gets what functions print.
    device, dtype: of reward models (default: float32). key: where the job names the rewards.
    Raises JobError or ModelError, in one line, for what can be told before the first answer.
    """
    check_rewards(terms, key=key)
    process = RewardProcess(log)
    columns = list(
        dict.fromkeys(name for prompt in prompts for name in prompt.columns if name not in _ARGUMENTS)
    )
    try:
        places = _name_places(terms, key)
        opened = [
            _open_term(
                term,
                number,
                place=place,
                process=process,
                prompts=prompts,
                columns=columns,
                open_model=partial(open_reward_model, renderer=renderer, device=device, dtype=dtype),
            )
            for number, (term, place) in enumerate(zip(terms, places, strict=True))
        ]
        names = _name_terms(terms)
        yield Rewards(
            [
                (name, term.weight, place, score)
                for name, term, place, score in zip(names, terms, places, opened, strict=True)
            ]
        )
    finally:
        process.close()


def _open_term(
    term: RewardTerm,
    number: int,
    *,
    place: str,
    process: RewardProcess,
    prompts: Sequence[Prompt],
    columns: Sequence[str],
    open_model: Callable[..., Score],
) -> Score:
    if term.source == "regex":
        return _search(term, process, place)
    if term.source in VERIFIERS:
        if not any(can_verify(term.source, prompt.truth) for prompt in prompts):
            raise JobError(
                place,
                f"no prompt has {AGAINST_TRUTH[term.source]} to match",
                rule=f"a truth is a column {', '.join(TRUTHS)}, or the row's last answer",
                cure="Add one to the data, or use another reward",
            )
        verify = open_verifier(term, place)
        return lambda answers: [verify(answer) for answer in answers]
    if (function := _read_function(term.source, place)) is not None:
        file, name = function
        request = {
            "do": "load",
            "number": number,
            "file": str(file.resolve()),
            "name": name,
            "given": [*_ARGUMENTS, *columns],
        }
        process.ask(request, place=place, timeout=term.timeout, fails=JobError)
        return _call(number, term, process, place, columns)
    return open_model(Path(term.source), place=place)


# --- functions --------------------------------------------------------------------------------------------------------


def _call(number: int, term: RewardTerm, process: RewardProcess, place: str, columns: Sequence[str]) -> Score:
    """A function called as TRL calls it: one keyword for each column, one item for each answer."""

    def score(answers: Sequence[Answer]) -> list[float | None]:
        arguments = {
            "prompts": [_as_trl(answer.prompt.question) for answer in answers],
            "completions": [_complete(answer) for answer in answers],
            "completion_ids": [list(answer.ids) for answer in answers],
            **{name: [answer.prompt.columns.get(name) for answer in answers] for name in columns},
        }
        request = {"do": "call", "number": number, "arguments": arguments}
        return process.ask(request, place=place, timeout=term.timeout, fails=TrainingFailed)

    return score


def _as_trl(question: Sequence[Message] | str) -> Any:
    if isinstance(question, str):
        return question
    return [{"role": turn.role, "content": turn.content, **turn.extra} for turn in question]


def _complete(answer: Answer) -> Any:
    if isinstance(answer.prompt.question, str):
        return answer.text
    return [{"role": "assistant", "content": answer.text}]


def _search(term: RewardTerm, process: RewardProcess, place: str) -> Score:
    def score(answers: Sequence[Answer]) -> list[float | None]:
        request = {"do": "search", "pattern": term.pattern, "texts": [answer.text for answer in answers]}
        return process.ask(request, place=place, timeout=term.timeout, fails=TrainingFailed)

    return score


def _read_function(source: str, place: str) -> tuple[Path, str] | None:
    """File and name of a function, None for another source. Raises JobError for a file without a name."""
    file, _, name = source.rpartition(":")
    if file.endswith(".py"):
        return Path(file), name
    if source.endswith(".py"):
        raise JobError(place, "names no function", cure=f"Write {Path(source).name}:NAME")
    return None


# --- names ------------------------------------------------------------------------------------------------------------


def _say_unknown(source: str) -> str:
    return f"{source}: no such folder" if "/" in source else f"unknown reward {source!r}"


def _guess(source: str) -> str:
    near = difflib.get_close_matches(source.lower().replace("-", "_"), VERIFIERS, n=1)
    return f"Did you mean {near[0]!r}?" if near else "Check the name"


def _shorten(source: str) -> str:
    """A source as messages and logs call it: without the folders of a path."""
    return Path(source).name or source


def _name_places(terms: Sequence[RewardTerm], key: str) -> list[str]:
    return [f"{key}[{number}] ({_shorten(term.source)})" for number, term in enumerate(terms)]


def _name_terms(terms: Sequence[RewardTerm]) -> list[str]:
    """A name for each reward: its function's, its verifier's or its folder's, numbered where one comes again."""
    names = [_shorten(term.source).rpartition(":")[2] for term in terms]
    counts = Counter(names)
    return [f"{name}_{number}" if counts[name] > 1 else name for number, name in enumerate(names)]

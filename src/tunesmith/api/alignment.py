"""What an arm is judged on besides its answers: held-out pairs, rewards, and how far it went from where it started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tunesmith.api.rewards import open_rewards
from tunesmith.core.fingerprint import hash_row
from tunesmith.core.jsonl import write_json, write_jsonl
from tunesmith.core.records import AnswerRecord, EvalRecord, PreferenceRecord, read_answers
from tunesmith.core.rundir import RunDir
from tunesmith.core.types import TokenRow
from tunesmith.data.prepare import Prepared
from tunesmith.data.prompts import Answer, Prompt
from tunesmith.data.render import Renderer
from tunesmith.job.spec import EvaluateSpec, RewardTerm, SamplingSpec

if TYPE_CHECKING:
    from tunesmith.models.causal_lm import CausalLM

# Prompts whose sampled answers KL is measured on.
MAX_KL_PROMPTS = 128


def score_pairs(model: CausalLM, pairs: Prepared) -> list[PreferenceRecord]:
    """How likely a model finds both answers of each held-out pair."""
    from tunesmith.eval.nll import score_rows

    rows = pairs.rows("test")
    scores, clusters = score_rows(model, rows), pairs.clusters("test")
    return [
        PreferenceRecord(
            row=number,
            row_id=f"{rows[first].row_id}{rows[first + 1].row_id}",
            place=rows[first].origin.place,
            cluster=clusters[first],
            logps=[-score.nll for score in scores[first : first + 2]],
            tokens=[score.num_target_tokens for score in scores[first : first + 2]],
        )
        for number, first in enumerate(range(0, len(rows), 2))
    ]


def summarise_pairs(pairs: Sequence[PreferenceRecord]) -> dict[str, float]:
    return {"preference_accuracy": fmean(pair.is_right for pair in pairs)}


def reward_answers(
    run: RunDir,
    prompts: Mapping[int, Prompt],
    terms: Sequence[RewardTerm],
    renderer: Renderer,
    *,
    device: Any,
) -> tuple[dict[int, float], list[str]]:
    """What each of an arm's answers is worth, by row, and what to know about it. prompts: by row."""
    answers, log = read_answers(run.answers), run.root / "rewards.log"
    asked = [number for number in prompts if answers[number].answer is not None]
    said = [_as_answer(answers[number], prompts[number], renderer) for number in asked]
    with open_rewards(
        terms,
        prompts=list(prompts.values()),
        renderer=renderer,
        log=log,
        device=device,
        key="evaluate.rewards",
    ) as rewards:
        scored = rewards(said)
    doubts = [
        f"{name} said nothing (None) of {count:,} of {len(said):,} answers: they count as 0"
        for name, count in scored.num_missing.items()
        if count
    ]
    return dict(zip(asked, scored.total, strict=True)), doubts


def _as_answer(answer: AnswerRecord, prompt: Prompt, renderer: Renderer) -> Answer:
    text = answer.answer or ""
    ids = renderer.tokenizer.encode(text)
    return Answer(prompt, text, answer.num_new_tokens, answer.finished, ids)


def sample_answers(
    model: CausalLM, prompts: Sequence[Prompt], renderer: Renderer, spec: EvaluateSpec, *, seed: int
) -> list[TokenRow]:
    """An answer to each prompt drawn from the model as it is (temperature 1), as a row whose targets it is."""
    from tunesmith.infer.generate import generate

    found = generate(
        model,
        [list(prompt.ids) for prompt in prompts],
        max_new_tokens=spec.max_new_tokens,
        stop_ids=renderer.stop_ids,
        sampling=SamplingSpec(temperature=1.0, seed=seed),
        keys=[f"kl/{prompt.row_id}" for prompt in prompts],
    )
    rows: list[TokenRow] = []
    for prompt, one in zip(prompts, found, strict=True):
        answered = one.ids if one.stop_id is None else [*one.ids, one.stop_id]
        ids, mask = [*prompt.ids, *answered], [0] * len(prompt.ids) + [1] * len(answered)
        rows.append(TokenRow(ids, mask, prompt.origin, hash_row(ids, mask)))
    return rows


def measure_kl(model: CausalLM, start: CausalLM, rows: Sequence[TokenRow]) -> list[float]:
    """log p(answer | model) - log p(answer | start) of answers that the model drew; the mean is its KL divergence from
    its start, nats per answer."""
    from tunesmith.eval.nll import score_rows

    ours, theirs = score_rows(model, rows), score_rows(start, rows)
    return [before.nll - now.nll for now, before in zip(ours, theirs, strict=True)]


def add_scores(run: RunDir, record: EvalRecord, scores: Mapping[str, Mapping[int, float]]) -> EvalRecord:
    """Write values of rows beside the metrics of a judged arm's answers: name -> row -> value."""
    answers: list[AnswerRecord] = []
    for answer in read_answers(run.answers):
        own = {name: values[answer.row] for name, values in scores.items() if answer.row in values}
        answers.append(replace(answer, scores={**answer.scores, **own}))
    write_jsonl(run.answers, (answer.to_json() for answer in answers))
    means = {name: fmean(values.values()) for name, values in scores.items() if values}
    record = replace(record, metrics={**record.metrics, **means})
    write_json(run.evaluation, record.to_json())
    return record

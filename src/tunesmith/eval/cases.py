"""The steps of the judge, each over all test rows: gather, prompt, score, answer, choose, mark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.core.records import AnswerRecord
from tunesmith.core.types import Conversation, TokenRow
from tunesmith.data.prepare import Prepared
from tunesmith.data.render import Renderer
from tunesmith.eval.choice import ChoiceScore, read_choices, render_choices, score_choices
from tunesmith.eval.metrics import (
    METRICS,
    NOT_JSON,
    MetricContext,
    choose_metrics,
    cut_reasoning,
    load_schema,
    parse_answer,
    score_fields,
)
from tunesmith.eval.nll import RowScore, add_scores, score_rows, summarize_scores
from tunesmith.eval.prompting import (
    Prompt,
    PromptingKind,
    attach_answer,
    build_prompts,
    find_last_stretch,
    read_question,
)
from tunesmith.eval.single_pass import Asked, score_and_answer
from tunesmith.infer.generate import Generation, generate
from tunesmith.job.spec import EvaluateSpec
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.decoder import Decoder

MAX_FIELDS = 40
"""Fields of JSON answers that get an accuracy of their own."""

OnProgress = Callable[[int, int], None]


@dataclass(slots=True)
class Case:
    """One test row on its way through the judge.

    rows:   the row as training would see it (several where a template makes one row per turn).
    scored: the same targets under what this arm reads.
    """

    conversation: Conversation
    rows: list[TokenRow]
    cluster: str
    truth: str
    prompt: Prompt | None = None
    scored: list[TokenRow] = field(default_factory=list)
    score: RowScore | None = None
    generation: Generation | None = None
    answer: str | None = None
    options: ChoiceScore | None = None
    answer_index: int | None = None


def gather_cases(prepared: Prepared, renderer: Renderer, *, split: str, max_rows: int | None) -> list[Case]:
    """The first `max_rows` rows of a split. Raises DataError if it has none."""
    rendered: dict[int, list[TokenRow]] = {}
    for number, row in zip(prepared.conversation_numbers(split), prepared.rows(split), strict=True):
        rendered.setdefault(number, []).append(row)
    conversations, clusters = prepared.conversations(split), prepared.conversation_clusters(split)
    cases = [
        Case(
            conversations[number],
            rows,
            clusters[number],
            _read_truth(renderer, conversations[number], rows[-1]),
        )
        for number, rows in sorted(rendered.items())[:max_rows]
    ]
    if not cases:
        raise DataError(split, "has no rows to score", cure="Give data.split.test a share or a file")
    return cases


def _read_truth(renderer: Renderer, conversation: Conversation, row: TokenRow) -> str:
    """The answer's text; for a tool call, which has none of its own, what the template makes of it."""
    if "tool_calls" not in conversation.messages[-1].extra:
        return conversation.answer
    stop = set(renderer.stop_ids)
    ids = [token for token, bit in zip(row.ids, row.mask, strict=True) if bit and token not in stop]
    return renderer.tokenizer.decode(ids)


def resolve_metrics(cases: Sequence[Case], spec: EvaluateSpec) -> tuple[list[str], Any, list[str]]:
    """Names of the metrics to compute, the schema's validator, and a warning for each metric that cannot apply.

    Rows of plain text have no question, so nothing is generated for them.
    """
    validator = load_schema(Path(spec.schema_file)) if spec.schema_file else None
    for case in cases:
        if choices := read_choices(case.conversation):
            case.answer_index = choices[1]
    asked = [case for case in cases if case.conversation.kind != "text"]
    if not asked:
        return [], validator, ["plain text has no answers to generate: likelihood only"]
    has_choices = all(case.answer_index is not None for case in asked)
    if spec.metrics != "auto":
        names = list(dict.fromkeys(spec.metrics))
    else:
        names = choose_metrics(
            [case.truth for case in asked], has_schema=validator is not None, has_choices=has_choices
        )
    kept: list[str] = []
    warnings: list[str] = []
    for name in names:
        fitting = sum(METRICS[name].applies(case.truth, _make_context(case, validator)) for case in asked)
        if fitting:
            kept.append(name)
        if fitting < len(asked):
            warnings.append(
                f"{name} applies to {fitting} of {len(asked)} rows: it needs {METRICS[name].needs}"
            )
    return kept, validator, warnings


def prompt_cases(
    cases: Sequence[Case],
    renderer: Renderer,
    train: Sequence[Conversation],
    *,
    prompting: PromptingKind,
    spec: EvaluateSpec,
    seed: int,
    max_prompt_tokens: int,
) -> list[str]:
    """Give each case its prompt and the row to score under it; returns warnings."""
    asked = [case for case in cases if case.conversation.kind != "text"]
    prompts, warnings = build_prompts(
        prompting,
        renderer,
        [case.conversation for case in asked],
        train=train,
        spec=spec,
        seed=seed,
        max_prompt_tokens=max_prompt_tokens,
    )
    for case in cases:
        case.scored = case.rows
    for case, prompt in zip(asked, prompts, strict=True):
        case.prompt = prompt
        if prompt.num_shots:
            case.scored = _render_scored(renderer, case, prompt)
    return warnings


def _render_scored(renderer: Renderer, case: Case, prompt: Prompt) -> list[TokenRow]:
    """The case's targets after the arm's prompt."""
    if len(case.rows) == 1 and (row := attach_answer(prompt.ids, case.rows[0])):
        return [row]
    return renderer.render_conversation(prompt.conversation)


def score_cases(
    model: CausalLM, cases: Sequence[Case], *, end_ids: Sequence[int], on_progress: OnProgress | None = None
) -> None:
    """Likelihood of each case's true answer."""
    flat = [row for case in cases for row in case.scored]
    scores = iter(score_rows(model, flat, end_ids=end_ids, on_progress=on_progress))
    for case in cases:
        case.score = add_scores([next(scores) for _ in case.scored])


def answer_cases(
    model: CausalLM,
    renderer: Renderer,
    cases: Sequence[Case],
    *,
    spec: EvaluateSpec,
    on_progress: OnProgress | None = None,
) -> None:
    """Let the model answer each case that has a prompt; one that fills the context gets no answer, as if cut."""
    asked: list[tuple[Case, Prompt]] = []
    for case in cases:
        if case.prompt and len(case.prompt.ids) < model.config.max_positions:
            asked.append((case, case.prompt))
        elif case.prompt:
            case.answer, case.generation = "", Generation([], finished=False)
    generations = generate(
        model,
        [prompt.ids for _, prompt in asked],
        max_new_tokens=spec.max_new_tokens,
        stop_ids=renderer.stop_ids,
        sampling=spec.sampling,
        on_progress=on_progress,
    )
    for (case, _), generation in zip(asked, generations, strict=True):
        case.generation = generation
        case.answer = renderer.tokenizer.decode(generation.ids)


def score_and_answer_cases(
    model: CausalLM,
    renderer: Renderer,
    cases: Sequence[Case],
    *,
    spec: EvaluateSpec,
    count: Callable[[str], OnProgress],
) -> None:
    """`score_cases` and `answer_cases`, reading each prompt once where every scored row begins with its prompt.

    count: starts the progress of a stage.
    """
    asked = [found for case in cases if (found := _read_asked(model, case))]
    if len(asked) < len(cases) or not isinstance(model, Decoder):
        score_cases(model, cases, end_ids=renderer.stop_ids, on_progress=count("likelihood"))
        answer_cases(model, renderer, cases, spec=spec, on_progress=count("answers"))
        return
    scores, generations = score_and_answer(
        model,
        asked,
        max_new_tokens=spec.max_new_tokens,
        stop_ids=renderer.stop_ids,
        sampling=spec.sampling,
        on_progress=count("answers"),
    )
    for case, score, generation in zip(cases, scores, generations, strict=True):
        case.score, case.generation = score, generation
        case.answer = renderer.tokenizer.decode(generation.ids)


def _read_asked(model: CausalLM, case: Case) -> Asked | None:
    """The scored row as a prompt with its true answer, if that is what it is, and the prompt leaves room."""
    if case.prompt is None or len(case.scored) != 1:
        return None
    row, length = case.scored[0], len(case.prompt.ids)
    begins = list(row.ids[:length]) == case.prompt.ids and find_last_stretch(row.mask) == length
    return Asked(row, length) if begins and length < min(len(row.ids), model.config.max_positions) else None


def choose_cases(
    model: CausalLM, renderer: Renderer, cases: Sequence[Case], *, on_progress: OnProgress | None = None
) -> None:
    """Score the options of each case that has some, under the arm's prompt."""
    asked = [case for case in cases if case.answer_index is not None and case.prompt]
    questions = [_render_options(renderer, case) for case in asked]
    scores = score_choices(model, questions, end_ids=renderer.stop_ids, on_progress=on_progress)
    for case, score in zip(asked, scores, strict=True):
        case.options = score


def _render_options(renderer: Renderer, case: Case) -> list[TokenRow]:
    choices = read_choices(case.conversation)
    assert choices
    assert case.prompt
    return render_choices(renderer, case.prompt.conversation, choices[0])


def _make_context(case: Case, validator: Any) -> MetricContext:
    chosen = case.options.likeliest_per_byte if case.options else None
    return MetricContext(validator, chosen, case.answer_index)


def mark_cases(cases: Sequence[Case], names: Sequence[str], validator: Any) -> list[AnswerRecord]:
    """One record per case: likelihood, answer, and the value of every metric that suits the row."""
    return [_mark_case(number, case, names, validator) for number, case in enumerate(cases)]


def _mark_case(number: int, case: Case, names: Sequence[str], validator: Any) -> AnswerRecord:
    assert case.score
    context = _make_context(case, validator)
    said = cut_reasoning(case.answer or "", case.truth)
    scores: dict[str, float] = {}
    for name in names:
        metric = METRICS[name]
        if (case.answer is not None or not metric.generates) and metric.applies(case.truth, context):
            scores[name] = metric(said, case.truth, context)
    if case.options:
        scores["choice_accuracy_by_sum"] = float(case.options.likeliest == case.answer_index)
    return AnswerRecord(
        row=number,
        row_id=case.rows[-1].row_id,
        place=case.conversation.origin.place,
        cluster=case.cluster,
        question=read_question(case.conversation),
        truth=case.truth,
        answer=case.answer,
        nll=case.score.nll,
        nll_content=case.score.nll_content,
        num_target_tokens=case.score.num_target_tokens,
        num_bytes=case.score.num_bytes,
        num_prompt_tokens=len(case.prompt.ids) if case.prompt else 0,
        num_new_tokens=len(case.generation.ids) if case.generation else 0,
        finished=case.generation.finished if case.generation else True,
        scores=scores,
    )


def summarize_cases(cases: Sequence[Case], answers: Sequence[AnswerRecord]) -> dict[str, float]:
    """The metrics of an arm.

    `nll`, `perplexity` and the like over tokens; every score's mean over the rows that have it; `finished`, the share
    of generated answers that ended by themselves; `json_fields.NAME`, the accuracy of each common field.
    """
    metrics = summarize_scores([case.score for case in cases if case.score])
    for name in dict.fromkeys(name for answer in answers for name in answer.scores):
        metrics[name] = _mean([answer.scores[name] for answer in answers if name in answer.scores])
    if generated := [answer for answer in answers if answer.answer is not None]:
        metrics["finished"] = _mean([float(answer.finished) for answer in generated])
    if "json_fields" in metrics:
        metrics |= {f"json_fields.{name}": value for name, value in tabulate_fields(generated).items()}
    return metrics


def tabulate_fields(answers: Sequence[AnswerRecord]) -> dict[str, float]:
    """Accuracy of each field of JSON answers, over the rows whose true answer has it; the commonest fields first.

    At most `MAX_FIELDS`: free-form objects would give a field to every row.
    """
    marks: dict[str, list[float]] = {}
    for answer in answers:
        if parse_answer(answer.truth) is not NOT_JSON:
            said = cut_reasoning(answer.answer or "", answer.truth)
            for name, value in score_fields(said, answer.truth).items():
                marks.setdefault(name or "(all)", []).append(value)
    common = sorted(marks, key=lambda name: (-len(marks[name]), name))[:MAX_FIELDS]
    return {name: _mean(marks[name]) for name in common}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def count_reserved_tokens(prepared: Prepared, cases: Sequence[Case], *, max_new_tokens: int) -> int:
    """Context kept free behind a prompt: room for the longest answer of the rows, known or to be scored."""
    train = prepared.rows("train") if "train" in prepared.splits else ()
    longest_train = max((row.num_targets for row in train), default=0)
    longest_test = max(row.num_targets for case in cases for row in case.rows)
    return max(min(max_new_tokens, longest_train), longest_test)

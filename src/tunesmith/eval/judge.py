"""The one judge: every arm answers the same sealed rows, and the same code says what each answer is worth.

row -> prompt of the arm -> likelihood of the true answer, and a generated answer -> metrics -> answers.jsonl
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import torch

from tunesmith.core.events import Event, OnEvent, ignore_event
from tunesmith.core.jsonl import write_json, write_jsonl
from tunesmith.core.records import AnswerRecord, EvalRecord
from tunesmith.core.rundir import RunDir
from tunesmith.data.prepare import Prepared
from tunesmith.data.render import Renderer
from tunesmith.eval import cases as steps
from tunesmith.eval.doubts import doubt_lengths, find_doubts
from tunesmith.eval.forgetting import Forgetting
from tunesmith.eval.metrics import METRICS
from tunesmith.eval.prompting import PromptingKind
from tunesmith.job.spec import EvaluateSpec
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.quantize import count_stored_bytes


def judge(
    model: CausalLM,
    renderer: Renderer,
    prepared: Prepared,
    *,
    out: RunDir,
    spec: EvaluateSpec,
    prompting: PromptingKind = "zero-shot",
    seed: int = 0,
    split: str = "test",
    model_name: str = "",
    adapter: str | None = None,
    quantize: str | None = None,
    forgetting: Forgetting | None = None,
    task: str = "",
    on_event: OnEvent = ignore_event,
) -> EvalRecord:
    """Score one arm and seed; writes `answers.jsonl` and `eval.json` into `out`.

    quantize: what the model was quantised to, for the record.
    prompting: what stands before each row; examples come from the train split and are drawn with `seed`.
    forgetting: measures it, where it is wanted; kept over several seeds, it runs the base once.
    Raises DataError if the split has no rows, ArmFailed if a likelihood is not finite.
    """
    clock = _Clock()
    tell = _Teller(task, on_event)
    cases = steps.gather_cases(prepared, renderer, split=split, max_rows=spec.max_rows)
    answers, metrics, warnings = _score(model, renderer, prepared, cases, spec, prompting, seed, tell)
    forgotten = None
    if forgetting:
        tell.say("forgetting")
        forgotten = forgetting.measure(model, [row for case in cases for row in case.rows])
    record = EvalRecord(
        model=model_name,
        adapter=adapter,
        quantize=quantize,
        size_bytes=count_stored_bytes(model) if quantize else 0,
        prompting=prompting,
        metrics=metrics,
        num_rows=len(cases),
        num_target_tokens=sum(answer.num_target_tokens for answer in answers),
        data_sha256=prepared.fingerprints[f"{split}_sha256"],
        forgetting=forgotten,
        warnings=warnings,
        wall_seconds=clock.wall_seconds,
        cpu_seconds=clock.cpu_seconds,
        peak_bytes=measure_peak(),
    )
    write_jsonl(out.answers, (answer.to_json() for answer in answers))
    write_json(out.evaluation, record.to_json())
    return record


def _score(
    model: CausalLM,
    renderer: Renderer,
    prepared: Prepared,
    cases: list[steps.Case],
    spec: EvaluateSpec,
    prompting: PromptingKind,
    seed: int,
    tell: _Teller,
) -> tuple[list[AnswerRecord], dict[str, float], list[str]]:
    """Records, metrics and warnings of all cases."""
    names, validator, warnings = steps.resolve_metrics(cases, spec)
    reserved = steps.count_reserved_tokens(prepared, cases, max_new_tokens=spec.max_new_tokens)
    warnings += steps.prompt_cases(
        cases,
        renderer,
        prepared.conversations("train") if prompting != "zero-shot" and "train" in prepared.splits else (),
        prompting=prompting,
        spec=spec,
        seed=seed,
        max_prompt_tokens=model.config.max_positions - reserved,
    )
    lengths = [len(row.ids) for case in cases for row in case.scored]
    warnings += doubt_lengths(lengths, max_positions=model.config.max_positions)
    if any(METRICS[name].generates for name in names):
        steps.score_and_answer_cases(model, renderer, cases, spec=spec, count=tell.count)
    else:
        steps.score_cases(model, cases, end_ids=renderer.stop_ids, on_progress=tell.count("likelihood"))
    if "choice_accuracy" in names:
        steps.choose_cases(model, renderer, cases)
    answers = steps.mark_cases(cases, names, validator)
    metrics = steps.summarize_cases(cases, answers)
    warnings += find_doubts(
        answers, metrics, vocab_size=model.config.vocab_size, max_new_tokens=spec.max_new_tokens
    )
    return answers, metrics, warnings


class _Teller:
    """Turns counts into events."""

    def __init__(self, task: str, on_event: OnEvent) -> None:
        self._task, self._on_event = task, on_event

    def say(self, text: str) -> None:
        self._on_event(Event("stage", task=self._task, text=text))

    def count(self, text: str) -> Callable[[int, int], None]:
        self.say(text)
        return lambda done, total: self._on_event(Event("progress", self._task, text, done, total))


class _Clock:
    """Wall and CPU seconds of this process since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @property
    def wall_seconds(self) -> float:
        return time.perf_counter() - self._wall

    @property
    def cpu_seconds(self) -> float:
        return time.process_time() - self._cpu


def measure_peak() -> int:
    """Peak memory in bytes: of the GPU where there is one, else of this process since it started."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux counts kibibytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

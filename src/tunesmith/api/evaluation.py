"""Score any model, adapter or run; generate with it."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.api.opening import writing_to
from tunesmith.api.tasks import JudgeTask
from tunesmith.core.errors import DataError, ModelError, RunDirError
from tunesmith.core.events import Event, OnEvent, ignore_event
from tunesmith.core.jsonl import read_json, read_settings, write_json, write_jsonl
from tunesmith.core.records import EvalRecord, RunRecord
from tunesmith.core.rundir import RunDir
from tunesmith.core.types import Message
from tunesmith.data.derive import list_prompts
from tunesmith.data.prepare import Prepared, load_prepared, prepare_data
from tunesmith.data.render import Renderer
from tunesmith.data.sources import find_sources
from tunesmith.data.tokenizer import Tokenizer, load_tokenizer
from tunesmith.job.load import job_from
from tunesmith.job.resolve import resolve_model
from tunesmith.job.spec import (
    DataSpec,
    Job,
    LoraSpec,
    ModelSpec,
    QuantizeSpec,
    SamplingSpec,
    SourceSpec,
)
from tunesmith.models.adapter_config import check_adapter
from tunesmith.models.headers import check_model

if TYPE_CHECKING:
    from tunesmith.api.tasks import Weights
    from tunesmith.eval.forgetting import Forgetting
    from tunesmith.job.spec import Compute, Storage
    from tunesmith.models.causal_lm import CausalLM


@dataclass(frozen=True, slots=True)
class Target:
    """What is scored: a base, what lies on it, and what both are quantised to. `template` is the run's own, if it had
    one."""

    model_name: str
    model_folder: Path
    weights: Weights = "base"
    weights_folder: Path | None = None
    storage: Storage = "full"
    template: str | None = None
    double_quant: bool = True
    compute: Compute = "auto"
    quantize: QuantizeSpec | None = None

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's own tokenizer where it has one: it may hold added tokens."""
        own = self.weights_folder if self.weights == "adapter" else None
        if own and any(
            (own / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
        ):
            return own
        return self.model_folder


def find_target(name: str, *, base: str | None = None) -> Target:
    """Run folder, adapter folder, model folder, bundled name or hub id -> what to load. Raises ModelError."""
    folder = Path(name).expanduser()
    run = RunDir(folder)
    is_run, is_adapter = run.record.is_file(), (folder / "adapter_config.json").is_file()
    if base and (is_run or not is_adapter):
        raise ModelError(
            name,
            "is a run, which knows its base" if is_run else "is no adapter folder",
            rule="--base names the model under an adapter",
            cure="Leave --base out",
        )
    if is_run:
        return _target_of_run(run)
    if is_adapter:
        config = read_settings(folder / "adapter_config.json")
        named = base or config.get("base_model_name_or_path")
        if not named:
            raise ModelError(name, "does not name its base", cure="Name it with --base")
        resolved = resolve_model(ModelSpec(name=named, revision=None if base else config.get("revision")))
        return Target(resolved.name, resolved.folder, "adapter", folder)
    resolved = resolve_model(ModelSpec(name=name))
    return Target(resolved.name, resolved.folder)


def _target_of_run(run: RunDir) -> Target:
    record = RunRecord.from_json(read_json(run.record), place=str(run.record))
    job = Job.model_validate(record.config)
    resolved = resolve_model(job.model_spec)
    method = job.method_spec
    if isinstance(method, LoraSpec):
        kept = (method.storage, job.data.template, method.double_quant, method.compute)
        return Target(resolved.name, resolved.folder, "adapter", run.adapter, *kept, quantize=method.qat_spec)
    return Target(
        resolved.name,
        resolved.folder,
        "model",
        run.model,
        template=job.data.template,
        quantize=method.qat_spec,
    )


def check_target(target: Target) -> Tokenizer:
    """The target's tokenizer. Raises ModelError, by headers alone, if weights, adapter or vocabulary do not fit."""
    config = check_model(target.model_folder)
    if target.weights == "model":
        assert target.weights_folder is not None
        config = check_model(target.weights_folder)
    rows = config.vocab_size
    if target.weights == "adapter":
        assert target.weights_folder is not None
        rows = check_adapter(target.weights_folder, config)
    return load_tokenizer(target.tokenizer_folder, embedding_rows=rows or None)


def evaluate(
    target: str | Path,
    *,
    data: str | Path,
    out: str | Path | None = None,
    generate: bool = True,
    max_rows: int | None = None,
    template: str | None = None,
    base: str | None = None,
    on_bad_row: Literal["refuse", "skip"] = "refuse",
    on_event: OnEvent = ignore_event,
) -> EvalRecord:
    """Score `target` on rows with answers: NLL of the true answers and, with `generate`, metrics of generated ones.

    target: run folder, adapter folder, model folder, bundled name or hub id.
    data:   file, folder (its test split), bundled name or hub id.
    out:    folder that keeps `eval.json`, `answers.jsonl` and what `on_bad_row="skip"` set aside; without it only the
            record is returned. A run's own folder is refused.
    """
    found = find_target(str(target), base=base)
    tokenizer = check_target(found)
    rows = str(data)
    with tempfile.TemporaryDirectory() as scratch, open_scores(out or scratch) as run:
        # A source that brings a test split is scored on it; any other is scored whole.
        test = "auto" if "test" in find_sources(SourceSpec(path=rows)) else rows
        job = job_from(
            {
                "model": found.model_name,
                "data": {
                    "train": rows,
                    "split": {"validation": 0.0, "test": test},
                    "template": template or found.template,
                    "max_tokens": 1 << 20,
                    "deduplicate": "none",
                },
                "evaluate": {
                    "metrics": "auto" if generate else [],
                    "max_rows": max_rows,
                    "forgetting": False,
                },
            }
        )
        on_event(Event("stage", text="Preparing data"))
        prepared = prepare_data(
            job,
            tokenizer=tokenizer,
            folder=Path(scratch) / "prepared",
            on_bad_row=on_bad_row,
            splits=("test",),
            rejects=run.rejects,
        )
        for finding in prepared.report.findings:
            if finding.code == "rejected_rows" and finding.split == "test":
                on_event(Event("warning", text=finding.message))
        task = JudgeTask(
            label="",
            job=job.model_dump(mode="json"),
            out=str(run.root),
            prepared=str(prepared.folder),
            model_folder=str(found.model_folder),
            model_name=found.model_name,
            key="",
            weights=found.weights,
            weights_folder=str(found.weights_folder) if found.weights_folder else None,
            storage=found.storage,
            prompting="zero-shot",
            seed=0,
            general=None,
            double_quant=found.double_quant,
            compute=found.compute,
            quantize=found.quantize.model_dump(mode="json") if found.quantize else None,
        )
        return run_judge_task(task, on_event)


def evaluate_tasks(
    target: str | Path,
    tasks: Sequence[str],
    *,
    out: str | Path | None = None,
    max_rows: int | None = None,
    template: str | None = None,
    base: str | None = None,
    on_event: OnEvent = ignore_event,
) -> dict[str, Any]:
    """Scores of lm-eval tasks (extra `lm-eval`), by task and metric, and what they were measured on.

    target: as in `evaluate`. tasks: names in lm-eval, or YAML files of that format. out: folder that keeps
    `harness.json`. max_rows: only the first rows of each task.
    """
    from tunesmith.eval.harness import find_tasks, run_harness

    found = find_target(str(target), base=base)
    tokenizer = check_target(found)
    renderer = Renderer(tokenizer, DataSpec(train="", template=template or found.template))
    wanted = find_tasks(tasks)
    with tempfile.TemporaryDirectory() as scratch, open_scores(out or scratch) as run:
        on_event(Event("stage", text=f"Running {', '.join(tasks)} of lm-eval"))
        record = {
            "schema": 1,
            "model": found.model_name,
            "adapter": str(found.weights_folder) if found.weights == "adapter" else None,
            "max_rows": max_rows,
            "tasks": run_harness(load_target(found), renderer, wanted, limit=max_rows),
        }
        write_json(run.harness, record)
    return record


@contextmanager
def open_scores(out: str | Path) -> Generator[RunDir]:
    """Own a folder for scores. A run's is refused: its rows and scores belong to it."""
    run = RunDir(Path(out))
    if run.holds_run():
        raise RunDirError(
            str(run.root),
            "holds a run, whose rows and scores would be overwritten",
            rule="scores have a folder of their own",
            cure=f"Give another --out, such as {run.root / 'eval'}",
        )
    run.create()
    with run.lock(), writing_to(run):
        yield run


def run_judge_task(
    task: JudgeTask, on_event: OnEvent, *, bases: dict[str, Forgetting] | None = None
) -> EvalRecord:
    """Score one arm and seed in this process and write its record.

    bases: kept from task to task, it saves what forgetting needs of a base from being computed again.
    """
    from tunesmith.api.devices import pick_device
    from tunesmith.eval.judge import judge
    from tunesmith.models.heap import return_freed_memory

    job = Job.model_validate(task.job)
    run = RunDir(Path(task.out)).create()
    target = Target(
        task.model_name,
        Path(task.model_folder),
        task.weights,
        Path(task.weights_folder) if task.weights_folder else None,
        task.storage,
        double_quant=task.double_quant,
        compute=task.compute,
        quantize=QuantizeSpec.model_validate(task.quantize) if task.quantize else None,
    )
    tokenizer = load_tokenizer(target.tokenizer_folder)
    prepared = load_prepared(Path(task.prepared))
    on_event(Event("progress", task.label, "loading"))
    model = load_target(target, precision=job.evaluate.precision)
    forgetting = None
    if task.general:
        forgetting = _find_forgetting(task, Path(task.general), tokenizer, {} if bases is None else bases)
    record = judge(
        model,
        Renderer(tokenizer, job.data),
        prepared,
        out=run,
        spec=job.evaluate,
        prompting=task.prompting,
        seed=task.seed,
        model_name=task.model_name,
        adapter=task.weights_folder if task.weights == "adapter" else None,
        quantize=target.quantize.label if target.quantize else None,
        forgetting=forgetting,
        task=task.label or pick_device().type,
        on_event=_name_seed(task.seed, on_event) if task.label else on_event,
    )
    record = _judge_further(task, job, target, model, Renderer(tokenizer, job.data), prepared, record)
    del model
    return_freed_memory()
    return record


def _judge_further(
    task: JudgeTask,
    job: Job,
    target: Target,
    model: CausalLM,
    renderer: Renderer,
    prepared: Prepared,
    record: EvalRecord,
) -> EvalRecord:
    """Held-out pairs, rewards of the answers, and how far the model went from where its training began."""
    from tunesmith.api import alignment

    run, scores, began = RunDir(Path(task.out)), dict[str, dict[int, float]](), time.perf_counter()
    if task.preferences:
        pairs = alignment.score_pairs(model, load_prepared(Path(task.preferences)))
        write_jsonl(run.pair_scores, (pair.to_json() for pair in pairs))
        record = replace(record, metrics={**record.metrics, **alignment.summarise_pairs(pairs)})
        write_json(run.evaluation, record.to_json())
    if not (job.evaluate.rewards or task.start):
        return record
    prompts = list_prompts(prepared, renderer, "test", count=record.num_rows)
    doubts: list[str] = []
    if job.evaluate.rewards:
        if len(prompts) < record.num_rows:
            doubts.append(
                f"{record.num_rows - len(prompts):,} rows are plain text: rewards are of the others"
            )
        scores["reward"], said = alignment.reward_answers(
            run, prompts, job.evaluate.reward_terms, renderer, device=model.device
        )
        doubts += said
    if task.start and prompts:
        fitting = [n for n, prompt in prompts.items() if len(prompt.ids) < model.config.max_positions]
        asked = fitting[: alignment.MAX_KL_PROMPTS]
        drawn = alignment.sample_answers(
            model, [prompts[n] for n in asked], renderer, job.evaluate, seed=task.seed
        )
        start = load_target(
            replace(target, weights_folder=Path(task.start)), precision=job.evaluate.precision
        )
        scores["kl_from_start"] = dict(zip(asked, alignment.measure_kl(model, start, drawn), strict=True))
        del start
    seconds = record.wall_seconds + time.perf_counter() - began
    record = replace(record, wall_seconds=seconds, warnings=[*record.warnings, *doubts])
    return alignment.add_scores(run, record, scores)


def _name_seed(seed: int, on_event: OnEvent) -> OnEvent:
    """One worker judges all seeds of an arm under one name."""
    return lambda event: on_event(dataclasses.replace(event, text=f"seed {seed}, {event.text}"))


def _find_forgetting(
    task: JudgeTask, general: Path, tokenizer: Tokenizer, bases: dict[str, Forgetting]
) -> Forgetting:
    """The measure of forgetting for the task's base, made if it is not among `bases`."""
    from tunesmith.eval.forgetting import Forgetting, read_general_text

    precision = Job.model_validate(task.job).evaluate.precision
    held = (task.storage, task.double_quant, task.compute, task.quantize is None)
    key = repr((task.model_folder, task.weights, *held, precision, task.general))
    if key not in bases:
        # Adapters can be switched off, unless they were folded in.
        apart = task.weights == "model" or task.quantize is not None
        base = (
            load_target(Target(task.model_name, Path(task.model_folder)), precision=precision)
            if apart
            else None
        )
        bases[key] = Forgetting(read_general_text(general, tokenizer), base=base)
    return bases[key]


def load_target(target: Target, *, precision: str = "auto") -> CausalLM:
    """A model ready to be judged: the base, an adapter on it, or another whole model in its place; then quantised."""
    from tunesmith.api.devices import pick_device, pick_dtype
    from tunesmith.models.adapter_files import load_adapter
    from tunesmith.models.load import load_model

    device = pick_device()
    whole = target.weights_folder if target.weights == "model" else None
    model = load_model(
        whole or target.model_folder,
        device=device,
        dtype=pick_dtype(precision, device),
        base=target.storage,
        double_quant=target.double_quant,
        # Other precisions are the judge's own, the same for every arm.
        compute="fp8" if target.compute == "fp8" else "auto",
    )
    if target.weights == "adapter":
        assert target.weights_folder is not None
        load_adapter(model, target.weights_folder)
    if target.quantize:
        from tunesmith.models.quantize import quantize_model

        quantize_model(model, target.quantize)
    return model.eval()


def evaluation_json(record: EvalRecord) -> dict[str, Any]:
    """The object that `eval --json` prints: every metric at the top, then counts and costs."""
    return {
        "schema": 1,
        **record.metrics,
        "num_rows": record.num_rows,
        "num_target_tokens": record.num_target_tokens,
        "model": record.model,
        "adapter": record.adapter,
        "quantize": record.quantize,
        "data_sha256": record.data_sha256,
        "wall_seconds": record.wall_seconds,
        "cpu_seconds": record.cpu_seconds,
        "peak_bytes": record.peak_bytes,
        "warnings": record.warnings,
    }


def generate(
    target: str | Path,
    prompts: Sequence[str | Sequence[Mapping[str, str]]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    template: str | None = None,
    base: str | None = None,
) -> list[str]:
    """Answers of a model, adapter or run.

    prompts: each a user message, or a list of messages (`role`, `content`). Greedy unless `temperature` is above 0.
    """
    from tunesmith.infer.generate import generate as sample

    found = find_target(str(target), base=base)
    tokenizer = load_tokenizer(found.tokenizer_folder)
    renderer = Renderer(tokenizer, DataSpec(train="", template=template or found.template))
    model = load_target(found)
    generations = sample(
        model,
        [renderer.render_prompt(_as_messages(prompt)) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        stop_ids=renderer.stop_ids,
        sampling=SamplingSpec(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed),
    )
    stop = set(renderer.stop_ids)
    return [tokenizer.decode([token for token in item.ids if token not in stop]) for item in generations]


def _as_messages(prompt: str | Sequence[Mapping[str, str]]) -> list[Message]:
    if isinstance(prompt, str):
        return [Message("user", prompt)]
    messages: list[Message] = []
    for item in prompt:
        role = item.get("role")
        if role not in ("system", "user", "assistant", "tool"):
            raise DataError("prompt", f"role {role!r}", rule="roles are system, user, assistant, tool")
        messages.append(Message(role, item.get("content", "")))
    return messages

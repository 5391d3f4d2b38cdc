"""lm-eval tasks on our engine: a model class for EleutherAI's lm-evaluation-harness (extra `lm-eval`).

    tunesmith eval FOLDER --tasks blimp,arc_easy
    lm_eval --model tunesmith --model_args model=FOLDER,adapter=FOLDER --tasks blimp,arc_easy

Importing this module registers the name `tunesmith`; nothing else in the package imports it. Tokens are split between
context and continuation as the harness's own Hugging Face class does, so its published numbers can be compared.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tunesmith.core.errors import DataError, JobError, SetupError
from tunesmith.core.types import Message, Origin, TokenRow
from tunesmith.data.render import Renderer
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.eval.nll import BUDGET_TOKENS, CHUNK_LOGITS, plan_batches, score_rows
from tunesmith.infer.generate import generate
from tunesmith.job.spec import SamplingSpec
from tunesmith.models.causal_lm import CausalLM
from tunesmith.models.layout import make_batch
from tunesmith.models.load import load_model
from tunesmith.models.lora import load_adapter

try:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
    )
except ImportError as error:
    missing = error.name or "a part of it"
    raise SetupError(
        "lm-eval",
        "is not installed" if missing == "lm_eval" else f"lacks {missing}",
        rule="its tasks need the extra",
        cure="Run: pip install 'tunesmith[lm-eval]'",
    ) from None

DEFAULT_NEW_TOKENS = 256
_NOWHERE = Origin("lm-eval", "lm-eval", 0)


@register_model("tunesmith")
class HarnessModel(LM):
    """What the harness asks of a model: log-likelihoods of continuations and of texts, and greedy continuations.

    model:   a model folder, or a loaded model. renderer: only with a loaded model.
    adapter: adapter folder to put on the folder's model.
    dtype:   compute dtype, by torch's name.
    """

    def __init__(
        self,
        model: str | CausalLM,
        renderer: Renderer | None = None,
        *,
        adapter: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """batch_size and max_batch_size are the harness's; batches here follow a token budget and change nothing."""
        super().__init__()
        if isinstance(model, CausalLM):
            if renderer is None:
                raise ValueError("a loaded model needs its renderer")
            self.model, self.renderer = model, renderer
        else:
            self.model = load_model(model, device=device or "cpu", dtype=getattr(torch, dtype))
            if adapter is not None:
                load_adapter(self.model, Path(adapter))
            self.renderer = Renderer(load_tokenizer(model))

    @property
    def tokenizer_name(self) -> str:
        return str(self.renderer.tokenizer.folder or "tokenizer").replace("/", "__")

    @property
    def prefix_id(self) -> int:
        """The token that stands before a text without context."""
        tokenizer = self.renderer.tokenizer
        found = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if found is None:
            raise SetupError(
                "lm-eval", "the tokenizer has neither BOS nor EOS", rule="a text needs a token before it"
            )
        return found

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.renderer.template.source if chat_template else ""

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The text the model continues; without a generation prompt, the last turn is left open."""
        turns = [Message(turn["role"], turn["content"]) for turn in chat_history]
        if add_generation_prompt:
            return self.renderer.render_prompt_text(turns)
        return self.renderer.render_prompt_text(turns[:-1]) + turns[-1].content

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether greedy decoding gives it) of each (context, continuation)."""
        rows = [self._split_pair(*request.args) for request in requests]
        return score_with_hits(self.model, rows)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, every token predicted once, in windows of the model's context."""
        rows: list[TokenRow] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.renderer.tokenizer.encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_id, self.model.config.max_positions, 1)
            for context, predicted in map(make_disjoint_window, windows):
                rows.append(make_target_row([*context, *predicted], len(context)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, score_rows(self.model, rows), strict=True):
            totals[owner] -= score.nll
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut at the first of the task's stop strings."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in groups.values():
            settings = requests[numbers[0]].args[1]
            length = int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS))
            room = max(1, self.model.config.max_positions - length)
            prompts = [self._encode(requests[number].args[0])[-room:] for number in numbers]
            generations = generate(
                self.model,
                prompts,
                max_new_tokens=length,
                stop_ids=self.renderer.stop_ids,
                sampling=_read_sampling(settings),
            )
            for number, generation in zip(numbers, generations, strict=True):
                text = self.renderer.tokenizer.decode(generation.ids, skip_special=True)
                answers[number] = cut_at(text, settings.get("until", []))
        return [answers[number] for number in range(len(requests))]

    def _encode(self, text: str) -> list[int]:
        """Ids of a text as the model met texts in training: BOS first where its tokenizer adds one, never twice."""
        tokenizer = self.renderer.tokenizer
        return [*tokenizer.bos_before(text), *tokenizer.encode(text)]

    def _split_pair(self, context: str, continuation: str) -> TokenRow:
        if not context:
            ids = self.renderer.tokenizer.encode(continuation)
            start = 0 if ids[:1] == [self.prefix_id] else 1
            return self._fit_row([self.prefix_id] * start + ids, 1)
        # A space at the end of the context belongs to the first word of the continuation.
        bare = context.rstrip()
        whole = self._encode(context + continuation)
        return self._fit_row(whole, len(self._encode(bare or context)))

    def _fit_row(self, ids: list[int], start: int) -> TokenRow:
        cut = max(0, len(ids) - self.model.config.max_positions)
        return make_target_row(ids[cut:], max(1, start - cut))


def make_target_row(ids: Sequence[int], start: int) -> TokenRow:
    """A row whose tokens from `start` on are scored."""
    return TokenRow(ids, [0] * start + [1] * (len(ids) - start), _NOWHERE, "")


@torch.no_grad()
def score_with_hits(model: CausalLM, rows: Sequence[TokenRow]) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, whether every target is the likeliest token) of each row."""
    results: dict[int, tuple[float, bool]] = {}
    step = max(1, CHUNK_LOGITS // model.config.vocab_size)
    for numbers in plan_batches([len(row.ids) for row in rows], budget_tokens=BUDGET_TOKENS):
        batch = make_batch([rows[number] for number in numbers], device=model.device)
        hidden_KD = model.hidden(batch.ids_T, batch.layout, batch.sources_K)
        logps: list[float] = []
        hits: list[bool] = []
        for hidden, ids in zip(hidden_KD.split(step), batch.targets_K.split(step), strict=True):
            logits = model.head(hidden).float()
            logps += (logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
            hits += (logits.argmax(-1) == ids).tolist()
        start = 0
        for number in numbers:
            end = start + rows[number].num_targets
            results[number] = (sum(logps[start:end]), all(hits[start:end]))
            start = end
    return [results[number] for number in range(len(rows))]


def cut_at(text: str, stops: str | Sequence[str]) -> str:
    """The text before the earliest of the stop strings."""
    found = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop]
    return text[: min((at for at in found if at >= 0), default=len(text))]


def _read_sampling(settings: Mapping[str, Any]) -> SamplingSpec:
    if not settings.get("do_sample"):
        return SamplingSpec()
    return SamplingSpec(
        temperature=float(settings.get("temperature", 1.0)),
        top_p=float(settings.get("top_p", 1.0)),
        top_k=int(settings.get("top_k", 0)),
    )


def find_tasks(names: Sequence[str]) -> list[str | dict[str, Any]]:
    """Tasks by their names in lm-eval, or from YAML files of that format. Raises JobError for one that there is not."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    known: set[str] | None = None
    found: list[str | dict[str, Any]] = []
    for name in names:
        if Path(name).is_file():
            found.append(_read_task(Path(name)))
            continue
        known = set(TaskManager().all_tasks) if known is None else known
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise JobError(
                f"--tasks {name}",
                "is no task of lm-eval and no file",
                rule="tasks are lm-eval's names, groups, or YAML files",
                cure=f"Did you mean {near[0]}?" if near else "See: lm_eval --tasks list",
            )
        found.append(name)
    return found


def _read_task(path: Path) -> dict[str, Any]:
    """A task that is one YAML file; those that call functions or include others must be lm-eval's own."""
    try:
        task = YAML(typ="safe").load(path)
    except YAMLError as error:
        raise JobError(str(path), f"cannot be read ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(task, dict) or "task" not in task:
        raise JobError(str(path), "has no `task`", rule="a task file has lm-eval's YAML format")
    return task


def run_harness(
    model: CausalLM, renderer: Renderer, tasks: Sequence[str | dict[str, Any]], *, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Scores of lm-eval tasks by task and metric; downloads a task's data where the harness does.

    limit: rows of each task, the first ones. Raises DataError if a task's rows cannot be had.
    """
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]

    try:
        outcome: Any = simple_evaluate(
            model=HarnessModel(model, renderer), tasks=list(tasks), limit=limit, log_samples=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            "lm-eval",
            f"its tasks cannot be run ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
            rule="it fetches their rows from the Hub",
            cure="Check the network and HF_HUB_OFFLINE",
        ) from None
    return {
        task: {
            name.removesuffix(",none"): value for name, value in scores.items() if isinstance(value, float)
        }
        for task, scores in outcome["results"].items()
    }

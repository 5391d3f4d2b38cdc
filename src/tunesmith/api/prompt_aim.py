"""The aim of PPO and GRPO: prompts that the model answers itself, and what its answers are worth."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from tunesmith.api.aim import Aim, Setting
from tunesmith.api.rewards import open_rewards
from tunesmith.api.rollouts import Sampler, name_term
from tunesmith.core.fingerprint import hash_json
from tunesmith.data.prompts import Prompt
from tunesmith.data.render import Renderer
from tunesmith.job.objective import GrpoSpec, PpoSpec

if TYPE_CHECKING:
    from tunesmith.models.causal_lm import CausalLM

# Prompts that a validation answers, greedily.
MAX_VALIDATED = 64


@contextmanager
def open_prompt_aim(setting: Setting) -> Generator[Aim]:
    """Rewards are open while the block runs. A validation is the negative mean reward of greedy answers."""
    from tunesmith.methods.objectives import make_objective
    from tunesmith.training.rollouts import Rollouts

    job, prepared, model = setting.job, setting.prepared, setting.model
    spec = cast("GrpoSpec | PpoSpec", job.objective_spec)
    prompts = {name: prepared.prompts(name) for name in ("train", "validation") if name in prepared.splits}
    renderer = Renderer(setting.tokenizer, job.data)
    with open_rewards(
        spec.terms,
        prompts=[prompt for split in prompts.values() for prompt in split],
        renderer=renderer,
        log=setting.run.root / "rewards.log",
        device=model.device,
        dtype=model.dtype,
    ) as rewards:
        samplers = {
            name: Sampler(
                spec=spec,
                model=model,
                prompts=split,
                judge=rewards,
                renderer=renderer,
                make_batch=setting.make_batch,
                # Validation asks for rewards alone.
                frozen=_freeze(spec, model) if name == "train" else None,
                seed=job.train.seed,
                budget_tokens=setting.budget_tokens,
                trained_once=spec.passes == 1 and spec.prompts * spec.samples <= job.train.batch_rows,
                on_progress=lambda done, total: setting.report("answers", done, total),
            )
            for name, split in prompts.items()
        }
        rows = Rollouts(
            len(prompts["train"]),
            samplers["train"].collect,
            prompts=spec.prompts,
            num_answers=spec.samples,
            passes=spec.passes,
            batch_rows=job.train.batch_rows,
            seed=job.train.seed,
            fingerprint=hash_json([_describe(prompt) for prompt in prompts["train"]]),
        )
        evaluate = None
        if "validation" in samplers:
            evaluate = lambda: -samplers["validation"].reward_of_greedy(MAX_VALIDATED)  # noqa: E731
        # What a single reward is made of is the reward.
        terms = [name_term(name) for name in rewards.names] if len(rewards.names) > 1 else []
        sampler = samplers["train"]
        yield Aim(
            make_objective(spec, terms=terms),
            rows,
            evaluate,
            doubts=sampler.tally.list_doubts,
            fall_back=sampler.fall_back,
        )


def _describe(prompt: Prompt) -> Sequence[Any]:
    columns: Mapping[str, Any] = prompt.columns
    return [prompt.row_id, prompt.truth, dict(columns)]


def _freeze(spec: GrpoSpec | PpoSpec, model: CausalLM) -> Any:
    from tunesmith.methods.frozen import FrozenStart

    asks = isinstance(spec, PpoSpec) or spec.beta or spec.max_kl is not None
    return FrozenStart(model) if asks else None

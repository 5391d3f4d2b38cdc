"""PPO's and GRPO's rows: prompts are answered by the model as it is, answers are judged, tokens weighed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.api.rewards import Scored
from tunesmith.core.errors import TrainingFailed
from tunesmith.core.fingerprint import hash_row
from tunesmith.core.types import TokenRow
from tunesmith.data.batch import plan_micro_batches
from tunesmith.data.prompts import Answer, Prompt
from tunesmith.job.objective import GrpoSpec, PpoSpec
from tunesmith.job.spec import SamplingSpec

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.data.render import Renderer
    from tunesmith.methods.frozen import FrozenStart
    from tunesmith.models.causal_lm import CausalLM

# Of one forward pass without gradients: values of each target token, by name, each (K,).
Measure = Callable[[Any], Mapping[str, "Tensor"]]


@dataclass
class Tally:
    """What was odd about the answers of all rollouts, counted. groups: answers to one prompt that are compared."""

    answers: int = 0
    cut: int = 0
    missing: Counter[str] = field(default_factory=Counter[str])
    groups: int = 0
    flat_groups: int = 0

    def count(self, answers: Sequence[Answer], scored: Scored, *, group: int) -> None:
        self.answers += len(answers)
        self.cut += sum(not answer.finished for answer in answers)
        self.missing.update(scored.num_missing)
        if group > 1:
            groups = [scored.total[at : at + group] for at in range(0, len(answers), group)]
            self.groups += len(groups)
            self.flat_groups += sum(min(one) == max(one) for one in groups)

    def list_doubts(self) -> list[str]:
        """A sentence for each, with its count."""
        doubts = [
            f"{name} said nothing (None) of {count:,} of {self.answers:,} sampled answers: they count as 0"
            for name, count in self.missing.items()
            if count
        ]
        if self.flat_groups:
            doubts.append(
                f"all answers to a prompt were worth the same in {self.flat_groups:,} of {self.groups:,} groups: "
                "nothing was learned from them"
            )
        if self.cut:
            doubts.append(
                f"{self.cut:,} of {self.answers:,} sampled answers were cut at objective.max_new_tokens, "
                "or at the end of the context"
            )
        return doubts


@dataclass
class Sampler:
    """Samples and weighs the answers of a rollout.

    judge:       answers -> what each is worth.
    make_batch:  (rows, device) -> batch, as training makes it.
    trained_once: a rollout is one step's answers, trained on once: by the weights that sampled them.
    frozen:      the reference; None where the objective asks for none.
    on_progress: called with (answers sampled, answers in all).
    """

    spec: GrpoSpec | PpoSpec
    model: CausalLM
    prompts: Sequence[Prompt]
    judge: Callable[[Sequence[Answer]], Scored]
    renderer: Renderer
    make_batch: Callable[[Sequence[TokenRow], Any], Any]
    frozen: FrozenStart | None
    seed: int
    budget_tokens: int
    trained_once: bool = False
    on_progress: Callable[[int, int], None] = lambda done, total: None
    tally: Tally = field(default_factory=lambda: Tally())
    # Weights as they were when the last rollout was found close enough to the reference.
    _good: FrozenStart | None = None

    def fall_back(self) -> bool:
        """Put the last weights back whose answers kept within `max_kl`; False if none are known."""
        if self._good is None:
            return False
        self._good.put_back()
        return True

    def collect(self, numbers: Sequence[int], epoch: int) -> list[TokenRow]:
        """Rows of `spec.samples` answers to each prompt, with what `policy_objectives` needs of them."""
        was_training = self.model.training
        self.model.train(False)
        try:
            answers, sampled = self.answer(numbers, samples=self.spec.samples, name=str(epoch))
            scored = self.judge(answers)
            rows = [_make_row(answer.prompt, ids) for answer, ids in zip(answers, sampled, strict=True)]
            known = self._measure(rows)
        finally:
            self.model.train(was_training)
        self.tally.count(answers, scored, group=self.spec.samples if isinstance(self.spec, GrpoSpec) else 1)
        weigh = self._compare if isinstance(self.spec, GrpoSpec) else self._estimate
        worth = {"reward": scored.total} | {name_term(name): values for name, values in scored.terms.items()}
        return [
            replace(row, numbers={**facts, **more, **{name: worth[name][place] for name in worth}})
            for place, (row, facts, more) in enumerate(
                zip(rows, known, weigh(scored.total, rows, known), strict=True)
            )
        ]

    def reward_of_greedy(self, most: int) -> float:
        """Mean reward of greedy answers to the first prompts, at most so many."""
        answers, _ = self.answer(range(min(most, len(self.prompts))), samples=1, name="", greedy=True)
        return float(np.mean(self.judge(answers).total))

    def answer(
        self, numbers: Sequence[int], *, samples: int, name: str, greedy: bool = False
    ) -> tuple[list[Answer], list[list[int]]]:
        """Answers to prompts, those to one prompt together, and their tokens with the one that stopped each. What is
        drawn follows from seed, `name` and the prompt's number."""
        from tunesmith.infer.generate import generate
        from tunesmith.infer.together import sample_together
        from tunesmith.models.decoder import Decoder

        wanted = [(number, sample) for number in numbers for sample in range(samples)]
        asked = [self.prompts[number].ids for number, _ in wanted]
        model, most = self.model, self.spec.max_new_tokens
        rest: Any = {
            "stop_ids": self.renderer.stop_ids,
            "sampling": SamplingSpec(temperature=0.0 if greedy else self.spec.temperature, seed=self.seed),
            "keys": [f"{name}/{number}/{sample}" for number, sample in wanted],
            "on_progress": self.on_progress,
        }
        # Of what is judged nothing may depend on the batch; of what is drawn its last bits may.
        if isinstance(model, Decoder) and model.device.type == "cuda" and not greedy:
            found = sample_together(model, asked, max_new_tokens=most, **rest)
        else:
            found = generate(model, asked, max_new_tokens=most, **rest)
        sampled = [one.ids if one.stop_id is None else [*one.ids, one.stop_id] for one in found]
        answers = [
            Answer(
                prompt=self.prompts[number],
                text=self.renderer.tokenizer.decode(one.ids),
                num_tokens=len(ids),
                finished=one.finished,
                ids=one.ids,
            )
            for (number, _), one, ids in zip(wanted, found, sampled, strict=True)
        ]
        return answers, sampled

    # --- what sampling knew -------------------------------------------------------------------------------------------

    def _measure(self, rows: Sequence[TokenRow]) -> list[dict[str, list[float]]]:
        """Of each row's answer tokens, their log-probabilities now and under the reference, and their values."""
        from tunesmith.methods.logprobs import head_logps, source_states, token_logps
        from tunesmith.methods.policy_objectives import OLD, OLD_VALUE, TOKEN_REFERENCE, expect

        temperature = self.spec.temperature
        if self.trained_once and self.frozen is None and isinstance(self.spec, GrpoSpec):
            return [{} for _ in rows]  # the loss knows the only thing that is asked for

        def now(batch: Any) -> Mapping[str, Tensor]:
            hidden_KD = source_states(self.model, batch)
            found = {OLD: head_logps(self.model, hidden_KD, batch, temperature=temperature)}
            return found | (
                {} if self.model.score is None else {OLD_VALUE: expect(self.model, hidden_KD, batch)}
            )

        def before(batch: Any) -> Mapping[str, Tensor]:
            return {TOKEN_REFERENCE: token_logps(self.model, batch, temperature=temperature)}

        known = self._run(rows, now)
        if self.frozen is not None:
            with self.frozen.restored():
                for facts, more in zip(known, self._run(rows, before), strict=True):
                    facts |= more
            self._check_kl(known)
        return known

    def _run(self, rows: Sequence[TokenRow], measure: Measure) -> list[dict[str, list[float]]]:
        import torch

        found: list[dict[str, list[float]]] = [{} for _ in rows]
        with torch.no_grad():
            for places in plan_micro_batches(
                [len(row.ids) for row in rows], budget_tokens=self.budget_tokens
            ):
                batch = self.make_batch([rows[place] for place in places], self.model.device)
                edges = list(accumulate((rows[place].num_targets for place in places), initial=0))
                for name, values_K in measure(batch).items():
                    values = values_K.float().tolist()
                    for place, (start, end) in zip(places, pairwise(edges), strict=True):
                        found[place][name] = values[start:end]
        return found

    def _check_kl(self, known: Sequence[Mapping[str, list[float]]]) -> None:
        kl = float(np.mean([_gap(facts).sum() for facts in known]))
        if self.spec.max_kl is not None and not kl <= self.spec.max_kl:
            raise TrainingFailed(
                "a rollout",
                f"its answers are {kl:.4g} nats of KL from the reference",
                rule=f"objective.max_kl is {self.spec.max_kl:g}",
                cure="Lower train.learning_rate or raise the price of KL",
            )
        if self.spec.max_kl is not None:
            from tunesmith.methods.frozen import FrozenStart

            self._good = FrozenStart(self.model)

    # --- what tokens weigh --------------------------------------------------------------------------------------------

    def _compare(
        self, rewards: Sequence[float], rows: Sequence[TokenRow], _known: Sequence[Mapping[str, list[float]]]
    ) -> list[dict[str, list[float]]]:
        from tunesmith.methods.policy import compare_in_group
        from tunesmith.methods.policy_objectives import ADVANTAGE

        assert isinstance(self.spec, GrpoSpec)
        size = self.spec.samples
        found: list[float] = []
        for start in range(0, len(rewards), size):
            group = rewards[start : start + size]
            found += compare_in_group(group, by_deviation=self.spec.scale == "group").tolist()
        return [{ADVANTAGE: [one] * row.num_targets} for one, row in zip(found, rows, strict=True)]

    def _estimate(
        self, rewards: Sequence[float], _rows: Sequence[TokenRow], known: Sequence[Mapping[str, list[float]]]
    ) -> list[dict[str, list[float]]]:
        from tunesmith.methods.policy import estimate_advantages, whiten
        from tunesmith.methods.policy_objectives import ADVANTAGE, OLD_VALUE, RETURN

        spec = self.spec
        assert isinstance(spec, PpoSpec)
        worth = np.asarray(rewards, dtype=np.float64)
        worth = worth - worth.mean() if spec.center_rewards else worth
        worth = whiten(worth, center=False) if spec.whiten_rewards else worth
        estimates = []
        for reward, facts in zip(worth, known, strict=True):
            rewards_T = -spec.kl_weight * _gap(facts)
            rewards_T[-1] += reward
            values_T = facts[OLD_VALUE]
            estimates.append(
                estimate_advantages(
                    rewards_T.tolist(), values_T, gamma=spec.gamma, gae_lambda=spec.gae_lambda
                )
            )
        edges = list(accumulate((len(one) for one, _ in estimates), initial=0))
        advantages = whiten(np.concatenate([one for one, _ in estimates]))
        return [
            {ADVANTAGE: advantages[start:end].tolist(), RETURN: returns.tolist()}
            for (start, end), (_, returns) in zip(pairwise(edges), estimates, strict=True)
        ]


def _gap(facts: Mapping[str, list[float]]) -> Any:
    """How much likelier each token was under the policy than under the reference, nats, (T,)."""
    from tunesmith.methods.policy_objectives import OLD, TOKEN_REFERENCE

    return np.asarray(facts[OLD], dtype=np.float64) - np.asarray(facts[TOKEN_REFERENCE], dtype=np.float64)


def name_term(name: str) -> str:
    """What one of several rewards is called in `steps.jsonl`."""
    return f"reward/{name}"


def _make_row(prompt: Prompt, sampled: Sequence[int]) -> TokenRow:
    ids = [*prompt.ids, *sampled]
    mask = [0] * len(prompt.ids) + [1] * len(sampled)
    return TokenRow(ids, mask, prompt.origin, hash_row(ids, mask))

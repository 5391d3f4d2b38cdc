"""Continue prompts: packed prefill, batched steps with a key/value cache, greedy or sampled.

The result for a prompt does not depend on the batch it is in: every prompt is computed with shapes that follow from
its own length (models/cache.py), and draws random numbers from a generator of its own, seeded by its place in the list.

n: sequences of a batch  V: vocabulary  D: width
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.core.errors import DataError
from tunesmith.job.spec import SamplingSpec
from tunesmith.models.causal_lm import CausalLM, DecodeSession
from tunesmith.models.layout import pad_length

# Keys and values of a batch, and tokens of one prefill.
CACHE_BYTES, PREFILL_TOKENS, MAX_BATCH = 384 * 2**20, 16384, 256
# Sequences are dropped from the cache once this share of them has finished: each drop copies the rest.
_DROP_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Generation:
    """ids: new tokens, without the stop token. finished: a stop token came before the limit."""

    ids: list[int]
    finished: bool


@torch.no_grad()
def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: SamplingSpec | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    batch_size: int | None = None,
    keys: Sequence[str] | None = None,
) -> list[Generation]:
    """Continuations in the order of `prompts`.

    sampling:    None or temperature 0 is greedy; of equal logits the lowest token id wins.
    on_progress: called with (prompts done, prompts in all).
    batch_size:  most sequences at a time; default: by cache memory. Never changes a result.
    keys:        names that seed each prompt's draws, default its place in the list.
    Raises DataError for a prompt that leaves no room in the context for a single new token.
    """
    sampling = sampling or SamplingSpec()
    limit = model.config.max_positions
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {place} is empty")
        if len(prompt) >= limit:
            raise DataError(
                f"prompt {place + 1}",
                f"has {len(prompt)} tokens, the model's context {limit}",
                rule="a prompt leaves room for an answer",
                cure="Lower evaluate.shots or evaluate.retrieved",
            )
    was_training = model.training
    model.eval()
    prefix = _find_shared(prompts) if model.shares_prefix else []
    order = sorted(range(len(prompts)), key=lambda place: (len(prompts[place]), place))
    results: dict[int, Generation] = {}
    try:
        for batch in _cut_batches(order, prompts, len(prefix), max_new_tokens, model, batch_size):
            own = [prompts[place][len(prefix) :] for place in batch]
            room = [min(max_new_tokens, limit - len(prompts[place])) for place in batch]
            session = model.open_session(own, max_new_tokens=max(room), prefix=prefix)
            names = [str(place) if keys is None else keys[place] for place in batch]
            chooser = _Chooser(sampling, names)
            done_before = len(results)

            def report(done: int, before: int = done_before) -> None:
                if on_progress is not None:
                    on_progress(before + done, len(prompts))

            for place, found in zip(
                batch, _run_batch(model, session, room, set(stop_ids), chooser, report), strict=True
            ):
                results[place] = found
    finally:
        model.close_sessions()
        model.train(was_training)
    return [results[place] for place in range(len(prompts))]


def _find_shared(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Longest common start that leaves every prompt a token of its own; empty where sharing would not pay."""
    if len(prompts) < 2:
        return []
    first, last = min(map(list, prompts)), max(map(list, prompts))
    shared = 0
    most = min(len(prompt) for prompt in prompts) - 1
    while shared < most and first[shared] == last[shared]:
        shared += 1
    return first[:shared] if shared >= 64 else []


def _cut_batches(
    order: list[int],
    prompts: Sequence[Sequence[int]],
    shared: int,
    new: int,
    model: CausalLM,
    batch_size: int | None,
) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    tokens = 0
    for place in order:
        own = len(prompts[place]) - shared
        capacity = pad_length(own + new)
        most = min(batch_size or MAX_BATCH, max(1, CACHE_BYTES // (capacity * model.bytes_per_token())))
        if batches[-1] and (len(batches[-1]) >= most or tokens + own > PREFILL_TOKENS):
            batches.append([])
            tokens = 0
        batches[-1].append(place)
        tokens += own
    return [batch for batch in batches if batch]


def _run_batch(
    model: CausalLM,
    session: DecodeSession,
    room: list[int],
    stop_ids: set[int],
    chooser: _Chooser,
    report: Callable[[int], None],
) -> list[Generation]:
    outputs: list[list[int]] = [[] for _ in room]
    finished = [False] * len(room)
    slots = list(range(len(room)))  # which sequence lies in each slot of the session
    running = set(slots)
    hidden = session.prefill()
    while running:
        chosen = chooser.choose(model.head(hidden), slots)
        for slot, token in zip(slots, chosen, strict=True):
            if slot not in running:
                continue
            if token in stop_ids:
                finished[slot] = True
                running.discard(slot)
            else:
                outputs[slot].append(token)
                if len(outputs[slot]) >= room[slot]:
                    running.discard(slot)
        report(len(room) - len(running))
        if not running:
            break
        if len(running) <= (1 - _DROP_SHARE) * len(slots):
            kept = [at for at, slot in enumerate(slots) if slot in running]
            session.keep(kept)
            slots, chosen = [slots[at] for at in kept], [chosen[at] for at in kept]
        hidden = session.step(torch.tensor(chosen, device=hidden.device))
    return [Generation(ids, end) for ids, end in zip(outputs, finished, strict=True)]


class _Chooser:
    """Picks the next token of each sequence."""

    def __init__(self, sampling: SamplingSpec, names: Sequence[str]) -> None:
        self.sampling = sampling
        self.generators: list[torch.Generator] = []
        if sampling.temperature > 0:
            for name in names:
                key = hashlib.sha256(f"{sampling.seed}:{name}".encode()).digest()
                self.generators.append(torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1))

    def choose(self, logits_nV: Tensor, slots: list[int]) -> list[int]:
        logits_nV = logits_nV.float()
        if not self.generators:
            return pick_greedy(logits_nV).tolist()
        probs_nV = shape_distribution(logits_nV, self.sampling)
        draws = torch.tensor([torch.rand((), generator=self.generators[slot]).item() for slot in slots])
        return draw(probs_nV, draws.to(logits_nV.device)).tolist()


def pick_greedy(logits_nV: Tensor) -> Tensor:
    """Token of the largest logit; the lowest id among equal ones, on every device."""
    best = logits_nV.amax(-1, keepdim=True)
    ids = torch.arange(logits_nV.shape[-1], device=logits_nV.device)
    return torch.where(logits_nV == best, ids, logits_nV.shape[-1]).amin(-1)


def shape_distribution(logits_nV: Tensor, sampling: SamplingSpec) -> Tensor:
    """Probabilities after temperature, then top_k, then top_p, (n, V).

    top_p keeps the smallest set of most likely tokens whose probability reaches top_p; the most likely always stays.
    """
    logits_nV = logits_nV / sampling.temperature
    order = torch.argsort(logits_nV, dim=-1, descending=True, stable=True)
    ranked = logits_nV.gather(-1, order)
    if sampling.top_k:
        ranked[..., sampling.top_k :] = float("-inf")
    probs = ranked.softmax(-1)
    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before >= sampling.top_p, 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, order, probs)


def draw(probs_nV: Tensor, uniform_n: Tensor) -> Tensor:
    """Token where the cumulative probability passes each uniform draw, (n,)."""
    cumulative = probs_nV.double().cumsum(-1)
    aim = uniform_n.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, aim, right=True).squeeze(-1).clamp(max=probs_nV.shape[-1] - 1)

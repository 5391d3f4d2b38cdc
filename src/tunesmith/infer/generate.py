"""Continue prompts: packed prefill, batched steps with a key/value cache, greedy or sampled.

Finished sequences leave the batch at once, and new prompts join the running ones while there is room.

The result for a prompt does not depend on the batch it is in: every prompt is computed with shapes that follow from
its own length (models/cache.py), and draws random numbers from a generator of its own, seeded by its place in the list.

n: sequences of a batch  V: vocabulary  D: width
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.core.errors import DataError
from tunesmith.job.spec import SamplingSpec
from tunesmith.models.causal_lm import CausalLM, DecodeSession

# Keys and values of all sequences at a time, and tokens of one prefill.
CACHE_BYTES = {"cpu": 64 * 2**20, "cuda": 384 * 2**20}
PREFILL_TOKENS, MAX_SEQUENCES = 4096, 192


@dataclass(frozen=True, slots=True)
class Generation:
    """ids: new tokens, without the stop token. finished: a stop token came before the limit. stop_id: which one."""

    ids: list[int]
    finished: bool
    stop_id: int | None = None


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

    def open_prompts() -> Iterator[Opened]:
        for places in _cut_batches(prompts, len(prefix), model, batch_size):
            own = [prompts[place][len(prefix) :] for place in places]
            session = model.open_session(own, prefix=prefix)
            yield Opened(session, places, [len(ids) for ids in own], [[] for _ in own], session.prefill())

    room = [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
    try:
        return continue_all(
            model,
            open_prompts(),
            room=room,
            stop_ids=stop_ids,
            sampling=sampling,
            on_progress=on_progress,
            batch_size=batch_size,
            keys=keys,
        )
    finally:
        model.close_sessions()
        model.train(was_training)


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
    prompts: Sequence[Sequence[int]], shared: int, model: CausalLM, batch_size: int | None
) -> Iterator[list[int]]:
    """Places of the prompts of each prefill, neighbours in length."""
    most_tokens = min(PREFILL_TOKENS, cache_bytes(model) // 2 // model.bytes_per_token())
    most = max(1, (batch_size or MAX_SEQUENCES) // 2)
    batch: list[int] = []
    tokens = 0
    for place in sorted(range(len(prompts)), key=lambda place: (len(prompts[place]), place)):
        own = len(prompts[place]) - shared
        if batch and (len(batch) >= most or tokens + own > most_tokens):
            yield batch
            batch, tokens = [], 0
        batch.append(place)
        tokens += own
    if batch:
        yield batch


def cache_bytes(model: CausalLM) -> int:
    """Memory for the keys and values of all sequences at a time."""
    return CACHE_BYTES.get(model.device.type, CACHE_BYTES["cuda"])


@dataclass(frozen=True, slots=True)
class Opened:
    """Sequences whose beginnings have been run.

    places:    which of the caller's sequences each one is.
    lengths:   tokens that each has in the cache.
    outputs:   new tokens that each has already.
    hidden_nD: hidden state behind the last token of each.
    """

    session: DecodeSession
    places: Sequence[int]
    lengths: Sequence[int]
    outputs: Sequence[list[int]]
    hidden_nD: Tensor


@torch.no_grad()
def continue_all(
    model: CausalLM,
    batches: Iterable[Opened],
    *,
    room: Sequence[int],
    stop_ids: Sequence[int],
    sampling: SamplingSpec,
    on_progress: Callable[[int, int], None] | None = None,
    batch_size: int | None = None,
    keys: Sequence[str] | None = None,
) -> list[Generation]:
    """Continue sequences to their ends, by place. A batch is asked for when those before it have left room.

    room: most new tokens of each place; the other arguments are those of `generate`.
    """
    names = [str(place) for place in range(len(room))] if keys is None else keys
    pool = _Pool(model, room, set(stop_ids), _Chooser(sampling, names))
    most, most_tokens = batch_size or MAX_SEQUENCES, cache_bytes(model) // model.bytes_per_token()

    def report() -> None:
        if on_progress is not None:
            on_progress(len(pool.results), len(room))

    for opened in batches:
        pool.admit(opened)
        report()
        while len(pool.places) > most // 2 or sum(pool.lengths) > most_tokens // 2:
            pool.step()
            report()
    while pool.places:
        pool.step()
        report()
    return [pool.results[place] for place in range(len(room))]


class _Pool:
    """Sequences that advance together, one token at a time; the finished ones leave it.

    places, lengths, tokens: of each running sequence, its place, its tokens in the cache and the token to run next.
    """

    def __init__(self, model: CausalLM, room: Sequence[int], stop_ids: set[int], chooser: _Chooser) -> None:
        self.model, self.room, self.stop_ids, self.chooser = model, room, stop_ids, chooser
        self.places: list[int] = []
        self.lengths: list[int] = []
        self.tokens: list[int] = []
        self.results: dict[int, Generation] = {}
        self._outputs: dict[int, list[int]] = {}
        self._session: DecodeSession | None = None

    def admit(self, opened: Opened) -> None:
        self._outputs |= zip(opened.places, opened.outputs, strict=True)
        running, tokens = self._choose(opened.hidden_nD, opened.places)
        opened.session.keep(running)
        if self._session is None or not self.places:
            self._session = opened.session
        else:
            self._session.join(opened.session)
        self.places += [opened.places[at] for at in running]
        self.lengths += [opened.lengths[at] for at in running]
        self.tokens += tokens

    def step(self) -> None:
        assert self._session is not None
        hidden_nD = self._session.step(torch.tensor(self.tokens, device=self.model.device))
        running, self.tokens = self._choose(hidden_nD, self.places)
        if len(running) < len(self.places):
            self._session.keep(running)
            self.places = [self.places[at] for at in running]
            self.lengths = [self.lengths[at] for at in running]
        self.lengths = [length + 1 for length in self.lengths]

    def _choose(self, hidden_nD: Tensor, places: Sequence[int]) -> tuple[list[int], list[int]]:
        """Give each sequence its next token. Returns which ones go on, and their tokens."""
        chosen = self.chooser.choose(self.model.head(hidden_nD), places)
        running: list[int] = []
        for at, (place, token) in enumerate(zip(places, chosen, strict=True)):
            ids = self._outputs[place]
            if token in self.stop_ids:
                self.results[place] = Generation(ids, finished=True, stop_id=token)
                continue
            ids.append(token)
            if len(ids) >= self.room[place]:
                self.results[place] = Generation(ids, finished=False)
            else:
                running.append(at)
        return running, [chosen[at] for at in running]


class _Chooser:
    """Picks the next token of each sequence."""

    def __init__(self, sampling: SamplingSpec, names: Sequence[str]) -> None:
        self.sampling = sampling
        self.generators: list[torch.Generator] = []
        if sampling.temperature > 0:
            for name in names:
                key = hashlib.sha256(f"{sampling.seed}:{name}".encode()).digest()
                self.generators.append(torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1))

    def choose(self, logits_nV: Tensor, places: Sequence[int]) -> list[int]:
        logits_nV = logits_nV.float()
        if not self.generators:
            return pick_greedy(logits_nV).tolist()
        probs_nV = shape_distribution(logits_nV, self.sampling)
        draws = torch.tensor([torch.rand((), generator=self.generators[place]).item() for place in places])
        return draw(probs_nV, draws.to(logits_nV.device)).tolist()


def pick_greedy(logits_nV: Tensor) -> Tensor:
    """Token of the largest logit; the lowest id among equal ones."""
    return logits_nV.argmax(-1)


def shape_distribution(logits_nV: Tensor, sampling: SamplingSpec) -> Tensor:
    """Probabilities after temperature, then top_k, then top_p, (n, V).

    top_p keeps the smallest set of most likely tokens whose probability reaches top_p; the most likely always stays.
    """
    logits_nV = logits_nV / sampling.temperature
    if not sampling.top_k and sampling.top_p >= 1:
        return logits_nV.softmax(-1)  # to sort costs more than a step of a small model
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

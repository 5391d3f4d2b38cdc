"""Continue prompts side by side until the last one is done: what a GPU samples rollouts with.

`generate` moves sequences to where their length belongs, so that a result never depends on the batch; for every token
the host decides anew what is computed, and a GPU waits for it. Here all sequences of a batch lie in one block as long
as the longest may get, tokens are chosen and kept on the device, and every step is the same kernels over the same
memory: a GPU records it once and replays it. Prompts that are alike are read once. Answers that are done are computed
on with the others.

Results follow from the same draws as `generate`'s; their last bits depend on what else is in the batch.

n: sequences of a batch  M: most new tokens  V: vocabulary  D: width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tunesmith.infer.generate import (
    CACHE_BYTES,
    Generation,
    count_room,
    cut_batches,
    draw,
    make_generators,
    pick_greedy,
    shape_distribution,
)
from tunesmith.job.spec import SamplingSpec
from tunesmith.models.cache import Session
from tunesmith.models.decoder import Decoder
from tunesmith.models.layout import pad_length
from tunesmith.models.recording import try_to_record

# Of a GPU's memory, for keys and values: not of what is free, or a run that goes on would cut other batches.
_CACHE_SHARE = 1 / 8
# Steps until the host asks whether all are done.
_ASK_EVERY = 16
# The first step makes what is made once, the second finds it made.
_STEPS_BEFORE = 2


@torch.no_grad()
def sample_together(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: SamplingSpec,
    keys: Sequence[str],
    on_progress: Callable[[int, int], None] | None = None,
    batch_size: int | None = None,
) -> list[Generation]:
    """Continuations in the order of `prompts`; arguments are those of `generate`. The model is in eval mode."""
    room = count_room(model, prompts, max_new_tokens=max_new_tokens)
    unique = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
    try:
        session, hidden_UD, slots = _read(model, unique)
        size = pad_length(max(map(len, prompts)) + max(room))
        most = batch_size or max(1, int(_cache_bytes(model.device)) // (size * model.bytes_per_token()))
        found: list[Generation] = []
        for start in range(0, len(prompts), most):
            span = slice(start, start + most)
            rows = [slots[tuple(prompt)] for prompt in prompts[span]]
            batch = _Batch(
                session.spread(rows, size=size),
                room=room[span],
                stop_ids=stop_ids,
                sampling=sampling,
                keys=keys[span],
            )
            found += batch.run(hidden_UD[rows])
            if on_progress is not None:
                on_progress(len(found), len(prompts))
        return found
    finally:
        model.close_sessions()


def _read(
    model: Decoder, prompts: Sequence[tuple[int, ...]]
) -> tuple[Session, Tensor, dict[tuple[int, ...], int]]:
    """The session of all prompts, hidden states behind their ends (U, D), and the place of each in both."""
    session, hidden, order = Session(model, []), list[Tensor](), list[tuple[int, ...]]()
    for places in cut_batches(prompts, 0, model, None):
        taken = [prompts[place] for place in places]
        other = model.open_session(taken)
        hidden.append(other.prefill())
        session.join(other)
        order += taken
    return session, torch.cat(hidden), {prompt: slot for slot, prompt in enumerate(order)}


def _cache_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return CACHE_BYTES["cpu"]
    return _CACHE_SHARE * torch.cuda.get_device_properties(device).total_memory


class _Batch:
    """Sequences of a `spread` session, with all that a step reads and writes in its place.

    tokens_n, lengths_n: the token to run next, and how many are in the cache.
    at_n1:               new tokens so far, the same of all.
    outputs_nM:          the new tokens; what lies behind a stop token or the room means nothing.
    """

    def __init__(
        self,
        session: Session,
        *,
        room: Sequence[int],
        stop_ids: Sequence[int],
        sampling: SamplingSpec,
        keys: Sequence[str],
    ) -> None:
        self._session, self._room, self._sampling = session, room, sampling
        self._model, device, count = session.model, session.model.device, len(room)
        self._stop_ids = set(stop_ids)
        self._stops_S = torch.tensor(sorted(self._stop_ids), dtype=torch.int64, device=device)
        self._tokens_n = torch.zeros(count, dtype=torch.int64, device=device)
        self._lengths_n = torch.tensor(session.lengths, device=device)
        self._at_n1 = torch.zeros(count, 1, dtype=torch.int64, device=device)
        self._outputs_nM = torch.zeros(count, max(room), dtype=torch.int64, device=device)
        self._is_done_n = torch.zeros(count, dtype=torch.bool, device=device)
        self._room_n = torch.tensor(room, device=device)
        self._draws_nM: Tensor | None = None
        if sampling.temperature > 0:
            draws = [torch.rand(max(room), generator=one) for one in make_generators(sampling, keys)]
            self._draws_nM = torch.stack(draws).to(device)

    def run(self, hidden_nD: Tensor) -> list[Generation]:
        """hidden_nD: behind each prompt."""
        self._choose(hidden_nD)
        graph: torch.cuda.CUDAGraph | None = None
        for step in range(1, max(self._room)):
            if step % _ASK_EVERY == 0 and bool(self._is_done_n.all()):
                break
            if step == _STEPS_BEFORE + 1 and self._model.device.type == "cuda":
                graph = try_to_record(self._advance)
            self._advance() if graph is None else graph.replay()
        rows = self._outputs_nM.tolist()
        if graph is not None:
            del graph
            torch.cuda.empty_cache()
        return [self._cut(ids[:room]) for ids, room in zip(rows, self._room, strict=True)]

    def _advance(self) -> None:
        """One more token of each sequence, all in place."""
        hidden_nD = self._session.step_in_place(self._tokens_n, self._lengths_n)
        self._lengths_n.add_(1)
        self._choose(hidden_nD)

    def _choose(self, hidden_nD: Tensor) -> None:
        logits_nV = self._model.head(hidden_nD).float()
        if self._draws_nM is None:
            tokens_n = pick_greedy(logits_nV)
        else:
            drawn_n = self._draws_nM.gather(1, self._at_n1).squeeze(1)
            tokens_n = draw(shape_distribution(logits_nV, self._sampling), drawn_n)
        self._outputs_nM.scatter_(1, self._at_n1, tokens_n[:, None])
        self._tokens_n.copy_(tokens_n)
        self._at_n1.add_(1)
        self._is_done_n |= (tokens_n[:, None] == self._stops_S).any(1) | (self._at_n1[:, 0] >= self._room_n)

    def _cut(self, ids: list[int]) -> Generation:
        for place, token in enumerate(ids):
            if token in self._stop_ids:
                return Generation(ids[:place], finished=True, stop_id=token)
        return Generation(ids, finished=False)

"""Keys and values of sequences that are being continued.

Sequences of a batch lie in slots sorted by length. A step attends each group of slots over the padded length that
follows from a sequence's own length, so its result does not depend on the other sequences. Tokens that all prompts
start with (few-shot examples) can be computed once and shared.

T: flat tokens  n: sequences  P: shared prefix tokens  C: capacity  H: query heads  N: key/value heads  d: head width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.models.attention import FOLDED_MAX, fold_heads, make_mask, unfold_heads
from tunesmith.models.layout import Layout, make_layout, pad_length

if TYPE_CHECKING:
    from tunesmith.models.decoder import Decoder


_QUERY_BLOCK = 256


@dataclass(frozen=True)
class PrefillView:
    """New documents: document i of `layout` goes into slot i."""

    layout: Layout
    slots: list[Tensor]  # per bucket, the slots of its documents

    @staticmethod
    def of(layout: Layout) -> PrefillView:
        members: dict[int, list[int]] = {}
        for slot, length in enumerate(layout.lengths):
            members.setdefault(pad_length(length), []).append(slot)
        return PrefillView(
            layout, [torch.tensor(members[b.padded_length], device=layout.device) for b in layout.buckets]
        )


@dataclass(frozen=True)
class StepView:
    """One new token per sequence.

    lengths_n: tokens of its own (behind the shared prefix) that each sequence has before this step.
    groups:    (first slot, last slot + 1, padded length, mask of hidden keys (slots, padded length)).
    """

    lengths_n: Tensor
    groups: list[tuple[int, int, int, Tensor]]

    @staticmethod
    def of(lengths: Sequence[int], *, window: int, device: torch.device) -> StepView:
        groups, at = [], 0
        lengths_n = torch.tensor(lengths, device=device)
        while at < len(lengths):
            size = pad_length(lengths[at] + 1)
            end = at
            while end < len(lengths) and pad_length(lengths[end] + 1) == size:
                end += 1
            keys, last = torch.arange(size, device=device)[None], lengths_n[at:end, None]
            hidden = keys > last
            if window:
                hidden = hidden | (keys <= last - window)
            groups.append((at, end, size, hidden))
            at = end
        return StepView(lengths_n, groups)


CacheView = PrefillView | StepView | dict[int, StepView]


class LayerCache:
    """Keys and values of one layer, (n, N, C, d) each, and of the shared prefix, (N, P, d)."""

    def __init__(
        self,
        slots: int,
        capacity: int,
        *,
        kv_heads: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.k = torch.empty(slots, kv_heads, capacity, width, dtype=dtype, device=device)
        # Padded slots are masked, but 0 * NaN of uninitialised memory would still be NaN.
        self.v = torch.zeros(slots, kv_heads, capacity, width, dtype=dtype, device=device)
        self.prefix: tuple[Tensor, Tensor] | None = None

    def keep(self, slots: Tensor) -> None:
        """Drop all other slots; order is kept."""
        self.k, self.v = self.k.index_select(0, slots), self.v.index_select(0, slots)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, view: CacheView, *, scale: float, window: int
    ) -> Tensor:
        """Store k and v (T, N, d), attend q (T, H, d) over what its sequence has. Returns (T, H * d)."""
        if isinstance(view, dict):  # layers of one model with different windows
            view = view[window]
        if isinstance(view, StepView):
            return self._attend_step(q, k, v, view, scale)
        return self._attend_prompt(q, k, v, view, scale, window)

    def _attend_prompt(
        self, q: Tensor, k: Tensor, v: Tensor, view: PrefillView, scale: float, window: int
    ) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
        stream, kv = torch.cat((q, k, v), 1), k.shape[1]
        for bucket, slots in zip(view.layout.buckets, view.slots, strict=True):
            size, count = bucket.padded_length, bucket.num_documents
            qf, kf, vf = fold_heads(stream, bucket, kv)
            self.k[slots, :, :size] = kf.view(count, kv, size, -1)
            self.v[slots, :, :size] = vf.view(count, kv, size, -1)
            if self.prefix is None and size > FOLDED_MAX[q.dtype]:
                mask = make_mask(size, window, q.dtype, q.device) if 0 < window < size else None
                rows = F.scaled_dot_product_attention(
                    qf.view(count, -1, size, q.shape[2]),
                    kf.view(count, kv, size, -1),
                    vf.view(count, kv, size, -1),
                    attn_mask=mask,
                    is_causal=mask is None,
                    scale=scale,
                    enable_gqa=True,
                ).reshape(count * kv, -1, q.shape[2])
            else:
                rows = self._attend_folded(
                    qf.view(count * kv, -1, size, q.shape[2]), kf, vf, count, scale, window
                )
            unfolded = unfold_heads(rows, bucket, kv)
            out.index_copy_(0, bucket.flat_n, unfolded.index_select(0, bucket.inside_n))
        return out

    def _attend_folded(
        self, q: Tensor, k: Tensor, v: Tensor, count: int, scale: float, window: int
    ) -> Tensor:
        """q: (n * N, G, S, d), k and v: (n * N, S, d). Blocks of queries see only the keys up to their own end, which
        saves almost half of the work on long prompts. Returns (n * N, G * S, d)."""
        size, width = k.shape[1], k.shape[2]
        mask = make_mask(size, window, q.dtype, q.device)
        pieces = []
        for first in range(0, size, _QUERY_BLOCK):
            last = min(first + _QUERY_BLOCK, size)
            query = q[:, :, first:last].flatten(1, 2)
            scores = torch.bmm(query, k[:, :last].transpose(1, 2)).mul_(scale)
            scores.view(len(q), -1, last - first, last).add_(mask[first:last, :last])
            mixed = self._mix(query.view(count, -1, query.shape[1], width), scores, v[:, :last], scale)
            pieces.append(mixed.view(len(q), -1, last - first, width))
        return torch.cat(pieces, 2).flatten(1, 2)

    def _attend_step(self, q: Tensor, k: Tensor, v: Tensor, view: StepView, scale: float) -> Tensor:
        count, kv, width = k.shape
        at = torch.arange(count, device=q.device)
        self.k[at, :, view.lengths_n] = k
        self.v[at, :, view.lengths_n] = v
        queries = q.view(count, kv, -1, width)
        pieces = []
        for first, last, size, hidden in view.groups:
            own_k = self.k[first:last, :, :size].flatten(0, 1)
            own_v = self.v[first:last, :, :size].flatten(0, 1)
            query = queries[first:last]
            scores = torch.bmm(query.flatten(0, 1), own_k.transpose(1, 2)).mul_(scale)
            scores.view(last - first, -1, size).masked_fill_(hidden[:, None], float("-inf"))
            pieces.append(self._mix(query, scores, own_v, scale).view(last - first, -1))
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _mix(self, query: Tensor, scores: Tensor, own_v: Tensor, scale: float) -> Tensor:
        """Softmax over the shared prefix and the own keys together; values mixed. query: (n, N, M, d),
        scores of the own keys: (n * N, M, size). Returns (n * N, M, d)."""
        if self.prefix is None:
            return torch.bmm(torch.softmax(scores, -1), own_v)
        count, kv, rows, width = query.shape
        prefix_k, prefix_v = self.prefix
        shared = prefix_k.shape[1]
        by_head = query.transpose(0, 1).reshape(kv, count * rows, width)
        early = torch.bmm(by_head, prefix_k.transpose(1, 2)).mul_(scale)
        early = early.view(kv, count, rows, shared).transpose(0, 1).reshape(count * kv, rows, shared)
        probs = torch.softmax(torch.cat((early, scores), -1), -1)
        late = torch.bmm(probs[..., shared:], own_v)
        early = (
            probs[..., :shared]
            .reshape(count, kv, rows, shared)
            .transpose(0, 1)
            .reshape(kv, count * rows, shared)
        )
        mixed = (
            torch.bmm(early, prefix_v)
            .view(kv, count, rows, width)
            .transpose(0, 1)
            .reshape(count * kv, rows, width)
        )
        return late + mixed


class Session:
    """Sequences being continued by our own decoder. Slots hold them in the order given, which is by length.

    prompts: own tokens of each sequence (behind the shared prefix), at least one, ascending in length.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        prefix: SharedPrefix | None = None,
    ) -> None:
        self.model, self.prefix = model, prefix
        self.lengths = [len(prompt) for prompt in prompts]
        self.start = 0 if prefix is None else prefix.length
        self.windows = set(model.config.windows)
        config, capacity = model.config, pad_length(self.lengths[-1] + max_new_tokens)
        self.caches = [
            LayerCache(
                len(prompts),
                capacity,
                kv_heads=config.num_kv_heads,
                width=config.head_dim,
                dtype=model.dtype,
                device=model.device,
            )
            for _ in range(config.num_layers)
        ]
        if prefix is not None:
            for cache, shared in zip(self.caches, prefix.layers, strict=True):
                cache.prefix = shared
        self._prompts = prompts

    def prefill(self) -> Tensor:
        """Hidden state behind each prompt's last token, (n, D)."""
        device = self.model.device
        layout = make_layout(self.lengths, device=device)
        ids_T = torch.tensor([token for prompt in self._prompts for token in prompt], device=device)
        last_n = layout.cumulative_N1[1:].long() - 1
        return self.model.step(
            ids_T, layout.positions_T + self.start, self.caches, PrefillView.of(layout), last_n
        )

    def step(self, ids_n: Tensor) -> Tensor:
        """Append one token to each sequence. Hidden state behind it, (n, D)."""
        device = self.model.device
        views = {window: StepView.of(self.lengths, window=window, device=device) for window in self.windows}
        view = views[min(views)] if len(views) == 1 else views
        positions_n = torch.tensor(self.lengths, device=device) + self.start
        hidden = self.model.step(ids_n, positions_n, self.caches, view)
        self.lengths = [length + 1 for length in self.lengths]
        return hidden

    def keep(self, slots: Sequence[int]) -> None:
        """Continue only these sequences, in this (ascending) order."""
        kept = torch.tensor(slots, device=self.model.device)
        for cache in self.caches:
            cache.keep(kept)
        self.lengths = [self.lengths[slot] for slot in slots]


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of tokens that all prompts start with: per layer (k, v), each (N, P, d)."""

    length: int
    layers: list[tuple[Tensor, Tensor]]

    @staticmethod
    def of(model: Decoder, ids: Sequence[int]) -> SharedPrefix:
        session = Session(model, [ids], max_new_tokens=0)
        session.prefill()
        return SharedPrefix(
            len(ids),
            [
                (c.k[0, :, : len(ids)].contiguous(), c.v[0, :, : len(ids)].contiguous())
                for c in session.caches
            ],
        )

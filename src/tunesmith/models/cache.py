"""Keys and values of sequences that are being continued.

Sequences lie in groups of one padded length, which follows from a sequence's own length, so its result does not depend
on the other sequences. A group is one block of memory that products read as it lies; a sequence that outgrows its group
moves to the next. Tokens that all prompts start with (few-shot examples) can be computed once and shared.

T: flat tokens  n: sequences  S: padded length  P: shared prefix tokens  L: layers  H: query heads  N: key/value heads
d: head width
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.models.attention import (
    FOLDED_MAX,
    cap_scores,
    fold_heads,
    make_mask,
    make_scores,
    unfold_heads,
)
from tunesmith.models.layout import Layout, make_layout, pad_length

if TYPE_CHECKING:
    from tunesmith.models.decoder import Decoder


_QUERY_BLOCK = 256
# Kernels are compiled and kept per shape, so there must be few: sequences of a group are counted in these steps, tokens
# and sequences of a pass in those of `pad_length`. What fills them up is computed and never read.
_ROUND_ROWS = 8


class Group:
    """Sequences whose keys and values are padded to one length.

    store:   (2, L, rows, N, S, d): keys, values.
    members: the sequence in each row that is in use; the used rows come first.
    """

    def __init__(self, model: Decoder, padded_length: int, members: Sequence[int] = ()) -> None:
        self.padded_length, self.members = padded_length, list(members)
        config = model.config
        # Padded places are masked, but 0 * NaN of uninitialised memory would still be NaN.
        self.store = torch.zeros(
            (2, config.num_layers, len(self.members), config.num_kv_heads, padded_length, config.head_dim),
            dtype=model.dtype,
            device=model.device,
        )

    @property
    def num_rows(self) -> int:
        """Rows in use, rounded up."""
        return _round_up(len(self.members), _ROUND_ROWS)

    def append(self, source: Group, rows: Sequence[int]) -> None:
        """Take over rows of a group of the same or a shorter length, which keeps its copy."""
        used, size = len(self.members), source.padded_length
        self.reserve(used + len(rows))
        for at, row in enumerate(rows, used):
            self.store[:, :, at, :, :size] = source.store[:, :, row]
        self.members += [source.members[row] for row in rows]

    def reserve(self, rows: int) -> None:
        """Make room for that many rows, and for those that fill up the shape."""
        if _round_up(rows, _ROUND_ROWS) > self.store.shape[2]:
            # A quarter more than needed: one at a time, sequences come from the next shorter group.
            room = _round_up(rows + rows // 4, _ROUND_ROWS)
            store = self.store.new_zeros(*self.store.shape[:2], room, *self.store.shape[3:])
            store[:, :, : len(self.members)] = self.store[:, :, : len(self.members)]
            self.store = store

    def drop(self, rows: Sequence[int]) -> None:
        """Give up rows; the last ones move into their places."""
        left, gone = len(self.members) - len(rows), set(rows)
        moving = (row for row in range(left, len(self.members)) if row not in gone)
        for row in sorted(gone):
            if row < left:
                last = next(moving)
                self.store[:, :, row] = self.store[:, :, last]
                self.members[row] = self.members[last]
        del self.members[left:]


@dataclass(frozen=True)
class PrefillView:
    """New documents: bucket i of `layout` goes into group i."""

    layout: Layout


@dataclass(frozen=True)
class StepView:
    """One new token per sequence, group after group.

    lengths_n: tokens of its own (behind the shared prefix) that each sequence has before this step.
    hidden:    per group, the keys that each row may not see, (rows, 1, S).
    """

    lengths_n: Tensor
    hidden: list[Tensor]

    @staticmethod
    def of(groups: Sequence[Group], lengths_n: Tensor, *, window: int) -> StepView:
        hidden, at = [], 0
        for group in groups:
            last = lengths_n.new_zeros(group.num_rows, 1, 1)
            last[: len(group.members), 0, 0] = lengths_n[at : at + len(group.members)]
            keys = torch.arange(group.padded_length, device=lengths_n.device)
            unseen = keys > last
            hidden.append(unseen | (keys <= last - window) if window else unseen)
            at += len(group.members)
        return StepView(lengths_n, hidden)


CacheView = PrefillView | StepView | dict[int, StepView]


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer: `groups` of the session, and of the shared prefix, (N, P, d) each."""

    groups: list[Group]
    layer: int
    prefix: tuple[Tensor, Tensor] | None = None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        view: CacheView,
        *,
        scale: float,
        window: int,
        cap: float = 0.0,
    ) -> Tensor:
        """Store k and v (T, N, d), attend q (T, H, d) over what its sequence has. Returns (T, H * d).

        Tokens behind those of the view fill up the shape: nothing is stored for them, and they get zeros or noise.
        """
        if isinstance(view, dict):  # layers of one model with different windows
            view = view[window]
        if isinstance(view, StepView):
            return self._attend_step(q, k, v, view, scale, cap)
        return self._attend_prompt(q, k, v, view.layout, scale, window, cap)

    def _attend_prompt(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int, cap: float
    ) -> Tensor:
        out = q.new_zeros(q.shape[0], q.shape[1] * q.shape[2])
        stream, kv = torch.cat((q, k, v), 1), k.shape[1]
        for bucket, group in zip(layout.buckets, self.groups, strict=True):
            size, count = bucket.padded_length, bucket.num_documents
            qf, kf, vf = fold_heads(stream, bucket, kv)
            group.store[0, self.layer, :count] = kf.view(count, kv, size, -1)
            group.store[1, self.layer, :count] = vf.view(count, kv, size, -1)
            q_split, k_split, v_split = (x.view(count, kv, -1, x.shape[-1]) for x in (qf, kf, vf))
            rows = [
                self._attend_documents(q_split[span], k_split[span], v_split[span], scale, window, cap)
                for span in _split_powers(count)
            ]
            unfolded = unfold_heads(torch.cat(rows), bucket, kv)
            out.index_copy_(0, bucket.flat_n, unfolded.index_select(0, bucket.inside_n))
        return out

    def _attend_documents(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, cap: float
    ) -> Tensor:
        """q: (n, N, G * S, d), k and v: (n, N, S, d). Returns (n * N, G * S, d)."""
        count, kv, size, width = k.shape
        if cap or self.prefix is not None or size <= FOLDED_MAX[q.dtype]:
            queries = q.reshape(count * kv, -1, size, width)
            return self._attend_folded(queries, k.flatten(0, 1), v.flatten(0, 1), count, scale, window, cap)
        mask = make_mask(size, window, q.dtype, q.device) if 0 < window < size else None
        return F.scaled_dot_product_attention(
            q.reshape(count, -1, size, width),
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        ).reshape(count * kv, -1, width)

    def _attend_folded(
        self, q: Tensor, k: Tensor, v: Tensor, count: int, scale: float, window: int, cap: float
    ) -> Tensor:
        """q: (n * N, G, S, d), k and v: (n * N, S, d). Blocks of queries see only the keys up to their own end, which
        saves almost half of the work on long prompts. Returns (n * N, G * S, d)."""
        size, width = k.shape[1], k.shape[2]
        mask = make_mask(size, window, q.dtype, q.device)
        pieces = []
        for first in range(0, size, _QUERY_BLOCK):
            last = min(first + _QUERY_BLOCK, size)
            query = q[:, :, first:last].flatten(1, 2)
            ahead = mask[first:last, :last].repeat(q.shape[1], 1)
            scores = make_scores(query, k[:, :last], ahead, scale, cap)
            mixed = self._mix(query.view(count, -1, query.shape[1], width), scores, v[:, :last], scale, cap)
            pieces.append(mixed.view(len(q), -1, last - first, width))
        return torch.cat(pieces, 2).flatten(1, 2)

    def _attend_step(
        self, q: Tensor, k: Tensor, v: Tensor, view: StepView, scale: float, cap: float
    ) -> Tensor:
        kv, width, at = k.shape[1], k.shape[2], 0
        queries = q.view(len(q), kv, -1, width)
        out = q.new_zeros(queries.shape)
        for group, hidden in zip(self.groups, view.hidden, strict=True):
            used, rows, size = len(group.members), group.num_rows, group.padded_length
            store, places = group.store[:, self.layer, :rows], view.lengths_n[at : at + used]
            used_n = torch.arange(used, device=q.device)
            store[0, used_n, :, places] = k[at : at + used]
            store[1, used_n, :, places] = v[at : at + used]
            # The rows that fill up a group borrow the queries of the next one, or of what fills up the stream.
            query = queries[at : at + rows]
            scores = torch.bmm(query.flatten(0, 1), store[0].flatten(0, 1).transpose(1, 2)).mul_(scale)
            scores = cap_scores(scores, cap)
            scores.view(rows, -1, size).masked_fill_(hidden, float("-inf"))
            mixed = self._mix(query, scores, store[1].flatten(0, 1), scale, cap)
            out[at : at + used] = mixed.view(rows, kv, -1, width)[:used]
            at += used
        return out.view(len(q), -1)

    def _mix(self, query: Tensor, scores: Tensor, own_v: Tensor, scale: float, cap: float) -> Tensor:
        """Softmax over the shared prefix and the own keys together; values mixed. query: (n, N, M, d),
        scores of the own keys: (n * N, M, size). Returns (n * N, M, d)."""
        if self.prefix is None:
            return torch.bmm(torch.softmax(scores, -1), own_v)
        count, kv, rows, width = query.shape
        prefix_k, prefix_v = self.prefix
        shared = prefix_k.shape[1]
        by_head = query.transpose(0, 1).reshape(kv, count * rows, width)
        early = cap_scores(torch.bmm(by_head, prefix_k.transpose(1, 2)).mul_(scale), cap)
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


def _split_powers(count: int) -> Iterator[slice]:
    """13 -> spans of 8, 4 and 1: few shapes for any number of documents."""
    at = 0
    while at < count:
        step = 1 << ((count - at).bit_length() - 1)
        yield slice(at, at + step)
        at += step


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


class Session:
    """Sequences being continued by our own decoder.

    prompts: own tokens of each sequence (behind the shared prefix), at least one.
    lengths: tokens that each sequence has in the cache.
    """

    def __init__(
        self, model: Decoder, prompts: Sequence[Sequence[int]], *, prefix: SharedPrefix | None = None
    ) -> None:
        self.model, self._prefix = model, prefix
        self.lengths = [len(prompt) for prompt in prompts]
        self.start = 0 if prefix is None else prefix.length
        self.windows = set(model.config.windows)
        self.groups: list[Group] = []
        shared = [None] * model.config.num_layers if prefix is None else prefix.layers
        self.caches = [LayerCache(self.groups, layer, pair) for layer, pair in enumerate(shared)]
        self._prompts = prompts

    def prefill(self, keep_K: Tensor | None = None) -> Tensor:
        """Run the prompts. Hidden states at these flat positions of the prompts laid end to end, (K, D); by default
        behind each prompt's last token, (n, D)."""
        device = self.model.device
        layout = make_layout(self.lengths, device=device)
        members: dict[int, list[int]] = {}
        for slot, length in enumerate(self.lengths):
            members.setdefault(pad_length(length), []).append(slot)
        self.groups += [Group(self.model, size, members[size]) for size in sorted(members)]
        if keep_K is None:
            keep_K = layout.cumulative_N1[1:].long() - 1
        fill = pad_length(layout.num_tokens) - layout.num_tokens
        ids_T = torch.tensor(
            [token for prompt in self._prompts for token in prompt] + [0] * fill, device=device
        )
        positions_T = F.pad(layout.positions_T + self.start, (0, fill))
        kept = len(keep_K)
        filled_K = F.pad(keep_K, (0, pad_length(kept) - kept))
        return self.model.step(ids_T, positions_T, self.caches, PrefillView(layout), filled_K)[:kept]

    def step(self, ids_n: Tensor) -> Tensor:
        """Append one token to each sequence. Hidden state behind it, (n, D)."""
        self._move_outgrown()
        device, order = self.model.device, [slot for group in self.groups for slot in group.members]
        lengths_n = torch.tensor([self.lengths[slot] for slot in order], device=device)
        order_n = torch.tensor(order, device=device)
        hidden_nD = self.step_in_place(ids_n[order_n], lengths_n)
        self.lengths = [length + 1 for length in self.lengths]
        return torch.empty_like(hidden_nD).index_copy_(0, order_n, hidden_nD)

    def step_in_place(self, ids_n: Tensor, lengths_n: Tensor) -> Tensor:
        """`step` of sequences in the order of their groups, which have room for one more token.

        lengths_n: what `lengths` would say, which stays as it is. Nothing is read or decided by the host: of a session
        whose groups stay (`spread`), a recording of this can be replayed.
        """
        count = len(ids_n)
        views = {window: StepView.of(self.groups, lengths_n, window=window) for window in self.windows}
        view = views[min(views)] if len(views) == 1 else views
        fill = pad_length(count + _ROUND_ROWS) - count
        positions_T = F.pad(lengths_n + self.start, (0, fill))
        return self.model.step(F.pad(ids_n, (0, fill)), positions_T, self.caches, view)[:count]

    def spread(self, slots: Sequence[int], *, size: int) -> Session:
        """A session of these sequences, each as often as it is named, in one group that pads all to `size` tokens."""
        made, group = Session(self.model, [], prefix=self._prefix), Group(self.model, size)
        group.reserve(len(slots))
        for source in self.groups:
            rows = {slot: row for row, slot in enumerate(source.members)}
            places = [place for place, slot in enumerate(slots) if slot in rows]
            taken = source.store[:, :, [rows[slots[place]] for place in places]]
            group.store[:, :, places, :, : source.padded_length] = taken
        group.members = list(range(len(slots)))
        made.groups.append(group)
        made.lengths = [self.lengths[slot] for slot in slots]
        return made

    def _move_outgrown(self) -> None:
        """Put each sequence into a group that has room for one more token."""
        for group in list(self.groups):
            size = group.padded_length
            rows = [row for row, slot in enumerate(group.members) if self.lengths[slot] >= size]
            if rows:
                self._find_group(pad_length(size + 1)).append(group, rows)
                group.drop(rows)
        self._sort_groups()
        for group in self.groups:
            group.reserve(len(group.members))

    def _find_group(self, size: int) -> Group:
        for group in self.groups:
            if group.padded_length == size:
                return group
        self.groups.append(Group(self.model, size))
        return self.groups[-1]

    def _sort_groups(self) -> None:
        self.groups[:] = sorted((g for g in self.groups if g.members), key=lambda g: g.padded_length)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget what each sequence has behind its first `lengths` own tokens."""
        self.lengths = list(lengths)

    def keep(self, slots: Sequence[int]) -> None:
        """Continue only these sequences, in this order."""
        place = {slot: at for at, slot in enumerate(slots)}
        for group in self.groups:
            group.drop([row for row, slot in enumerate(group.members) if slot not in place])
            group.members = [place[slot] for slot in group.members]
        self._sort_groups()
        self.lengths = [self.lengths[slot] for slot in slots]

    def join(self, other: Session) -> None:
        """Take over the sequences of another session with the same prefix, behind the own ones."""
        for theirs in other.groups:
            theirs.members = [slot + len(self.lengths) for slot in theirs.members]
            self._find_group(theirs.padded_length).append(theirs, range(len(theirs.members)))
        self._sort_groups()
        self.lengths += other.lengths


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of tokens that all prompts start with: per layer (k, v), each (N, P, d)."""

    length: int
    layers: list[tuple[Tensor, Tensor]]

    @staticmethod
    def of(model: Decoder, ids: Sequence[int]) -> SharedPrefix:
        session = Session(model, [ids])
        session.prefill()
        keys, values = session.groups[0].store[:, :, 0, :, : len(ids)].contiguous()
        return SharedPrefix(len(ids), list(zip(keys, values, strict=True)))

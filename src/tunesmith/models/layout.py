"""How documents of different lengths lie in one flat stream, and how attention groups them.

All linear layers run on the flat stream (T, D) without padding. Only attention needs whole documents: they are grouped
into buckets of one padded length each. The padded length of a document follows from its own length alone, so what else
is in the batch never changes the shapes its numbers are computed with.

T: flat tokens  N: documents  B: documents of a bucket  S: padded length  K: target tokens
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tunesmith.core.types import TokenRow


def _make_rungs() -> list[int]:
    rungs = list(range(16, 128, 16))
    step, top = 32, 256
    while top <= 1 << 22:
        rungs += range(top // 2, top, step)
        step, top = step * 2, top * 2
    return rungs


# Padded lengths: steps of 16 up to 128, then a quarter of the power of two below. At most a quarter is padding.
_RUNGS = _make_rungs()


def pad_length(length: int) -> int:
    """Length to which attention pads a document."""
    return _RUNGS[bisect_left(_RUNGS, length)]


@dataclass(frozen=True)
class Bucket:
    """Documents of one padded length.

    gather_BS:  flat position of every padded slot; empty slots repeat the document's first token, (B*S,).
    inside_n:   slots that hold a token, in the order of `flat_n`, (n,).
    flat_n:     their flat positions, (n,).
    empty_e:    slots without a token, (B*S - n,).
    """

    num_documents: int
    padded_length: int
    gather_BS: Tensor
    inside_n: Tensor
    flat_n: Tensor
    empty_e: Tensor


@dataclass(frozen=True)
class Fold:
    """Rows of heads between the flat stream (row = token * heads per token + head) and padded blocks of documents.

    into:   stream row of every block row; rows of empty slots repeat the document's first token, (R,).
    back:   block row of every stream row, (T * heads,).
    empty:  block rows without a token.
    """

    into: Tensor
    back: Tensor
    empty: Tensor


@dataclass(frozen=True)
class Layout:
    """Documents laid end to end.

    lengths:       tokens per document, N of them, T in all.
    positions_T:   position of each token in its own document, int64.
    cumulative_N1: starts of the documents and T at the end, int32, (N + 1,).
    """

    lengths: tuple[int, ...]
    positions_T: Tensor
    cumulative_N1: Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.positions_T.shape[0])

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    @property
    def device(self) -> torch.device:
        return self.positions_T.device

    @cached_property
    def starts(self) -> list[int]:
        starts, at = [], 0
        for length in self.lengths:
            starts.append(at)
            at += length
        return starts

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Made on first use: variable-length kernels do not need them."""
        members: dict[int, list[int]] = {}
        for document, length in enumerate(self.lengths):
            members.setdefault(pad_length(length), []).append(document)
        return [self._make_bucket(size, members[size]) for size in sorted(members)]

    @cached_property
    def order_T(self) -> Tensor | None:
        """Flat position -> row of the bucket outputs laid end to end; None where that is the identity."""
        flat_T = torch.cat([bucket.flat_n for bucket in self.buckets])
        order_T = torch.empty_like(flat_T)
        order_T[flat_T] = torch.arange(len(flat_T), device=flat_T.device)
        return None if len(self.buckets) == 1 and bool((flat_T[1:] > flat_T[:-1]).all()) else order_T

    def fold(self, num_kv_heads: int, groups: int) -> tuple[Fold, Fold]:
        """Folds of a stream of queries, keys and values, N * (G + 2) heads per token, and of its queries alone, N * G.

        Buckets one after the other; of each, blocks of queries (B, N, G, S), of keys (B, N, S), of values (B, N, S).
        """
        key = num_kv_heads, groups
        if key not in self._folds:
            heads_NG = torch.arange(num_kv_heads * groups).view(num_kv_heads, groups)
            keys_N1 = torch.arange(num_kv_heads)[:, None] + num_kv_heads * groups
            self._folds[key] = (
                self._make_fold((heads_NG, keys_N1, keys_N1 + num_kv_heads)),
                self._make_fold((heads_NG,)),
            )
        return self._folds[key]

    @cached_property
    def _folds(self) -> dict[tuple[int, int], tuple[Fold, Fold]]:
        return {}

    def _make_fold(self, blocks: Sequence[Tensor]) -> Fold:
        """blocks: numbers of the heads of each block of a bucket, (N, G)."""
        num_heads = sum(heads_NG.numel() for heads_NG in blocks)
        rows, held = [], []
        for bucket in self.buckets:
            shape = (bucket.num_documents, 1, 1, bucket.padded_length)
            tokens = bucket.gather_BS.view(shape) * num_heads
            inside = torch.ones_like(bucket.gather_BS, dtype=torch.bool).index_fill_(0, bucket.empty_e, False)
            for heads_NG in blocks:
                block = tokens + heads_NG[None, :, :, None]
                rows.append(block.flatten())
                held.append(inside.view(shape).expand_as(block).flatten())
        into, inside = torch.cat(rows), torch.cat(held)
        slots = inside.nonzero().flatten()
        back = torch.empty(self.num_tokens * num_heads, dtype=torch.int64)
        back[into[slots]] = slots
        return Fold(into, back, (~inside).nonzero().flatten())

    def _make_bucket(self, size: int, documents: list[int]) -> Bucket:
        starts_B = torch.tensor([self.starts[document] for document in documents])
        lengths_B = torch.tensor([self.lengths[document] for document in documents])
        offsets_S = torch.arange(size)
        inside_BS = offsets_S[None] < lengths_B[:, None]
        gather_BS = torch.where(inside_BS, starts_B[:, None] + offsets_S[None], starts_B[:, None]).flatten()
        slots_n = inside_BS.flatten().nonzero().flatten()
        empty_e = (~inside_BS).flatten().nonzero().flatten()
        move = self.device
        return Bucket(
            len(documents),
            size,
            gather_BS.to(move),
            slots_n.to(move),
            gather_BS[slots_n].to(move),
            empty_e.to(move),
        )


def make_layout(lengths: Sequence[int], *, device: torch.device | str = "cpu") -> Layout:
    """Layout of documents of the given lengths (tokens, each at least 1). Raises ValueError for empty ones."""
    if not lengths or min(lengths) < 1:
        raise ValueError(f"a layout needs documents of at least one token, got lengths {list(lengths)[:8]}")
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    cumulative_N1 = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Layout(tuple(lengths), positions_T.to(device), cumulative_N1.to(device))


@dataclass(frozen=True)
class Batch:
    """Rows ready for a model: what `hidden` and the losses take.

    ids_T:       token ids of all rows end to end, int64.
    sources_K:   flat positions whose *next* token is a target, ascending, int64.
    targets_K:   those next tokens, int64.
    row_K:       which row of the batch each target belongs to, int64.
    """

    ids_T: Tensor
    layout: Layout
    sources_K: Tensor
    targets_K: Tensor
    row_K: Tensor

    @property
    def num_targets(self) -> int:
        return int(self.targets_K.shape[0])

    def split_ids(self) -> list[list[int]]:
        """The ids of each row."""
        return [ids.tolist() for ids in self.ids_T.split(list(self.layout.lengths))]


def make_batch(
    rows: Sequence[TokenRow], *, device: torch.device | str = "cpu", round_tokens: int = 1
) -> Batch:
    """Batch of rendered rows.

    round_tokens: fill the stream up to a multiple of this many tokens with documents that nothing reads or scores.
        Kernels are compiled and kept per shape; of round lengths there are few, and each comes back.

    A row of n tokens gives n flat positions; its target at place t is predicted from place t - 1:
        ids 5 6 7, mask 0 1 1  ->  sources 0 1, targets 6 7
    Raises ValueError if a row's first token is a target: nothing precedes it.
    """
    ids, mask, row = [], [], []
    for number, token_row in enumerate(rows):
        if token_row.mask[0]:
            raise ValueError(
                f"{token_row.origin.place}: the first token is a target, but nothing precedes it"
            )
        ids.extend(token_row.ids)
        mask.extend(token_row.mask)
        row.extend([number] * len(token_row.ids))
    fillers = _split_filler(-len(ids) % round_tokens)
    ids.extend([0] * sum(fillers))
    ids_T = torch.tensor(ids, dtype=torch.int64)
    places_K = torch.tensor(mask, dtype=torch.uint8).nonzero().flatten()
    return Batch(
        ids_T=ids_T.to(device),
        layout=make_layout([*(len(token_row.ids) for token_row in rows), *fillers], device=device),
        sources_K=(places_K - 1).to(device),
        targets_K=ids_T[places_K].to(device),
        row_K=torch.tensor(row, dtype=torch.int64)[places_K].to(device),
    )


def _split_filler(num_tokens: int) -> list[int]:
    """Filler tokens as short documents, which cost attention next to nothing."""
    whole, rest = divmod(num_tokens, _RUNGS[0])
    return [_RUNGS[0]] * whole + ([rest] if rest else [])

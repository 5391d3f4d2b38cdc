"""How documents of different lengths lie in one flat stream, and how attention groups them.

All linear layers run on the flat stream (T, D) without padding. Only attention needs whole documents: they are grouped
into buckets of one padded length each. The padded length of a document follows from its own length alone, so what else
is in the batch never changes the shapes its numbers are computed with.

Documents that begin alike (one system prompt for all, one prompt for both answers of a pair) may share what they begin
with: those tokens lie in the stream once, with an earlier document, and every document's attention reads them there.
Causal attention gives them the same hidden states in each document, so no number changes; only their gradients are
added up before, not after, the layers.

T: flat tokens  N: documents  B: documents of a bucket  S: padded length  K: target tokens
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
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


# Target rows are computed in multiples of this many.
ROUND_TARGETS = 64
# Fewer common tokens than this are not worth sharing.
MIN_SHARED = 8
# Where kernels take any lengths, documents are counted in multiples of this many, the longest in powers of two from
# here on, and target rows in eighths of the tokens: kernels pass by what is empty.
_ROUND_DOCUMENTS, _LEAST_BOUND, _TARGET_SHARES = 16, 256, 8


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`; to a GPU from pinned memory, so that the host does not wait for the copy."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pad_length(length: int) -> int:
    """Length to which attention pads a document."""
    return _RUNGS[bisect_left(_RUNGS, length)]


@dataclass(frozen=True)
class Bucket:
    """Documents of one padded length.

    documents:  their numbers, B of them.
    gather_BS:  flat position of every padded slot; empty slots repeat the document's first token, (B*S,).
    inside_n:   slots that hold a token of the document's own, in the order of `flat_n`, (n,).
    flat_n:     their flat positions, (n,).
    empty_e:    slots without a token. The others, neither inside nor empty, hold tokens of an earlier document.
    """

    documents: tuple[int, ...]
    padded_length: int
    gather_BS: Tensor
    inside_n: Tensor
    flat_n: Tensor
    empty_e: Tensor

    @property
    def num_documents(self) -> int:
        return len(self.documents)


@dataclass(frozen=True)
class Fold:
    """Rows of heads between the flat stream (row = token * heads per token + head) and padded blocks of documents.

    into:    stream row of every block row; rows of empty slots repeat the document's first token, (R,).
    back:    block row of every stream row, (T * heads,).
    foreign: block rows without a token of the document's own: empty, or of an earlier document.
    copies:  stream rows of shared tokens, (m,), and the block rows that repeat them, (c, m): a pair for each c.
    """

    into: Tensor
    back: Tensor
    foreign: Tensor
    copies: Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Layout:
    """Documents laid end to end.

    lengths:       tokens per document, N of them, shared ones included.
    positions_T:   position of each token in its own document, int64.
    cumulative_N1: starts of the documents' own tokens and T at the end, int32, (N + 1,).
    shared:        how many of each document's first tokens an earlier one stores, its host, which begins with the same.
    hosts:         their numbers. Both are empty where nothing is shared.
    bound:         what kernels may take for the longest document; 0 is the longest itself. With a bound, `lengths` are
                   an example: what counts is in the tensors, and `cumulative_N1` may end in empty documents.
    """

    lengths: tuple[int, ...]
    positions_T: Tensor
    cumulative_N1: Tensor
    shared: tuple[int, ...] = ()
    hosts: tuple[int, ...] = ()
    bound: int = 0

    @property
    def num_tokens(self) -> int:
        return int(self.positions_T.shape[0])

    @property
    def max_length(self) -> int:
        return self.bound or max(self.lengths)

    @property
    def is_even(self) -> bool:
        """Whether all documents have the same length and share nothing."""
        return not self.shared and min(self.lengths) == max(self.lengths)

    @property
    def device(self) -> torch.device:
        return self.positions_T.device

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
        if len(self.buckets) == 1:
            return None  # of one bucket, documents and their tokens lie in the order of the stream
        flat_T = torch.cat([bucket.flat_n for bucket in self.buckets])
        order_T = torch.empty_like(flat_T)
        order_T[flat_T] = torch.arange(len(flat_T), device=flat_T.device)
        return order_T

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

    def widened(self) -> Layout:
        """A copy into which layouts of the same `rounded` numbers can be copied."""
        num_documents, bound = self.rounded()
        cumulative_N1 = self.cumulative_N1.new_full((num_documents + 1,), self.num_tokens)
        layout = Layout(self.lengths, self.positions_T.clone(), cumulative_N1, bound=bound)
        layout.copy_(self)
        return layout

    def copy_(self, layout: Layout) -> None:
        """Take over a layout. This one is `widened`."""
        count = len(layout.cumulative_N1)
        self.positions_T.copy_(layout.positions_T)
        self.cumulative_N1[:count].copy_(layout.cumulative_N1)
        self.cumulative_N1[count:] = self.num_tokens

    def rounded(self) -> tuple[int, int]:
        """(documents, tokens of the longest), rounded up so far that few numbers come up."""
        longest = max(_LEAST_BOUND, 1 << (max(self.lengths) - 1).bit_length())
        return -(-len(self.lengths) // _ROUND_DOCUMENTS) * _ROUND_DOCUMENTS, longest

    def shares(self, document: int) -> int:
        """How many of a document's first tokens lie in an earlier one."""
        return self.shared[document] if self.shared else 0

    def find_tokens(self) -> list[Tensor]:
        """Where each document's tokens lie in the stream, on the host: to read `cumulative_N1` would be to wait for a
        GPU."""
        found: list[Tensor] = []
        start = 0
        for document, length in enumerate(self.lengths):
            shared = self.shares(document)
            own = torch.arange(start, start + length - shared)
            found.append(torch.cat((found[self.hosts[document]][:shared], own)) if shared else own)
            start += length - shared
        return found

    def _make_fold(self, blocks: Sequence[Tensor]) -> Fold:
        """blocks: numbers of the heads of each block of a bucket, (N, G)."""
        num_heads = sum(heads_NG.numel() for heads_NG in blocks)
        rows, owned, documents = [], [], []
        for bucket in self.buckets:
            shape = (bucket.num_documents, 1, 1, bucket.padded_length)
            tokens = bucket.gather_BS.view(shape) * num_heads
            own = torch.zeros_like(bucket.gather_BS).index_fill_(0, bucket.inside_n, 1)
            own.index_fill_(0, bucket.empty_e, -1)
            for heads_NG in blocks:
                block = tokens + heads_NG[None, :, :, None]
                rows.append(block.flatten())
                owned.append(own.view(shape).expand_as(block).flatten())
                documents.append(torch.tensor(bucket.documents).view(-1, 1, 1, 1).expand_as(block).flatten())
        into, own = torch.cat(rows), torch.cat(owned)
        slots = (own == 1).nonzero().flatten()
        back = torch.empty(self.num_tokens * num_heads, dtype=torch.int64)
        back[into[slots]] = slots
        return Fold(into, back, (own != 1).nonzero().flatten(), _sort_copies(into, own, torch.cat(documents)))

    def _make_bucket(self, size: int, documents: list[int]) -> Bucket:
        tokens = self.find_tokens()
        lengths_B1 = torch.tensor([self.lengths[document] for document in documents])[:, None]
        shared_B1 = torch.tensor([self.shares(document) for document in documents])[:, None]
        offsets_S = torch.arange(size)[None]
        inside_BS = offsets_S < lengths_B1
        flat_BS = torch.stack([F.pad(tokens[n], (0, size - len(tokens[n]))) for n in documents])
        gather_BS = torch.where(inside_BS, flat_BS, flat_BS[:, :1]).flatten()
        slots_n = (inside_BS & (offsets_S >= shared_B1)).flatten().nonzero().flatten()
        empty_e = (~inside_BS).flatten().nonzero().flatten()
        move = self.device
        return Bucket(
            tuple(documents),
            size,
            send(gather_BS, move),
            send(slots_n, move),
            send(gather_BS[slots_n], move),
            send(empty_e, move),
        )


def _sort_copies(into: Tensor, own: Tensor, documents: Tensor) -> list[tuple[Tensor, Tensor]]:
    """`Fold.copies`: block rows that are no document's own, by stream row, in the order of documents."""
    copied = (own == 0).nonzero().flatten()
    copied = copied[documents[copied].argsort(stable=True)]
    copied = copied[into[copied].argsort(stable=True)]
    rows, counts = into[copied].unique_consecutive(return_counts=True)
    found = [(rows[counts == c], copied[counts.repeat_interleave(counts) == c]) for c in counts.unique()]
    return [(of, block.view(len(of), -1).t()) for of, block in found]


def make_layout(
    lengths: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    shared: Sequence[int] = (),
    hosts: Sequence[int] = (),
) -> Layout:
    """Layout of documents of the given lengths (tokens, each at least 1). Raises ValueError for empty ones.

    shared, hosts: as of `Layout`; a document shares fewer tokens than it has, and at most what its host has.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"a layout needs documents of at least one token, got lengths {list(lengths)[:8]}")
    firsts = shared or [0] * len(lengths)
    spans = list(zip(firsts, lengths, strict=True))
    positions_T = torch.cat([torch.arange(first, length) for first, length in spans])
    own = [0, *(length - first for first, length in spans)]
    cumulative_N1 = torch.tensor(own, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Layout(
        tuple(lengths), send(positions_T, device), send(cumulative_N1, device), tuple(shared), tuple(hosts)
    )


@dataclass(frozen=True)
class Batch:
    """Rows ready for a model: what `hidden` and the losses take.

    ids_T:       token ids of all rows end to end, int64.
    sources_K:   flat positions whose *next* token is a target, ascending, int64.
    targets_K:   those next tokens, int64.
    row_K:       which row of the batch each target belongs to, int64.
    num_rows:    rows of the batch, N; documents that only fill it up are none.
    numbers:     what rows know besides their tokens, fp32: one number a row (N,), or one a target (K,).
    of_targets:  names of the numbers that are one a target.
    """

    ids_T: Tensor
    layout: Layout
    sources_K: Tensor
    targets_K: Tensor
    row_K: Tensor
    num_rows: int
    numbers: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    of_targets: frozenset[str] = frozenset()

    @property
    def num_targets(self) -> int:
        return int(self.targets_K.shape[0])

    def signature(self, *, any_lengths: bool = False, by_rows: bool = False) -> tuple[Hashable, ...]:
        """What decides which kernels a training step runs, and over how much: batches of one signature differ in the
        values of their tensors alone, once they are filled up (`fixed`).

        any_lengths: attention's kernels read documents' lengths from a tensor, and are the same for all.
        by_rows: what is computed has a value for each row.
        """
        layout, rows = self.layout, self.num_rows if by_rows else 0
        if self._differs_in_values(any_lengths):
            return layout.num_tokens, *layout.rounded(), self._round_targets(any_lengths), rows
        return layout.lengths, layout.shared, layout.hosts, self._round_targets(any_lengths), rows

    def fixed(self, *, any_lengths: bool = False) -> Batch:
        """A copy that batches of the same signature can be copied into. Fillers repeat a source, with the target -1."""
        missing = self._round_targets(any_lengths) - self.num_targets
        if self._differs_in_values(any_lengths):
            layout = self.layout.widened()
        else:
            # All share one layout. What it makes on first use comes from the host, from which no recording may copy.
            layout = self.layout
            _ = layout.order_T
        return Batch(
            self.ids_T.clone(),
            layout,
            torch.cat((self.sources_K, self.sources_K[:1].expand(missing))),
            F.pad(self.targets_K, (0, missing), value=-1),
            torch.cat((self.row_K, self.row_K[:1].expand(missing))),
            self.num_rows,
            {
                name: F.pad(values, (0, missing)) if name in self.of_targets else values.clone()
                for name, values in self.numbers.items()
            },
            self.of_targets,
        )

    def copy_(self, batch: Batch) -> None:
        """Take over the values of a batch of this one's signature. This one is `fixed`."""
        kept = batch.num_targets
        self.ids_T.copy_(batch.ids_T)
        if self.layout.bound:
            self.layout.copy_(batch.layout)
        for mine, theirs, filler in (
            (self.sources_K, batch.sources_K, batch.sources_K[:1]),
            (self.targets_K, batch.targets_K, None),
            (self.row_K, batch.row_K, batch.row_K[:1]),
        ):
            mine[:kept].copy_(theirs)
            if kept < len(mine):
                mine[kept:] = -1 if filler is None else filler
        for name, values in batch.numbers.items():
            self.numbers[name][: len(values)].copy_(values)
            self.numbers[name][len(values) :] = 0

    def _differs_in_values(self, any_lengths: bool) -> bool:
        # Documents of one length have a kernel of their own.
        return any_lengths and not self.layout.is_even and not self.layout.shared

    def _round_targets(self, any_lengths: bool) -> int:
        share = 0 if not self._differs_in_values(any_lengths) else self.layout.num_tokens // _TARGET_SHARES
        unit = max(1, -(-share // ROUND_TARGETS)) * ROUND_TARGETS
        return -(-self.num_targets // unit) * unit

    def split_ids(self) -> list[list[int]]:
        """The ids of each row."""
        return [ids.tolist() for ids in self.ids_T.split(list(self.layout.lengths))]


def make_batch(
    rows: Sequence[TokenRow],
    *,
    device: torch.device | str = "cpu",
    round_tokens: int = 1,
    share_prefix: bool = False,
) -> Batch:
    """Batch of rendered rows.

    share_prefix: compute once the tokens that all rows begin with, and those that a row has in common with the one
        before it. Not for variable-length kernels, nor with dropout.

    round_tokens: fill the stream up to a multiple of this many tokens with documents that nothing reads or scores.
        Kernels are compiled and kept per shape; of round lengths there are few, and each comes back.

    A row of n tokens gives n flat positions; its target at place t is predicted from place t - 1:
        ids 5 6 7, mask 0 1 1  ->  sources 0 1, targets 6 7
    Raises ValueError if a row's first token is a target: nothing precedes it.
    """
    shared, hosts = _find_shared(rows) if share_prefix else ([0] * len(rows), [0] * len(rows))
    ids, mask = [], []
    for token_row, first in zip(rows, shared, strict=True):
        if token_row.mask[0]:
            raise ValueError(
                f"{token_row.origin.place}: the first token is a target, but nothing precedes it"
            )
        own = slice(first, None)
        # Through numpy: to go through Python's integers takes a hundred times as long.
        ids.append(np.asarray(token_row.ids[own], dtype=np.int64))
        mask.append(np.asarray(token_row.mask[own], dtype=np.uint8))
    sizes = torch.tensor([len(part) for part in ids])
    row_T = torch.arange(len(rows)).repeat_interleave(sizes)
    fillers = _split_filler(-int(sizes.sum()) % round_tokens)
    ids_T = torch.from_numpy(np.concatenate([*ids, np.zeros(sum(fillers), dtype=np.int64)]))
    places_K = torch.from_numpy(np.concatenate(mask)).nonzero().flatten()
    return Batch(
        ids_T=send(ids_T, device),
        layout=make_layout(
            [*(len(token_row.ids) for token_row in rows), *fillers],
            device=device,
            shared=[*shared, *[0] * len(fillers)] if any(shared) else (),
            hosts=[*hosts, *[0] * len(fillers)] if any(shared) else (),
        ),
        sources_K=send(places_K - 1, device),
        targets_K=send(ids_T[places_K], device),
        row_K=send(row_T[places_K], device),
        num_rows=len(rows),
        numbers={name: send(_collect(name, rows), device) for name in rows[0].numbers},
        of_targets=frozenset(name for name, value in rows[0].numbers.items() if not _is_number(value)),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _collect(name: str, rows: Sequence[TokenRow]) -> Tensor:
    """A number of each row, or the numbers of all rows' targets end to end; fp32."""
    values = [row.numbers[name] for row in rows]
    if _is_number(values[0]):
        return torch.tensor(values, dtype=torch.float32)
    return torch.from_numpy(np.concatenate([np.asarray(value, dtype=np.float32) for value in values]))


def _find_shared(rows: Sequence[TokenRow]) -> tuple[list[int], list[int]]:
    """(how many of a row's first tokens another one stores, which one) of each row: what all have in common with the
    first, or more with the one before."""
    if len(rows) < 2:
        return [0], [0]
    # Every source of a target stays its row's own.
    ends = [max(0, next((at for at, kept in enumerate(row.mask) if kept), len(row.ids)) - 1) for row in rows]
    ids = [np.asarray(row.ids[:end]) for row, end in zip(rows, ends, strict=True)]
    common = min(_count_equal(ids[0], other) for other in ids[1:])
    common = common if common >= MIN_SHARED else 0
    shared, hosts = [0], [0]
    for number, pair in enumerate(pairwise(ids)):
        more = _count_equal(*pair)
        shared.append(more if more >= common + MIN_SHARED else common)
        hosts.append(number if shared[-1] > common else 0)
    return shared, hosts


def _count_equal(one: np.ndarray, other: np.ndarray) -> int:
    size = min(len(one), len(other))
    differs = one[:size] != other[:size]
    return int(differs.argmax()) if differs.any() else size


def _split_filler(num_tokens: int) -> list[int]:
    """Filler tokens as short documents, which cost attention next to nothing."""
    whole, rest = divmod(num_tokens, _RUNGS[0])
    return [_RUNGS[0]] * whole + ([rest] if rest else [])

"""The interface that training, judging and sampling use, whatever runs underneath: own decoder or fallback.

T: flat tokens  K: kept tokens  D: width  V: vocabulary
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.models.config import DecoderConfig
from tunesmith.models.layout import Layout, pad_length
from tunesmith.models.projection import MasterCast, Projection

if TYPE_CHECKING:
    from tunesmith.models.adapter_config import AdapterConfig
    from tunesmith.models.segments import Segments


_SCORE = "score_head"


class TokenTable(nn.Module):
    """A (V, D) matrix: the embedding, or an untied head. `tuned` is the whole copy that an adapter trains and saves."""

    def __init__(self, name: str, weight: Tensor, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.dtype = name, dtype
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.tuned: nn.Parameter | None = None
        self.enabled = True
        self._casts = (MasterCast(), MasterCast())

    @property
    def active(self) -> nn.Parameter:
        return self.tuned if self.tuned is not None and self.enabled else self.weight

    def matrix(self) -> Tensor:
        """(V, D) in the compute dtype, differentiable if it is trained."""
        active = self.active
        return self._casts[active is self.tuned].of(active, self.dtype)

    def look_up(self, ids: Tensor) -> Tensor:
        # Rows are cast after the look-up: the gradient of a repeated token then adds up in the master's precision.
        return F.embedding(ids, self.active).to(self.dtype)


class DecodeSession(Protocol):
    """Sequences being continued; see cache.Session."""

    def prefill(self) -> Tensor: ...

    def step(self, ids_n: Tensor) -> Tensor: ...

    def keep(self, slots: Sequence[int]) -> None: ...

    def join(self, other: Self) -> None: ...


class CausalLM(nn.Module, ABC):
    """A causal language model over packed documents.

    folder:  where its tokenizer and configuration files lie.
    dtype:   compute dtype of hidden states and products.
    """

    config: DecoderConfig
    folder: Path
    dtype: torch.dtype
    embedding: TokenTable
    untied_head: TokenTable | None
    # How a GPU trains an own decoder; None on a CPU, which has passes of its own, and for the fallback.
    segments: Segments | None = None
    # Bytes of a chunk of fp32 logits in the loss; None: what suits the device.
    loss_chunk_bytes: int | None = None

    # What an adapter folder must say about how the adapter was made; set by lora.add_lora.
    adapter_config: AdapterConfig | None = None
    head_name: str = "lm_head"

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def head_table(self) -> TokenTable:
        return self.embedding if self.untied_head is None else self.untied_head

    @property
    def head_weight(self) -> Tensor:
        """(V, D) in the compute dtype, differentiable if it is trained."""
        return self.head_table.matrix()

    @property
    def has_plain_head(self) -> bool:
        """Whether logits are hidden @ head_weight^T and nothing more."""
        return True

    def untie_head(self) -> None:
        """Give a tied model a head of its own, equal to the base's embedding."""
        self.untied_head = TokenTable(
            self.head_name, self.embedding.weight.detach().clone(), dtype=self.dtype
        )
        self.config = dataclasses.replace(self.config, tied=False)

    def add_score(self, weight: Tensor | None = None) -> None:
        """Give the model a score of hidden states, trained; all zero unless a weight (1, D) is given."""
        score = nn.Linear(self.config.hidden_size, 1, bias=False, device=self.device, dtype=torch.float32)
        score.weight.data = (
            torch.zeros_like(score.weight) if weight is None else weight.detach().float().clone()
        )
        self.add_module(_SCORE, score)

    @property
    def score(self) -> nn.Linear | None:
        """(1, D), fp32: what a reward model thinks of an answer, or PPO expects of it."""
        return cast("nn.Linear | None", self._modules.get(_SCORE))

    def resize_vocabulary(self, num_tokens: int) -> None:
        """Append rows to embedding and head, each the mean of the old rows: close to what an unseen token means."""
        for table in self.tables():
            old = table.weight.detach()
            mean = old.float().mean(0, keepdim=True).to(old.dtype)
            rows = torch.cat((old, mean.expand(num_tokens - len(old), -1)))
            table.weight = nn.Parameter(rows, requires_grad=table.weight.requires_grad)
        self.config = dataclasses.replace(self.config, vocab_size=num_tokens)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (K, V) of hidden states (K, D), in the compute dtype."""
        rows = hidden.shape[0]
        if torch.is_grad_enabled():
            return F.linear(hidden, self.head_weight)
        # Never fewer than MIN_ROWS (projection.py), and few shapes: a kernel is compiled and kept for each.
        return F.linear(F.pad(hidden, (0, 0, 0, pad_length(rows) - rows)), self.head_weight)[:rows]

    @abstractmethod
    def hidden(self, ids_T: Tensor, layout: Layout, keep_K: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, (T, D), or (K, D) at the flat positions `keep_K`.

        With `keep_K` the last block computes only those rows after its attention; the values are the same.
        """

    @abstractmethod
    def open_session(self, prompts: Sequence[Sequence[int]], *, prefix: Sequence[int] = ()) -> DecodeSession:
        """Sequences to continue. prefix: tokens in front of all, run once."""

    @abstractmethod
    def close_sessions(self) -> None:
        """Forget what sessions share; call it when weights may change."""

    def bytes_per_token(self) -> int:
        """Cache memory of one token of one sequence."""
        config = self.config
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * self.dtype.itemsize

    @property
    def shares_prefix(self) -> bool:
        """Whether `open_session` takes a prefix."""
        return False

    @abstractmethod
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, tensor) of the model without adapters, merged matrices split again; detached."""

    def projections(self) -> Iterator[Projection]:
        return (module for module in self.modules() if isinstance(module, Projection))

    def tables(self) -> Iterator[TokenTable]:
        return (module for module in self.modules() if isinstance(module, TokenTable))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimizer updates: adapters in fp32, or all weights as `make_trainable` made them."""
        return [parameter for _, parameter in self.named_trainable()]

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter), checkpoint names; `a+b` is a merged matrix with the rows of a, then of b.

        Adapters: `model.layers.0.self_attn.q_proj.lora_A.weight`, as PEFT calls them without its prefix.
        """
        names = self._parameter_names()
        return [(names[id(p)], p) for p in self.parameters() if p.requires_grad]

    def _parameter_names(self) -> dict[int, str]:
        names = {id(p): name for name, p in self.named_parameters()}
        for module in self.modules():
            if isinstance(name := getattr(module, "name", None), str) and hasattr(module, "weight"):
                names[id(module.weight)] = f"{name}.weight"
        for projection in self.projections():
            merged = merge_names(projection.names)
            for key in ("weight", "bias"):
                if (p := getattr(projection, key)) is not None:
                    names[id(p)] = f"{merged}.{key}"
            for name, _, lora in projection.loras():
                names[id(lora.a)], names[id(lora.b)] = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
                if lora.magnitude is not None:
                    names[id(lora.magnitude)] = f"{name}.lora_magnitude_vector"
        if self.score is not None:
            names[id(self.score.weight)] = "score.weight"
        for table in self.tables():
            names[id(table.weight)] = f"{table.name}.weight"
            if table.tuned is not None:
                names[id(table.tuned)] = f"{table.name}.weight"
        return names

    def named_matrices(self) -> dict[str, list[slice]]:
        """Trained matrices of linear layers (no embedding, no head): name in `named_trainable` -> rows of its parts."""
        return {
            f"{merge_names(projection.names)}.weight": [rows for _, rows in projection.rows()]
            for projection in self.projections()
            if projection.weight is not None and projection.weight.requires_grad
        }

    def make_trainable(self, dtype: torch.dtype = torch.float32) -> None:
        """Full fine-tuning: every weight is trained in `dtype` (fp64 stays). Raises ValueError on a packed base.

        fp32: masters of any compute dtype. bf16: no masters, for an optimizer that rounds stochastically.
        """
        for projection in self.projections():
            if projection.packed is not None:
                raise ValueError("a quantised base cannot be trained whole")
        for parameter in self.parameters():
            if parameter.dtype != torch.float64:
                parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)


def merge_names(names: tuple[str, ...]) -> str:
    """`a.q_proj`, `a.k_proj` -> `a.q_proj+k_proj`."""
    first, *others = names
    return "+".join([first, *(name.rpartition(".")[2] for name in others)])

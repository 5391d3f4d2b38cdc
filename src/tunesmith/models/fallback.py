"""Any other `AutoModelForCausalLM` behind the interface of our own decoder.

The Hugging Face module computes; its linear layers become our `Projection`s, so adapters, quantised bases and saving
are the same code, and its embedding and head read our `TokenTable`s. Packed documents are rendered as padded batches,
one per bucket. Its own dropout layers stay off, as they are in our decoder. Code from the model folder is never run.

B: documents of a bucket  S: padded length  T: flat tokens  K: kept tokens  n: sequences  D: width  V: vocabulary
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.errors import ModelError
from tunesmith.models.causal_lm import CausalLM, TokenTable
from tunesmith.models.config import DecoderConfig
from tunesmith.models.headers import StoredTensor
from tunesmith.models.layout import Layout, pad_length
from tunesmith.models.projection import Projection


def load_fallback(
    folder: Path,
    config: DecoderConfig,
    stored: Mapping[str, StoredTensor],
    *,
    dtype: torch.dtype,
    masters: torch.dtype | None,
) -> Fallback:
    """Load through transformers, safetensors only. Raises ModelError in one line for whatever it refuses.

    masters: dtype in which all weights will be trained; None if they stay frozen.
    """
    if masters not in (None, dtype):
        # The Hugging Face modules compute in their weights' dtype.
        bf16 = masters == torch.bfloat16
        raise ModelError(
            str(folder),
            f"{config.model_type!r} models are trained whole in {'bf16' if bf16 else 'fp32'} only"
            + (" with train.optimizer: adamw-bf16" if bf16 else ""),
            cure="Set train.precision: bf16"
            if bf16
            else "Set train.precision: fp32, or train.optimizer: adamw-bf16, or method: lora",
        )
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError, KeyError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            str(folder),
            f"transformers cannot load this {config.model_type!r} model ({reason})",
            rule="models run without code of their own",
            cure="Use a supported architecture",
        ) from None
    inner, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelError(str(folder), f"tensor {missing[0]} is missing", cure="Give a complete checkpoint")
    return Fallback(inner, config, folder=folder, dtype=dtype)


class _TableEmbedding(nn.Module):
    """The model's own embedding module (which may scale), reading our table."""

    def __init__(self, module: nn.Module, table: TokenTable) -> None:
        super().__init__()
        self.table = table
        del module._parameters["weight"]
        module.register_parameter("weight", None)
        object.__setattr__(self, "module", module)  # its parameters are the table's: do not list them twice

    @property
    def weight(self) -> Tensor:
        return self.table.matrix()

    def forward(self, ids: Tensor) -> Tensor:
        module: Any = self.module
        module._parameters["weight"] = self.table.matrix()
        try:
            return module.forward(ids)
        finally:
            module._parameters["weight"] = None


class _TableHead(nn.Module):
    """The head, reading our table; the bias stays frozen."""

    def __init__(self, table: TokenTable, bias: Tensor | None) -> None:
        super().__init__()
        self.table = table
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        return self.table.matrix()

    def forward(self, hidden: Tensor) -> Tensor:
        bias = self.bias
        if bias is not None and len(bias) < self.table.active.shape[0]:  # new tokens
            bias = F.pad(bias, (0, self.table.active.shape[0] - len(bias)))
        return F.linear(hidden, self.table.matrix(), bias)


class _GivenHidden(nn.Module):
    """Stands for the body of a model whose hidden states are known already."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        output = SimpleNamespace(
            last_hidden_state=inputs_embeds, past_key_values=None, hidden_states=None, attentions=None
        )
        return _Indexable(output)


class _Indexable:
    """An output object that models read by name or by number."""

    def __init__(self, fields: SimpleNamespace) -> None:
        self._fields = fields

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fields, name, None)

    def __getitem__(self, at: int | slice) -> Any:
        return (self._fields.last_hidden_state,)[at]


class Fallback(CausalLM):
    """See `CausalLM`. inner: a Hugging Face causal LM, taken over by this object."""

    def __init__(self, inner: Any, config: DecoderConfig, *, folder: Path, dtype: torch.dtype) -> None:
        super().__init__()
        self.folder, self.dtype = folder, dtype
        self.inner = inner.requires_grad_(False).eval()
        embed, head = inner.get_input_embeddings(), inner.get_output_embeddings()
        if embed is None or head is None:
            raise ModelError(str(folder), f"{config.model_type!r} has no token embedding or head to reach")
        tied = head.weight is embed.weight
        names = {id(module): name for name, module in inner.named_modules()}
        self.head_name = names[id(head)]
        self.embedding = TokenTable(names[id(embed)], embed.weight.detach(), dtype=dtype)
        self.untied_head = None if tied else TokenTable(self.head_name, head.weight.detach(), dtype=dtype)
        self.config = dataclasses.replace(
            config, tied=tied, vocab_size=embed.weight.shape[0], hidden_size=embed.weight.shape[1]
        )
        inner.set_input_embeddings(_TableEmbedding(embed, self.embedding))
        inner.set_output_embeddings(_TableHead(self.head_table, head.bias))
        self._replace_linears()
        body = copy.copy(inner)
        body._modules = dict(inner._modules)
        body._modules[inner.base_model_prefix] = _GivenHidden()
        self._head_only: Any
        object.__setattr__(self, "_head_only", body)

    def _replace_linears(self) -> None:
        from transformers.pytorch_utils import Conv1D

        for name, module in list(self.inner.named_modules()):
            if not isinstance(module, nn.Linear | Conv1D):
                continue
            transposed = isinstance(module, Conv1D)
            weight = module.weight.detach().t().contiguous() if transposed else module.weight.detach()
            bias = None if module.bias is None else module.bias.detach()
            projection = Projection(
                [name], [weight.shape[0]], weight, bias, dtype=self.dtype, transposed=transposed
            )
            parent, _, leaf = name.rpartition(".")
            setattr(self.inner.get_submodule(parent), leaf, projection)

    def train(self, mode: bool = True) -> Fallback:
        super().train(False)
        for projection in self.projections():
            projection.training = mode
        return self

    def untie_head(self) -> None:
        super().untie_head()
        self.inner.get_output_embeddings().table = self.untied_head

    @property
    def has_plain_head(self) -> bool:
        return False  # softcapping, scaling and biases are the module's own business

    def head(self, hidden: Tensor) -> Tensor:
        return self._head_only.forward(inputs_embeds=hidden[None], use_cache=False).logits[0]

    def hidden(self, ids_T: Tensor, layout: Layout, keep_K: Tensor | None = None) -> Tensor:
        pieces = []
        for bucket in layout.buckets:
            shape = (bucket.num_documents, bucket.padded_length)
            mask_BS = torch.ones(shape, dtype=torch.int64, device=ids_T.device)
            mask_BS.view(-1)[bucket.empty_e] = 0
            output = self.inner.base_model(
                input_ids=ids_T[bucket.gather_BS].view(shape), attention_mask=mask_BS, use_cache=False
            )
            pieces.append(output.last_hidden_state.flatten(0, 1).index_select(0, bucket.inside_n))
        hidden_TD = torch.cat(pieces)
        if layout.order_T is not None:
            hidden_TD = hidden_TD.index_select(0, layout.order_T)
        return hidden_TD if keep_K is None else hidden_TD.index_select(0, keep_K)

    def open_session(
        self, prompts: Sequence[Sequence[int]], *, prefix: Sequence[int] = ()
    ) -> FallbackSession:
        if prefix:
            raise ValueError("the fallback does not share prefixes")
        return FallbackSession(self, prompts)

    def close_sessions(self) -> None:
        pass

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield f"{self.embedding.name}.weight", self.embedding.weight.detach()
        if self.untied_head is not None:
            yield f"{self.untied_head.name}.weight", self.untied_head.weight.detach()
        for name, module in self.inner.named_modules():
            if isinstance(module, Projection):
                weight = module.weight if module.packed is None else module.packed.dense(self.dtype)
                assert weight is not None
                yield f"{name}.weight", weight.detach().t() if module.transposed else weight.detach()
                if module.bias is not None:
                    yield f"{name}.bias", module.bias.detach()
            elif not isinstance(module, TokenTable | _TableEmbedding):
                for key, parameter in module.named_parameters(recurse=False):
                    yield f"{name}.{key}", parameter.detach()
                for key, buffer in module.named_buffers(recurse=False):
                    if key not in module._non_persistent_buffers_set:
                        yield f"{name}.{key}", buffer

    def _parameter_names(self) -> dict[int, str]:
        return {at: name.removeprefix("inner.") for at, name in super()._parameter_names().items()}


@dataclasses.dataclass
class _Group:
    """Sequences of one padded prompt length, left-padded: batch shapes follow from a sequence's own length."""

    slots: list[int]
    mask_nS: Tensor
    positions_n: Tensor
    cache: Any = None


class FallbackSession:
    """See cache.Session; keeps the Hugging Face model's own cache."""

    def __init__(self, model: Fallback, prompts: Sequence[Sequence[int]]) -> None:
        self.model, self.count = model, len(prompts)
        members: dict[int, list[int]] = {}
        for slot, prompt in enumerate(prompts):
            members.setdefault(pad_length(len(prompt)), []).append(slot)
        self.groups: list[_Group] = []
        self._ids: list[Tensor] = []
        for size, slots in members.items():
            ids = [[prompts[slot][0]] * (size - len(prompts[slot])) + list(prompts[slot]) for slot in slots]
            mask = [[0] * (size - len(prompts[slot])) + [1] * len(prompts[slot]) for slot in slots]
            lengths = [len(prompts[slot]) for slot in slots]
            self._ids.append(torch.tensor(ids, device=model.device))
            self.groups.append(
                _Group(
                    slots, torch.tensor(mask, device=model.device), torch.tensor(lengths, device=model.device)
                )
            )

    def prefill(self) -> Tensor:
        hidden = self.model.embedding.weight.new_empty(
            self.count, self.model.config.hidden_size, dtype=self.model.dtype
        )
        for group, ids_nS in zip(self.groups, self._ids, strict=True):
            positions = (group.mask_nS.cumsum(1) - 1).clamp(min=0)
            hidden[group.slots] = self._run(group, ids_nS, positions)
        return hidden

    def step(self, ids_n: Tensor) -> Tensor:
        hidden = self.model.embedding.weight.new_empty(
            self.count, self.model.config.hidden_size, dtype=self.model.dtype
        )
        for group in self.groups:
            group.mask_nS = F.pad(group.mask_nS, (0, 1), value=1)
            hidden[group.slots] = self._run(group, ids_n[group.slots][:, None], group.positions_n[:, None])
            group.positions_n = group.positions_n + 1
        return hidden

    def _run(self, group: _Group, ids_nS: Tensor, positions_nS: Tensor) -> Tensor:
        output = self.model.inner.base_model(
            input_ids=ids_nS,
            attention_mask=group.mask_nS,
            position_ids=positions_nS,
            past_key_values=group.cache,
            use_cache=True,
        )
        group.cache = output.past_key_values
        return output.last_hidden_state[:, -1]

    def keep(self, slots: Sequence[int]) -> None:
        place = {slot: at for at, slot in enumerate(slots)}
        groups = []
        for group in self.groups:
            rows = [row for row, slot in enumerate(group.slots) if slot in place]
            if not rows:
                continue
            chosen = torch.tensor(rows, device=self.model.device)
            group.cache.batch_select_indices(chosen)
            groups.append(
                _Group(
                    [place[group.slots[row]] for row in rows],
                    group.mask_nS[chosen],
                    group.positions_n[chosen],
                    group.cache,
                )
            )
        self.groups, self.count = groups, len(slots)

    def join(self, other: FallbackSession) -> None:
        for group in other.groups:
            group.slots = [slot + self.count for slot in group.slots]
        self.groups, self.count = self.groups + other.groups, self.count + other.count

"""Our own decoder for the dense families of families.py: merged QKV and gate/up, packed documents.

What families differ in is in their `DecoderConfig`, as numbers and tables. A block reads tensors and shapes only: no
layer number, no cache object, nothing that would make a compiler start again.

T: flat tokens  K: kept tokens  D: width  H: query heads  N: key/value heads  d: head width  F: feed-forward width
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tunesmith.models.attention import attend, attend_rotated, cap_scores, takes_any_lengths
from tunesmith.models.cache import CacheView, LayerCache, Session, SharedPrefix
from tunesmith.models.causal_lm import CausalLM, TokenTable
from tunesmith.models.config import DecoderConfig
from tunesmith.models.elementwise import (
    gate,
    make_inverse_frequencies,
    make_rotation,
    norm_rms,
    rotate,
)
from tunesmith.models.layout import Layout
from tunesmith.models.memory import Level
from tunesmith.models.projection import MasterCast, Projection
from tunesmith.models.recompute import HostStore, recompute
from tunesmith.models.segments import BlockFunctions, BlockPlan, FinishTensors, HeadsTensors


class Norm(nn.Module):
    """RMSNorm with its checkpoint name."""

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        config: DecoderConfig,
        *,
        dtype: torch.dtype,
        storage: torch.dtype,
    ) -> None:
        super().__init__()
        self.name, self.eps, self.offset = name, config.norm_eps, config.norm_offset
        self.dtype = dtype
        weight = tensors[f"{name}.weight"].to(storage, copy=True)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._cast = MasterCast()

    def tensor(self) -> Tensor:
        """The weight in the compute dtype, differentiable if it is trained."""
        return self._cast.of(self.weight, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return norm_rms(x, self.tensor(), self.eps, self.offset)


class Block(nn.Module):
    def __init__(
        self,
        config: DecoderConfig,
        tensors: Mapping[str, Tensor],
        layer: int,
        *,
        dtype: torch.dtype,
        storage: torch.dtype,
    ) -> None:
        super().__init__()
        at = f"model.layers.{layer}."
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.scale, self.cap, self.window = config.score_scale, config.score_cap, config.windows[layer]
        self.gate = config.gate

        def project(*names: str, bias: bool) -> Projection:
            full = [at + name for name in names]
            weights = [tensors[f"{name}.weight"].to(storage) for name in full]
            biases = [tensors[f"{name}.bias"].to(storage) for name in full] if bias else []
            return Projection(
                full,
                [len(w) for w in weights],
                _stack(weights),
                _stack(biases) if biases else None,
                dtype=dtype,
            )

        def norm(name: str) -> Norm:
            return Norm(at + name, tensors, config, dtype=dtype, storage=storage)

        qkv = ("qkv_proj",) if config.fused else ("q_proj", "k_proj", "v_proj")
        gate_up = ("gate_up_proj",) if config.fused else ("gate_proj", "up_proj")
        self.qkv = project(*(f"self_attn.{name}" for name in qkv), bias=config.qkv_bias)
        self.out = project("self_attn.o_proj", bias=config.o_bias)
        self.gate_up = project(*(f"mlp.{name}" for name in gate_up), bias=config.mlp_bias)
        self.down = project("mlp.down_proj", bias=config.mlp_bias)
        # With post-norms, `post_attention_layernorm` is what its name says; without, it is the second half's first.
        post = config.post_norms
        self.norm_in = norm("input_layernorm")
        self.norm_out = norm("post_attention_layernorm") if post else None
        self.norm_mlp = norm("pre_feedforward_layernorm" if post else "post_attention_layernorm")
        self.norm_down = norm("post_feedforward_layernorm") if post else None
        self.norm_q = norm("self_attn.q_norm") if config.qk_norm else None
        self.norm_k = norm("self_attn.k_norm") if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, keep_K: Tensor | None) -> Tensor:
        attended = attend(
            self._make_qkv(x),
            cos,
            sin,
            layout,
            num_kv_heads=self.num_kv_heads,
            scale=self.scale,
            window=self.window,
            cap=self.cap,
        )
        if keep_K is not None:
            attended, x = attended.index_select(0, keep_K), x.index_select(0, keep_K)
        return self._finish(x, attended)

    @property
    def has_plain_form(self) -> bool:
        return all(part.has_plain_form for part in (self.qkv, self.out, self.gate_up, self.down))

    @property
    def draws(self) -> bool:
        """Whether a pass draws random numbers."""
        return self.training and any(part.dropout for part in (self.qkv, self.out, self.gate_up, self.down))

    def run(
        self,
        functions: BlockFunctions,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: Layout,
        keep_K: Tensor | None,
    ) -> Tensor:
        """`forward` through functions that a compiler can have."""

        def tensor(norm: Norm | None) -> Tensor | None:
            return None if norm is None else norm.tensor()

        plan = BlockPlan(
            self.num_heads,
            self.num_kv_heads,
            self.norm_in.eps,
            self.norm_in.offset,
            self.gate,
            *(part.plan() for part in (self.qkv, self.out, self.gate_up, self.down)),
        )
        heads = HeadsTensors(
            self.norm_in.tensor(), tensor(self.norm_q), tensor(self.norm_k), self.qkv.tensors()
        )
        q, k, v = functions.make_heads(x, cos, sin, heads, plan)
        attended = attend_rotated(q, k, v, layout, scale=self.scale, window=self.window, cap=self.cap)
        rest = FinishTensors(
            tensor(self.norm_out),
            self.norm_mlp.tensor(),
            tensor(self.norm_down),
            *(part.tensors() for part in (self.out, self.gate_up, self.down)),
        )
        if keep_K is None:
            return functions.finish(x, attended, rest, plan)
        return functions.finish_kept(x.index_select(0, keep_K), attended.index_select(0, keep_K), rest, plan)

    def step(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, view: CacheView, keep_K: Tensor | None
    ) -> Tensor:
        """The same block over tokens whose earlier keys and values lie in `cache`, which takes theirs."""
        qkv = self._make_qkv(x)
        rotated = qkv.shape[1] - self.num_kv_heads
        turned = rotate(qkv[:, :rotated], cos, sin)
        attended = cache.attend(
            turned[:, : self.num_heads],
            turned[:, self.num_heads :],
            qkv[:, rotated:],
            view,
            scale=self.scale,
            window=self.window,
            cap=self.cap,
        )
        if keep_K is not None:
            attended, x = attended.index_select(0, keep_K), x.index_select(0, keep_K)
        return self._finish(x, attended)

    def _make_qkv(self, x: Tensor) -> Tensor:
        """(T, H + 2N, d): queries, keys, values, before rotation."""
        qkv = self.qkv(self.norm_in(x)).unflatten(1, (self.num_heads + 2 * self.num_kv_heads, -1))
        if self.norm_q is None or self.norm_k is None:
            return qkv
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), 1)
        return torch.cat((self.norm_q(q), self.norm_k(k), v), 1)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        added = self.out(attended)
        x = x + (added if self.norm_out is None else self.norm_out(added))
        added = self.down(gate(self.gate_up(self.norm_mlp(x)), self.gate))
        return x + (added if self.norm_down is None else self.norm_down(added))


class Decoder(CausalLM):
    """See `CausalLM`. tensors: checkpoint name -> tensor, already checked against the config (weights.py).

    storage: dtype of the parameters; fp32 where they will be trained, else the compute dtype.
    """

    def __init__(
        self,
        config: DecoderConfig,
        tensors: Mapping[str, Tensor],
        *,
        folder: Path,
        dtype: torch.dtype,
        storage: torch.dtype,
    ) -> None:
        super().__init__()
        self.config, self.folder, self.dtype = config, folder, dtype
        self.embedding = TokenTable(
            "model.embed_tokens", tensors["model.embed_tokens.weight"].to(storage, copy=True), dtype=dtype
        )
        self.layers = nn.ModuleList(
            [
                Block(config, tensors, layer, dtype=dtype, storage=storage)
                for layer in range(config.num_layers)
            ]
        )
        self.norm = Norm("model.norm", tensors, config, dtype=dtype, storage=storage)
        self.untied_head = (
            None
            if config.tied
            else TokenTable("lm_head", tensors["lm_head.weight"].to(storage, copy=True), dtype=dtype)
        )
        ropes = list(dict.fromkeys(config.ropes))
        self.rope_of = [ropes.index(rope) for rope in config.ropes]
        inverse = torch.stack([make_inverse_frequencies(rope, config.head_dim) for rope in ropes])
        self.register_buffer("inverse", inverse, persistent=False)
        self.inverse: Tensor
        # Rounded as the embeddings are, or a bf16 model would not be the one that was trained.
        self.embedding_scale = float(torch.tensor(config.embedding_scale, dtype=dtype))
        self._prefix: tuple[tuple[int, ...], SharedPrefix] | None = None
        # What training keeps of each block for its backward pass.
        self.levels: tuple[Level, ...] = ("keep",) * config.num_layers

    def hidden(self, ids_T: Tensor, layout: Layout, keep_K: Tensor | None = None) -> Tensor:
        x, rotations = self._begin(ids_T, layout.positions_T)
        last = len(self.layers) - 1
        segments = self.segments if torch.is_grad_enabled() and self.has_plain_form else None
        if segments is not None and not x.requires_grad:
            x.requires_grad_()  # the first block is then like the others, and needs no graph of its own
        levels = self.levels if torch.is_grad_enabled() else ("keep",) * len(self.layers)
        store = HostStore() if "offload" in levels else None
        for number, (block, rope) in enumerate(zip(self.layers, self.rope_of, strict=True)):
            assert isinstance(block, Block)
            level, run = levels[number], block
            if segments is not None:
                run = partial(block.run, segments.cheap if level == "cheap" else segments.keep)
            rest = (*rotations[rope], layout, keep_K if number == last else None)
            if level == "keep" or (level == "cheap" and segments is not None):
                x = run(x, *rest)
            else:
                x = recompute(run, x, *rest, store=store if level == "offload" else None, random=block.draws)
        return self.norm(x)

    @property
    def has_plain_form(self) -> bool:
        return all(block.has_plain_form for block in self.layers if isinstance(block, Block))

    def refresh(self) -> bool:
        """Bring what adapters are joined to up to date with them, where passes over it are only replayed. False if
        they are joined to nothing."""
        columns = [column for projection in self.projections() for column in projection.joined_columns()]
        if columns:
            into, b, scales = zip(*columns, strict=True)
            with torch.no_grad():
                for target, scaled in zip(into, torch._foreach_mul(b, scales), strict=True):  # pyright: ignore[reportPrivateImportUsage]
                    target.copy_(scaled)
        return bool(columns)

    def step(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        caches: list[LayerCache],
        view: CacheView,
        keep_K: Tensor | None = None,
    ) -> Tensor:
        x, rotations = self._begin(ids_T, positions_T)
        last = len(self.layers) - 1
        for number, (block, cache, rope) in enumerate(zip(self.layers, caches, self.rope_of, strict=True)):
            assert isinstance(block, Block)
            x = block.step(x, *rotations[rope], cache, view, keep_K if number == last else None)
        return self.norm(x)

    def _begin(self, ids_T: Tensor, positions_T: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Embeddings, and (cos, sin) of each of the model's rotary embeddings."""
        x = self.embedding.look_up(ids_T)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        return x, [make_rotation(inverse, positions_T, self.dtype) for inverse in self.inverse]

    @property
    def has_plain_head(self) -> bool:
        return not self.config.logit_cap

    @property
    def takes_any_lengths(self) -> bool:
        """Whether passes over documents of other lengths run the same kernels."""
        return takes_any_lengths(self.device, self.dtype, cap=self.config.score_cap)

    def head(self, hidden: Tensor) -> Tensor:
        return cap_scores(super().head(hidden), self.config.logit_cap)

    def open_session(self, prompts: Sequence[Sequence[int]], *, prefix: Sequence[int] = ()) -> Session:
        if not prefix:
            return Session(self, prompts)
        key = tuple(prefix)
        if self._prefix is None or self._prefix[0] != key:
            self._prefix = (key, SharedPrefix.of(self, prefix))
        return Session(self, prompts, prefix=self._prefix[1])

    @property
    def shares_prefix(self) -> bool:
        return not any(self.config.windows)

    def close_sessions(self) -> None:
        self._prefix = None

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield "model.embed_tokens.weight", self.embedding.weight.detach()
        for module in self.modules():
            if isinstance(module, Projection):
                for name, rows in module.rows():
                    weight = module.weight if module.packed is None else module.packed.dense(self.dtype)
                    assert weight is not None
                    yield f"{name}.weight", weight.detach()[rows]
                    if module.bias is not None:
                        yield f"{name}.bias", module.bias.detach()[rows]
            elif isinstance(module, Norm):
                yield f"{module.name}.weight", module.weight.detach()
        if self.untied_head is not None:
            yield "lm_head.weight", self.untied_head.weight.detach()


def _stack(tensors: list[Tensor]) -> Tensor:
    # A single tensor may be a window into a mapped file; training must own its memory.
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0].clone()

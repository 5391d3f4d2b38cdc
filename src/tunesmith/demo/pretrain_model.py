"""The Llama decoder that `pretrain.py` trains, and its optimizer (Muon for matrices, AdamW for the rest).

Parameter names are those of `transformers`' LlamaForCausalLM, so the state dict is the checkpoint. Several documents
lie in one flat row of tokens; none sees another. Shapes: N tokens of a step in one flat row, D width, H heads.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen

from tunesmith.training.muon import orthogonalize

# torch named the causal switch differently in its first releases with this kernel.
HAS_WINDOW = "window_size" in inspect.signature(varlen.varlen_attn).parameters


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are those of `tunesmith/tiny`."""

    vocab_size: int = 3072
    hidden: int = 256
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 640
    context: int = 2048
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-5

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


class Linear(nn.Linear):
    """A bias-free linear layer with an fp32 master weight used in the input's dtype."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight, std=inputs**-0.5)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name torch gave it
        return F.linear(input, self.weight.to(input.dtype))


class Norm(nn.Module):
    """RMSNorm in fp32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.epsilon) * self.weight).to(x.dtype)


@dataclass(frozen=True)
class Layout:
    """Where documents lie in the flat row: rotary tables (N, head) and either cumulative starts or a mask."""

    cos: Tensor
    sin: Tensor
    starts: Tensor | None
    mask: Tensor | None
    longest: int


def rotate(x: Tensor, layout: Layout) -> Tensor:
    """Rotary embedding of (N, H, head), halves paired as in Llama checkpoints."""
    first, second = x.chunk(2, -1)
    return x * layout.cos[:, None] + torch.cat((-second, first), -1) * layout.sin[:, None]


def attend_documents(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Causal attention of (N, H, head) within the documents that begin at `starts`; CUDA only."""
    causal: dict[str, Any] = {"window_size": (-1, 0)} if HAS_WINDOW else {"is_causal": True}
    mixed = varlen.varlen_attn(query, key, value, starts, starts, longest, longest, **causal)
    assert isinstance(mixed, Tensor)
    return mixed


class Attention(nn.Module):
    """Causal attention within documents, with shared key and value heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = Linear(shape.hidden, shape.heads * shape.head_size)
        self.k_proj = Linear(shape.hidden, shape.kv_heads * shape.head_size)
        self.v_proj = Linear(shape.hidden, shape.kv_heads * shape.head_size)
        self.o_proj = Linear(shape.heads * shape.head_size, shape.hidden)
        nn.init.zeros_(self.o_proj.weight)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        shape, tokens = self.shape, x.shape[0]
        groups = shape.heads // shape.kv_heads
        query = rotate(self.q_proj(x).view(tokens, shape.heads, -1), layout)
        key = rotate(self.k_proj(x).view(tokens, shape.kv_heads, -1), layout).repeat_interleave(groups, 1)
        value = self.v_proj(x).view(tokens, shape.kv_heads, -1).repeat_interleave(groups, 1)
        if layout.starts is not None:
            mixed = attend_documents(query, key, value, layout.starts, layout.longest)
        else:
            swapped = (part.transpose(0, 1) for part in (query, key, value))
            mixed = F.scaled_dot_product_attention(*swapped, attn_mask=layout.mask).transpose(0, 1)
        return self.o_proj(mixed.reshape(tokens, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden, shape.feed_forward)
        self.up_proj = Linear(shape.hidden, shape.feed_forward)
        self.down_proj = Linear(shape.feed_forward, shape.hidden)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = FeedForward(shape)
        self.input_layernorm = Norm(shape.hidden, shape.norm_epsilon)
        self.post_attention_layernorm = Norm(shape.hidden, shape.norm_epsilon)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Llama with tied embeddings; returns weighted loss sums of a flat row of documents."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        inner = nn.Module()
        inner.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden)
        nn.init.normal_(inner.embed_tokens.weight, std=0.02)
        inner.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        inner.norm = Norm(shape.hidden, shape.norm_epsilon)
        self.model = inner

    def forward(
        self, ids: Tensor, targets: Tensor, weights: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss to minimise, sum of nats over text tokens, sum over answer tokens); ids, targets, weights are (N,).

        weights: 1 for a text token, 2 for an answer token, a fraction for a prompt token, 0 for padding.
        """
        table: Any = self.model.embed_tokens.weight  # pyright: ignore
        dtype = torch.bfloat16 if ids.is_cuda else torch.float32
        x = F.embedding(ids, table).to(dtype)
        for block in self.model.layers:  # pyright: ignore
            x = block(x, layout)
        logits = F.linear(self.model.norm(x), table.to(dtype)).float()  # pyright: ignore
        nats = F.cross_entropy(logits, targets, reduction="none")
        loss = (nats * weights).sum() / weights.sum().clamp(min=1)  # a row may be padding throughout
        with torch.no_grad():
            text, answer = (nats * (weights == 1)).sum(), (nats * (weights == 2)).sum()
        return loss, text, answer


def make_rope(shape: Shape, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) tables, each (N, head), for the given positions (N,)."""
    steps = (
        torch.arange(0, shape.head_size, 2, device=positions.device, dtype=torch.float32) / shape.head_size
    )
    angles = positions.float()[:, None] * shape.rope_theta**-steps
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix; matrices of one shape are handled as a stack."""

    def __init__(
        self, matrices: list[nn.Parameter], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.02
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._orthogonalize = torch.compile(orthogonalize) if matrices[0].is_cuda else orthogonalize

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            stacks: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                stacks.setdefault(matrix.shape, []).append(matrix)
            for size, matrices in stacks.items():
                grads = torch.stack([matrix.grad for matrix in matrices])  # pyright: ignore
                state = self.state[matrices[0]]
                buffer = state.setdefault("momentum", torch.zeros_like(grads))
                buffer.lerp_(grads, 1 - group["momentum"])
                update = self._orthogonalize(grads.lerp(buffer, group["momentum"]))
                rate = group["lr"] * math.sqrt(max(1.0, size[0] / size[1]))
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])  # pyright: ignore
                torch._foreach_add_(matrices, list(update.unbind()), alpha=-rate)  # pyright: ignore


def make_optimizers(model: Decoder, *, matrix_rate: float, other_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    adam = torch.optim.AdamW(
        others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=matrices[0].is_cuda
    )
    return [Muon(matrices, lr=matrix_rate), adam]

"""Which attention is fastest for which documents: forward and backward of our variants, and of FlexAttention, on a GPU.

    python benchmarks/attention_choice.py             under a minute; writes benchmarks/results/attention_choice.json
    python benchmarks/attention_choice.py --table     the table for the documentation, from that file
    python benchmarks/attention_choice.py --device cpu --tokens 256 --out /dev/null      tries the script

`tunesmith.models.attention.attend_rotated` chooses by what is measured here. Every variant is first held to plain
attention in fp32 on the same stream; one that is wrong, or fails, is recorded so and not timed. FlashAttention 4 takes
part where its package, flash-attn-4, is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
for _folder in (CHECKOUT / "src", CHECKOUT / "benchmarks"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from tunesmith.models import attention  # noqa: E402
from tunesmith.models.layout import Layout, make_layout  # noqa: E402

INTRODUCTION = """Every variant is held to plain attention in fp32 first. What a training step takes: torch's own choice
(cuDNN) where all documents of a micro-batch are equally long, the variable-length kernel otherwise, plain attention for
scores with a softcap. Made by `benchmarks/attention_choice.py`."""
RESULT = CHECKOUT / "benchmarks" / "results" / "attention_choice.json"
# Query and key/value heads of Llama-3.1-8B (128 wide), and as many channels in heads of 64.
HEADS = {128: (32, 8), 64: (64, 16)}
EVEN, WINDOW, CAP, ALLOWED = 2048, 512, 30.0, 0.02
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Documents of one stream, and what attention does with them."""

    name: str
    lengths: tuple[int, ...]
    width: int
    window: int = 0
    cap: float = 0.0


def list_shapes(tokens: int) -> Iterator[Shape]:
    """Rows of one length, and lengths as instruction data has them: log-normal around 200 tokens, at most 2,048."""
    even = (min(EVEN, tokens),) * max(1, tokens // EVEN)
    drawn = (
        np.random.default_rng(0).lognormal(5.3, 0.8, tokens).astype(int).clip(16, min(EVEN, tokens)).tolist()
    )
    mixed: list[int] = []
    while sum(mixed) < tokens:
        mixed.append(min(drawn[len(mixed)], tokens - sum(mixed)))
    for width in HEADS:
        for kind, lengths in (("even", even), ("mixed", tuple(mixed))):
            yield Shape(kind, lengths, width)
            yield Shape(f"{kind}, window {WINDOW}", lengths, width, window=WINDOW)
            yield Shape(f"{kind}, softcap", lengths, width, cap=CAP)


def list_variants(shape: Shape, layout: Layout) -> dict[str, Attend]:
    """Everything that could compute a shape; what does not apply is left out."""
    scale, device = shape.width**-0.5, layout.device
    given: dict[str, Any] = {"scale": scale, "window": shape.window, "cap": shape.cap}
    plain: Attend = lambda q, k, v: attention.attend_plain(q, k, v, layout, **given)  # noqa: E731
    found: dict[str, Attend] = {"plain": plain}
    if layout.is_even and not shape.cap and not 0 < shape.window < layout.max_length:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def even(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention.attend_even(q, k, v, layout.max_length, scale=scale)

        def forced(backend: Any) -> Attend:
            def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                with sdpa_kernel(backend):
                    return even(q, k, v)

            return run

        found["even, torch's choice"] = even
        if device.type == "cuda":
            found["even, cuDNN"] = forced(SDPBackend.CUDNN_ATTENTION)
            found["even, flash"] = forced(SDPBackend.FLASH_ATTENTION)
    if device.type == "cuda" and not shape.cap:
        found["varlen"] = lambda q, k, v: attention.attend_varlen(
            q, k, v, layout, scale=scale, window=shape.window
        )
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        found["FA4"] = make_flash4(shape, layout, scale)
    if device.type == "cuda":

        def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if "flex" not in made:
                made["flex"] = make_flex(shape, layout, scale)
            return made["flex"](q, k, v)

        made: dict[str, Attend] = {}
        found["flex"] = flex
    return found


def make_flash4(shape: Shape, layout: Layout, scale: float) -> Attend:
    """FlashAttention 4 (package flash-attn-4), for rows of one length or any."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        window = (shape.window - 1, 0) if shape.window else (None, None)
        given: dict[str, Any] = {"softmax_scale": scale, "causal": True, "window_size": window}
        given["softcap"] = shape.cap
        if layout.is_even:
            rows = (x.unflatten(0, (-1, layout.max_length)) for x in (q, k, v))
            out = flash_attn_func(*rows, **given)
        else:
            bounds = {"cu_seqlens_q": layout.cumulative_N1, "cu_seqlens_k": layout.cumulative_N1}
            most = {"max_seqlen_q": layout.max_length, "max_seqlen_k": layout.max_length}
            out = flash_attn_varlen_func(q, k, v, **bounds, **most, **given)
        return (out[0] if isinstance(out, tuple) else out).reshape(len(q), -1)

    return run


def make_flex(shape: Shape, layout: Layout, scale: float) -> Attend:
    """Compiled FlexAttention over the whole stream. The mask is made once; in training it would be for each batch."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sizes = torch.tensor(shape.lengths)
    document_T = torch.arange(len(sizes)).repeat_interleave(sizes).to(layout.device)
    tokens, window, cap = len(document_T), shape.window or len(document_T), shape.cap

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < window) & (document_T[q] == document_T[k])

    def bend(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    mask = create_block_mask(sees, None, None, tokens, tokens, device=layout.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        bent = bend if cap else None
        out = compiled(q, k, v, score_mod=bent, block_mask=mask, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)

    return run


def make_stream(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads, groups = HEADS[shape.width]
    drawn = torch.randn(sum(shape.lengths), heads + 2 * groups, shape.width, generator=generator)
    q, k, v = drawn.to(device, dtype).split((heads, groups, groups), 1)
    return q.contiguous().requires_grad_(), k.contiguous().requires_grad_(), v.contiguous().requires_grad_()


def run_once(attend: Attend, stream: tuple[Tensor, ...]) -> list[Tensor]:
    """Output and gradients of a fixed upstream gradient."""
    out = attend(*stream)
    grads = torch.autograd.grad(out, stream, torch.ones_like(out))
    return [out.detach(), *grads]


def measure_distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest relative distance of outputs and gradients."""
    return max(float((f.float() - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True))


def time_variant(attend: Attend, stream: tuple[Tensor, ...], *, repeats: int) -> float:
    """Median milliseconds of a forward and a backward."""
    wait = torch.cuda.synchronize if stream[0].is_cuda else lambda: None
    for _ in range(2):
        run_once(attend, stream)
    seconds: list[float] = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        run_once(attend, stream)
        wait()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """What needs a compiler comes last: it takes the time that the rest leaves."""
    began, rows = time.monotonic(), dict[Shape, dict[str, Any]]()
    for compiled in (False, True):
        for shape in list_shapes(arguments.tokens):
            row = rows.setdefault(shape, start_row(shape))
            if time.monotonic() - began > arguments.seconds:
                row["left_out"]["flex" if compiled else "all"] = "no time was left"
                continue
            measure_shape(shape, row, arguments, compiled=compiled)
            print(f"{shape.name} {shape.width}: {row['milliseconds']} {row['left_out'] or ''}", flush=True)
            if arguments.out.parent.is_dir() and str(arguments.out) != "/dev/null":
                text = json.dumps(describe(list(rows.values()), arguments), indent=1)
                arguments.out.write_text(text + "\n", encoding="utf-8")
    return describe(list(rows.values()), arguments)


def start_row(shape: Shape) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": shape.name, "width": shape.width, "documents": len(shape.lengths)}
    return row | {"tokens": sum(shape.lengths), "milliseconds": {}, "left_out": {}}


def measure_shape(
    shape: Shape, row: dict[str, Any], arguments: argparse.Namespace, *, compiled: bool
) -> None:
    layout = make_layout(shape.lengths, device=arguments.device)
    variants = list_variants(shape, layout)
    wanted = run_once(variants["plain"], make_stream(shape, arguments.device, torch.float32))
    stream = make_stream(shape, arguments.device, torch.bfloat16)
    for variant, attend in variants.items():
        if compiled is not (variant == "flex"):
            continue
        try:
            off = measure_distance(run_once(attend, stream), wanted)
            if off < ALLOWED:
                row["milliseconds"][variant] = time_variant(attend, stream, repeats=arguments.repeats)
            else:
                row["left_out"][variant] = f"{off:.3g} from plain attention"
        except Exception as error:
            row["left_out"][variant] = f"{type(error).__name__}: {error}".splitlines()[0][:200]


def describe(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    from tunesmith.core.fingerprint import describe_versions

    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    versions = describe_versions() | {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    command = f"python benchmarks/attention_choice.py --tokens {arguments.tokens}"
    return {"schema": 1, "hardware": name, "versions": versions, "command": command, "rows": rows}


def make_table(record: dict[str, Any]) -> str:
    """Markdown: milliseconds of each variant by shape, the fastest in bold."""
    variants = list(dict.fromkeys(variant for row in record["rows"] for variant in row["milliseconds"]))
    lines = [f"Milliseconds of a forward and a backward pass, bf16, one layer; {record['hardware']}.", ""]
    lines += ["| documents | head | " + " | ".join(variants) + " |", "|" + "---|" * (2 + len(variants))]
    for row in record["rows"]:
        best = min(row["milliseconds"].values(), default=0.0)
        cells = [
            ""
            if (took := row["milliseconds"].get(v)) is None
            else f"**{took:.2f}**"
            if took == best
            else f"{took:.2f}"
            for v in variants
        ]
        documents = f"{row['shape']} ({row['documents']} in {row['tokens']:,} tokens)"
        lines.append(f"| {documents} | {row['width']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_section(path: Path = RESULT) -> str:
    """The part of docs/benchmarks.md; empty if nothing is measured."""
    if not path.is_file():
        return ""
    return "\n\n".join(
        ("## Attention by shape", INTRODUCTION, make_table(json.loads(path.read_text(encoding="utf-8"))))
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of the stream")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes of each variant")
    parser.add_argument("--seconds", type=float, default=55.0, help="no variant is begun later than this")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the table of --out")
    arguments = parser.parse_args()
    if arguments.table:
        print(read_section(arguments.out))
        return
    print(make_table(measure(arguments)))


if __name__ == "__main__":
    main()

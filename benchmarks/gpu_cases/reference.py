"""Gradients that contenders are held to: transformers and PEFT, eager, in fp32, one row after the other.

    python -m gpu_cases.reference task.json

task: `model`, `adapter` (shortened), `rows`, `step` (row numbers), `method`, `objective` ("sft" or "dpo", with `beta`;
rows are then pairs, and the model as it is is the reference), `four_bit`, `fp8`, `out` (folder). Writes
reference.safetensors (fp32) and rounded.safetensors: the same eager code in bf16, whose distance from fp32 is the
noise of that precision. With `fp8` also rounded-fp8.safetensors: bf16, and the operands of every frozen product of the
blocks in fp8 codes, multiplied in fp32.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

from gpu_cases.inputs import StoredRows, name_parameter
from tunesmith.models.fp8 import emulate, quantize_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Fp8Product(torch.autograd.Function):
    """x W^T of codes, and dY W of those of dY times W's scales: what an fp8 base computes, by its definition."""

    @staticmethod
    def forward(ctx, x, codes, scale):
        ctx.codes, ctx.scale = codes, scale
        return emulate(*quantize_rows(x), codes, scale[:, 0], x.dtype)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        codes, code_scale = quantize_rows(grad.float() * ctx.scale[:, 0])
        return emulate(codes, code_scale, ctx.codes.t(), None, grad.dtype), None, None


def round_frozen_products(model: Any) -> None:
    """Let every adapted linear layer multiply in fp8."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if base is None:
            continue
        weight = base.weight
        if hasattr(weight, "quant_state"):
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight.data, weight.quant_state)
        operands = quantize_rows(weight.detach())

        def forward(x: torch.Tensor, operands: Any = operands) -> torch.Tensor:
            return Fp8Product.apply(x.flatten(0, -2), *operands).unflatten(0, x.shape[:-1])  # type: ignore[union-attr]

        base.forward = forward


def load(task: dict[str, Any], dtype: torch.dtype, *, fp8: bool) -> Any:
    quantized: dict[str, Any] = {}
    if task["four_bit"]:
        quantized["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        quantized["device_map"] = {"": DEVICE}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        task["model"], dtype=dtype, attn_implementation="sdpa", **quantized
    )
    if not task["four_bit"]:
        model = model.to(DEVICE)
    if task["method"] == "lora":
        model = peft.PeftModel.from_pretrained(model, task["adapter"], is_trainable=True)
    if fp8:
        round_frozen_products(model)
    return model


def compute(task: dict[str, Any], dtype: torch.dtype, *, fp8: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss in nats per target token (of pairs, per pair), and its gradients by common name, fp32 on the CPU."""
    model = load(task, dtype, fp8=fp8)
    rows = [StoredRows(Path(task["rows"]))[number] for number in task["step"]]
    num_targets = sum(int(kept[1:].sum()) for _, kept in rows)
    total = 0.0

    def sum_nll(row: tuple[Any, Any]) -> torch.Tensor:
        ids_1T = torch.from_numpy(row[0]).long()[None].to(DEVICE)
        targets = torch.from_numpy(row[1][1:]).bool().to(DEVICE)
        logits = model(input_ids=ids_1T).logits[0, :-1][targets]
        return F.cross_entropy(logits.float(), ids_1T[0, 1:][targets], reduction="sum")

    if task["objective"] == "dpo":
        for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
            gains = [value.detach() - value for value in map(sum_nll, (chosen, rejected))]
            loss = -F.logsigmoid(task["beta"] * (gains[0] - gains[1])) / (len(rows) // 2)
            loss.backward()
            total += float(loss)
    else:
        for row in rows:
            loss = sum_nll(row) / num_targets
            loss.backward()
            total += float(loss)
    found = {
        name_parameter(name): p.grad.float().cpu().clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return total, found


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out = Path(task["out"])
    losses: dict[str, float] = {}
    kinds = [("reference", torch.float32, False), ("rounded", torch.bfloat16, False)]
    if task["fp8"]:
        kinds.append(("rounded-fp8", torch.bfloat16, True))
    for name, dtype, fp8 in kinds:
        losses[name], gradients = compute(task, dtype, fp8=fp8)
        save_file(gradients, str(out / f"{name}.safetensors"))
    (out / "reference.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()

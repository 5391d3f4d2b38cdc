"""Gradients that contenders are held to: transformers and PEFT, eager, in fp32, one row after the other.

    python -m gpu_cases.reference task.json

task: `model`, `adapter` (shortened), `rows`, `step` (row numbers), `method`, `four_bit`, `out` (folder). Writes
reference.safetensors (fp32) and rounded.safetensors: the same eager code in bf16, whose distance from fp32 is the
noise of that precision.
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

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(task: dict[str, Any], dtype: torch.dtype) -> Any:
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
    return model


def compute(task: dict[str, Any], dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss in nats per target token, and its gradients by common name, fp32 on the CPU."""
    model = load(task, dtype)
    rows = [StoredRows(Path(task["rows"]))[number] for number in task["step"]]
    num_targets = sum(int(kept[1:].sum()) for _, kept in rows)
    total = 0.0
    for ids, kept in rows:
        ids_1T = torch.from_numpy(ids).long()[None].to(DEVICE)
        targets = torch.from_numpy(kept[1:]).bool().to(DEVICE)
        logits = model(input_ids=ids_1T).logits[0, :-1][targets]
        loss = F.cross_entropy(logits.float(), ids_1T[0, 1:][targets], reduction="sum") / num_targets
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
    for name, dtype in (("reference", torch.float32), ("rounded", torch.bfloat16)):
        losses[name], gradients = compute(task, dtype)
        save_file(gradients, str(out / f"{name}.safetensors"))
    (out / "reference.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()

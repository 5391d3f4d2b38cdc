"""What a parity record needs: what reached the model, and what the optimizer did with it, seen from outside.

A worker's module, like hf.py. What it cannot see stays None, which gates tell apart from what is right.
"""

from __future__ import annotations

import hashlib
import struct

import torch
from frozen import sample_base

IGNORED = -100


class Capture:
    """Sees what reaches the model, and what the optimizer does with it. What it cannot see stays None."""

    def __init__(self, watcher) -> None:
        self.watcher, self.open = watcher, False
        self.examples: list[dict] | None = []
        self.steps: list[dict] = []
        self.found: list[dict] = []
        frozen = sample_base(watcher.trainer.model)
        self.base = {saved_name(f"{name}.weight").removesuffix(".weight"): v for name, v in frozen.items()}
        self.groups: list[dict] | None = None
        self.state_dtypes: list[str] | None = None
        watcher.trainer.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def parameters(self) -> None:
        """As the framework made them, before ours take their place."""
        for name, parameter in self.watcher.trained.items():
            values = parameter.detach().double()
            self.found.append(
                {
                    "name": saved_name(name),
                    "shape": list(parameter.shape),
                    "dtype": str(parameter.dtype).removeprefix("torch."),
                    "std": float(values.std(correction=0)),
                }
            )

    def _see(self, model, args, kwargs) -> None:
        if not self.open or self.examples is None:
            return
        ids, labels, seen = (kwargs.get(name) for name in ("input_ids", "labels", "attention_mask"))
        flat = seen is None and kwargs.get("position_ids") is not None
        if ids is None or labels is None or flat or (seen is not None and seen.dim() != 2):
            self.examples = None  # rows laid end to end, or embedded already: not taken apart here
            return
        seen = torch.ones_like(ids) if seen is None else seen
        for row_ids, row_labels, row_seen in zip(ids.tolist(), labels.tolist(), seen.tolist(), strict=True):
            self.examples.append(describe_example(row_ids, row_labels, row_seen))

    def step(self, optimizer) -> None:
        watcher = self.watcher
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if self.groups is None:
            names = {id(p): saved_name(name) for name, p in watcher.trained.items()}
            self.groups = [
                describe_group(group, names, optimizer) for group in optimizer.param_groups if group["params"]
            ]
            states = (t for state in optimizer.state.values() for k, t in state.items() if k != "step")
            kinds = {str(t.dtype).removeprefix("torch.") for t in states if torch.is_tensor(t)}
            self.state_dtypes = sorted(kinds)
        self.steps.append(
            {
                "examples": self.examples,
                "loss": watcher.loss,
                "grad_norm": watcher.grad_norm,
                "learning_rates": watcher.rates,
                "clip_norm": watcher.clip_norm,
                "applied_norm": watcher.applied_norm,
            }
        )
        self.examples = None if self.examples is None else []

    def record(self) -> dict:
        precision = self.watcher.handoff["precision"]
        return {
            "schema": 1,
            "framework": self.watcher.framework,
            "versions": self.watcher.versions,
            "precision": {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision],
            "steps": self.steps,
            "parameters": self.found,
            "groups": self.groups,
            "state_dtypes": self.state_dtypes,
            "base": self.base,
        }


def describe_example(ids: list[int], labels: list[int], seen: list[int]) -> dict:
    """A row as `core.parity.Example` has it. In the digest, a label that is not its own token is a 2: another row."""
    places = [at for at, is_seen in enumerate(seen) if is_seen]
    kept = [ids[at] for at in places]
    marks = [0 if labels[at] == IGNORED else 1 if labels[at] == ids[at] else 2 for at in places]
    if marks:
        marks[0] = 0  # nothing before it could predict it, so it carries no loss
    return {
        "digest": hash_row(kept, marks),
        "num_tokens": len(kept),
        "num_target_tokens": sum(map(bool, marks)),
        "labelled_pads": sum(1 for at, is_seen in enumerate(seen) if not is_seen and labels[at] != IGNORED),
    }


def hash_row(ids: list[int], mask: list[int]) -> str:
    """`tunesmith.core.fingerprint.hash_row`, which cannot be imported here."""
    digest = hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids))
    digest.update(bytes(mask))
    return digest.hexdigest()[:16]


def describe_group(group: dict, names: dict[int, str], optimizer) -> dict:
    kind = type(optimizer).__name__.lower()
    if (
        getattr(getattr(optimizer, "args", None), "optim_bits", 32) == 8
    ):  # bitsandbytes has one class for both
        kind = "adamw8bit"
    beta1, beta2 = group.get("betas", (0.0, 0.0))
    return {
        "kind": {"adamw8bit": "adamw-8bit"}.get(kind, kind),
        "names": [names.get(id(p), "?") for p in group["params"]],
        "weight_decay": float(group.get("weight_decay", 0.0)),
        "beta1": float(beta1),
        "beta2": float(beta2),
        "epsilon": float(group.get("eps", 0.0)),
    }


def saved_name(name: str) -> str:
    """A parameter's name as PEFT or transformers saves it, without what wraps the model:

    `base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight` is `model.layers.0.mlp.up_proj.lora_A.weight`.
    """
    name = name.removeprefix("module.").replace("_orig_mod.", "").removeprefix("base_model.model.")
    name = name.replace(".default", "").replace(".base_layer.", ".")
    return name.removesuffix(".weight") if ".lora_magnitude_vector" in name else name

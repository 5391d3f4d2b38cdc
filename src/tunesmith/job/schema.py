"""The job file described by its own spec: a JSON Schema for editors, and the reference page `docs/job-file.md`."""

from __future__ import annotations

import json
from typing import Any

from tunesmith.job.objective import (
    DistillSpec,
    DpoSpec,
    GrpoSpec,
    KtoSpec,
    OrpoSpec,
    PpoSpec,
    RewardSpec,
    RewardTerm,
    SimpoSpec,
)
from tunesmith.job.spec import (
    ArmSpec,
    CompareSpec,
    DataSpec,
    EvaluateSpec,
    FullSpec,
    Job,
    LoraSpec,
    ModelSpec,
    QuantizeSpec,
    SamplingSpec,
    SourceSpec,
    Spec,
    SplitSpec,
    TrainSpec,
    TuneSpec,
)

EXAMPLE_JOB = """\
# yaml-language-server: $schema=./tunesmith.schema.json
model: tunesmith/tiny              # bundled; or a folder, or a hub id
data:
  train: tunesmith/tickets         # bundled; or a file, folder, glob or hub id; a list mixes sources
  max_tokens: 1024
method: lora                       # full | lora | qlora, or a mapping: {name: lora, rank: 32}
train: {epochs: 3, batch_rows: 16, learning_rate: auto, seed: 0}
compare:
  arms: [zero-shot, few-shot, rag, lora, qlora, full]
  seeds: [0, 1, 2]
  metric: exact_match              # declared before the run; the rest is exploratory
"""

_SECTIONS: tuple[tuple[str, type[Spec]], ...] = (
    ("model", ModelSpec),
    ("data", DataSpec),
    ("data.train[]", SourceSpec),
    ("data.split", SplitSpec),
    ("method (full)", FullSpec),
    ("method (lora, qlora)", LoraSpec),
    ("method.qat, compare.arms[].quantize", QuantizeSpec),
    ("objective (distill)", DistillSpec),
    ("objective (dpo)", DpoSpec),
    ("objective (orpo)", OrpoSpec),
    ("objective (simpo)", SimpoSpec),
    ("objective (kto)", KtoSpec),
    ("objective (reward)", RewardSpec),
    ("objective (grpo)", GrpoSpec),
    ("objective (ppo)", PpoSpec),
    ("objective.rewards[]", RewardTerm),
    ("train", TrainSpec),
    ("evaluate", EvaluateSpec),
    ("evaluate.sampling", SamplingSpec),
    ("compare", CompareSpec),
    ("compare.arms[]", ArmSpec),
    ("compare.tune", TuneSpec),
)


def job_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a job file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Job.model_json_schema(),
        "title": "Tunesmith job",
    }


def job_reference() -> str:
    """`docs/job-file.md`: every key, its type, default and meaning."""
    parts = [
        "# The job file\n",
        "Made from the schema by `tunesmith schema --markdown`; do not edit by hand.\n",
    ]
    parts.append(f"```yaml\n{EXAMPLE_JOB}```\n")
    parts.append(
        "Unknown keys are refused with line number and a guess. Paths are relative to the job file. "
        "`--set train.learning_rate=1e-4` overrides a key on the command line.\n"
    )
    for title, spec in _SECTIONS:
        parts.append(f"## {title}\n\n{(spec.__doc__ or '').strip()}\n" if _own_doc(spec) else f"## {title}\n")
        parts.append(_key_table(spec))
    return "\n".join(parts)


def _own_doc(spec: type[Spec]) -> bool:
    return bool(spec.__doc__) and spec.__doc__ != Spec.__doc__


def _key_table(spec: type[Spec]) -> str:
    properties = spec.model_json_schema()["properties"]
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in spec.model_fields.items():
        shown = (
            "required"
            if field.is_required()
            else f"`{_show_default(field.get_default(call_default_factory=True))}`"
        )
        meaning = (field.description or "").replace("\n", " ").replace("|", "\\|")
        rows.append(f"| `{name}` | {_show_type(properties[name])} | {shown} | {meaning} |")
    return "\n".join(rows) + "\n"


def _show_default(value: Any) -> str:
    if isinstance(value, Spec):
        return "{}"
    return json.dumps(value)


def _show_type(node: dict[str, Any]) -> str:
    if branches := node.get("anyOf") or node.get("oneOf"):
        return " or ".join(dict.fromkeys(_show_type(branch) for branch in branches))
    if "enum" in node:
        return " or ".join(f"`{value}`" for value in node["enum"])
    if "const" in node:
        return f"`{node['const']}`"
    if "$ref" in node:
        return "mapping"
    if node.get("type") == "array":
        return f"list of {_show_type(node['items'])}"
    bounds = [f"{sign} {node[key]:g}" for key, sign in _BOUNDS if key in node]
    name = {"integer": "whole number", "string": "text", "boolean": "true/false", "null": "null"}.get(
        node.get("type", ""), node.get("type", "value")
    )
    return f"{name} {', '.join(bounds)}".strip()


_BOUNDS = (("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<="))

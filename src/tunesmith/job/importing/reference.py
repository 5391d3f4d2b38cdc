"""The tables of `docs/importing.md`, made from the tables that do the work."""

from __future__ import annotations

import json

from tunesmith.job.importing.engine import FRAMEWORKS
from tunesmith.job.importing.rules import UNSET, Framework, Key
from tunesmith.job.importing.unsloth import CLI

_INTRO = """\
# Importing a configuration

Made from the code by `tunesmith schema --imports`; do not edit by hand.

```console
$ tunesmith import qlora.yml --out job.yaml     # whose it is, is told by its keys; or --from NAME
```

Reads what Axolotl (`axolotl train`), LLaMA-Factory (`llamafactory-cli train`), TRL (`trl sft --config`) and Unsloth
(`unsloth train --config`) take, and writes a job file in which each value names the line it comes from. For Unsloth's
notebooks, which have no file, the argument names of `from_pretrained`, `get_peft_model` and `SFTConfig` may be written
as one flat YAML, with `dataset_name` for the rows.

Every key of the file is reported as one of:

- **mapped**: to a key of ours, with a remark where the meaning differs;
- **implied**: we do that anyway, or it changes no result;
- **not supported**: it changes the result and a job cannot say it (or nobody knows the key). The job says in its first
  lines what is missing, and a stand-in is named where there is one.

Defaults of theirs that the file does not mention but that decide something are written out too, so that the job does
not depend on ours. They belong to one version each, named below. `--json` prints the report.

The command ends with 0 if there is a job, even if something is not supported; with 1 if there is none (learning from
preferences, no model, no rows); with 2 if the file cannot be read.

What to look at after an import:

- **A batch** is counted for one GPU. With packing switched on theirs counts packed sequences, ours rows.
- **Warm-up** given in steps becomes a share of the steps, which takes `max_steps`; without it a stand-in is written.
- **Held-out rows**: theirs have no test split, and so has the job (`data.split.test: 0`). Give it a share to have
  something that `eval` and `compare` can judge on.
- **Templates** of the same name are not the same letter by letter: `tunesmith preview job.yaml` shows what is trained.
- Files are looked for where the command runs, then beside the configuration. YAML aliases and tags are not read.
"""


def import_reference() -> str:
    """`docs/importing.md`: what an import does, and every key of every framework."""
    parts = [_INTRO]
    for framework in FRAMEWORKS:
        title = framework.title
        if framework.name == "unsloth":
            title += ": the file of `unsloth train`" if framework is CLI else ": argument names"
        parts.append(f"## {title}\n\nDefaults of {framework.version}, from `{framework.source}`.\n")
        parts.append(_mapped(framework))
        parts.append(_rest(framework, "implied", "Implied"))
        parts.append(_rest(framework, "not supported", "Not supported, unless off"))
    return "\n".join(parts)


def _mapped(framework: Framework) -> str:
    rows = ["| key | ours | their default |", "|---|---|---|"]
    for name, key in sorted(framework.table.items(), key=lambda item: (item[1].to, item[0])):
        if key.status == "mapped":
            note = f" ({key.note})" if key.note else ""
            rows.append(f"| `{name}` | `{key.to}`{note} | {_default(key)} |")
    for habit in framework.habits:
        rows.append(f"| {habit.text} | `{habit.to}` | `{json.dumps(habit.value)}` |")
    return "\n".join(rows) + "\n"


def _default(key: Key) -> str:
    if key.required:
        return "none"
    return "" if key.default is UNSET or key.default is None else f"`{json.dumps(key.default)}`"


def _rest(framework: Framework, status: str, title: str) -> str:
    """Keys by their reason; a long tail reads better as lists than as a table."""
    reasons: dict[str, list[str]] = {}
    for name, key in framework.table.items():
        if key.status == status:
            reasons.setdefault(key.note or "other", []).append(f"`{name}`")
    lines = [f"- {reason}: {', '.join(sorted(names))}" for reason, names in sorted(reasons.items())]
    return f"{title}:\n\n" + "\n".join(lines) + "\n"

"""`docs/importing-keys.md`, made from the tables that do the work."""

from __future__ import annotations

import json

from tunesmith.job.importing.engine import FRAMEWORKS
from tunesmith.job.importing.rules import UNSET, Framework, Key
from tunesmith.job.importing.unsloth import CLI


def import_reference() -> str:
    """`docs/importing-keys.md`: every key of every framework, what becomes of it, and their defaults."""
    parts = [
        "# Keys that an import knows\n\nMade from the code by `tunesmith schema --imports`; do not edit by hand.\n"
    ]
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

"""What the report shows of other frameworks, gathered from what their runs left into one file of plain data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tunesmith
from tunesmith.comparing.plan import PlannedArm
from tunesmith.core.errors import SetupError
from tunesmith.core.frameworks import FrameworkPage, FrameworkPages
from tunesmith.core.jsonl import read_json, write_json
from tunesmith.core.records import EnvironmentRecord
from tunesmith.core.rundir import RunDir
from tunesmith.frameworks.catalog import FRAMEWORKS
from tunesmith.frameworks.environments import require_environment
from tunesmith.frameworks.handoff import Handoff
from tunesmith.frameworks.logs import clean_line, clean_text
from tunesmith.frameworks.matrix import ask_all
from tunesmith.frameworks.ports import PORTS
from tunesmith.frameworks.saying import Saying, describe_saying

MAX_LOG_LINES = 60
MAX_LINE = 400


def write_pages(run: RunDir, arms: Sequence[PlannedArm], *, samples: bool) -> None:
    """Write `frameworks.json`: a page for each arm of another framework, and what all frameworks can express.

    samples: with the end of each log, which may quote rows.
    """
    pages = tuple(_make_page(run, arm, samples=samples) for arm in arms if arm.is_foreign)
    if pages:
        write_json(run.frameworks, FrameworkPages(ask_all(), pages).to_json())
    else:
        run.frameworks.unlink(missing_ok=True)


def _make_page(run: RunDir, arm: PlannedArm, *, samples: bool) -> FrameworkPage:
    first, shown = run.arm(arm.name, arm.seeds[0]), run.parity_run(arm.name, "parity")
    record = _read_if_there(first.framework / "record.json")
    handed = _read_if_there(first.handoff / "handoff.json") or _read_if_there(shown.handoff / "handoff.json")
    environment, saying = _find_environment(arm.framework), Saying((), {}, {}, {})
    places = [(str(run.root.absolute()), "DIR"), (str(Path(tunesmith.__file__).parent), "tunesmith")]
    if environment:
        places.insert(0, (str(Path(environment.python).absolute().parents[1]), "ENV"))
    if handed and arm.framework in PORTS:
        handoff = Handoff.from_json(handed["handoff"], place=str(first.handoff / "handoff.json"))
        saying = describe_saying(PORTS[arm.framework], handoff, record.get("resolved", {}))
        # The folder may have been moved since.
        places.append((handoff.scratch.partition(f"/arms/{arm.name}/")[0], "DIR"))
        places.insert(0, (handoff.model, str(handed["run"].get("model", "MODEL"))))
    places.append((str(Path.home()), "~"))
    log = _choose_log(run, arm) if samples else None
    return FrameworkPage(
        arm=arm.name,
        framework=arm.framework,
        title=FRAMEWORKS[arm.framework].title if arm.framework in FRAMEWORKS else arm.framework,
        versions=record.get("versions") or (environment.versions if environment else {}),
        fixed=saying.fixed,
        told={name: _hide(value, places) for name, value in saying.told.items()},
        altered={name: tuple(_hide(v, places) for v in both) for name, both in saying.altered.items()},
        defaults={name: _hide(value, places) for name, value in saying.defaults.items()},
        warnings=tuple(_hide(clean_text(str(text)), places) for text in record.get("warnings", ())),
        log=_hide(read_log_end(log), places) if log else "",
        log_file=log.relative_to(run.root).as_posix() if log else "",
    )


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _find_environment(name: str) -> EnvironmentRecord | None:
    try:
        return require_environment(name)
    except SetupError:
        return None


def _choose_log(run: RunDir, arm: PlannedArm) -> Path | None:
    """Of the first training without a record, which is the one that failed; else of the first; else of its first
    steps, where no training was begun."""
    trainings = [
        (run.arm(arm.name, seed).root / f"{arm.name}-seed-{seed}.log", run.arm(arm.name, seed).record)
        for seed in arm.seeds
    ]
    logs = [log for log, record in trainings if not record.is_file()] + [log for log, _ in trainings]
    logs.append(run.parity_run(arm.name, "parity").root / f"{arm.name}-parity.log")
    return next((log for log in logs if log.is_file()), None)


def read_log_end(path: Path) -> str:
    """The last lines, harmless, without empty ones, long ones cut. Cleaned again: other versions wrote them too."""
    with path.open("rb") as handle:
        handle.seek(max(0, path.stat().st_size - 4 * MAX_LOG_LINES * MAX_LINE))
        lines = (clean_line(line).rstrip() for line in handle.read().split(b"\n"))
    kept = [line if len(line) <= MAX_LINE else line[: MAX_LINE - 1] + "…" for line in lines if line]
    return "\n".join(kept[-MAX_LOG_LINES:])


def _hide(text: str, places: Sequence[tuple[str, str]]) -> str:
    """Names for this machine's folders: a report is sent to others."""
    for folder, name in places:
        text = text.replace(folder, name)
    return text

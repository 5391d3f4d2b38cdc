"""2,000 rows of databricks-dolly-15k on a small real model, by our engine, TRL, LLaMA-Factory, Axolotl and Unsloth.

    tunesmith frameworks install trl        (and llamafactory, axolotl, unsloth)
    .venv/bin/python benchmarks/real_rows_example.py                              (half an hour on one core)
    .venv/bin/python benchmarks/real_rows_example.py --model FOLDER --data FILE   (yours)

Runs docs/examples/real-rows/job.yaml and puts what may be published of it beside that file: the report and its JSON,
without the rows, and the table of README.md there. Stops before writing if anything holds words of a row, or a folder
of this machine. With --keep FOLDER an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from html import unescape
from pathlib import Path
from typing import Any

from tunesmith.api import compare, report_markdown
from tunesmith.core.events import Event
from tunesmith.core.rundir import RunDir
from tunesmith.job.load import load_job

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "examples" / "real-rows"
SHARED = Path(os.environ.get("TUNESMITH_SHARED") or ROOT.parent / "shared" / "data")
NUM_ROWS, MAX_CHARACTERS, SEED = 2000, 400, 0
QUOTED_WORDS = 5
"""So many words of a row, one after the other, are a quotation."""
_MARKS = re.compile(r"(<!-- results: begin[^>]*-->\n).*?(<!-- results: end -->)", re.DOTALL)


def choose_rows(path: Path) -> list[dict[str, Any]]:
    """2,000 rows drawn from those with at most 400 characters of question and answer, the same ones every time."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    short = [row for row in rows if len(row["instruction"]) + len(row["response"]) <= MAX_CHARACTERS]
    return random.Random(SEED).sample(short, NUM_ROWS)


def list_quotations(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """Every five words of a row that follow each other, without what stands between words."""
    found: set[str] = set()
    for row in rows:
        for words in (_split(str(text)) for text in row.values()):
            found |= {" ".join(words[at : at + QUOTED_WORDS]) for at in range(len(words) - QUOTED_WORDS + 1)}
    return found


def _split(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def find_quotation(text: str, quotations: set[str]) -> str | None:
    """The first words of a row in a text, as JSON and HTML would show it."""
    words = _split(unescape(text).replace("\\n", " "))
    runs = (" ".join(words[at : at + QUOTED_WORDS]) for at in range(len(words) - QUOTED_WORDS + 1))
    return next((run for run in runs if run in quotations), None)


def publish(run: RunDir, rows: Iterable[Mapping[str, Any]], to: Path) -> None:
    """Copy report and JSON, with names relative to the run's folder. Exits if they hold words of a row, or paths."""
    quotations, here = list_quotations(rows), f"{run.root.parent}/"
    files = (run.report, run.comparison, run.gates, run.frameworks)
    texts = {path.name: path.read_text(encoding="utf-8").replace(here, "") for path in files}
    for name, text in texts.items():
        if quoted := find_quotation(text, quotations):
            sys.exit(f"{name}: quotes a row ({quoted!r}); nothing was written")
        if path := next(
            (p for p in (str(Path.home()), str(ROOT), tempfile.gettempdir()) if f"{p}/" in text), None
        ):
            sys.exit(f"{name}: names a folder of this machine ({path}); nothing was written")
    for name, text in texts.items():
        (to / name).write_text(text, encoding="utf-8")


def write_table(text: str, page: Path) -> None:
    before = page.read_text(encoding="utf-8")
    after, count = _MARKS.subn(lambda marks: f"{marks[1]}\n{text.strip()}\n\n{marks[2]}", before)
    assert count == 1, page
    page.write_text(after, encoding="utf-8")


def tell(event: Event) -> None:
    if event.kind in ("warning", "note", "done", "failed"):
        print(f"{event.task} {event.text}".strip(), file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "stories260k")
    parser.add_argument("--data", type=Path, default=SHARED / "sft" / "dolly_part_no_context.jsonl")
    parser.add_argument("--out", type=Path, default=EXAMPLE)
    parser.add_argument("--keep", type=Path, help="folder in which rows and runs stay")
    arguments = parser.parse_args()
    for path in (arguments.model, arguments.data):
        if not path.exists():
            sys.exit(f"{path}: not found; give --model and --data, or set TUNESMITH_SHARED")
    rows = choose_rows(arguments.data)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.keep or Path(scratch)).resolve()
        model = folder / "stories260k"
        model.mkdir(parents=True, exist_ok=True)
        for path in (*arguments.model.iterdir(), EXAMPLE / "job.yaml"):
            shutil.copyfile(path, (folder if path.name == "job.yaml" else model) / path.name)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        comparison = compare(load_job(folder / "job.yaml"), out=folder / "run", on_event=tell)
        arguments.out.mkdir(parents=True, exist_ok=True)
        publish(RunDir(folder / "run"), rows, arguments.out)
    if arguments.out == EXAMPLE:
        write_table(report_markdown(comparison), EXAMPLE / "README.md")
    print(report_markdown(comparison))


if __name__ == "__main__":
    main()

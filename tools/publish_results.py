"""Put the figures of a finished demo into README and docs, so that none is typed by hand.

    .venv/bin/tunesmith demo --out demo-run
    .venv/bin/python tools/publish_results.py demo-run

Writes benchmarks/results/demo.json (the public JSON with hardware, versions, commit, seeds) and the text between the
`results: begin` and `results: end` marks of README.md and docs/which-method.md.

    .venv/bin/tunesmith demo --out rates-run --set compare.tune.trials=3 --set 'compare.seeds=[0]'
    .venv/bin/python tools/publish_results.py --rates rates-run

Writes benchmarks/results/demo_rates.json: the validation loss of every learning rate tried for every trained arm.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tunesmith.api import comparison_json, report, report_markdown
from tunesmith.core.fingerprint import describe_hardware, describe_versions
from tunesmith.core.jsonl import read_json, write_json

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/which-method.md")
_MARKS = re.compile(r"(<!-- results: begin[^>]*-->\n).*?(<!-- results: end -->)", re.DOTALL)


def publish(run: Path) -> None:
    comparison = report(run)
    public = comparison_json(comparison, run) | {"report": None}
    origin = {"command": "tunesmith demo", "versions": describe_versions(), "hardware": describe_hardware()}
    write_json(ROOT / "benchmarks" / "results" / "demo.json", public | origin)
    text = report_markdown(comparison).strip() + "\n"
    for name in PAGES:
        page = ROOT / name
        before = page.read_text(encoding="utf-8")
        after, count = _MARKS.subn(lambda marks: f"{marks[1]}\n{text}\n{marks[2]}", before)
        if count != 1:
            sys.exit(
                f"{name}: {count} places for results; one pair of `results: begin` and `results: end` marks"
            )
        page.write_text(after, encoding="utf-8")


def publish_rates(run: Path) -> None:
    trials: dict[str, list[dict[str, float]]] = {}
    origin: dict[str, object] = {}
    for path in sorted((run / "arms").glob("*/trials/*/run.json")):
        record = read_json(path)
        point = {key: record[key] for key in ("learning_rate", "validation_loss", "seed")}
        trials.setdefault(path.parents[2].name, []).append(point)
        origin = {key: record[key] for key in ("versions", "hardware", "train_tokens")}
    command = "tunesmith demo --set compare.tune.trials=3 --set 'compare.seeds=[0]'"
    result = {"command": command, "trials": trials} | origin
    write_json(ROOT / "benchmarks" / "results" / "demo_rates.json", result)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        publish(Path(sys.argv[1]))
    elif len(sys.argv) == 3 and sys.argv[1] == "--rates":
        publish_rates(Path(sys.argv[2]))
    else:
        sys.exit("usage: publish_results.py [--rates] RUN")

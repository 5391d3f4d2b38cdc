"""The tests that need a GPU, and what came of them, for the record.

    python benchmarks/gpu_tests.py                      benchmarks/results/gpu_tests.json
    python benchmarks/gpu_tests.py --out OUT.json -- -n 8   with arguments of pytest's own

Runs `pytest -m gpu` and stores how many tests passed, which did not, with hardware, versions and commit. A library's
warnings are no failures here. The exit status is pytest's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
for _folder in (CHECKOUT / "src", CHECKOUT / "benchmarks"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from cpu_vs_trl import describe_hardware  # noqa: E402
from gpu_cases.protocol import describe_packages  # noqa: E402
from tunesmith.core.fingerprint import describe_versions, hash_code  # noqa: E402

RESULT = CHECKOUT / "benchmarks" / "results" / "gpu_tests.json"


def read_report(path: Path) -> dict[str, Any]:
    """What a JUnit file tells: counts, and the names of tests that failed or were skipped, with the first line why."""
    counts: Counter[str] = Counter()
    told: dict[str, dict[str, str]] = {"failed": {}, "skipped": {}}
    for case in ET.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        outcome, why = "passed", ""
        for kind in ("failure", "error", "skipped"):
            if (found := case.find(kind)) is not None:
                outcome = "skipped" if kind == "skipped" else "failed"
                why = (found.get("message") or "").strip().partition("\n")[0][:200]
        counts[outcome] += 1
        if outcome in told:
            told[outcome][name] = why
    return {"counts": dict(counts), **told}


def read_section(path: Path = RESULT) -> str:
    """The part of docs/benchmarks.md; empty if the tests were never run."""
    if not path.is_file():
        return ""
    record = json.loads(path.read_text(encoding="utf-8"))
    counts = ", ".join(f"{count} {outcome}" for outcome, count in record["counts"].items())
    where = f"{record['hardware']['gpu']}, commit `{record['versions']['commit']}`, {record['date'][:10]}"
    lines = ["## Tests that need a GPU", "", f"`{record['command']}`: {counts} ({where})."]
    lines += [f"- failed: `{name}`: {why}" for name, why in record["failed"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("arguments", nargs="*", help="of pytest")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-W", "default", f"--junitxml={report}"]
        done = subprocess.run([*command, *options.arguments], cwd=CHECKOUT)
        if not report.is_file():
            raise SystemExit(f"pytest ended with {done.returncode} and left no report")
        found = read_report(report)
    import torch

    packages = describe_packages("torchao", "bitsandbytes")
    gpu = packages["gpu"] or {"gpu": "none"}
    record = {
        **found,
        "command": "python benchmarks/gpu_tests.py",
        "hardware": describe_hardware() | gpu,
        "versions": {**describe_versions(), **packages["versions"], "torch": torch.__version__},
        "code": hash_code(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{found['counts']} -> {options.out}")
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()

"""LoRA, QLoRA and full fine-tuning on one GPU: Tunesmith against Unsloth and TRL, interleaved, on the same tokens.

    python benchmarks/gpu.py --list                                       the cases
    python benchmarks/gpu.py --case lora-bf16 --wheels .whl --out OUT.json   one case (minutes), merged into OUT.json;
                                                                          several share what they can, and --minutes
    python benchmarks/gpu.py --case lora-bf16 --prepare --wheels .whl     only its inputs and reference, for later
    python benchmarks/gpu.py --case lora-bf16 --ours-only --wheels .whl --out OUT.json   our side alone
    python benchmarks/gpu.py --tune full-8b --wheels .whl --out OUT.json  find the peer's fastest settings first
    python benchmarks/gpu.py --merge OUT.json ...                         into benchmarks/results/gpu.json
    python benchmarks/gpu.py --table                                      docs/benchmarks.md from the results

A case builds its inputs (random weights of the shape, seeded; an adapter; rows: gpu_cases/inputs.py), computes a
reference in fp32, holds each side's gradients to it, and times the sides in turns. Each side is a process of its own
(gpu_cases/protocol.py); those that wait hold their weights and optimizer states only. Token ids, kept labels and rows
of a step are equal on both sides, checked by a hash of what each side really fed its model. Cases with a side in
common (two of our jobs against one peer, or one against two) are measured together (gpu_cases/groups.py).

The real rows are not part of the repository. Render them once (any JSONL with instructions and a Llama 3 tokenizer):
    python benchmarks/gpu.py --make-rows dolly.jsonl --tokenizer FOLDER --rows ROWS
    python benchmarks/gpu.py --case real-lengths --rows ROWS --wheels .whl --out OUT.json

On a machine where nothing can be installed, --wheels installs the folder's wheels (slim_wheels.py) into a temporary
folder that only the measured processes see. Without a GPU, the harness itself can be tried:
    python benchmarks/gpu.py --case lora-bf16 --shape tiny --device cpu --plain --contender ours
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
for _folder in (CHECKOUT / "src", CHECKOUT / "benchmarks"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from gpu_cases.cases import CASES, SHAPES, Case  # noqa: E402
from gpu_cases.groups import Entry, describe_origin, plan_groups, prepare_group, run_group  # noqa: E402
from gpu_cases.inputs import render_rows  # noqa: E402
from gpu_cases.options import CaseFailed, Options, install_wheels, merge_keys, say, strip_paths  # noqa: E402
from gpu_cases.results import (  # noqa: E402
    compute_ratio,
    judge,
    load_results,
    make_page,
    merge_results,
    read_cpu_results,
    save_results,
)

RESULT = CHECKOUT / "benchmarks" / "results" / "gpu.json"
PAGE = CHECKOUT / "docs" / "benchmarks.md"
# A further group of the same call is not begun with less time than this.
LEAST_SECONDS = 150


# --- measuring --------------------------------------------------------------------------------------------------------


def choose_entry(name: str, arguments: argparse.Namespace) -> Entry:
    """The case as the command line wants it, and which of the peer's settings."""
    case = change_case(CASES[name], arguments)
    tuned = load_results(arguments.out)["tuned"].get(name, {}).get("best")
    return Entry(case, arguments.setting or tuned or next(iter(case.peer.settings)))


def change_case(case: Case, arguments: argparse.Namespace) -> Case:
    rows = case.rows
    if arguments.row_tokens:
        rows = replace(rows, tokens=arguments.row_tokens)
    return replace(
        case,
        shape=arguments.shape or case.shape,
        rows=rows,
        batch_rows=arguments.batch_rows or case.batch_rows,
        steps=arguments.steps or case.steps,
        warm_up=arguments.warm_up or case.warm_up,
    )


def measure(group: Sequence[Entry], arguments: argparse.Namespace, options: Options) -> bool:
    """Run a group and merge its records as they grow. Returns whether all its cases ran; never raises for what
    happens in it."""
    before, latest = load_results(arguments.out), dict[str, dict[str, Any]]()
    cases = {entry.case.name: entry.case for entry in group}

    def keep(name: str, record: dict[str, Any]) -> None:
        if "failed" not in record:
            record["ratio"] = compute_ratio(cases[name], record)
        latest[name] = record
        if arguments.contender is None:
            new = strip_paths({"cases": latest, "tuned": {}}, options)
            save_results(arguments.out, merge_results(before, new))

    try:
        only = "ours" if arguments.ours_only else arguments.contender
        failures = run_group(group, options, only=only, on_record=keep)
    except Exception as error:
        failures = dict.fromkeys(cases, describe_error(error))
        # Whole rounds stand; of a case without any, what there is stands beside the reason.
        for name in cases:
            if "failed" in latest.get(name, {"failed": ""}):
                keep(name, {**latest.get(name, {}), "failed": str(error), **describe_origin()})
    for name, case in cases.items():
        tell_result(case, latest[name], failures.get(name, ""), arguments)
    return not failures


def describe_error(error: BaseException) -> str:
    """One line: what, and where in the code."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    told = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    return " ".join(told.split())[:600]


def tell_result(case: Case, record: dict[str, Any], failure: str, arguments: argparse.Namespace) -> None:
    if failure:
        say(f"{case.name} failed: {failure}")
    elif arguments.contender is not None:
        print(json.dumps(record, indent=1))
    elif arguments.ours_only:
        print(f"{case.name}: ours {record['ours'].get('tokens_per_second', 0):,.0f} tokens/s")
    if "ratio" in record:
        print(f"{case.name}: {record['ratio']['of_medians']:.3f}  {judge(case, record)}")


def tune_peer(case: Case, options: Options) -> dict[str, Any]:
    """The fastest of the peer's settings on this machine, and what each one gave."""
    tried: dict[str, Any] = {}
    quick = replace(options, rounds=1, skip_parity=True)
    case = replace(case, steps=min(case.steps, 10))
    for name in case.peer.settings:
        latest: dict[str, Any] = {}
        failures = run_group(
            [Entry(case, name)],
            quick,
            only="peer",
            on_record=lambda _, record, kept=latest: kept.update(record),
        )
        if failures:
            tried[name] = {"failed": failures[case.name]}
        else:
            keys = ("tokens_per_second", "peak_bytes", "reserved_bytes")
            tried[name] = {key: latest["peer"][key] for key in keys}
    rates = {name: one["tokens_per_second"] for name, one in tried.items() if "failed" not in one}
    if not rates:
        raise CaseFailed(f"none of the settings of {case.peer.label} ran")
    return {"best": max(rates, key=lambda name: rates[name]), "tried": tried, **describe_origin()}


def prepare(groups: Sequence[Sequence[Entry]], options: Options) -> bool:
    """Write inputs and references of all groups, side by side: what two need is made once. Returns whether all are
    there."""

    def make(group: Sequence[Entry]) -> bool:
        try:
            prepare_group(group, options)
        except Exception as error:
            say(f"{group[0].case.name} is not prepared: {describe_error(error)}")
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        return all(list(pool.map(make, groups)))


# --- command line -----------------------------------------------------------------------------------------------------


def parse_key(text: str) -> dict[str, Any]:
    """`train.memory_limit=20GiB` -> nested mapping; the value is JSON where it can be read as such."""
    path, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        read: Any = json.loads(value)
    except ValueError:
        read = value
    for key in reversed(path.split(".")):
        read = {key: read}
    return read


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", default=[], choices=list(CASES), help="what to measure")
    parser.add_argument(
        "--tune", action="append", default=[], choices=list(CASES), help="try the peer's settings"
    )
    parser.add_argument(
        "--prepare", action="store_true", help="only write the cases' inputs and references into --folder"
    )
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="result files to merge into --out")
    parser.add_argument("--table", action="store_true", help="write docs/benchmarks.md from --out")
    parser.add_argument("--out", type=Path, default=RESULT, help="result file; what is in it stays")
    parser.add_argument("--folder", type=Path, help="where inputs are written and found again")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that the measured processes need")
    parser.add_argument("--rows", type=Path, help="folder of rendered rows, for the real lengths")
    parser.add_argument("--make-rows", type=Path, metavar="DATA", help="render a data file into --rows")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer for --make-rows")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES), help="another shape than the case's")
    parser.add_argument("--row-tokens", type=int, help="another length of random rows than the case's")
    parser.add_argument("--batch-rows", type=int, help="another number of rows in a step than the case's")
    parser.add_argument("--contender", choices=["ours", "peer"], help="run one side; nothing is recorded")
    parser.add_argument(
        "--ours-only",
        action="store_true",
        help="run our side alone; the record says that the peer is missing",
    )
    parser.add_argument(
        "--case-seconds",
        type=float,
        default=240.0,
        help="the most that one case may take; of cases measured together, each",
    )
    parser.add_argument(
        "--setting", help="name of the peer's settings; default: the tuned ones, else the first"
    )
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peer")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each side")
    parser.add_argument("--steps", type=int, help="timed steps of a round; default: the case's")
    parser.add_argument("--warm-up", type=int, help="steps before the first round; default: the case's")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="no new round that would end later than this"
    )
    parser.add_argument(
        "--job", type=parse_key, action="append", default=[], metavar="KEY=VALUE", help="job key"
    )
    parser.add_argument("--plain", action="store_true", help="leave out the case's own job keys")
    parser.add_argument(
        "--skip-parity", action="store_true", help="time without the gradient check, and say so"
    )
    return parser


def make_options(arguments: argparse.Namespace) -> Options:
    folder = arguments.folder or Path(tempfile.gettempdir()) / "tunesmith-gpu"
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    job: dict[str, Any] = {}
    for keys in arguments.job:
        job = merge_keys(job, keys)
    return Options(
        folder=folder,
        device=arguments.device,
        rounds=arguments.rounds,
        deadline=time.monotonic() + 60 * arguments.minutes,
        rows=arguments.rows.resolve() if arguments.rows else None,
        site=install_wheels(arguments.wheels.resolve(), folder) if arguments.wheels else None,
        # Absolute, but not resolved: a virtual environment is known by the path of its link.
        peer_python=str(Path(arguments.peer_python).absolute()),
        plain=arguments.plain,
        skip_parity=arguments.skip_parity,
        job=job,
        case_seconds=arguments.case_seconds,
    )


def run(arguments: argparse.Namespace) -> bool:
    """Tune and measure what was asked for. Returns whether all of it ran."""
    options = make_options(arguments)
    ok = True
    for name in arguments.tune:
        try:
            tuned = tune_peer(change_case(CASES[name], arguments), options)
        except Exception as error:
            say(f"{name} is not tuned: {describe_error(error)}")
            ok = False
            continue
        say(f"{name}: best is {tuned['best']}")
        new = strip_paths({"cases": {}, "tuned": {name: tuned}}, options)
        save_results(arguments.out, merge_results(load_results(arguments.out), new))
    groups = plan_groups([choose_entry(name, arguments) for name in arguments.case], options)
    if arguments.prepare:
        return prepare(groups, options)
    for number, group in enumerate(groups):
        if number and options.seconds_left() < LEAST_SECONDS:
            names = ", ".join(entry.case.name for entry in group)
            say(f"{names}: not started, {options.seconds_left():.0f} s are left")
            ok = False
            continue
        ok = measure(group, arguments, options) and ok
    return ok


def make_whole_page(results: dict[str, Any]) -> str:
    """docs/benchmarks.md: this script's results, and those that other scripts left beside them."""
    import attention_choice
    import framework_arms
    import gpu_tests
    import plan_accuracy

    more = [script.read_section() for script in (framework_arms, plan_accuracy, attention_choice, gpu_tests)]
    return make_page(results, read_cpu_results(RESULT.parent), more=more)


def main() -> None:
    arguments = make_parser().parse_args()
    if arguments.list:
        for case in CASES.values():
            print(f"{case.name:18} {case.what}, against {case.peer.label}; aim {case.bar}")
    if arguments.make_rows:
        if not (arguments.tokenizer and arguments.rows):
            raise SystemExit("--make-rows needs --tokenizer and --rows")
        number = render_rows(
            arguments.make_rows, arguments.tokenizer, arguments.rows, template="llama-3", max_tokens=2048
        )
        say(f"{number} rows in {arguments.rows}")
    ok = run(arguments) if arguments.tune or arguments.case else True
    for path in arguments.merge:
        save_results(arguments.out, merge_results(load_results(arguments.out), load_results(path)))
    if arguments.table:
        PAGE.write_text(make_whole_page(load_results(arguments.out)), encoding="utf-8")
    if not ok:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

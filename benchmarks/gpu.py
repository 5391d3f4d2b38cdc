"""LoRA, QLoRA and full fine-tuning on one GPU: Tunesmith against Unsloth and TRL, interleaved, on the same tokens.

    python benchmarks/gpu.py --list                                       the cases
    python benchmarks/gpu.py --case lora-bf16 --wheels .whl --out OUT.json   one case (minutes), merged into OUT.json;
                                                                          several share inputs and --minutes
    python benchmarks/gpu.py --case lora-bf16 --ours-only --wheels .whl --out OUT.json   our side alone
    python benchmarks/gpu.py --tune full-8b --wheels .whl --out OUT.json  find the peer's fastest settings first
    python benchmarks/gpu.py --merge OUT.json ...                         into benchmarks/results/gpu.json
    python benchmarks/gpu.py --table                                      docs/benchmarks.md from the results

A case builds its inputs (random weights of the shape, seeded; an adapter; rows: gpu_cases/inputs.py), computes a
reference in fp32, holds each side's gradients to it, and times the sides in turns. Each side is a process of its own
(gpu_cases/protocol.py); of two alive, the one that waits holds its weights and optimizer states only. Token ids, kept
labels and rows of a step are equal on both sides, checked by a hash of what each side really fed its model.

The real rows are not part of the repository. Render them once (any JSONL with instructions and a Llama 3 tokenizer):
    python benchmarks/gpu.py --make-rows dolly.jsonl --tokenizer FOLDER --rows ROWS
    python benchmarks/gpu.py --case real-lengths --rows ROWS --wheels .whl --out OUT.json

On a machine where nothing can be installed, --wheels installs the folder's wheels (slim_wheels.py) into a temporary
folder that only the measured processes see. Without a GPU, the harness itself can be tried:
    python benchmarks/gpu.py --case lora-bf16 --shape tiny --device cpu --plain --contender ours
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
for _folder in (CHECKOUT / "src", CHECKOUT / "benchmarks"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from cpu_vs_trl import describe_hardware, say  # noqa: E402
from gpu_cases.cases import CASES, SHAPES, Case  # noqa: E402
from gpu_cases.inputs import StoredRows, hash_step, plan_steps, render_rows, write_random_rows  # noqa: E402
from gpu_cases.parity import check_parity  # noqa: E402
from gpu_cases.protocol import Contender, ContenderFailed  # noqa: E402
from gpu_cases.results import (  # noqa: E402
    compute_ratio,
    judge,
    load_results,
    make_page,
    merge_results,
    read_cpu_results,
    save_results,
    summarize,
)
from tunesmith.core.fingerprint import describe_versions, hash_code, hash_json  # noqa: E402

RESULT = CHECKOUT / "benchmarks" / "results" / "gpu.json"
PAGE = CHECKOUT / "docs" / "benchmarks.md"
MODULES = {"ours": "ours", "unsloth": "unsloth_peer", "trl": "trl_peer"}
RANK, ALPHA = 16, 32
LEARNING_RATE = 1e-4
CLIP_NORM = 1.0
SEED = 0
# The first step of a round fills the allocator again; it is not timed.
SETTLE = 1
SHORT_LAYERS = 2
# A further case of the same call is not begun with less time than this.
LEAST_SECONDS = 150


@dataclass(frozen=True)
class Options:
    """How the cases are run, on this machine."""

    folder: Path
    device: str
    rounds: int
    deadline: float
    rows: Path | None
    site: Path | None
    peer_python: str
    plain: bool
    skip_parity: bool
    job: dict[str, Any]
    # The most that a case may take, its inputs apart.
    case_seconds: float = 240.0

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Inputs:
    """Files of a case, and the rows of each step."""

    folder: Path
    model: Path
    adapter: Path
    short_model: Path
    short_adapter: Path
    rows: Path
    steps: list[list[int]]
    max_tokens: int
    digests: list[str]


class CaseFailed(Exception):
    """A case cannot be measured; one line."""


# --- inputs -----------------------------------------------------------------------------------------------------------


def make_inputs(case: Case, options: Options, *, num_steps: int) -> Inputs:
    """Write what is not there yet: weights, adapters, rows."""
    shape = SHAPES[case.shape]
    for name, config in (("whole", shape), ("short", shape.shortened(SHORT_LAYERS))):
        folder = options.folder / f"{case.shape}-{name}"
        if (folder / "adapter" / "adapter_config.json").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        task = {"out": str(folder), "config": config.config, "rank": RANK, "alpha": ALPHA}
        task |= {"seed": SEED, "device": options.device}
        run_helper("inputs", task, options)
    if case.rows.kind == "real":
        if options.rows is None or not (options.rows / "prepared.json").is_file():
            raise CaseFailed(f"{case.name} needs --rows, a folder made with --make-rows")
        rows = options.rows
    else:
        # Whole rounds of steps, so that folders are shared between cases.
        num_rows = case.batch_rows * (num_steps + 8)
        rows = options.folder / f"rows-{shape.config['vocab_size']}-{case.rows.tokens}-{num_rows}"
        write_random_rows(
            rows,
            lengths=[case.rows.tokens] * num_rows,
            vocab_size=shape.config["vocab_size"],
            seed=SEED,
        )
    stored = StoredRows(rows)
    steps = plan_steps(len(stored), batch_rows=case.batch_rows, seed=SEED)
    if len(steps) < num_steps:
        raise CaseFailed(
            f"{len(stored)} rows are {len(steps)} steps of {case.batch_rows}, {num_steps} are needed"
        )
    steps = steps[:num_steps]
    whole, short = options.folder / f"{case.shape}-whole", options.folder / f"{case.shape}-short"
    return Inputs(
        folder=options.folder,
        model=whole / "model",
        adapter=whole / "adapter",
        short_model=short / "model",
        short_adapter=short / "adapter",
        rows=rows,
        steps=steps,
        max_tokens=max(len(stored[number][0]) for step in steps for number in step),
        digests=[hash_step([stored[number] for number in step]) for step in steps[: case.warm_up]],
    )


def run_helper(module: str, task: dict[str, Any], options: Options) -> None:
    """Run one of our own steps in a process of its own: it leaves no memory behind."""
    file = options.folder / f"{module}-task.json"
    file.write_text(json.dumps(task), encoding="utf-8")
    command = [sys.executable, "-m", f"gpu_cases.{module}", str(file)]
    done = subprocess.run(
        command,
        env=make_environment(options),
        cwd=options.folder,
        capture_output=True,
        text=True,
        timeout=max(1.0, options.seconds_left()),
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        raise CaseFailed(f"{module} ended with {done.returncode}: {lines[-1][:500]}")


def make_environment(options: Options) -> dict[str, str]:
    paths = [CHECKOUT / "benchmarks", CHECKOUT / "src", *([options.site] if options.site else [])]
    inherited = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *([inherited] if inherited else [])]),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if options.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return environment


def install_wheels(wheels: Path, folder: Path) -> Path:
    """Unpack carried wheels into a folder. Returns it."""
    site = folder / "site"
    if site.is_dir():
        return site
    say(f"installing {len(list(wheels.glob('*.whl')))} wheels")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--upgrade", "--target", str(site), *map(str, sorted(wheels.glob("*.whl")))]
    subprocess.run(command, check=True)
    return site


# --- tasks ------------------------------------------------------------------------------------------------------------


def merge_keys(into: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, the second one's values on top."""
    merged = dict(into)
    for key, value in more.items():
        known = merged.get(key)
        merged[key] = (
            merge_keys(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
        )
    return merged


def make_job(
    case: Case, options: Options, *, model: Path, adapter: Path, rows: Path, steps: int
) -> dict[str, Any]:
    """An ordinary job: what a user would write for this case."""
    method: dict[str, Any] = {"name": case.method}
    if case.method == "lora":
        method = {"name": "lora", "rank": RANK, "alpha": ALPHA, "adapter": str(adapter)}
    job: dict[str, Any] = {
        "model": str(model),
        "data": {"train": str(rows)},
        "method": method,
        "train": {
            "steps": steps,
            "batch_rows": case.batch_rows,
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "warmup": 0.0,
            "clip_norm": CLIP_NORM,
            "seed": SEED,
            "precision": "bf16" if options.device == "cuda" else "fp32",
            "evaluate_every": "never",
            "save_every": "never",
            "keep_best": False,
        },
    }
    job = merge_keys(job, {} if options.plain else case.job)
    return merge_keys(job, options.job)


def make_task(
    case: Case, role: str, settings: dict[str, Any], inputs: Inputs, options: Options
) -> dict[str, Any]:
    """What a contender's process is told."""
    folder = inputs.folder / f"{case.name}-{role}"
    folder.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = {
        "folder": str(folder),
        "rows": str(inputs.rows),
        "checked_steps": case.warm_up,
    }
    if role == "ours" or case.peer.who == "ours":
        shared = {"rows": inputs.rows, "steps": len(inputs.steps)}
        return common | {
            "job": make_job(case, options, model=inputs.model, adapter=inputs.adapter, **shared),
            "short_job": make_job(
                case,
                options,
                model=inputs.short_model,
                adapter=inputs.short_adapter,
                rows=inputs.rows,
                steps=1,
            ),
        }
    return common | {
        "model": str(inputs.model),
        "adapter": str(inputs.adapter),
        "short_model": str(inputs.short_model),
        "short_adapter": str(inputs.short_adapter),
        "steps": inputs.steps,
        "max_tokens": inputs.max_tokens,
        "batch_rows": case.batch_rows,
        "method": case.method,
        "rank": RANK,
        "alpha": ALPHA,
        "learning_rate": LEARNING_RATE,
        "clip_norm": CLIP_NORM,
        "dtype": "bfloat16" if options.device == "cuda" else "float32",
        "settings": settings,
    }


# --- measuring --------------------------------------------------------------------------------------------------------


class Side:
    """One contender of a case through all its rounds: its process, if one is alive, and what it has answered."""

    def __init__(self, role: str, case: Case, setting: str, inputs: Inputs, options: Options) -> None:
        self.role, self.case, self.inputs, self.options = role, case, inputs, options
        self.who = "ours" if role == "ours" else case.peer.who
        self.settings = {} if self.who == "ours" else case.peer.settings[setting]
        self._process: Contender | None = None
        self._warm = False
        self.warm_up: dict[str, Any] = {}
        self.warm_up_seconds = 0.0
        self.rounds: list[dict[str, Any]] = []
        self.start_seconds: list[float] = []

    @property
    def process(self) -> Contender:
        if self._process is None:
            self._process = start_contender(self)
            self._warm = False
        return self._process

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        return self.process.ask(command, timeout=self.options.seconds_left())

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None

    def check_gradients(self, reference: Path) -> dict[str, Any]:
        """Raises CaseFailed if the gradients, or the rows they come from, are not the reference's.

        What passed once in this folder, with the same settings and code, is not run again.
        """
        task = make_task(self.case, self.role, self.settings, self.inputs, self.options)
        decides = task["short_job"] if self.who == "ours" else self.settings
        code = hash_code() if self.who == "ours" else ""
        passed = reference / f"passed-{self.who}-{hash_json([decides, code])[:16]}.json"
        if passed.is_file():
            say(f"  {self.who}: gradients checked before")
            return json.loads(passed.read_text(encoding="utf-8"))
        out = reference / f"{self.role}.safetensors"
        answer = self.ask({"do": "gradients", "out": str(out)})
        if answer["digest"] != self.inputs.digests[0]:
            raise CaseFailed(f"{self.who} fed other rows to its model than the plan says")
        fp8 = self.who == "ours" and "fp8" in (self.case.base, self.case.compute) and not self.options.plain
        exact = self.options.plain and self.options.device == "cpu"
        try:
            parity = check_parity(reference, out, answer, fp8=fp8, exact=exact)
        except ValueError as error:
            raise CaseFailed(f"{self.who}: {error}") from None
        out.unlink()
        say(
            f"  {self.who}: gradients {parity.distance.total:.3g} from fp32 (allowed {parity.allowed_total:.3g})"
        )
        if not parity.passed:
            raise CaseFailed(f"{self.who} is not timed: {parity.reason}")
        passed.write_text(json.dumps(parity.to_json()), encoding="utf-8")
        return parity.to_json()

    def get_warm(self) -> None:
        """Load, compile, and take the steps that are not timed; their rows are checked."""
        process = self.process
        if self._warm:
            return
        asked = time.perf_counter()
        answer = self.ask({"do": "steps", "count": self.case.warm_up})
        if answer["digests"] != self.inputs.digests:
            raise CaseFailed(f"{self.who} fed other rows to its model than the plan says")
        self._warm = True
        if not self.warm_up:
            self.warm_up, self.warm_up_seconds = answer, time.perf_counter() - asked
        say(f"  {self.who}: warm after {time.perf_counter() - process.started:.0f} s")

    def run_round(self) -> None:
        """Timed steps. With processes that take turns, this one is started for it and stopped after it."""
        self.get_warm()
        answer = self.ask({"do": "steps", "count": SETTLE + self.case.steps})
        timed = {key: answer[key][SETTLE:] for key in ("seconds", "tokens", "targets", "losses")}
        timed |= {key: answer[key] for key in ("peak_bytes", "reserved_bytes")}
        self.rounds.append(timed)
        say(f"  {self.who}: {sum(timed['tokens']) / sum(timed['seconds']):,.0f} tokens/s")
        if not self.case.together:
            self.stop()

    def time_start(self) -> float:
        """Seconds from starting the process to the end of its first step."""
        self.stop()
        process = self.process
        self.warm_up = self.ask({"do": "steps", "count": 1})
        seconds = time.perf_counter() - process.started
        if self.warm_up["digests"] != self.inputs.digests[:1]:
            raise CaseFailed(f"{self.who} fed other rows to its model than the plan says")
        say(f"  {self.who}: first step after {seconds:.1f} s")
        self.stop()
        return seconds

    def describe(self, num_rounds: int) -> dict[str, Any]:
        """What it has done, its first `num_rounds` rounds: as many as the other side has."""
        rounds = self.rounds[:num_rounds]
        last = rounds[-1] if rounds else self.warm_up
        record: dict[str, Any] = {
            "who": self.who,
            "settings": self.settings,
            "first_loss": self.warm_up["losses"][0],
            "last_loss": last["losses"][-1],
            "facts": self.warm_up["facts"],
            "warm_up_seconds": self.warm_up_seconds,
            "warm_up_step_seconds": self.warm_up["seconds"],
        }
        if self.start_seconds:
            record["start_seconds"] = self.start_seconds
        if rounds:
            record |= summarize(rounds)
            record |= {key: max(r[key] for r in rounds) for key in ("peak_bytes", "reserved_bytes")}
            record["rounds"] = [{k: r[k] for k in ("seconds", "tokens", "targets")} for r in rounds]
        return record


def start_contender(side: Side) -> Contender:
    task = make_task(side.case, side.role, side.settings, side.inputs, side.options)
    return Contender(
        MODULES[side.who],
        task,
        folder=Path(task["folder"]),
        environment=make_environment(side.options),
        python=sys.executable if side.who == "ours" else side.options.peer_python,
    )


class CaseRun:
    """A case being measured: its sides, what the gate said of them, and the record of what there is so far."""

    def __init__(
        self, case: Case, options: Options, *, setting: str, only: str | None, on_record: OnRecord
    ) -> None:
        # Of one process: those that take turns start from the first step every time.
        num_steps = case.warm_up + (options.rounds if case.together else 1) * (SETTLE + case.steps)
        self.case, self.setting, self._on_record = case, setting, on_record
        self.inputs = make_inputs(case, options, num_steps=num_steps)
        # Inputs are shared by cases: the time they take is nobody's.
        until = min(options.deadline, time.monotonic() + options.case_seconds)
        self.options = dataclasses.replace(options, deadline=until)
        roles = ["ours", "peer"] if only is None else [only]
        self.sides = [Side(role, case, setting, self.inputs, self.options) for role in roles]
        self.is_pair = only is None
        self.parity: Any = "skipped" if options.skip_parity else {}

    def run(self) -> dict[str, Any]:
        try:
            if self.case.together and not self.options.skip_parity:
                # Their imports take a while: meanwhile the reference is computed.
                for side in self.sides:
                    _ = side.process
            if self.case.measure == "start":
                for side in self.sides:
                    self._check(side)
                self._measure_starts()
            else:
                self._measure_speed()
        finally:
            for side in self.sides:
                side.stop()
        return self.describe()

    def _check(self, side: Side) -> None:
        if self.options.skip_parity or side.role in self.parity:
            return
        self.parity[side.role] = side.check_gradients(make_reference(self.case, self.inputs, self.options))
        if not self.case.together:
            side.stop()

    def _measure_speed(self) -> None:
        """A-B-A-B until the rounds are done or another one would not fit the time. A side is checked, and gets warm,
        when its first round comes: ours is measured whatever becomes of the peer."""
        longest = 0.0
        for number in range(self.options.rounds):
            if number and self.options.seconds_left() < 1.3 * longest:
                say(f"  time is up after {number} of {self.options.rounds} rounds")
                break
            took = 0.0
            for side in self.sides:
                self._check(side)
                if self.case.together:
                    side.get_warm()
                began = time.monotonic()
                side.run_round()
                took += time.monotonic() - began
                self._on_record(self.describe())
            longest = max(longest, took)

    def _measure_starts(self) -> None:
        """The first pair warms the caches on disk and does not count."""
        longest = 0.0
        for number in range(1 + self.options.rounds):
            began = time.monotonic()
            if number > 1 and self.options.seconds_left() < 1.3 * longest:
                say(f"  time is up after {number - 1} of {self.options.rounds} rounds")
                break
            for side in self.sides:
                seconds = side.time_start()
                if number:
                    side.start_seconds.append(seconds)
            longest = max(longest, time.monotonic() - began)
            if number:
                self._on_record(self.describe())

    def describe(self) -> dict[str, Any]:
        """The record: whole once every side has a round; before, `failed` says that it is not."""
        done = [max(len(side.rounds), len(side.start_seconds)) for side in self.sides]
        num_rounds = min(done) or max(done)
        record = {
            "case": dataclasses.asdict(self.case),
            "peer_setting": self.setting,
            "parity": self.parity,
            "num_rounds": num_rounds,
            "steps": self.case.steps,
            "rows_sha256": self.inputs.digests[0],
            **{side.role: side.describe(num_rounds) for side in self.sides if side.warm_up},
            "job": make_task(self.case, "ours", {}, self.inputs, self.options)["job"],
            "hardware": describe_hardware() | self.sides[0].warm_up["facts"]["gpu"],
            **describe_origin(),
        }
        if not self.is_pair:
            record["failed"] = f"only {self.sides[0].role} was run"
        elif not min(done):
            record["failed"] = "the peer was not measured"
        return record


OnRecord = Callable[[dict[str, Any]], None]


def run_case(
    case: Case,
    options: Options,
    *,
    setting: str,
    only: str | None,
    on_record: OnRecord = lambda record: None,
) -> dict[str, Any]:
    """Measure a case; with `only`, one side of it. Raises CaseFailed or ContenderFailed.

    on_record: called after every round with the record so far.
    """
    say(f"{case.name}: {case.what}, against {case.peer.label} ({setting})")
    return CaseRun(case, options, setting=setting, only=only, on_record=on_record).run()


def make_reference(case: Case, inputs: Inputs, options: Options) -> Path:
    four_bit = case.base == "nf4" and not options.plain
    name = f"reference-{inputs.short_model.parent.name}-{inputs.rows.name}-{case.method}{'-nf4' * four_bit}"
    folder = options.folder / name
    folder.mkdir(exist_ok=True)
    if not (folder / "reference.json").is_file():
        say("  reference gradients in fp32")
        task = {"model": str(inputs.short_model), "adapter": str(inputs.short_adapter)}
        task |= {"rows": str(inputs.rows), "step": inputs.steps[0], "method": case.method}
        run_helper("reference", task | {"four_bit": four_bit, "out": str(folder)}, options)
    return folder


def describe_origin() -> dict[str, Any]:
    return {
        "commit": describe_versions().get("commit", ""),
        "code": hash_code(),
        # Names of files and folders, not where they happened to lie.
        "command": " ".join(["python benchmarks/gpu.py", *(Path(word).name for word in sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def tune_peer(case: Case, options: Options) -> dict[str, Any]:
    """The fastest of the peer's settings on this machine, and what each one gave."""
    tried: dict[str, Any] = {}
    quick = dataclasses.replace(options, rounds=1, skip_parity=True)
    case = dataclasses.replace(case, steps=min(case.steps, 10))
    for name in case.peer.settings:
        try:
            record = run_case(case, quick, setting=name, only="peer")
            peer = record["peer"]
            tried[name] = {key: peer[key] for key in ("tokens_per_second", "peak_bytes", "reserved_bytes")}
        except (CaseFailed, ContenderFailed) as error:
            tried[name] = {"failed": str(error)}
            say(f"  {name}: {error}")
    rates = {name: one["tokens_per_second"] for name, one in tried.items() if "failed" not in one}
    if not rates:
        raise CaseFailed(f"none of the settings of {case.peer.label} ran")
    return {"best": max(rates, key=lambda name: rates[name]), "tried": tried, **describe_origin()}


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
    parser.add_argument("--case-seconds", type=float, default=240.0, help="the most that one case may take")
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


def change_case(case: Case, arguments: argparse.Namespace) -> Case:
    rows = case.rows
    if arguments.row_tokens:
        rows = dataclasses.replace(rows, tokens=arguments.row_tokens)
    return dataclasses.replace(
        case,
        shape=arguments.shape or case.shape,
        rows=rows,
        batch_rows=arguments.batch_rows or case.batch_rows,
        steps=arguments.steps or case.steps,
        warm_up=arguments.warm_up or case.warm_up,
    )


def measure(name: str, arguments: argparse.Namespace, options: Options) -> bool:
    """Run a case and merge its record, round by round. Returns whether it ran; never raises for what happens in it."""
    case = change_case(CASES[name], arguments)
    before = load_results(arguments.out)
    tuned = before["tuned"].get(name, {}).get("best")
    setting = arguments.setting or tuned or next(iter(case.peer.settings))
    latest: dict[str, Any] = {}

    def keep(record: dict[str, Any]) -> None:
        latest.clear()
        latest.update(record)
        if "failed" not in record:
            latest["ratio"] = compute_ratio(case, record)
        if arguments.contender is None:
            new = strip_paths({"cases": {name: latest}, "tuned": {}}, options)
            save_results(arguments.out, merge_results(before, new))

    try:
        only = "ours" if arguments.ours_only else arguments.contender
        keep(run_case(case, options, setting=setting, only=only, on_record=keep))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        say(f"{name} failed: {' '.join(told.split())[:600]}")
        show_logs(name, options)
        # Whole rounds stand; of a case without any, what there is stands beside the reason.
        if "failed" in latest or not latest:
            keep({**latest, "failed": str(error), **describe_origin()})
        return False
    if arguments.contender is not None:
        print(json.dumps(latest, indent=1))
        return True
    if arguments.ours_only:
        print(f"{name}: ours {latest['ours'].get('tokens_per_second', 0):,.0f} tokens/s")
        return True
    print(f"{name}: {latest['ratio']['of_medians']:.3f}  {judge(case, latest)}")
    return True


def show_logs(name: str, options: Options, *, lines: int = 20) -> None:
    """The ends of the contenders' logs: the machine they lie on may be gone in a minute."""
    for log in sorted(options.folder.glob(f"{name}-*/*.log")):
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        say("\n".join([f"--- {log.parent.name}", *tail]))


def strip_paths(record: dict[str, Any], options: Options) -> dict[str, Any]:
    """The record without the folders of the machine that it was made on."""
    text = json.dumps(record)
    for folder in (options.folder, *([options.rows.parent] if options.rows else []), CHECKOUT):
        text = text.replace(f"{folder}/", "")
    return json.loads(text)


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
    ok = True
    if arguments.tune or arguments.case:
        options = make_options(arguments)
        for name in arguments.tune:
            tuned = tune_peer(change_case(CASES[name], arguments), options)
            say(f"{name}: best is {tuned['best']}")
            new = {"cases": {}, "tuned": {name: tuned}}
            new = strip_paths(new, options)
            save_results(arguments.out, merge_results(load_results(arguments.out), new))
        for number, name in enumerate(arguments.case):
            if number and options.seconds_left() < LEAST_SECONDS:
                say(f"{name}: not started, {options.seconds_left():.0f} s are left")
                ok = False
                continue
            ok = measure(name, arguments, options) and ok
    for path in arguments.merge:
        save_results(arguments.out, merge_results(load_results(arguments.out), load_results(path)))
    if arguments.table:
        import attention_choice

        page = make_page(
            load_results(arguments.out), read_cpu_results(RESULT.parent), attention_choice.read_table()
        )
        PAGE.write_text(page, encoding="utf-8")
    if not ok:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

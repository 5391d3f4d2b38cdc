"""One contender of a group of cases: its process, what it has answered, and whether it may go on."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from gpu_cases.cases import Case
from gpu_cases.options import CaseFailed, Options, make_environment, say
from gpu_cases.parity import check_parity
from gpu_cases.protocol import Contender, ContenderFailed
from gpu_cases.results import summarize
from gpu_cases.tasks import SETTLE, Inputs, find_reference, make_our_task, make_peer_task
from tunesmith.core.fingerprint import hash_code, hash_json

Role = Literal["ours", "peer"]
MODULES = {
    "ours": "ours",
    "unsloth": "unsloth_peer",
    "trl": "trl_peer",
    "trl-dpo": "trl_dpo_peer",
    "trl-grpo": "trl_grpo_peer",
}
# Of the time that a group has left, what one answer may take that is not a timed round: who hangs must leave the
# others enough to be measured.
PATIENCE = 0.5


def settle_side(case: Case, role: Role, setting: str, options: Options) -> tuple[str, dict[str, Any]]:
    """Who plays the role in the case, and with which settings (ours: keys of the job)."""
    if role == "peer":
        return case.peer.who, case.peer.settings[setting]
    return "ours", {} if options.plain else case.job


class Side:
    """A contender through all rounds of a group. `case` is the first of the cases that it stands in.

    Once it has failed, `failure` says why in one line, and its process is gone.
    """

    def __init__(self, case: Case, role: Role, setting: str, inputs: Inputs, options: Options) -> None:
        self.name, self.role, self.case = f"{case.name}-{role}", role, case
        self.who, self.settings = settle_side(case, role, setting, options)
        self.inputs, self.options = inputs, options
        self.failure = ""
        self.parity: dict[str, Any] | None = None
        self.warm_up: dict[str, Any] = {}
        self.load_seconds = self.warm_up_seconds = 0.0
        self.rounds: list[dict[str, Any]] = []
        self.start_seconds: list[float] = []
        self._process: Contender | None = None
        self._is_warm = False

    @property
    def task(self) -> dict[str, Any]:
        make_task = make_our_task if self.who == "ours" else make_peer_task
        folder = self.options.folder / self.name
        return make_task(self.case, self.settings, self.inputs, self.options, folder=folder)

    @property
    def num_done(self) -> int:
        return max(len(self.rounds), len(self.start_seconds))

    # --- its process --------------------------------------------------------------------------------------------------

    def start(self) -> Contender:
        """Its process, started if need be."""
        if self._process is None:
            task = self.task
            Path(task["folder"]).mkdir(exist_ok=True)
            self._process = Contender(
                MODULES[self.who],
                task,
                folder=Path(task["folder"]),
                environment=make_environment(self.options),
                python=sys.executable if self.who == "ours" else self.options.peer_python,
            )
            self._is_warm = False
        return self._process

    def ask(self, command: dict[str, Any], *, share: float = 1.0) -> dict[str, Any]:
        """share: of the time left, the most that the answer may take."""
        return self.start().ask(command, timeout=share * self.options.seconds_left())

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Whatever happens inside is the end of this side, and of nothing else."""
        try:
            yield
        except Exception as error:
            told = " ".join(str(error).split())
            if not isinstance(error, CaseFailed | ContenderFailed):
                place = traceback.extract_tb(error.__traceback__)[-1]
                told = f"{type(error).__name__}: {told} ({Path(place.filename).name}:{place.lineno})"
            self.failure = told[:600]
            say(f"  {self.name} failed: {self.failure}\n{self._read_log()}")
            self.stop()

    def _read_log(self, *, lines: int = 20) -> str:
        """The end of its log: the machine that it lies on may be gone in a minute."""
        if self._process is None:
            return ""
        text = self._process.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])

    # --- before the rounds --------------------------------------------------------------------------------------------

    def prepare(self, reference: Future[None] | None) -> None:
        """Gradients of the first step, and the model loaded, while others do the same; then the verdict.

        reference: when it is computed; None leaves the check out. What passed once in this folder, with the same
        settings and code, is not checked again.
        """
        if reference is not None and self._passed_file.is_file():
            self.parity, reference = json.loads(self._passed_file.read_text(encoding="utf-8")), None
            say(f"  {self.name}: gradients checked before")
        out, answer = self.options.folder / f"{self.name}-gradients.safetensors", dict[str, Any]()
        if reference is not None:
            answer = self.ask({"do": "gradients", "out": str(out)}, share=PATIENCE)
            say(f"  {self.name}: gradients are there")
        if self.case.together:
            asked = time.perf_counter()
            self.ask({"do": "load"}, share=PATIENCE)
            self.load_seconds = time.perf_counter() - asked
            say(f"  {self.name}: loaded")
        else:
            self.stop()
        if reference is not None:
            reference.result()
            self._check(out, answer)

    @property
    def _passed_file(self) -> Path:
        decides = self.task["short_job"] if self.who == "ours" else self.settings
        key = hash_json([decides, self._code])[:16]
        return find_reference(self.case, self.inputs, self.options) / f"passed-{self.who}-{key}.json"

    @property
    def _code(self) -> str:
        """What is known of the contender's code: of a peer's nothing, a folder has one version of it."""
        return hash_code() if self.who == "ours" else ""

    def _check(self, gradients: Path, answer: dict[str, Any]) -> None:
        """Raises CaseFailed if the gradients, or the rows they come from, are not the reference's."""
        self._check_rows([answer["digest"]], self.inputs.digests[:1])
        fp8 = "fp8" in (self.case.base, self.case.compute) and self.role == "ours" and not self.options.plain
        exact = self.options.plain and self.options.device == "cpu"
        reference = find_reference(self.case, self.inputs, self.options)
        try:
            parity = check_parity(reference, gradients, answer, fp8=fp8, exact=exact)
        except ValueError as error:
            raise CaseFailed(f"{self.who}: {error}") from None
        finally:
            gradients.unlink()
        distance, allowed = parity.distance.total, parity.allowed_total
        say(f"  {self.name}: gradients {distance:.3g} from fp32 (allowed {allowed:.3g})")
        if not parity.passed:
            raise CaseFailed(f"{self.who} is not timed: {parity.reason}")
        self.parity = parity.to_json()
        self._passed_file.write_text(json.dumps(self.parity), encoding="utf-8")

    def _check_rows(self, fed: list[str], planned: list[str]) -> None:
        if fed != planned:
            raise CaseFailed(f"{self.who} fed other rows to its model than the plan says")

    # --- steps --------------------------------------------------------------------------------------------------------

    def get_warm(self) -> None:
        """Compile, and take the steps that are not timed; their rows are checked."""
        process = self.start()
        if self._is_warm:
            return
        asked = time.perf_counter()
        answer = self.ask(
            {"do": "steps", "count": self.case.warm_up}, share=1.0 if self.warm_up else PATIENCE
        )
        self._check_rows(answer["digests"], self.inputs.digests)
        self._is_warm = True
        if not self.warm_up:
            self.warm_up, self.warm_up_seconds = answer, time.perf_counter() - asked
            self._note_warm_caches()
        say(f"  {self.name}: warm, {time.perf_counter() - process.started:.0f} s after its start")

    def run_round(self) -> None:
        """Timed steps. With processes that take turns, this one is started for it and stopped after it."""
        self.get_warm()
        answer = self.ask({"do": "steps", "count": SETTLE + self.case.steps})
        timed = {key: answer[key][SETTLE:] for key in ("seconds", "tokens", "targets", "losses")}
        timed |= {key: answer[key] for key in ("peak_bytes", "reserved_bytes", "facts")}
        self.rounds.append(timed)
        rate = sum(timed["tokens"]) / sum(timed["seconds"])
        say(f"  {self.name}: {rate:,.{'1' if self.case.unit == 'answers' else '0'}f} {self.case.unit}/s")
        if not self.case.together:
            self.stop()

    def time_start(self, *, counts: bool) -> None:
        """Take the seconds from starting the process to the end of its first step; keep them if the pair counts."""
        process = self.start()
        self.warm_up = self.ask({"do": "steps", "count": 1}, share=1.0 if self.warm_up else PATIENCE)
        seconds = time.perf_counter() - process.started
        self._check_rows(self.warm_up["digests"], self.inputs.digests[:1])
        self._note_warm_caches()
        say(f"  {self.name}: first step after {seconds:.1f} s{'' if counts else ', which filled the caches'}")
        self.stop()
        if counts:
            self.start_seconds.append(seconds)

    @property
    def _warm_caches_file(self) -> Path:
        """There if caches on disk hold what a first step of this side compiles: named by what decides that."""
        decides: Any = self.settings
        if self.who == "ours":
            job = self.task["job"]
            decides = {**job, "data": None, "train": {**job["train"], "steps": None}}
        case, inputs = self.case, self.inputs
        decides = [decides, self._code, case.shape, case.method, asdict(case.rows), case.batch_rows]
        key = hash_json([*decides, inputs.max_tokens, self.options.device])[:16]
        return self.options.folder / "compiled" / f"warm-{self.who}-{key}.json"

    @property
    def has_warm_caches(self) -> bool:
        return self._warm_caches_file.is_file()

    def _note_warm_caches(self) -> None:
        self._warm_caches_file.write_text(json.dumps({"by": self.name}), encoding="utf-8")

    # --- the record ---------------------------------------------------------------------------------------------------

    def describe(self, num_rounds: int) -> dict[str, Any]:
        """What it has done, its first `num_rounds` rounds: as many as the other side has."""
        rounds = self.rounds[:num_rounds]
        last = rounds[-1] if rounds else self.warm_up
        record: dict[str, Any] = {
            "who": self.who,
            "settings": self.settings if self.role == "peer" else {},
            "first_loss": self.warm_up["losses"][0],
            "last_loss": last["losses"][-1],
            "facts": last["facts"],
            "load_seconds": self.load_seconds,
            "warm_up_seconds": self.warm_up_seconds,
            "warm_up_step_seconds": self.warm_up["seconds"],
        }
        if self.start_seconds:
            record["start_seconds"] = self.start_seconds[:num_rounds]
        if rounds:
            record |= summarize(rounds)
            record |= {key: max(r[key] for r in rounds) for key in ("peak_bytes", "reserved_bytes")}
            record["rounds"] = [{k: r[k] for k in ("seconds", "tokens", "targets")} for r in rounds]
        return record

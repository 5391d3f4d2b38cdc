"""Cases that share a side are measured together: one process a side, everything untimed at once, then turns.

Of a group with our jobs A1 and A2 against the same peer B, the rounds are A1-A2-B, A1-A2-B, ...; each case gets a
record of its own, as if it had been alone. Before the first step all sides compute gradients and load side by side,
while the reference is computed; from then on only one of them works at a time, and nothing else does. (What is
compiled in company is chosen well: torch's compiler takes the fastest of a kernel's many timings, not their median.)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cpu_vs_trl import describe_hardware
from gpu_cases.cases import Case
from gpu_cases.options import Options, say
from gpu_cases.sides import Role, Side, settle_side
from gpu_cases.tasks import make_inputs, make_our_task, make_reference
from tunesmith.core.fingerprint import describe_versions, hash_code, hash_json

# (name of the case, its record so far)
OnRecord = Callable[[str, dict[str, Any]], None]
ROLES: tuple[Role, ...] = ("ours", "peer")
# A round is begun with so many times the longest one's seconds left.
MARGIN = 1.3


@dataclass(frozen=True)
class Entry:
    """A case to be measured. setting: name of the peer's settings."""

    case: Case
    setting: str


@dataclass(frozen=True)
class Pair:
    """A case of a running group and its sides; with only one of them, nothing is compared."""

    entry: Entry
    sides: dict[Role, Side]

    @property
    def failure(self) -> str:
        return next((side.failure for side in self.sides.values() if side.failure), "")

    @property
    def num_rounds(self) -> int:
        """Whole ones."""
        return min(side.num_done for side in self.sides.values())


# --- which cases go together ------------------------------------------------------------------------------------------


def plan_groups(entries: Sequence[Entry], options: Options) -> list[list[Entry]]:
    """The cases in groups: each joins the first group with a member that it shares a side with."""
    groups: list[list[Entry]] = []
    for entry in {entry.case.name: entry for entry in entries}.values():
        for group in groups:
            if any(_share_side(entry, member, options) for member in group):
                group.append(entry)
                break
        else:
            groups.append([entry])
    return groups


def _share_side(one: Entry, other: Entry, options: Options) -> bool:
    return bool(
        _decide_work(one.case) == _decide_work(other.case)
        and {_name_side(one, role, options) for role in ROLES}
        & {_name_side(other, role, options) for role in ROLES}
    )


def _decide_work(case: Case) -> list[Any]:
    """What both sides of a case do: equal for all cases of a group, which also have one reference."""
    work = [case.objective, case.shape, case.method, case.rows, case.batch_rows, case.steps, case.warm_up]
    return [*work, case.together, case.measure, case.base == "nf4"]


def _name_side(entry: Entry, role: Role, options: Options) -> str:
    return f"{role}-{hash_json(list(settle_side(entry.case, role, entry.setting, options)))}"


# --- measuring --------------------------------------------------------------------------------------------------------


class GroupRun:
    """A group being measured. The first case stands for all in what they have in common."""

    def __init__(
        self, entries: Sequence[Entry], options: Options, *, only: Role | None, on_record: OnRecord
    ) -> None:
        self.case = entries[0].case
        self.inputs = make_inputs(self.case, options)
        # Inputs are shared by cases: the time they take is nobody's.
        until = min(options.deadline, time.monotonic() + options.case_seconds * len(entries))
        self.options, self._on_record = replace(options, deadline=until), on_record
        made: dict[str, Side] = {}
        self.pairs: list[Pair] = []
        for entry in entries:
            sides: dict[Role, Side] = {}
            for role in ROLES if only is None else (only,):
                name = _name_side(entry, role, options)
                if name not in made:
                    made[name] = Side(entry.case, role, entry.setting, self.inputs, self.options)
                sides[role] = made[name]
            self.pairs.append(Pair(entry, sides))
        # Ours first: what becomes of a peer costs us nothing.
        self.sides = sorted(made.values(), key=lambda side: ROLES.index(side.role))

    def run(self) -> None:
        """Measure; every record is told as often as it grows, and once more in the end."""
        try:
            self._prepare()
            if self.case.measure == "start":
                self._measure_starts()
            else:
                self._measure_speed()
        finally:
            with ThreadPoolExecutor(len(self.sides)) as pool:
                list(pool.map(Side.stop, self.sides))
        for pair in self.pairs:
            self._tell(pair)

    def _prepare(self) -> None:
        """Everything before the first step, of all sides at once."""
        with ThreadPoolExecutor(len(self.sides) + 1) as pool:
            reference = None
            if not self.options.skip_parity and self.case.objective != "grpo":
                reference = pool.submit(make_reference, self.case, self.inputs, self.options)

            def prepare(side: Side) -> None:
                with side.failing():
                    side.prepare(reference)

            list(pool.map(prepare, self.sides))

    def _measure_speed(self) -> None:
        """A-B-A-B until the rounds are done or another one would not fit the time. Each gets warm in its first turn."""
        longest = 0.0
        for number in range(self.options.rounds):
            if number and self._is_late(longest, number):
                break
            took = 0.0
            for side in self._list_wanted():
                with side.failing():
                    if self.case.together:
                        side.get_warm()
                    began = time.monotonic()
                    side.run_round()
                    took += time.monotonic() - began
                self._tell_of(side)
            longest = max(longest, took)

    def _measure_starts(self) -> None:
        """Caches on disk are warm: if they are not known to be, the first pair warms them and does not count."""
        filled = 0 if all(side.has_warm_caches for side in self.sides) else 1
        longest = 0.0
        for number in range(filled + self.options.rounds):
            if number > filled and self._is_late(longest, number - filled):
                break
            began = time.monotonic()
            for side in self._list_wanted():
                with side.failing():
                    side.time_start(counts=number >= filled)
                self._tell_of(side)
            longest = max(longest, time.monotonic() - began)

    def _is_late(self, longest: float, number: int) -> bool:
        if self.options.seconds_left() >= MARGIN * longest:
            return False
        say(f"  time is up after {number} of {self.options.rounds} rounds")
        return True

    def _list_wanted(self) -> Iterator[Side]:
        """Sides that can run and have a case that stands. Ours gets a first round whatever becomes of its peers."""
        for side in self.sides:
            stands = any(side in pair.sides.values() and not pair.failure for pair in self.pairs)
            if not side.failure and (stands or (side.role == "ours" and not side.num_done)):
                yield side

    # --- records ------------------------------------------------------------------------------------------------------

    def _tell_of(self, side: Side) -> None:
        for pair in self.pairs:
            if side in pair.sides.values():
                self._tell(pair)

    def _tell(self, pair: Pair) -> None:
        self._on_record(pair.entry.case.name, self._describe(pair))

    def _describe(self, pair: Pair) -> dict[str, Any]:
        """The record: whole once every side has a round; before, `failed` says why it is not."""
        case = pair.entry.case
        done = [side.num_done for side in pair.sides.values()]
        num_rounds = min(done) or max(done)
        warm = {role: side for role, side in pair.sides.items() if side.warm_up}
        record = {
            "case": asdict(case),
            "peer_setting": pair.entry.setting,
            "measured_with": [other.entry.case.name for other in self.pairs if other is not pair],
            "parity": self._describe_parity(pair),
            "num_rounds": num_rounds,
            "steps": case.steps,
            "rows_sha256": self.inputs.digests[0],
            **{role: side.describe(num_rounds) for role, side in warm.items()},
            "job": self._make_job(case),
            "hardware": describe_hardware() | next((s.warm_up["facts"]["gpu"] for s in warm.values()), {}),
            **describe_origin(),
        }
        if not pair.num_rounds:
            open_roles = [role for role, side in pair.sides.items() if not side.num_done]
            record["failed"] = pair.failure or f"not measured: {' and '.join(open_roles)}"
        elif len(pair.sides) == 1:
            record["failed"] = f"only {next(iter(pair.sides))} was run"
        return record

    def _describe_parity(self, pair: Pair) -> Any:
        if pair.entry.case.objective == "grpo":
            return "answers are sampled"
        if self.options.skip_parity:
            return "skipped"
        return {role: side.parity for role, side in pair.sides.items() if side.parity}

    def _make_job(self, case: Case) -> dict[str, Any]:
        keys = settle_side(case, "ours", "", self.options)[1]
        return make_our_task(case, keys, self.inputs, self.options, folder=self.options.folder)["job"]


def run_group(
    entries: Sequence[Entry], options: Options, *, only: Role | None = None, on_record: OnRecord
) -> dict[str, str]:
    """Measure the cases of a group; with `only`, one side of each. Returns the failures, one line by case.

    on_record: called with a case's record whenever it has grown. Raises CaseFailed if there are no inputs.
    """
    for entry in entries:
        say(f"{entry.case.name}: {entry.case.what}, against {entry.case.peer.label} ({entry.setting})")
    run = GroupRun(entries, options, only=only, on_record=on_record)
    run.run()
    return {pair.entry.case.name: pair.failure for pair in run.pairs if pair.failure}


def prepare_group(entries: Sequence[Entry], options: Options) -> None:
    """Only write the inputs and the reference of a group. Raises CaseFailed."""
    inputs = make_inputs(entries[0].case, options)
    make_reference(entries[0].case, inputs, options)


def describe_origin() -> dict[str, Any]:
    return {
        "commit": describe_versions().get("commit", ""),
        "code": hash_code(),
        # Names of files and folders, not where they happened to lie.
        "command": " ".join(["python benchmarks/gpu.py", *(Path(word).name for word in sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }

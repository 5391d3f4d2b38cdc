"""A configuration of another framework, read key by key by that framework's table, and the report of what became of it.

Every key ends as exactly one of: mapped, implied, not supported. Defaults of theirs that decide something are resolved
into the job and listed apart.
"""

# pyright: standard
# Untyped nodes of YAML pass through here; strict would only ask for casts.

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tunesmith.core.errors import JobError
from tunesmith.job.importing import axolotl, llamafactory, trl, unsloth
from tunesmith.job.importing.rules import (
    UNSET,
    At,
    Files,
    Framework,
    Implied,
    Key,
    NotSupported,
    Taken,
    WrongValue,
)
from tunesmith.job.importing.sources import count_rows
from tunesmith.job.importing.trainer import StepsUnknown
from tunesmith.job.load import Location, check_values, read_yaml
from tunesmith.job.spec import DataSpec, LoraSpec, SplitSpec, TrainSpec

FRAMEWORKS: tuple[Framework, ...] = (
    axolotl.FRAMEWORK,
    llamafactory.FRAMEWORK,
    trl.FRAMEWORK,
    unsloth.CLI,
    unsloth.FLAT,
)
Status = Literal["mapped", "implied", "not supported"]
# Lists that several keys add to.
_JOINED = ("train.trackers", "method.new_tokens", "method.modules_to_save")
_SECRET = re.compile(r"(^|\.)(token|\w*(hub|hf|wandb)_token|\w*api_key|\w*_secret)$")


@dataclass(frozen=True, slots=True)
class Entry:
    """What became of one key.

    key: its path; empty for a habit without a key. place: file:line, empty for a default. value: theirs. to: our key.
    ours: our value. from_default: theirs, not in the file. fatal: no job without it.
    """

    key: str
    place: str
    value: Any
    status: Status
    to: str = ""
    ours: Any = None
    remark: str = ""
    from_default: bool = False
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class Import:
    """job: keys of a job file, or None if no job can be made; failures says why then. origins: of each key of the job,
    where its value comes from, in words."""

    framework: Framework
    file: Path
    entries: list[Entry]
    job: dict[str, Any] | None
    origins: dict[str, str]
    failures: list[str]

    @property
    def not_supported(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.status == "not supported"]

    def to_json(self) -> dict[str, Any]:

        def counts(of_defaults: bool) -> dict[str, int]:
            found = [entry.status for entry in self.entries if entry.from_default == of_defaults]
            return {status: found.count(status) for status in ("mapped", "implied", "not supported")}

        return {
            "framework": self.framework.name,
            "defaults_of_version": self.framework.version,
            "file": str(self.file),
            "counts": counts(False),
            "counts_of_defaults": counts(True),
            "keys": [asdict(entry) for entry in self.entries],
            "job": self.job,
            "failures": self.failures,
        }


def import_configuration(path: Path, *, framework: str | None = None, out: Path) -> Import:
    """Read a configuration. framework: its name; None recognises it by its keys. out: where the job will stand.

    Raises JobError if the file cannot be read, its kind not told, or a value is none that its framework takes.
    """
    values, places = read_yaml(path, what="a configuration", cure="Check the file")
    dialect = recognise(values, str(path), framework)
    return _Run(dialect, values, places, Files(path, out)).carry_out()


def recognise(values: Mapping[str, Any], place: str, name: str | None = None) -> Framework:
    """Whose configuration it is: the framework with most of the keys that it alone has."""
    dialects = [one for one in FRAMEWORKS if name in (None, one.name)]
    scores = {id(one): 0.0 for one in dialects}
    for one in dialects:
        patterns = {pattern for pattern, _ in _flatten(values, one.table).values()}
        scores[id(one)] = len(patterns & one.telltale) + len(patterns & one.table.keys()) / 1000
    first, *others = sorted(dialects, key=lambda one: -scores[id(one)])
    if name is not None:
        return first
    if scores[id(first)] < 1:
        raise JobError(
            place,
            "is no configuration of Axolotl, LLaMA-Factory, TRL or Unsloth that can be told by its keys",
            cure="Name it with --from",
        )
    if int(scores[id(others[0])]) >= int(scores[id(first)]) and others[0].name != first.name:
        raise JobError(
            place,
            f"could be a configuration of {first.title} or of {others[0].title}",
            cure=f"Say which: --from {first.name} or --from {others[0].name}",
        )
    return first


def _flatten(values: Mapping[str, Any], table: Mapping[str, Key]) -> dict[str, tuple[str, Any]]:
    """path -> (its name in the table, value). Goes into mappings and lists only where the table has keys inside."""
    inner = {name[:end] for name in table for end in (match.start() for match in re.finditer(r"\.", name))}
    flat: dict[str, tuple[str, Any]] = {}

    def walk(node: Mapping[str, Any], path: str, name: str) -> None:
        for key, value in node.items():
            at, called = path + key, name + key
            if isinstance(value, dict) and value and called in inner:
                walk(value, at + ".", called + ".")
            elif (
                isinstance(value, list)
                and value
                and called + "[]" in inner
                and all(isinstance(item, dict) and item for item in value)
            ):
                for index, item in enumerate(value):
                    walk(item, f"{at}[{index}].", called + "[].")
            else:
                flat[at] = (called, None if value in ("", [], {}) else value)

    walk(values, "", "")
    return flat


class _Run:
    """One import under way: entries and our values as they come."""

    def __init__(
        self, framework: Framework, values: Mapping[str, Any], places: Mapping[Location, str], files: Files
    ) -> None:
        self.framework, self.files = framework, files
        self.flat = _flatten(values, framework.table)
        self.places = {_path_of(location): place for location, place in places.items()}
        self.at = At({path: value for path, (_, value) in self.flat.items()}, framework.table, files)
        self.entries: list[Entry] = []
        self.ours: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.origin_places: dict[str, str] = {}
        self.warmup_steps: float | None = None

    def carry_out(self) -> Import:
        try:
            self.trains_adapters = self.framework.method(self.at) != "full"
        except WrongValue as error:
            raise self._wrong(error, "") from None
        for path, (name, value) in self.flat.items():
            self._take(path, name, value)
        for name, key in self.framework.table.items():
            self._take_default(name, key)
        for habit in self.framework.habits:
            if habit.to not in self.ours:
                self._write(habit.to, habit.value, f"{self.framework.title}: {habit.text}", "")
                self.entries.append(
                    Entry("", "", None, "mapped", habit.to, habit.value, habit.text, from_default=True)
                )
        self._settle_warmup()
        failures = [f"{entry.key}: {entry.remark}" for entry in self.entries if entry.fatal]
        if not failures:
            failures = [
                f"the configuration does not say what {what}"
                for key, what in (("model", "the base model is"), ("data.train", "rows are trained"))
                if key not in self.ours
            ]
        job = None if failures else _nested(self.ours)
        if job is not None:
            self._check(job)
        return Import(self.framework, self.files.config, self.entries, job, self.origins, failures)

    def _take(self, path: str, name: str, value: Any) -> None:
        place = self.places.get(path, str(self.files.config))
        shown = "(hidden)" if _SECRET.search(name) and value else value
        key = self.framework.table.get(name)
        if key is None:
            guess = difflib.get_close_matches(name, self.framework.table, n=1, cutoff=0.8)
            known = f"; did you mean {guess[0]!r}?" if guess else ""
            self.entries.append(Entry(path, place, shown, "not supported", remark=f"unknown key{known}"))
        elif value is None and not key.nullable:
            self.entries.append(Entry(path, place, None, "implied", remark="empty, as if it were not there"))
        elif key.adapter and not self.trains_adapters:
            self.entries.append(
                Entry(path, place, shown, "implied", remark="of adapters; every weight trains here")
            )
        else:
            self.entries.append(self._outcome(path, place, shown, value, key))

    def _take_default(self, name: str, key: Key) -> None:
        """Their default, where the file does not say it and no key of the file decides the same key of ours."""
        if self.at.given(name) or (name in self.flat and key.nullable) or "[]" in name:
            return
        if key.adapter and not self.trains_adapters:
            return
        if key.required:
            if key.to not in self.ours:
                remark = f"is missing; {self.framework.title} has no default for it"
                self.entries.append(
                    Entry(
                        name, "", None, "not supported", key.to, remark=remark, from_default=True, fatal=True
                    )
                )
            return
        if key.default is UNSET or (key.to and key.to in self.ours):
            return
        entry = self._outcome(name, "", key.default, key.default, key, from_default=True)
        if entry.status != "implied":
            self.entries.append(entry)

    def _outcome(
        self, path: str, place: str, shown: Any, value: Any, key: Key, from_default: bool = False
    ) -> Entry:
        item = path[: path.rindex("].") + 2] if "]." in path else ""
        at = At(self.at.values, self.at.table, self.files, item)
        origin = f"{path}, {self.framework.title}'s default" if from_default else f"{path}, {place}"
        try:
            answer = key.turn(value, at)
        except NotSupported as error:
            if isinstance(error, StepsUnknown):
                self.warmup_steps = error.steps
            ours = None if error.instead is UNSET else error.instead
            if error.instead is not UNSET and key.to:
                self._write(key.to, error.instead, f"in place of {path}: {error.reason}", place)
            for target, extra in error.also.items():
                self._write(target, extra, f"in place of {path}", place)
            return Entry(
                path, place, shown, "not supported", key.to if error.instead is not UNSET else "", ours,
                error.reason, from_default, error.fatal,
            )  # fmt: skip
        except WrongValue as error:
            raise self._wrong(error, path) from None
        if isinstance(answer, Implied):
            return Entry(path, place, shown, "implied", remark=answer.remark, from_default=from_default)
        taken = answer if isinstance(answer, Taken) else Taken(answer)
        origin += f" ({taken.remark})" if taken.remark else ""
        if not self._write(key.to, taken.value, origin, place):
            remark = f"{key.to} is {self.ours[key.to]!r} already, from {self.origins[key.to]}"
            return Entry(path, place, shown, "not supported", remark=remark, from_default=from_default)
        for target, extra in taken.also.items():
            self._write(target, extra, origin, place)
        return Entry(path, place, shown, "mapped", key.to, taken.value, taken.remark, from_default)

    def _settle_warmup(self) -> None:
        """Warm-up in steps as a share after all, where the rows are in files here and can be counted."""
        if (
            self.warmup_steps is None
            or not {"data.train", "train.batch_rows", "train.epochs"} <= self.ours.keys()
        ):
            return
        steps = self.warmup_steps
        sources = self.ours["data.train"]
        counted = 0.0
        for one in sources if isinstance(sources, list) else [sources]:
            path, weight = (one, 1) if isinstance(one, str) else (one["path"], one.get("weight", 1))
            if (rows := count_rows(self.files.out.parent / path)) is None:
                return
            counted += rows * weight
        held_out = self.ours.get("data.split.validation")
        kept = counted * (1 - held_out) if isinstance(held_out, float) else counted
        total = max(math.ceil(kept / self.ours["train.batch_rows"]) * self.ours["train.epochs"], 1)
        share = min(round(steps / total, 6), 0.999)
        remark = f"{steps:g} of about {total:g} steps, by the rows there are now; a share of the steps here"
        self.ours["train.warmup"] = share
        for index, entry in enumerate(self.entries):
            if entry.to == "train.warmup":
                self.entries[index] = replace(entry, status="mapped", ours=share, remark=remark)
                self.origins["train.warmup"] = f"{entry.key}, {entry.place or 'their default'} ({remark})"

    def _wrong(self, error: WrongValue, path: str) -> JobError:
        key = error.key or path
        place = self.places.get(key, str(self.files.config))
        return JobError(place, f"{key} is {self.at[key]!r}"[:100], rule=f"it should be {error}")

    def _write(self, target: str, value: Any, origin: str, place: str) -> bool:
        """The first key that decides one of ours has it; False if this one says something else."""
        if target in _JOINED:
            value = list(dict.fromkeys([*self.ours.get(target, []), *value]))
        elif target in self.ours:
            return self.ours[target] == value
        self.ours[target], self.origins[target], self.origin_places[target] = value, origin, place
        return True

    def _check(self, job: dict[str, Any]) -> None:
        """Raise JobError at their line for a value that no job can have."""
        places: dict[Location, str] = {}
        for target, place in self.origin_places.items():
            places[tuple(target.split("."))] = place or str(self.files.config)
        check_values(job, places, str(self.files.config))


def _path_of(location: Location) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(
        "."
    )


def _nested(ours: Mapping[str, Any]) -> dict[str, Any]:
    """`method.rank` and the like as mappings, in the order of the job's reference."""
    job: dict[str, Any] = {}
    for target in sorted(ours, key=_ORDER.index):
        *parents, last = target.split(".")
        if parents == ["method"] and last != "name" and ours["method.name"] == "full":
            continue
        node = job
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = ours[target]
    return job


_ORDER = [
    "model",
    *(f"data.{key}" for key in DataSpec.model_fields if key != "split"),
    *(f"data.split.{key}" for key in SplitSpec.model_fields),
    *(f"method.{key}" for key in LoraSpec.model_fields),
    *(f"train.{key}" for key in TrainSpec.model_fields),
]

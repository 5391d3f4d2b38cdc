"""On-disk schema of `frameworks.json`: what a report shows of other frameworks beside their figures.

Written by the parent of all workers from what they left, read by the report, which knows of no framework.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.core.checked import read_checked
from tunesmith.core.errors import DataError

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """What a framework says to a job with a feature. finding: why it cannot, "" where it can; cure: what then."""

    finding: str = ""
    cure: str = ""

    @property
    def can(self) -> bool:
        return not self.finding


@dataclass(frozen=True, slots=True)
class Feature:
    """A row of the matrix. setting: how a job says it, `method: {name: lora, dora: true}`. answers: by framework."""

    group: str
    title: str
    setting: str
    answers: dict[str, Answer]


@dataclass(frozen=True, slots=True)
class Matrix:
    """What each framework can express. frameworks: name -> title, our own engine first."""

    frameworks: dict[str, str]
    features: tuple[Feature, ...]

    def missing(self, framework: str) -> list[Feature]:
        """Features that it cannot express."""
        return [row for row in self.features if not row.answers.get(framework, Answer()).can]

    def public_json(self) -> dict[str, Any]:
        """The stable object of `frameworks matrix --json`; fields are added, never renamed. `finding` and `cure` are
        null where a framework can."""
        features = [
            {
                "group": row.group,
                "title": row.title,
                "setting": row.setting,
                "answers": {
                    name: {"can": answer.can, "finding": answer.finding or None, "cure": answer.cure or None}
                    for name, answer in row.answers.items()
                },
            }
            for row in self.features
        ]
        return {"frameworks": self.frameworks, "features": features}


@dataclass(frozen=True, slots=True)
class Fixed:
    """Something that the job fixes. said: the framework's settings that follow from it, name -> value."""

    name: str
    value: str
    said: dict[str, str]


@dataclass(frozen=True, slots=True)
class FrameworkPage:
    """One arm that another framework trained, as its first seed was run.

    versions:  distribution -> version, in its environment.
    fixed:     what the job fixes, and how it was said.
    told:      settings that were said besides, so that no default decides.
    altered:   settings that the framework used otherwise than they were said: name -> (said, used).
    defaults:  what is left of its configuration: its own defaults.
    log:       the end of what it printed; log_file: where all of it lies, relative to the run folder.
    """

    arm: str
    framework: str
    title: str
    versions: dict[str, str]
    fixed: tuple[Fixed, ...]
    told: dict[str, str]
    altered: dict[str, tuple[str, ...]]
    defaults: dict[str, str]
    warnings: tuple[str, ...]
    log: str
    log_file: str


@dataclass(frozen=True, slots=True)
class FrameworkPages:
    """`frameworks.json`."""

    matrix: Matrix
    pages: tuple[FrameworkPage, ...]

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: Any, *, place: str = "frameworks.json") -> FrameworkPages:
        """Raises DataError for another schema, and for a field that is missing or of another type."""
        if not isinstance(value, Mapping) or value.get("schema") != SCHEMA:  # pyright: ignore[reportUnknownMemberType]
            raise DataError(
                place, "is of another schema", rule=f"this version reads schema {SCHEMA}", cure="Delete it"
            )
        given: dict[str, Any] = {**value}
        return read_checked(cls, {key: item for key, item in given.items() if key != "schema"}, place=place)

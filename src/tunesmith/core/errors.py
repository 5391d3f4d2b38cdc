"""The one error tree. Every fault a user can cause or cure is a `TunesmithError`.

A message has four parts, printed as one line: *place* (file, line, key), *finding* (what was seen), *rule*
(what should hold) and *cure* (what to do):

    train.jsonl:17: last message is from 'user'; SFT learns from an assistant answer. Add one, or pass
    --on-bad-row skip

    TunesmithError            exit code 1 unless a subclass says otherwise
    ├── JobError        2     the job file, --set, or command line
    ├── DataError       2     rows, templates, tokenizers
    ├── ModelError      2     model folders, weights, adapters
    ├── RunDirError     2     the output folder: in use, read-only, disk full
    ├── SetupError      2     a missing extra, no GPU, a port taken
    ├── TrainingFailed  1     non-finite loss, out of memory
    ├── ArmFailed       1     an arm of a comparison ended without a result
    ├── EndpointFailed  1     an endpoint that other programs serve, after the last attempt
    └── Interrupted     130   Ctrl-C (130) or SIGTERM (143), checkpoint saved

Broken call contracts raise `ValueError`; internal invariants use `assert`. To add an error, subclass here.
"""

from __future__ import annotations


class TunesmithError(Exception):
    """A fault told in one line: place, finding, rule, cure."""

    exit_code = 1

    def __init__(self, place: str, finding: str, *, rule: str = "", cure: str = "") -> None:
        super().__init__(place, finding, rule, cure)
        self.place, self.finding, self.rule, self.cure = place, finding, rule, cure

    def __str__(self) -> str:
        text = f"{self.place}: {self.finding}" if self.place else self.finding
        if self.rule:
            text += f"; {self.rule}"
        if self.cure:
            text += f"{'' if text.endswith('?') else '.'} {self.cure}"
        return " ".join(text.split())


class JobError(TunesmithError):
    exit_code = 2


class DataError(TunesmithError):
    exit_code = 2


class ModelError(TunesmithError):
    exit_code = 2


class RunDirError(TunesmithError):
    exit_code = 2


class SetupError(TunesmithError):
    exit_code = 2


class TrainingFailed(TunesmithError):
    exit_code = 1


class ArmFailed(TunesmithError):
    exit_code = 1


class EndpointFailed(TunesmithError):
    exit_code = 1


class Interrupted(TunesmithError):
    """Stopped by a signal after saving; `exit_code` is 128 + the signal's number."""

    def __init__(self, place: str, finding: str, *, signal_number: int, cure: str = "") -> None:
        super().__init__(place, finding, cure=cure)
        self.exit_code = 128 + signal_number

"""What every framework is handed: token rows, their order, what is trained, and each number that the job fixes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.core.checked import read_checked


@dataclass(frozen=True, slots=True)
class Lora:
    """Adapters, as PEFT's `adapter_config.json` says it. start: folder with the ones that training begins from."""

    start: str
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    rslora: bool
    dora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]


@dataclass(frozen=True, slots=True)
class RawRows:
    """Training rows as our data layer read them, for a framework's own preprocessing (`compare.track: native`).

    rows:     JSONL, a line for each of `Handoff.rows`: {"messages": [{"role", "content"}]}, {"prompt", "completion"} or
              {"text"}, by `kind`. A chat with an answer that is not trained also has {"train": [bool of each message]}.
    trains:   what the loss is over: "the answer", the only one of each row; "all answers"; "last answer" of several;
              "some answers", by weights; of a text "everything".
    too_long: what the job does with rows above `max_tokens`. Those that it drops are not among `rows`.
    bos:      what the tokenizer writes before plain text by itself; "" if nothing.
    template: the chat template's source, None for rows that are no chat.
    end_token: what ends an answer in the template, where that is one token; else "".
    system_turn: what the template writes for a system turn of `{{content}}` alone; None if it refuses.
    marks_answers: the template has `{% generation %}`.
    extras:   the first thing in the rows beside roles and texts, as in "tool calls"; "" if there is none.
    report:   where the worker writes {"row", "input_ids", "labels"} of each row that is left, one a line.
    """

    rows: str
    kind: Literal["chat", "completion", "text", "several kinds"]
    trains: Literal["the answer", "all answers", "last answer", "some answers", "everything"]
    max_tokens: int
    too_long: Literal["drop", "truncate", "refuse"]
    bos: str
    stop_token: str
    template: str | None
    end_token: str
    system_turn: str | None
    marks_answers: bool
    extras: str
    report: str


@dataclass(frozen=True, slots=True)
class Handoff:
    """One training, or its first steps for a parity record. Plain data; paths are absolute.

    model:        folder of the base. stored_dtype: of its weights, and of those that full fine-tuning leaves.
    rows, validation: JSONL of {"input_ids", "labels"}; labels are ids where the loss counts, else -100. The sealed test
                  rows are not among them.
    order:        JSON: for each epoch its steps, for each step the numbers of its rows in `rows`. An epoch's last step
                  may be smaller. The loss of a step is divided by the target tokens of the whole step.
    lora:         None trains every weight.
    base:         storage of frozen linear layers, but for the head; the rest is in the training precision. nf4: blocks
                  of 64, absolute maxima in fp32, or with `double_quant` as 8-bit codes in blocks of 256.
    micro_rows:   rows per forward pass, a divisor of `batch_rows`.
    warmup_steps, total_steps: of the whole schedule, also where only the first steps are taken.
    clip_norm:    0 leaves gradients as they are.
    evaluate_every: validation loss after that many steps, and after the last; 0 at the ends of epochs, -1 never.
    steps_file, weights, record: what the worker leaves: StepRecords, the adapter's or model's folder (None: nothing is
                  kept), its record.
    parity_steps: take that many steps only and write `parity`, a ParityRecord; 0 trains.
    raw:          in the native track, what to train on in place of `rows`.
    """

    label: str
    model: str
    stored_dtype: str
    rows: str
    validation: str | None
    order: str
    lora: Lora | None
    base: Literal["full", "nf4"]
    double_quant: bool
    batch_rows: int
    micro_rows: int
    total_steps: int
    warmup_steps: int
    learning_rate: float
    schedule: Literal["cosine", "linear", "constant"]
    optimizer: Literal["adamw", "adamw-8bit"]
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    clip_norm: float
    seed: int
    precision: Literal["fp32", "bf16", "fp16"]
    device: Literal["cpu", "cuda"]
    compile: bool
    evaluate_every: int
    keep_best: bool
    scratch: str
    steps_file: str
    record: str
    weights: str | None
    parity: str
    parity_steps: int = 0
    raw: RawRows | None = None

    def to_json(self) -> dict[str, Any]:
        value = dataclasses.asdict(self)
        if self.raw is None:
            del value["raw"]
        return value

    @classmethod
    def from_json(cls, value: Any, *, place: str) -> Handoff:
        return read_checked(cls, value, place=place)

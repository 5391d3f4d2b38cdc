"""`compare.samples: false`: a report that can be given away holds no words of any row."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path
from typing import Any

import tunesmith
from tunesmith import api
from tunesmith.comparing.result import compare_run
from tunesmith.core.events import Event
from tunesmith.core.rundir import RunDir
from tunesmith.job.load import job_from

WORDS = 3
ANIMALS = "heron badger otter lynx stoat vole adder newt rook shrew marten polecat".split()


def make_rows() -> list[dict[str, str]]:
    """Truths are JSON, whose keys the report would show field by field."""
    return [
        {
            "prompt": f"Which winter coat does the {animal} wear in month {number}?",
            "completion": json.dumps({f"coat of that {animal}": f"brown with {number} grey stripes"}),
        }
        for number, animal in enumerate(ANIMALS)
    ]


def make_job(folder: Path, *, samples: bool) -> dict[str, Any]:
    rows = make_rows()
    for name, part in (("train", rows[:8]), ("test", rows[8:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
    return {
        "model": "tunesmith/tiny",
        "data": {
            "train": str(folder / "train.jsonl"),
            "split": {"validation": 0.0, "test": str(folder / "test.jsonl")},
        },
        "method": {"name": "lora", "rank": 2},
        "train": {"steps": 1, "evaluate_every": "never", "learning_rate": 1e-3},
        "evaluate": {"max_new_tokens": 4, "forgetting": False, "shots": 1},
        "compare": {"arms": ["few-shot", "lora"], "seeds": [0], "samples": samples},
    }


def list_phrases() -> set[str]:
    """Every three words in a row of a question or an answer."""
    texts = [text for row in make_rows() for text in row.values()]
    split = [text.split() for text in texts]
    return {" ".join(words[at : at + WORDS]) for words in split for at in range(len(words) - WORDS + 1)}


def find_phrases(out: Path) -> set[str]:
    """Those that stand in a file which is published: all but the arms' folders and the prepared rows."""
    texts = [unescape(path.read_text(encoding="utf-8")) for path in out.iterdir() if path.is_file()]
    plain = "\n".join([*texts, *(text.replace('\\"', '"') for text in texts)])
    return {phrase for phrase in list_phrases() if phrase in plain}


def test_a_published_file_holds_no_words_of_any_row_and_nothing_is_trained_for_it(tmp_path: Path) -> None:
    out, events = tmp_path / "out", list[Event]()
    with_rows = tunesmith.compare(make_job(tmp_path, samples=True), out=out)
    test_rows = {phrase for phrase in list_phrases() if any(name in phrase for name in ANIMALS[8:])}
    assert find_phrases(out) >= test_rows

    without = tunesmith.compare(make_job(tmp_path, samples=False), out=out, on_event=events.append)

    assert find_phrases(out) == set()
    assert not [event for event in events if event.kind == "step"]
    assert without.verdict == with_rows.verdict
    assert without.table == with_rows.table
    assert "left out of this report" in (out / "report.html").read_text(encoding="utf-8")
    api.report(out)
    assert find_phrases(out) == set()


def test_what_an_arm_ended_with_is_not_quoted(tmp_path: Path) -> None:
    job = make_job(tmp_path, samples=False)
    job["compare"]["arms"] = ["few-shot"]
    tunesmith.compare(job, out=tmp_path / "out")
    reason = f"cannot tokenize {make_rows()[0]['prompt']!r}"

    silent = compare_run(RunDir(tmp_path / "out"), job_from(job), failures={"lora-trl": reason})
    assert "lora-trl: ended without a result: its log says why" in silent.warnings
    assert find_phrases(tmp_path / "out") == set()

    job["compare"]["samples"] = True
    loud = compare_run(RunDir(tmp_path / "out"), job_from(job), failures={"lora-trl": reason})
    assert f"lora-trl: ended without a result: {reason}" in loud.warnings

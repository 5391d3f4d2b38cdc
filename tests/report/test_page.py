"""The page holds what it should, and nothing that a model said can act in it."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tunesmith.comparing.result import compare_run
from tunesmith.core.comparison import Comparison
from tunesmith.core.errors import DataError
from tunesmith.core.jsonl import read_json, read_jsonl, write_json, write_jsonl
from tunesmith.core.rundir import RunDir
from tunesmith.job.spec import Job
from tunesmith.report.page import hash_source, render_report
from tunesmith.report.visible import make_visible

Example = tuple[RunDir, Job, Comparison]
Writer = Callable[..., tuple[RunDir, Job]]
VOID = {"meta", "input", "path", "line", "rect", "circle"}


def load_payloads() -> list[str]:
    spec = importlib.util.spec_from_file_location("payloads", Path(__file__).parent / "payloads.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["payloads"] = module
    spec.loader.exec_module(module)
    return module.PAYLOADS


PAYLOADS = load_payloads()


class Reader(HTMLParser):
    """Elements, attributes and text as a browser would see them; unbalanced tags are a failure."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def page(example: Example) -> str:
    return render_report(example[0]).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, write_example: Writer) -> str:
    """The page of a comparison in which every row of every arm says one of the payloads, questions and truths too."""
    run_dir, job = write_example(
        tmp_path_factory.mktemp("hostile"), num_rows=100, num_clusters=50, arms=["zero-shot", "lora"]
    )
    for folder in (run_dir.arm("zero-shot", 0), *(run_dir.arm("lora", seed) for seed in (0, 1, 2))):
        rows: list[dict[str, Any]] = [value for _, value in read_jsonl(folder.answers)]
        for row, payload in zip(rows, PAYLOADS, strict=True):
            row.update(
                answer=f"{payload} {folder.root.parent.name}", question=payload, truth=payload, place=payload
            )
        write_jsonl(folder.answers, rows)
        value = read_json(folder.evaluation)
        value["warnings"] = PAYLOADS
        write_json(folder.evaluation, value)
    for seed in (0, 1, 2):
        value = read_json(run_dir.arm("lora", seed).record)
        value["hardware"]["cpu"] = PAYLOADS[0]
        value["versions"]["torch"] = PAYLOADS[1]
        write_json(run_dir.arm("lora", seed).record, value)
    compare_run(run_dir, job)
    return render_report(run_dir).read_text(encoding="utf-8")


def test_it_is_one_well_formed_document(page: str) -> None:
    reader = Reader(page)
    assert reader.open == []
    assert page.startswith("<!doctype html>")
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_every_part_is_there(page: str, example: Example) -> None:
    for section in (
        "warnings",
        "table",
        "quality",
        "gain",
        "costs",
        "curves",
        "pairs",
        "fields",
        "rows",
        "record",
    ):
        assert f'<section id="{section}"' in page
    reader = Reader(page)
    text = "".join(reader.text)
    comparison = example[2]
    assert comparison.verdict in text
    for row in comparison.table.rows:
        for cell in row:
            assert cell.text in text
            assert cell.detail in text
    for title in ("Exact match", "NLL", "Gain", "Forgetting", "Training time of one seed", "Peak memory",
                  "Training loss", "Validation loss", "Learning-rate trials"):  # fmt: skip
        assert f"<h3>{title}</h3>" in page
    assert (
        len([tag for tag, attributes in reader.tags if attributes.get("class") == "row"])
        == comparison.num_rows
    )


def test_charts_have_names_and_axes_have_units(page: str) -> None:
    charts = [
        attributes
        for tag, attributes in Reader(page).tags
        if tag == "svg" and attributes.get("class") == "chart"
    ]
    assert len(charts) == 10
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    for unit in ("nats per target token", "share of test rows", "nats per token", "Optimizer step"):
        assert unit in page


def test_nothing_is_loaded_and_only_our_own_script_may_run(page: str) -> None:
    reader = Reader(page)
    scripts = [attributes for tag, attributes in reader.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "comparison-data"}, {}]
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert style is not None
    assert script is not None
    policy = next(a["content"] for _, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == (
        f"default-src 'none'; style-src '{hash_source(style[1])}'; script-src '{hash_source(script[1])}'; "
        "base-uri 'none'; form-action 'none'"
    )
    for _, attributes in reader.tags:
        assert not {"src", "href", "style", "srcset", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_the_embedded_json_is_the_public_one(page: str, example: Example) -> None:
    data = re.search(r'<script type="application/json" id="comparison-data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data[1]) == json.loads(json.dumps(example[2].public_json()))


def test_no_payload_becomes_an_element_or_an_attribute(hostile: str, page: str) -> None:
    reader = Reader(hostile)
    assert reader.open == []
    honest = {tag for tag, _ in Reader(page).tags}
    assert {tag for tag, _ in reader.tags} <= honest
    assert len([tag for tag, _ in reader.tags if tag == "script"]) == 2
    for _, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert not {"src", "href", "style"} & attributes.keys()


@pytest.mark.parametrize("number", range(len(PAYLOADS)))
def test_each_payload_is_shown_as_text(hostile: str, number: int) -> None:
    shown = re.sub(r"\s+", " ", make_visible(PAYLOADS[number])).strip()
    text = hostile_text(hostile)
    assert shown in text
    if "<" in PAYLOADS[number]:
        assert PAYLOADS[number] not in hostile


_TEXT: dict[int, str] = {}


def hostile_text(page: str) -> str:
    if id(page) not in _TEXT:
        _TEXT[id(page)] = re.sub(r"\s+", " ", "".join(Reader(page).text))
    return _TEXT[id(page)]


def test_no_control_or_turning_character_is_left(hostile: str) -> None:
    raw = hostile.encode()
    allowed = {0x09, 0x0A}
    assert not [byte for byte in raw if byte < 0x20 and byte not in allowed]
    assert not re.search(
        "[\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u061c\ufeff\U000e0000-\U000e007f]", hostile
    )


def test_three_hundred_rows_by_six_arms_stay_below_two_megabytes(
    tmp_path: Path, write_example: Writer
) -> None:
    arms = ["zero-shot", "few-shot", "rag", "lora", "qlora", "full"]
    run_dir, job = write_example(tmp_path, num_rows=300, arms=arms)
    compare_run(run_dir, job)
    assert render_report(run_dir).stat().st_size < 2_000_000


def test_it_is_rebuilt_alike_from_files_alone(example: Example, page: str) -> None:
    example[0].report.unlink()
    assert render_report(example[0]).read_text(encoding="utf-8") == page


def test_a_folder_without_a_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"comparison\.json: No such file"):
        render_report(RunDir(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"arms": ["zero-shot", "rag"]},
        {"arms": ["lora"]},
        {"arms": ["zero-shot", "lora"], "seeds": [3], "trials": 0},
        {"arms": ["zero-shot", "lora", "full"], "metric": "nll"},
        {"num_clusters": 1, "arms": ["zero-shot", "few-shot"]},
    ],
)
def test_smaller_comparisons_have_a_page_too(
    tmp_path: Path, write_example: Writer, options: dict[str, Any]
) -> None:
    run_dir, job = write_example(tmp_path, **{"num_rows": 24, "num_clusters": 24, **options})
    comparison = compare_run(run_dir, job)
    reader = Reader(render_report(run_dir).read_text(encoding="utf-8"))
    assert reader.open == []
    assert comparison.verdict in "".join(reader.text)

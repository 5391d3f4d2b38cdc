"""The page in a real browser: nothing loads, nothing complains, nothing overflows, no answer runs, filters filter."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tunesmith.comparing.result import compare_run
from tunesmith.core.comparison import Comparison
from tunesmith.core.jsonl import read_jsonl, write_json, write_jsonl
from tunesmith.core.rundir import RunDir
from tunesmith.job.spec import Job
from tunesmith.report.page import render_report

HERE = Path(__file__).parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


chromium = load("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium.find_browser() is None, reason="needs Chromium: apt-get install chromium"),
]
Example = tuple[RunDir, Job, Comparison]


@pytest.fixture(scope="module")
def tab() -> Iterator[Any]:
    with chromium.open_browser() as page:
        yield page


@pytest.fixture(scope="module")
def report(example: Example) -> Path:
    return render_report(example[0])


@pytest.fixture(scope="module")
def hostile(
    tmp_path_factory: pytest.TempPathFactory, write_example: Callable[..., tuple[RunDir, Job]]
) -> Path:
    payloads = load("payloads").PAYLOADS
    run_dir, job = write_example(
        tmp_path_factory.mktemp("hostile"), num_rows=100, num_clusters=50, arms=["zero-shot", "lora"]
    )
    for folder in (run_dir.arm("zero-shot", 0), *(run_dir.arm("lora", seed) for seed in (0, 1, 2))):
        rows: list[dict[str, Any]] = [value for _, value in read_jsonl(folder.answers)]
        for row, payload in zip(rows, payloads, strict=True):
            row.update(answer=f"{payload}!", question=payload, truth=payload)
        write_jsonl(folder.answers, rows)
    compare_run(run_dir, job)
    return render_report(run_dir)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 820, 1440])
def test_it_opens_without_a_complaint_a_request_or_a_sideways_scroll(
    tab: Any, report: Path, width: int, dark: bool
) -> None:
    tab.open(report, width=width, dark=dark)
    assert tab.complaints() == []
    assert tab.requests() == [report.resolve().as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 27)" if dark else "rgb(251, 251, 250)")


@pytest.fixture(scope="module")
def foreign(
    tmp_path_factory: pytest.TempPathFactory, write_example: Callable[..., tuple[RunDir, Job]]
) -> Path:
    """A report with other frameworks in it."""
    make = load("make_example")
    folder = tmp_path_factory.mktemp("foreign")
    run_dir, job = write_example(folder, num_rows=12, num_clusters=6, arms=make.FOREIGN_ARMS, trials=0)
    write_json(run_dir.frameworks, make.make_pages().to_json())
    compare_run(run_dir, job)
    return render_report(run_dir)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_of_frameworks_open_without_overflowing_and_run_nothing_of_a_log(
    tab: Any, foreign: Path, width: int, dark: bool
) -> None:
    tab.open(foreign, width=width, dark=dark)
    tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("document.querySelectorAll('#frameworks tbody tr').length") == 5
    assert tab.evaluate("document.querySelector('pre.log').textContent").startswith("first line\n<script>")
    assert tab.evaluate("typeof window.hit") == "undefined"
    assert tab.complaints() == []
    assert tab.requests() == [foreign.resolve().as_uri()]


@pytest.mark.parametrize("width", [390, 1440])
def test_opened_rows_do_not_overflow_either(tab: Any, report: Path, width: int) -> None:
    tab.open(report, width=width)
    tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_no_answer_runs(tab: Any, hostile: Path) -> None:
    tab.open(hostile, width=1280)
    tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert tab.evaluate("typeof window.hit") == "undefined"
    assert tab.evaluate("document.querySelectorAll('script').length") == 2
    assert tab.complaints() == []
    assert tab.requests() == [hostile.resolve().as_uri()]
    assert tab.evaluate("document.querySelectorAll('details.row').length") == 100
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1280


def test_the_policy_stops_what_escaping_would_have_missed(tab: Any, hostile: Path, tmp_path: Path) -> None:
    # The page as it is with a script, a handler, an image and a style planted in it: none may take effect.
    planted = (
        "<script>window.hit=1</script><img src=x onerror='window.hit=1'><p id=p style='color:rgb(1,2,3)'>x</p>"
        "<img src='https://example.invalid/x.png'>"
    )
    page = tmp_path / "planted.html"
    page.write_text(
        hostile.read_text(encoding="utf-8").replace("<footer>", f"{planted}<footer>"), encoding="utf-8"
    )
    tab.open(page, width=1280)
    assert tab.evaluate("typeof window.hit") == "undefined"
    assert tab.evaluate("getComputedStyle(document.getElementById('p')).color") != "rgb(1, 2, 3)"
    assert tab.complaints() != []


def choose(tab: Any, control: str, value: str) -> None:
    tab.evaluate(f"""
        (() => {{
            const element = document.getElementById({control!r});
            element.value = {value!r};
            element.dispatchEvent(new Event("input"));
        }})()
    """)


def test_filters_show_the_rows_they_name(tab: Any, report: Path, example: Example) -> None:
    tab.open(report, width=1280)
    names = [arm.name for arm in example[2].arms]
    shown = "Array.from(document.querySelectorAll('details.row')).filter(r => !r.hidden)"
    assert tab.evaluate(f"{shown}.length") == example[2].num_rows
    choose(tab, "show", "wins")
    choose(tab, "arm", str(names.index("full")))
    choose(tab, "other", str(names.index("zero-shot")))
    rows = [[v for _, v in read_jsonl(example[0].arm("full", seed).answers)] for seed in (0, 1, 2)]
    base = [v for _, v in read_jsonl(example[0].arm("zero-shot", 0).answers)]
    wins = sum(
        sum(seed[i]["scores"]["exact_match"] for seed in rows) / 3 > base[i]["scores"]["exact_match"]
        for i in range(len(base))
    )
    assert tab.evaluate(f"{shown}.length") == wins
    assert tab.evaluate("document.getElementById('count').textContent") == f"{wins} of {len(base)} rows"
    choose(tab, "search", "no such text anywhere")
    assert tab.evaluate(f"{shown}.length") == 0


def test_without_scripts_everything_but_the_filters_is_there(
    tab: Any, report: Path, example: Example
) -> None:
    tab.open(report, width=1280, script=False)
    tree = tab.call("DOM.getDocument")
    controls = tab.call("DOM.querySelector", nodeId=tree["root"]["nodeId"], selector="#controls[hidden]")
    assert controls["nodeId"] != 0
    rows = tab.call("DOM.querySelectorAll", nodeId=tree["root"]["nodeId"], selector="details.row")
    assert len(rows["nodeIds"]) == example[2].num_rows
    charts = tab.call("DOM.querySelectorAll", nodeId=tree["root"]["nodeId"], selector="svg.chart")
    assert len(charts["nodeIds"]) == 10


def test_no_text_is_too_faint_to_read(tab: Any, report: Path) -> None:
    """Contrast of small text against what lies behind it, at least 4.5 to 1 (WCAG 2.2, level AA)."""
    measure = """
    (() => {
      const parse = (c) => c.match(/[0-9.]+/g).map(Number);
      const channel = (v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
      const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
      const behind = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
        if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
      const found = [];
      for (const selector of ['h1', '.details li', '.note', 'figcaption', 'th', 'td', 'td small', '.muted', 'ins',
          'del', '.truth', '.facts dt', '.better', '.preview', '.place', '.warned li', '.inconclusive', 'h4 small']) {
        const e = document.querySelector(selector);
        if (!e) continue;
        const a = light(parse(getComputedStyle(e).color)), b = light(behind(e));
        found.push([selector, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
      }
      return found;
    })()
    """
    for dark in (False, True):
        tab.open(report, width=1280, dark=dark)
        for selector, contrast in tab.evaluate(measure):
            assert contrast >= 4.5, f"{selector} {'dark' if dark else 'light'}: {contrast:.2f}"

"""The report: one HTML file that needs no network, no script (but for its filters) and no trust in what models said.

Text is escaped by the template engine after hidden characters were made visible; the Content-Security-Policy allows
this page's own style and script by their hashes and nothing else, so that even an escaping fault could not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tunesmith.core.comparison import ArmResult, Comparison, Difference
from tunesmith.core.jsonl import dump_json, read_json, write_bytes_atomic
from tunesmith.core.rundir import RunDir, as_rundir_error
from tunesmith.report.answers import (
    choose_row_metric,
    read_all_answers,
    share_fields,
    tally_rows,
    view_rows,
)
from tunesmith.report.charts import draw_mark
from tunesmith.report.figures import (
    draw_costs,
    draw_curves,
    draw_gain,
    draw_quality,
    draw_trials,
    show_share,
)
from tunesmith.report.framework_pages import group_features, read_pages, view_pages
from tunesmith.report.frameworks import view_frameworks
from tunesmith.report.parity import view_parity
from tunesmith.report.visible import make_visible

_FOLDER = Path(__file__).parent


def render_report(folder: RunDir) -> Path:
    """Write `report.html` from the comparison's files and return its path. It can be repeated at any time.

    Raises DataError if a file is missing or damaged, RunDirError if the report cannot be written.
    """
    comparison = Comparison.from_json(read_json(folder.comparison), place=str(folder.comparison))
    try:
        write_bytes_atomic(folder.report, build_page(folder, comparison).encode())
    except OSError as error:
        raise as_rundir_error(error, folder.report) from None
    return folder.report


def build_page(folder: RunDir, comparison: Comparison) -> str:
    """The whole page as text. Reads answers and steps from the arms' folders."""
    answers = read_all_answers(folder, comparison)
    row_metric = choose_row_metric(comparison, answers)
    pages = read_pages(folder)
    samples = comparison.record.get("job", {}).get("compare", {}).get("samples", True)
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    script = (_FOLDER / "filter.js").read_text(encoding="utf-8")
    return _template().render(
        comparison=comparison,
        arms=list(enumerate(comparison.arms)),
        facts=_list_facts(comparison),
        parity=view_parity(comparison),
        frameworks=view_frameworks(folder, comparison),
        pages=view_pages(folder, comparison, pages) if pages else [],
        matrix=pages.matrix if pages else None,
        features=group_features(pages.matrix) if pages else [],
        quality=draw_quality(comparison),
        gain=draw_gain(comparison),
        costs=draw_costs(comparison),
        curves=draw_curves(folder, comparison),
        trials=draw_trials(comparison),
        pairs=_square_pairs(comparison),
        samples=samples,
        rows=view_rows(comparison, answers, row_metric) if samples else [],
        row_metric=comparison.metrics[row_metric].title if row_metric in comparison.metrics else row_metric,
        by_likelihood=row_metric == "nll",
        tallies=tally_rows(comparison, answers, row_metric),
        # The keys of answers are the rows' own words, too.
        fields=share_fields(comparison, answers) if samples else [],
        best=_find_best_trained(comparison),
        base=_find_base(comparison),
        record=_list_record(comparison),
        data=_embed_json(comparison.public_json()),
        style=Markup(style),  # noqa: S704 - files of this package
        script=Markup(script),  # noqa: S704
        style_hash=hash_source(style),
        script_hash=hash_source(script),
        mark=draw_mark,
        share=show_share,
    )


def hash_source(source: str) -> str:
    """`sha256-...` of an inline style or script, as a Content-Security-Policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


@cache
def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("tunesmith.report", "."),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html.j2")


def _finalize(value: Any) -> Any:
    """Every printed value passes here: our own markup stays, all other text is made visible before it is escaped."""
    return value if isinstance(value, Markup) else make_visible(str(value))


def _embed_json(value: Mapping[str, Any]) -> Markup:
    """JSON inside a data block: no `<` that could close it, nothing but ASCII."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))  # noqa: S704


def _list_facts(comparison: Comparison) -> list[tuple[str, str]]:
    job = comparison.record.get("job", {})
    model, data = job.get("model", ""), job.get("data", {}).get("train", "")
    clusters = (
        f" in {comparison.num_clusters:,} clusters" if comparison.num_clusters != comparison.num_rows else ""
    )
    trainings: list[dict[str, Any]] = list(comparison.record.get("trainings", {}).values())
    hardware: dict[str, Any] = trainings[0]["hardware"] if trainings else {}
    machine = hardware.get("gpu") or hardware.get("cpu") or ""
    facts = [
        ("Base model", model if isinstance(model, str) else str(model.get("name", ""))),
        ("Data", data if isinstance(data, str) else dump_json(data)),
        ("Declared metric", comparison.metrics[comparison.metric].title),
        ("Test rows", f"{comparison.num_rows:,}{clusters}"),
        ("Seeds", ", ".join(map(str, comparison.seeds))),
        ("Hardware", str(machine)),
    ]
    return [(name, text) for name, text in facts if text]


def _square_pairs(comparison: Comparison) -> list[list[Difference | None]]:
    """pairs[i][j]: the judged difference of arm i from arm j, seen from arm i; None where none was judged."""
    number = {arm.name: index for index, arm in enumerate(comparison.arms)}
    square: list[list[Difference | None]] = [[None] * len(number) for _ in number]
    for pair in comparison.pairs:
        square[number[pair.arm]][number[pair.other]] = pair
        square[number[pair.other]][number[pair.arm]] = pair.flip()
    return square


def _find_best_trained(comparison: Comparison) -> int:
    """The arm whose wins and losses are shown first."""
    better = comparison.metrics[comparison.metric].higher_is_better
    ranked = [
        (arm.kind == "trained", (1 if better else -1) * arm.metrics[comparison.metric].value, -index)
        for index, arm in enumerate(comparison.arms)
        if comparison.metric in arm.metrics and not arm.not_comparable
    ]
    return -max(ranked)[2] if ranked else 0


def _find_base(comparison: Comparison) -> int:
    names = [arm.name for arm in comparison.arms]
    return names.index(comparison.base) if comparison.base in names else 0


def _list_record(comparison: Comparison) -> list[tuple[str, str]]:
    """Title and text of each part of the record."""
    record = comparison.record
    parts: list[tuple[str, Any]] = [
        ("How it was measured", comparison.method),
        ("Job", record.get("job", {})),
    ]
    parts += [(f"Training of {name}", value) for name, value in record.get("trainings", {}).items()]
    parts += [("Arms", {arm.name: _list_arm(arm) for arm in comparison.arms})]
    return [(title, json.dumps(value, indent=2, ensure_ascii=False)) for title, value in parts]


def _list_arm(arm: ArmResult) -> dict[str, Any]:
    shown = ("kind", "framework", "method", "prompting", "status", "trained_by", "seeds", "learning_rate", "steps",
             "trained_parameters", "total_parameters", "train_tokens", "target_tokens", "train_wall_seconds",
             "train_cpu_seconds", "eval_wall_seconds", "eval_cpu_seconds", "tune_wall_seconds", "peak_bytes",
             "size_bytes", "forgetting", "per_seed")  # fmt: skip
    return {name: getattr(arm, name) for name in shown}

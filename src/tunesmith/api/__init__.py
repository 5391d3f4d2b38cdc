"""The public functions. The command line is a thin layer over them; in a notebook:

    import tunesmith
    job = tunesmith.load_job("job.yaml")
    tunesmith.train(job, out="runs/first")
    tunesmith.evaluate("runs/first", data="test.jsonl").metrics
    tunesmith.compare(job, out="runs/all").verdict

Each is imported when it is first used: reading a job file needs none of what training needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.api.answering import answer_prompts
    from tunesmith.api.comparing import compare, comparison_json, report, report_markdown
    from tunesmith.api.demo import demo_job
    from tunesmith.api.evaluation import evaluate, evaluate_tasks, evaluation_json, generate
    from tunesmith.api.inspection import check, preview
    from tunesmith.api.pair_evaluation import evaluate_pairs
    from tunesmith.api.planning import plan
    from tunesmith.api.training import train
    from tunesmith.job.load import job_from, load_job

__all__ = [
    "answer_prompts",
    "check",
    "compare",
    "comparison_json",
    "demo_job",
    "evaluate",
    "evaluate_pairs",
    "evaluate_tasks",
    "evaluation_json",
    "generate",
    "job_from",
    "load_job",
    "plan",
    "preview",
    "report",
    "report_markdown",
    "train",
]

_HOMES = {
    "tunesmith.api.answering": ("answer_prompts",),
    "tunesmith.api.comparing": ("compare", "comparison_json", "report", "report_markdown"),
    "tunesmith.api.demo": ("demo_job",),
    "tunesmith.api.evaluation": ("evaluate", "evaluate_tasks", "evaluation_json", "generate"),
    "tunesmith.api.inspection": ("check", "preview"),
    "tunesmith.api.pair_evaluation": ("evaluate_pairs",),
    "tunesmith.api.planning": ("plan",),
    "tunesmith.api.training": ("train",),
    "tunesmith.job.load": ("job_from", "load_job"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'tunesmith.api' has no attribute {name!r}")

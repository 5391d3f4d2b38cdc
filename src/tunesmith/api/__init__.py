"""The public functions. The command line is a thin layer over them; in a notebook:

    import tunesmith
    job = tunesmith.load_job("job.yaml")
    tunesmith.train(job, out="runs/first")
    tunesmith.evaluate("runs/first", data="test.jsonl").metrics
    tunesmith.compare(job, out="runs/all").verdict

Importing this package imports neither torch nor transformers; the first function that needs them does.
"""

from __future__ import annotations

from tunesmith.api.comparing import compare, comparison_json, demo_job, report, report_markdown
from tunesmith.api.evaluation import evaluate, evaluation_json, generate
from tunesmith.api.inspection import check, preview
from tunesmith.api.training import train
from tunesmith.job.load import job_from, load_job

__all__ = [
    "check",
    "compare",
    "comparison_json",
    "demo_job",
    "evaluate",
    "evaluation_json",
    "generate",
    "job_from",
    "load_job",
    "preview",
    "report",
    "report_markdown",
    "train",
]

"""The synthetic comparison of tests/report/make_example.py, for tests that need whole run folders."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tunesmith.comparing.result import compare_run
from tunesmith.core.comparison import Comparison
from tunesmith.core.rundir import RunDir
from tunesmith.job.spec import Job

EXAMPLE = Path(__file__).parent.parent / "report" / "make_example.py"


def load_example() -> ModuleType:
    """The script as a module; it is no package member, so that it can be run by hand."""
    if "make_example" not in sys.modules:
        spec = importlib.util.spec_from_file_location("make_example", EXAMPLE)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["make_example"] = module
        spec.loader.exec_module(module)
    return sys.modules["make_example"]


@pytest.fixture(scope="session")
def write_example() -> Callable[..., tuple[RunDir, Job]]:
    return load_example().write_example


@pytest.fixture(scope="session")
def example(
    tmp_path_factory: pytest.TempPathFactory, write_example: Callable[..., tuple[RunDir, Job]]
) -> tuple[RunDir, Job, Comparison]:
    """Seven arms, three seeds, 90 rows in 30 clusters, judged. Not to be changed by a test."""
    run_dir, job = write_example(tmp_path_factory.mktemp("example"), num_rows=90, num_clusters=30)
    return run_dir, job, compare_run(run_dir, job)

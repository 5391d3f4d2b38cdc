"""What tests of several packages share: the test data beside the checkout, random models, a comparison made up.

Only tests that ask for `shared` need the folder of real data; without it they are skipped, and the rest stands on
templates, tokenizers and models made on the spot.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: two threads on a busy machine are slower than one, and sums are made in one order.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the shared test data: $TUNESMITH_SHARED, or ../shared/data beside the checkout."""
    root = Path(os.environ.get("TUNESMITH_SHARED") or Path(__file__).parents[2] / "shared" / "data")
    if not root.is_dir():
        pytest.skip("the shared test data is not on this machine (TUNESMITH_SHARED)")
    return root


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that needs a GPU is skipped without one, whatever `-m` selects."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA GPU on this machine")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The same test on both: "cpu" everywhere, which proves the test, and "cuda" under the marker `gpu`."""
    return request.param


@pytest.fixture(scope="session")
def hf_folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> (folder, transformers model): a random model of each family, made once."""
    from tiny_models import save_hf

    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = (folder, save_hf(name, folder))
        return made[name]

    return get


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An endpoint on this machine; no key is set, and no proxy stands before it."""
    from loopback import Loopback

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Loopback()
    yield server
    server.close()


@pytest.fixture(scope="session")
def write_example() -> Callable[..., Any]:
    """Writes the run folders of the made-up comparison of tests/report/make_example.py."""
    from make_example import write_example

    return write_example


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory, write_example: Callable[..., Any]) -> Any:
    """(run folder, job, comparison): seven arms, three seeds, 90 rows in 30 clusters. Not to be changed by a test."""
    from tunesmith.comparing.result import compare_run

    run_dir, job = write_example(tmp_path_factory.mktemp("example"), num_rows=90, num_clusters=30)
    return run_dir, job, compare_run(run_dir, job)

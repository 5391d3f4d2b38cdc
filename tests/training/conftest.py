"""Makes `tiny.py` importable as `train_tiny`, here and in the processes that tests start."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

TINY = Path(__file__).with_name("tiny.py")


def _load_tiny() -> None:
    spec = importlib.util.spec_from_file_location("train_tiny", TINY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_tiny"] = module
    spec.loader.exec_module(module)


_load_tiny()


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

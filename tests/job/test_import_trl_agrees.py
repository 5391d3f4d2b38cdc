"""TRL itself says which keys it has and what their defaults are; our table must say the same of its version."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

import cpu_vs_trl as bench
from tunesmith.job.importing.rules import UNSET
from tunesmith.job.importing.trl import FRAMEWORK

pytestmark = pytest.mark.trl

ASK = """
import dataclasses, json, trl
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig
fields = {}
for kind in (SFTConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig):
    for field in dataclasses.fields(kind):
        fields[field.name] = None if field.default is dataclasses.MISSING else field.default
print(json.dumps([trl.__version__, fields], default=str))
"""


@pytest.fixture(scope="module")
def theirs() -> tuple[str, dict[str, Any]]:
    """(version, defaults by key)."""
    if not bench.TRL_PYTHON.exists():
        pytest.skip("TRL's environment is missing; run: make test-trl")
    answer = subprocess.run(
        [bench.TRL_PYTHON, "-W", "ignore", "-c", ASK], capture_output=True, text=True, check=True
    )
    version, fields = json.loads(answer.stdout.splitlines()[-1])
    return version, fields


def test_our_table_is_of_this_version(theirs: tuple[str, dict[str, Any]]) -> None:
    assert theirs[0] == FRAMEWORK.version


def test_every_key_of_theirs_is_in_our_table(theirs: tuple[str, dict[str, Any]]) -> None:
    assert sorted(theirs[1].keys() - FRAMEWORK.table.keys()) == []


def test_every_default_in_our_table_is_theirs(theirs: tuple[str, dict[str, Any]]) -> None:
    ours = {name: key.default for name, key in FRAMEWORK.table.items() if key.default is not UNSET}
    # bf16 is None in the class and becomes true as the arguments are checked, unless fp16 is.
    assert {name: (True if name == "bf16" else theirs[1][name]) for name in ours} == ours

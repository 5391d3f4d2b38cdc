"""Arms that TRL trains, for real: on the same rows and from the same adapters it does what our own engine does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from real_arms import compare_arms, read_gates, read_parity, read_steps

import tunesmith
from tunesmith import api
from tunesmith.core.jsonl import read_json, read_jsonl
from tunesmith.core.rundir import RunDir
from tunesmith.data.prepare import load_prepared
from tunesmith.frameworks.adding import add_environment
from tunesmith.job.resolve import resolve_model
from tunesmith.job.spec import Job

pytestmark = [pytest.mark.trl, pytest.mark.slow, pytest.mark.timeout(300)]

METHODS = ("lora", "qlora", "full")
TRL_PYTHON = Path(__file__).parents[2] / ".venv-trl" / "bin" / "python"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with TRL in it."""
    if not TRL_PYTHON.exists():
        pytest.skip("TRL's environment is missing; run: make test-trl")
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(folder))
        add_environment("trl", str(TRL_PYTHON))
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Path:
    arms = [{"method": method, "framework": name} for method in METHODS for name in ("tunesmith", "trl")]
    return compare_arms(arms, tmp_path_factory.mktemp("compare"), home)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_steps_are_the_same(compared: Path, method: str) -> None:
    theirs, ours = read_parity(compared, f"{method}-trl")

    assert [step.examples for step in theirs.steps] == [step.examples for step in ours.steps]
    for their, our in zip(theirs.steps, ours.steps, strict=True):
        assert their.loss == pytest.approx(our.loss, rel=5e-6)
        assert their.grad_norm == pytest.approx(our.grad_norm, rel=3e-5)
        assert their.learning_rates == pytest.approx(our.learning_rates, rel=1e-12)
        assert their.clip_norm == our.clip_norm == 0.3
    assert {(p.name, p.shape, p.dtype) for p in theirs.parameters or ()} == {
        (p.name, p.shape, p.dtype) for p in ours.parameters or ()
    }
    described = [
        [(g.kind, sorted(g.names), g.weight_decay, g.beta1, g.beta2, g.epsilon) for g in record.groups or ()]
        for record in (theirs, ours)
    ]
    assert described[0] == described[1]
    assert theirs.state_dtypes == ours.state_dtypes == ("float32",)


@pytest.mark.parametrize("method", METHODS)
def test_every_gate_passes(compared: Path, method: str) -> None:
    assert read_gates(compared, f"{method}-trl") == ["PASS"] * 6


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_training_is_the_same_and_judged_alike(compared: Path, method: str) -> None:
    theirs, ours = read_steps(compared, f"{method}-trl"), read_steps(compared, method)

    same = ("step", "epoch", "num_tokens", "num_target_tokens")
    assert [[row[key] for key in same] for row in theirs] == [[row[key] for key in same] for row in ours]
    assert len({row["num_target_tokens"] for row in theirs[:3]}) > 1
    assert [row["loss"] for row in theirs] == pytest.approx([row["loss"] for row in ours], rel=1e-5)
    validated = [
        [row["validation_loss"] for row in rows if row["validation_loss"]] for rows in (theirs, ours)
    ]
    assert len(validated[0]) == 2
    assert validated[0] == pytest.approx(validated[1], rel=1e-5)
    arms = {arm["name"]: arm for arm in api.comparison_json(api.report(compared), compared)["arms"]}
    assert arms[f"{method}-trl"]["framework"] == "trl"
    nlls = [arms[name]["metrics"]["nll"]["value"] for name in (f"{method}-trl", method)]
    assert nlls[0] == pytest.approx(nlls[1], rel=1e-4)


def test_the_run_record_tells_who_trained_and_what_it_cost(compared: Path) -> None:
    theirs, ours = (
        read_json(compared / "arms" / arm / "seed-0" / "run.json") for arm in ("lora-trl", "lora")
    )

    assert theirs["framework"] == "trl"
    assert theirs["versions"].keys() >= {"trl", "peft", "transformers", "torch"}
    same = (
        "fingerprints",
        "learning_rate",
        "steps",
        "trained_parameters",
        "total_parameters",
        "train_tokens",
        "seed",
    )
    assert {key: theirs[key] for key in same} == {key: ours[key] for key in same}
    phases = theirs["phases"]
    assert phases.keys() >= {
        "importing",
        "loading",
        "building",
        "first step",
        "steps",
        "validating",
        "saving",
    }
    assert sum(phases.values()) <= theirs["wall_seconds"]
    resolved = read_json(compared / "arms" / "lora-trl" / "seed-0" / "framework" / "record.json")["resolved"]
    assert resolved["arguments"]["weight_decay"] == 0.1
    assert resolved["peft default"]["r"] == 4


# What plain PEFT says of each test row: nats of its target tokens.
SCORE = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, rows = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
for row in json.load(open(rows)):
    ids = torch.tensor(row["ids"])
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1]
    chosen = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    print(-float(chosen[torch.tensor(row["mask"])[1:].bool()].sum()))
"""


def test_plain_peft_loads_its_adapter_and_says_what_our_judge_says(compared: Path, tmp_path: Path) -> None:
    arm = RunDir(compared).arm("lora-trl", 0)
    answers = sorted((value for _, value in read_jsonl(arm.answers)), key=lambda answer: answer["row"])
    rows = load_prepared(RunDir(compared).prepared).rows("test")
    shown = [{"ids": list(rows[a["row"]].ids), "mask": list(map(int, rows[a["row"]].mask))} for a in answers]
    (tmp_path / "rows.json").write_text(json.dumps(shown))
    base = resolve_model(Job.model_validate(read_json(compared / "job.json")).model_spec).folder

    argv = [str(TRL_PYTHON), "-c", SCORE, str(base), str(arm.adapter), str(tmp_path / "rows.json")]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = subprocess.run(argv, check=True, capture_output=True, text=True, env=environ).stdout.split()

    assert len(said) == len(answers) > 0
    assert list(map(float, said)) == pytest.approx([answer["nll"] for answer in answers], rel=1e-5)


def test_the_tokens_of_every_step_of_the_training_itself_were_counted(compared: Path) -> None:
    gate = read_json(compared / "gates.json")["arms"]["lora-trl"]["gates"][0]
    steps = len(read_steps(compared, "lora-trl"))
    assert gate["says"].endswith(f"as many target tokens in all {steps} steps of 1 training")


def test_nothing_is_trained_twice(compared: Path, home: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(compared.parent, again)
    job = json.loads((again / "out" / "job.json").read_text())
    before = {path: path.stat().st_mtime_ns for path in again.glob("out/arms/**/run.json")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(home))
        tunesmith.compare(job, out=again / "out")

    assert len(before) == 2 * len(METHODS)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_dora_in_bf16_without_clipping_starts_where_ours_starts(tmp_path: Path, home: Path) -> None:
    method = {"name": "lora", "rank": 4, "rslora": True, "dora": True, "targets": ["q_proj", "mlp.down_proj"]}
    arms = [{"method": method, "framework": "trl", "name": "dora-trl"}]
    changes = {"weight_decay": 0.0, "clip_norm": None, "precision": "bf16", "evaluate_every": "never"}
    out = compare_arms(arms, tmp_path, home, steps=2, **changes)
    theirs, ours = read_parity(out, "dora-trl")

    assert theirs.steps[0].clip_norm == ours.steps[0].clip_norm == 0.0
    assert theirs.precision == ours.precision == "bfloat16"
    assert {(p.name, p.shape, p.dtype) for p in theirs.parameters or ()} == {
        (p.name, p.shape, p.dtype) for p in ours.parameters or ()
    }
    assert theirs.steps[0].loss == pytest.approx(ours.steps[0].loss, rel=5e-3)
    assert theirs.steps[0].grad_norm == pytest.approx(ours.steps[0].grad_norm, rel=3e-2)

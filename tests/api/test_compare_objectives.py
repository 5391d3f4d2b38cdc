"""A comparison whose arms go on from another: DPO and GRPO from SFT, judged on pairs, rewards and divergence."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from tunesmith import api
from tunesmith.api.alignment import measure_kl, score_pairs
from tunesmith.core.bundled import BUNDLED
from tunesmith.core.errors import DataError, JobError
from tunesmith.core.events import Event
from tunesmith.core.jsonl import read_json, read_jsonl
from tunesmith.data.prepare import load_prepared
from tunesmith.models.adapter_files import load_adapter
from tunesmith.models.load import load_model

TINY, TICKETS = BUNDLED["tunesmith/tiny"], BUNDLED["tunesmith/tickets"]


def write_pairs(path: Path, source: str, first: int, count: int) -> Path:
    """The right record against one of another ticket."""
    rows = [row["messages"] for _, row in read_jsonl(TICKETS / f"{source}.jsonl")][first : first + count + 1]
    path.write_text(
        "".join(
            json.dumps({"prompt": row[:-1], "chosen": row[-1:], "rejected": other[-1:]}) + "\n"
            for row, other in pairwise(rows)
        )
    )
    return path


def make_job(folder: Path, **more: Any) -> dict[str, Any]:
    (folder / "rewards.py").write_text(
        "def opens(completions, **kwargs):\n    return [float(c[0]['content'][:1] == '{') for c in completions]\n"
    )
    train = write_pairs(folder / "pairs.jsonl", "train", 0, 24)
    held_out = write_pairs(folder / "held-out.jsonl", "test", 100, 8)
    opens = f"{folder / 'rewards.py'}:opens"
    grpo = {"name": "grpo", "rewards": [opens], "prompts": 1, "samples": 4, "max_new_tokens": 8}
    starts = {"method": "lora", "starts_from": "lora"}
    return {
        "model": "tunesmith/tiny",
        "data": {"train": "tunesmith/tickets"},
        "method": {"name": "lora", "rank": 4},
        "train": {"steps": 2, "batch_rows": 4, "evaluate_every": "never", "precision": "fp32"},
        "evaluate": {
            "max_rows": 4,
            "max_new_tokens": 8,
            "precision": "fp32",
            "forgetting": False,
            "preferences": str(held_out),
            "rewards": [opens],
        },
        "compare": {
            "seeds": [0],
            "metric": "preference_accuracy",
            "arms": [
                "lora",
                {"name": "dpo", "objective": "dpo", "data": {"train": str(train)}, **starts},
                {"name": "grpo", "objective": grpo, "steps": 1, **starts},
            ],
            **more,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    tunesmith.compare(make_job(folder), out=folder / "out")
    return folder


def test_arms_are_held_against_their_start(finished: Path) -> None:
    public = api.comparison_json(api.report(finished / "out"), finished / "out")
    by_name = {arm["name"]: arm for arm in public["arms"]}
    assert [by_name[name]["starts_from"] for name in ("lora", "dpo", "grpo")] == [None, "lora", "lora"]
    assert {"preference_accuracy", "reward", "answer_tokens"} <= by_name["dpo"]["from_start"].keys()
    assert {"preference_margin", "kl_from_start"} <= by_name["dpo"]["metrics"].keys()
    assert by_name["dpo"]["metrics"]["preference_margin"]["value"] > 0
    assert "kl_from_start" not in by_name["lora"]["metrics"]
    assert "What changed from the start" in (finished / "out" / "report.html").read_text()


def test_training_went_on_from_the_weights_of_the_start(finished: Path) -> None:
    run = finished / "out" / "arms" / "dpo" / "seed-0"
    record = read_json(run / "run.json")
    start = finished / "out" / "arms" / "lora" / "seed-0" / "adapter"
    assert Path(record["config"]["method"]["adapter"]) == start
    first = next(iter(read_jsonl(run / "steps.jsonl")))[1]
    # The reference is the start, so that the first margin is none and the loss ln 2.
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["measures"]["margin"] == pytest.approx(0.0, abs=1e-5)


def load(finished: Path, arm: str) -> Any:
    model = load_model(TINY, device=torch.device("cpu"), dtype=torch.float32)
    load_adapter(model, finished / "out" / "arms" / arm / "seed-0" / "adapter")
    return model.eval()


def test_pairs_are_scored_by_plain_log_probabilities(finished: Path) -> None:
    pairs = load_prepared(finished / "out" / "preferences")
    assert len(pairs.rows("test")) == 16
    model, rows = load(finished, "dpo"), pairs.rows("test")
    (first, *_) = score_pairs(model, pairs)
    from tunesmith.models.layout import make_batch

    for side in (0, 1):
        row = rows[side]
        batch = make_batch([row], device=torch.device("cpu"))
        everywhere = torch.arange(len(row.ids))
        with torch.no_grad():
            logits = model.head(model.hidden(batch.ids_T, batch.layout, everywhere)).double().log_softmax(-1)
        wanted = sum(logits[n - 1, row.ids[n]].item() for n, bit in enumerate(row.mask) if bit)
        assert first.logps[side] == pytest.approx(wanted, rel=1e-5)
    kept = [
        value for _, value in read_jsonl(finished / "out" / "arms" / "dpo" / "seed-0" / "preferences.jsonl")
    ]
    assert kept[0]["logps"] == pytest.approx(first.logps, rel=1e-5)


def test_a_model_is_at_no_distance_from_itself_and_at_some_from_another(finished: Path) -> None:
    rows = load_prepared(finished / "out" / "preferences").rows("test")[:4]
    ours = load(finished, "dpo")
    assert measure_kl(ours, ours, rows) == [0.0] * 4
    assert any(gap != 0.0 for gap in measure_kl(ours, load(finished, "lora"), rows))


@pytest.mark.slow
def test_running_again_trains_nothing_and_a_changed_start_trains_what_follows(finished: Path) -> None:
    events: list[Event] = []
    tunesmith.compare(make_job(finished), out=finished / "out", on_event=events.append)
    assert not [event for event in events if event.kind in ("progress", "step")]
    changed = make_job(finished)
    changed["compare"]["arms"] = [
        {"method": "lora", "name": "lora", "learning_rate": 2e-3},
        changed["compare"]["arms"][1],
    ]
    tunesmith.compare(changed, out=finished / "out", on_event=events.append)
    trained = {event.task for event in events if event.kind == "step"}
    assert trained == {"lora seed 0", "dpo seed 0"}
    # The reference is the start as it is now, not what an earlier one was.
    first = next(iter(read_jsonl(finished / "out" / "arms" / "dpo" / "seed-0" / "steps.jsonl")))[1]
    assert first["measures"]["margin"] == pytest.approx(0.0, abs=1e-5)
    assert "dpo" in [arm.name for arm in api.report(finished / "out").arms if arm.status == "done"]


def test_no_arm_learns_from_what_it_is_judged_on(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl", "test", 0, 4)
    with pytest.raises(
        DataError, match="among the sealed test rows; no arm learns from what it is judged on"
    ):
        tunesmith.compare(job, out=tmp_path / "out")


def test_held_out_pairs_are_held_out(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    write_pairs(tmp_path / "held-out.jsonl", "train", 100, 4)
    with pytest.raises(DataError, match="among the pairs of evaluate"):
        tunesmith.compare(job, out=tmp_path / "out")


@pytest.mark.slow
def test_a_judge_prefers_answers_of_an_arm_or_of_its_start(
    finished: Path, loopback: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loopback import say

    # It likes whatever stands first, so that every preference turns with the order: ties, whatever the answers are.
    loopback.script(say("Verdict: A"))
    job = make_job(finished)
    job["evaluate"]["judge"] = {"endpoint": loopback.url, "model": "judge"}
    out = finished / "judged"
    tunesmith.compare(job, out=out)
    asked = len(loopback.asked)
    by_name = {arm["name"]: arm for arm in api.comparison_json(api.report(out), out)["arms"]}
    assert by_name["dpo"]["metrics"]["win_rate"]["value"] == 0.5
    assert "win_rate" not in by_name["lora"]["metrics"]  # it has no start, and zero-shot takes no part
    kept = read_json(out / "arms" / "dpo" / "seed-0" / "win_rate.json")
    assert kept["flips"] + kept["equal"] == 4
    assert asked == 2 * (
        kept["flips"] + read_json(out / "arms" / "grpo" / "seed-0" / "win_rate.json")["flips"]
    )
    tunesmith.compare(job, out=out)
    assert len(loopback.asked) == asked


@pytest.mark.slow
def test_a_reward_that_changed_is_trained_with_and_judged_by_again(finished: Path) -> None:
    out = finished / "changed"
    job = make_job(finished)
    job["compare"]["arms"] = [job["compare"]["arms"][0], job["compare"]["arms"][2]]
    tunesmith.compare(job, out=out)
    (finished / "rewards.py").write_text(
        "def opens(completions, **kwargs):\n    return [7.0 for _ in completions]\n"
    )
    events: list[Event] = []
    tunesmith.compare(job, out=out, on_event=events.append)
    assert {event.task for event in events if event.kind == "step"} == {"grpo seed 0"}
    arms = api.comparison_json(api.report(out), out)["arms"]
    assert [arm["metrics"]["reward"]["value"] for arm in arms] == [7.0, 7.0]


def test_an_arm_with_a_reward_that_is_not_there_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    job["compare"]["arms"][2]["objective"]["rewards"] = ["exact_mtach"]
    with pytest.raises(JobError, match=r"compare\.arms, grpo: objective\.rewards\[0\] .*'exact_match'"):
        tunesmith.compare(job, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()

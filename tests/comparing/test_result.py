"""From run folders to a judged comparison: values worked by hand, refusals, the stable JSON."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunesmith.comparing.result import compare_run
from tunesmith.core.comparison import ArmResult, Comparison
from tunesmith.core.errors import ArmFailed, DataError
from tunesmith.core.jsonl import read_json, write_json, write_jsonl
from tunesmith.core.records import AnswerRecord, EvalRecord
from tunesmith.core.rundir import RunDir
from tunesmith.job.spec import Job

Writer = Callable[..., tuple[RunDir, Job]]
Example = tuple[RunDir, Job, Comparison]


def make_job(arms: list[Any], **compare: Any) -> Job:
    return Job.model_validate(
        {"model": "m", "data": {"train": "d"}, "compare": {"arms": arms, "seeds": [0], **compare}}
    )


def write_arm(
    run_dir: RunDir, name: str, scores: list[float], nll: list[float], tokens: list[int], seed: int = 0
) -> None:
    """One arm's scoring with one row a cluster."""
    folder = run_dir.arm(name, seed).create()
    answers = [
        AnswerRecord(
            row=i, row_id=str(i), place=f"test.jsonl:{i + 1}", cluster=f"c{i}", question="q", truth="t", answer="a",
            nll=nll[i], num_target_tokens=tokens[i], num_bytes=4 * tokens[i], scores={"exact_match": scores[i]},
        )
        for i in range(len(scores))
    ]  # fmt: skip
    write_jsonl(folder.answers, [answer.to_json() for answer in answers])
    record = EvalRecord(
        model="m", adapter=None, prompting=name, metrics={}, num_rows=len(scores), num_target_tokens=sum(tokens),
        data_sha256="d", wall_seconds=2.0, cpu_seconds=3.0, peak_bytes=100,
    )  # fmt: skip
    write_json(folder.evaluation, record.to_json())


def test_four_rows_worked_by_hand(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    write_arm(run_dir, "zero-shot", [0, 0, 1, 0], [4.0, 6.0, 2.0, 8.0], [2, 2, 2, 4])
    write_arm(run_dir, "rag", [1, 0, 1, 1], [1.0, 3.0, 2.0, 4.0], [2, 2, 2, 4])
    comparison = compare_run(run_dir, make_job(["zero-shot", "rag"]))
    base, rag = comparison.arms
    assert base.metrics["exact_match"].value == 0.25
    assert base.metrics["nll"].value == pytest.approx(20 / 10)
    assert base.metrics["perplexity"].value == pytest.approx(math.exp(2))
    assert base.metrics["bits_per_byte"].value == pytest.approx(20 / math.log(2) / 40)
    assert rag.metrics["exact_match"].value == 0.75
    assert rag.metrics["nll"].value == pytest.approx(1.0)
    assert rag.differences["exact_match"].delta == pytest.approx(0.5)
    assert rag.differences["nll"].delta == pytest.approx(-1.0)
    assert (rag.wall_seconds, rag.cpu_seconds, rag.peak_bytes, rag.size_bytes) == (2.0, 3.0, 100, 0)


def test_deterministic_arms_give_verdicts_with_one_seed(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    ones = [1] * 40
    write_arm(run_dir, "zero-shot", [0] * 40, [3.0] * 40, ones)
    write_arm(run_dir, "rag", [1.0] * 36 + [0.0] * 4, [1.0] * 40, ones)
    comparison = compare_run(run_dir, make_job(["zero-shot", "rag"]))
    assert comparison.arms[1].versus_base == "better"
    assert comparison.verdict.startswith("No trained arm was run: rag (90.0% exact match)")


def test_the_example_is_judged_as_it_was_made(example: Example) -> None:
    comparison = example[2]
    assert comparison.base == "zero-shot"
    assert [arm.versus_base for arm in comparison.arms] == [None] + ["better"] * 6
    assert comparison.verdict.startswith("Fine-tuning won: ")
    assert comparison.num_clusters == 30
    assert len([pair for pair in comparison.pairs if pair.other == "zero-shot"]) == 6
    assert len(comparison.pairs) == 6 + 15
    shared = comparison.find_arm("lora+rag")
    assert shared.trained_by == "lora"
    assert shared.train_wall_seconds == comparison.find_arm("lora").train_wall_seconds > 0


def test_values_are_those_of_the_answers(example: Example) -> None:
    run_dir, _, comparison = example
    lora = comparison.find_arm("lora")
    for number, seed in enumerate(lora.seeds):
        lines = [json.loads(line) for line in run_dir.arm("lora", seed).answers.read_text().splitlines()]
        hits = sum(line["scores"]["exact_match"] for line in lines) / len(lines)
        nll = sum(line["nll"] for line in lines) / sum(line["num_target_tokens"] for line in lines)
        assert lora.per_seed["exact_match"][number] == pytest.approx(hits)
        assert lora.per_seed["nll"][number] == pytest.approx(nll)
    assert lora.metrics["exact_match"].value == pytest.approx(sum(lora.per_seed["exact_match"]) / 3)


def test_it_is_read_back_as_written(example: Example) -> None:
    run_dir, _, comparison = example
    assert Comparison.from_json(read_json(run_dir.comparison), place="x") == comparison


def test_it_can_be_judged_again_with_the_same_result(example: Example) -> None:
    run_dir, job, comparison = example
    before = run_dir.comparison.read_bytes()
    assert compare_run(run_dir, job) == comparison
    assert run_dir.comparison.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda value: value.update(schema=2), "schema 2"),
        (lambda value: value.update(extra=1), "unknown field 'extra'"),
        (lambda value: value.pop("verdict"), "verdict"),
        (lambda value: value["arms"][0].update(colour="red"), "unknown field 'colour'"),
        (lambda value: value.update(table=3), "int instead of an object"),
    ],
)
def test_a_damaged_comparison_is_refused(
    example: Example, tmp_path: Path, change: Callable[[dict[str, Any]], Any], finding: str
) -> None:
    value = read_json(example[0].comparison)
    change(value)
    write_json(RunDir(tmp_path).comparison, value)
    with pytest.raises(DataError) as caught:
        Comparison.from_json(read_json(RunDir(tmp_path).comparison), place="x")
    assert finding in str(caught.value)


def test_the_public_json_has_every_promised_field(example: Example) -> None:
    public = json.loads(json.dumps(example[2].public_json(report="out/report.html"), allow_nan=False))
    assert public["schema"] == 1
    assert public["metric"] == "exact_match"
    assert public["report"] == "out/report.html"
    assert isinstance(public["warnings"], list)
    promised = {
        "name", "kind", "framework", "seeds", "metrics", "versus_base", "trained_parameters", "train_tokens",
        "target_tokens", "wall_seconds", "cpu_seconds", "peak_bytes", "size_bytes",
    }  # fmt: skip
    for arm in public["arms"]:
        assert promised <= arm.keys()
        assert {"nll", "perplexity", "exact_match", "json_valid"} <= arm["metrics"].keys()
        for metric in arm["metrics"].values():
            assert metric["low"] <= metric["value"] <= metric["high"]


def test_nll_ranks_trained_arms_only(tmp_path: Path, write_example: Writer) -> None:
    run_dir, job = write_example(tmp_path, num_rows=60, num_clusters=30, metric="nll", trials=0)
    comparison = compare_run(run_dir, job)
    words = {arm.name: arm.versus_base for arm in comparison.arms}
    assert words["few-shot"] is None
    assert words["rag"] is None
    assert words["lora"] == "better"
    assert not [pair for pair in comparison.pairs if pair.arm == "rag"]
    assert any("NLL ranks trained arms only" in detail for detail in comparison.details)


def test_one_seed_is_exploratory(tmp_path: Path, write_example: Writer) -> None:
    run_dir, job = write_example(tmp_path, num_rows=60, num_clusters=30, seeds=[0])
    comparison = compare_run(run_dir, job)
    assert comparison.find_arm("lora").versus_base == "exploratory"
    assert comparison.find_arm("rag").versus_base == "better"
    assert comparison.verdict.startswith("Exploratory, one seed: ")
    assert any(warning.startswith("one seed:") for warning in comparison.warnings)


def _width(arm: ArmResult) -> float:
    difference = arm.differences["exact_match"]
    assert difference.low is not None
    assert difference.high is not None
    return difference.high - difference.low


def copy_example(example: Example, folder: Path) -> tuple[RunDir, Job]:
    shutil.copytree(example[0].root, folder / "copy")
    return RunDir(folder / "copy"), example[1]


def test_an_arm_scored_on_other_data_is_not_comparable(example: Example, tmp_path: Path) -> None:
    run_dir, job = copy_example(example, tmp_path)
    for seed in job.compare.seeds:
        path = run_dir.arm("full", seed).evaluation
        record = EvalRecord.from_json(read_json(path))
        write_json(path, replace(record, data_sha256="other").to_json())
    comparison = compare_run(run_dir, job)
    full = comparison.find_arm("full")
    assert full.not_comparable == "scored on other test data than zero-shot"
    assert full.versus_base is None
    assert full.metrics == {}
    assert "full: not comparable: scored on other test data than zero-shot" in comparison.warnings
    assert not [pair for pair in comparison.pairs if "full" in (pair.arm, pair.other)]
    assert "full" not in comparison.verdict


def test_an_arm_trained_with_another_template_is_not_comparable(example: Example, tmp_path: Path) -> None:
    run_dir, job = copy_example(example, tmp_path)
    for seed in job.compare.seeds:
        path = run_dir.arm("qlora", seed).record
        value = read_json(path)
        value["fingerprints"]["template"] = "other"
        write_json(path, value)
    comparison = compare_run(run_dir, job)
    assert comparison.find_arm("qlora").not_comparable == "trained with another template than lora"


def test_an_arm_with_a_missing_row_is_not_comparable(example: Example, tmp_path: Path) -> None:
    run_dir, job = copy_example(example, tmp_path)
    path = run_dir.arm("rag", 0).answers
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    comparison = compare_run(run_dir, job)
    assert comparison.find_arm("rag").not_comparable == "scored on other test rows than zero-shot"


def test_a_missing_seed_leaves_the_shared_ones(example: Example, tmp_path: Path) -> None:
    run_dir, job = copy_example(example, tmp_path)
    shutil.rmtree(run_dir.arm("full", 2).root)
    comparison = compare_run(run_dir, job, failures={"full": "out of memory"})
    assert comparison.seeds == [0, 1]
    assert comparison.find_arm("full").status == "partial"
    # Student's t with one degree of freedom: two seeds are no more than a hint.
    two, three = comparison.find_arm("lora"), example[2].find_arm("lora")
    assert two.seeds == [0, 1]
    assert len(two.per_seed["nll"]) == 2
    assert _width(two) > 1.3 * _width(three)
    assert any(warning.startswith("two seeds") for warning in comparison.warnings)
    assert comparison.warnings[0] == "full: ended without a result: out of memory"
    assert any("full: seed 2 missing" in warning for warning in comparison.warnings)


def test_a_missing_arm_is_shown_without_a_result(example: Example, tmp_path: Path) -> None:
    run_dir, job = copy_example(example, tmp_path)
    shutil.rmtree(run_dir.root / "arms" / "few-shot")
    comparison = compare_run(run_dir, job)
    assert comparison.find_arm("few-shot").status == "missing"
    assert "few-shot: not scored" in comparison.warnings
    assert comparison.table.rows[1][0].detail == "no result"


def test_nothing_scored_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ArmFailed, match="no arm was scored"):
        compare_run(RunDir(tmp_path), make_job(["zero-shot", "lora"]))


def test_a_declared_metric_that_nobody_has_is_a_failure(tmp_path: Path) -> None:
    write_arm(RunDir(tmp_path), "zero-shot", [1, 0], [1.0, 1.0], [1, 1])
    with pytest.raises(ArmFailed, match="no arm has 'rouge_l'"):
        compare_run(RunDir(tmp_path), make_job(["zero-shot"], metric="rouge_l"))

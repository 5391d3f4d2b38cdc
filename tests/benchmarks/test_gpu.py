"""The GPU benchmark's harness, on a CPU: our real engine on a tiny shape, against itself."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gpu
import slim_wheels
from cpu_vs_trl import TRL_PYTHON
from gpu_cases import inputs
from gpu_cases.cases import CASES, SHAPES, Case, Peer, Rows
from gpu_cases.groups import Entry, plan_groups, prepare_group, run_group
from gpu_cases.inputs import StoredRows, hash_step, list_tensors, plan_steps, write_model, write_random_rows
from gpu_cases.options import CaseFailed, Options, make_environment, merge_keys, say, strip_paths
from gpu_cases.parity import check_parity, measure_distance, split_name
from gpu_cases.protocol import Contender, ContenderFailed
from gpu_cases.results import (
    compute_ratio,
    judge,
    load_results,
    make_page,
    merge_results,
    summarize,
)
from gpu_cases.sides import Side
from gpu_cases.tasks import make_inputs, make_our_task
from tunesmith.data.prepare import load_prepared
from tunesmith.data.tokenizer import load_tokenizer

RATIO = {"of_medians": 1.0, "lowest": 1.0, "highest": 1.0}
ITSELF = Peer("ours", "itself", {"same": {}})
TINY = Case("tiny", "tiny against itself", "tiny", ITSELF, None, rows=Rows("full", 32), batch_rows=4, steps=2)
TRL = Peer("trl", "TRL", {"same": {"sft": {"logging_strategy": "no", "disable_tqdm": True}, "micro_rows": 2}})


def make_options(folder: Path, **changes: Any) -> Options:
    options = Options(
        folder=folder,
        device="cpu",
        rounds=2,
        deadline=time.monotonic() + 240,
        rows=None,
        site=None,
        peer_python=sys.executable,
        plain=True,
        skip_parity=False,
        job={},
    )
    return dataclasses.replace(options, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    return run(make_options(folder), TINY).records["tiny"]


@dataclasses.dataclass
class Ran:
    """records: the last of each case; told: names in the order in which records came; failures: by case."""

    records: dict[str, dict[str, Any]]
    told: list[str]
    failures: dict[str, str]


def run(options: Options, *cases: Case, only: Any = None) -> Ran:
    ran = Ran({}, [], {})

    def keep(name: str, record: dict[str, Any]) -> None:
        ran.records[name] = record
        ran.told.append(name)

    entries = [Entry(case, next(iter(case.peer.settings))) for case in cases]
    [group] = plan_groups(entries, options)
    ran.failures.update(run_group(group, options, only=only, on_record=keep))
    return ran


def vary(name: str, *, peer: Peer = ITSELF, **train: Any) -> Case:
    """TINY under another name, with its own keys of the job."""
    return dataclasses.replace(TINY, name=name, peer=peer, job={"train": train} if train else {})


# --- a whole case -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_sides_are_timed_for_every_round_on_the_same_rows(record):
    for side in (record["ours"], record["peer"]):
        assert [len(r["seconds"]) for r in side["rounds"]] == [2, 2]
        assert [r["tokens"] for r in side["rounds"]] == [[128, 128], [128, 128]]
        assert [r["targets"] for r in side["rounds"]] == [[124, 124], [124, 124]]
        assert side["tokens_per_second"] > 0
        assert side["peak_bytes"] > 0
    assert record["num_rounds"] == 2


@pytest.mark.slow
def test_our_engine_against_itself_starts_and_ends_at_the_same_loss(record):
    ours, peer = record["ours"], record["peer"]

    assert (ours["first_loss"], ours["last_loss"]) == (peer["first_loss"], peer["last_loss"])
    assert ours["first_loss"] == pytest.approx(np.log(512), rel=0.02)


@pytest.mark.slow
def test_gradients_are_those_of_transformers_and_peft(record):
    assert record["parity"]["ours"]["passed"]
    assert record["parity"]["ours"]["distance"]["total"] < 1e-5


@pytest.mark.slow
def test_a_contender_that_feeds_other_rows_is_not_timed(folder, record):
    options = make_options(folder, skip_parity=True)
    made = make_inputs(TINY, options)
    made = dataclasses.replace(made, digests=[*made.digests[1:], made.digests[0]])
    side = Side(TINY, "ours", "same", made, options)

    try:
        with pytest.raises(CaseFailed, match="ours fed other rows"):
            side.get_warm()
    finally:
        side.stop()


@pytest.mark.slow
def test_a_job_that_our_engine_refuses_fails_the_case_with_its_line(folder, record):
    ran = run(make_options(folder, job={"train": {"no_such_key": 1}}), TINY, only="ours")

    assert "no_such_key" in ran.failures["tiny"]
    assert ran.records["tiny"]["failed"] == ran.failures["tiny"]


@pytest.mark.slow
def test_our_figures_stand_when_the_peer_cannot_even_start(folder, record, capsys):
    ran = run(make_options(folder, peer_python="/bin/false"), vary("no-peer", peer=TRL))

    found = ran.records["no-peer"]
    assert found["ours"]["tokens_per_second"] > 0
    assert len(found["ours"]["rounds"]) == 1
    assert "peer" not in found
    assert found["failed"].startswith("trl_peer ended with 1")
    assert "no-peer-peer failed: trl_peer ended with 1" in capsys.readouterr().err


def test_a_case_that_breaks_is_told_in_one_line_and_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    def break_down(*_given: Any, **_more: Any) -> None:
        raise RuntimeError("something\nnobody thought of")

    monkeypatch.setattr(gpu, "run_group", break_down)
    out = tmp_path / "out.json"
    names = ["--case", "lora-bf16", "--case", "lora-bf16-limit", "--case", "lora-fp8"]
    arguments = gpu.make_parser().parse_args([*names, "--folder", str(tmp_path), "--out", str(out)])

    assert not gpu.run(arguments)

    assert (
        "lora-fp8 failed: RuntimeError: something nobody thought of (test_gpu.py:" in capsys.readouterr().err
    )
    assert {name: case["failed"] for name, case in load_results(out)["cases"].items()} == dict.fromkeys(
        ("lora-bf16", "lora-bf16-limit", "lora-fp8"), "something\nnobody thought of"
    )


@pytest.mark.slow
def test_the_smoke_test_of_a_gpu_runs_a_path_on_a_cpu(tmp_path):
    command = [sys.executable, str(gpu.CHECKOUT / "benchmarks" / "gpu_smoke.py"), "--device", "cpu"]
    command += [
        "--folder",
        str(tmp_path),
        "--only",
        "attention-even",
        "--only",
        "bf16-eager",
        "--only",
        "unpacking",
    ]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(line.split()[0] for line in done.stdout.splitlines()[:3]) == ["PASS", "PASS", "SKIP"]


def test_a_process_that_dies_is_told_in_one_line(tmp_path):
    contender = Contender("nothing_there", {}, folder=tmp_path, environment={})

    with pytest.raises(ContenderFailed, match=r"nothing_there ended with 1: .*No module named"):
        contender.ask({"do": "steps", "count": 1}, timeout=60)
    contender.stop()


@pytest.mark.slow
def test_a_record_names_no_folder_of_the_machine_it_was_made_on(folder, record):
    assert str(folder) in json.dumps(record)

    assert str(folder) not in json.dumps(strip_paths(record, make_options(folder)))


# --- cases measured together ------------------------------------------------------------------------------------------


def test_cases_that_share_a_side_are_a_group(tmp_path):
    options = make_options(tmp_path, plain=False)
    entries = [Entry(case, next(iter(case.peer.settings))) for case in CASES.values()]

    groups = plan_groups(entries, options)

    assert [[entry.case.name for entry in group] for group in groups] == [
        ["lora-bf16", "lora-fp8"],
        ["lora-bf16-limit", "lora-fp8-limit"],
        ["qlora-limit", "qlora-fp8-limit"],
        ["full-8b"],
        ["full-1.5b"],
        ["real-lengths", "real-lengths-trl"],
        ["lora-0.5b"],
        ["lora-1.5b"],
        ["dpo-1.5b"],
        ["grpo-1.5b"],
        ["first-step"],
    ]


def test_a_case_named_twice_is_measured_once_and_other_settings_of_a_peer_are_another_peer(tmp_path):
    options = make_options(tmp_path, plain=False)
    one, other = CASES["lora-bf16"], CASES["lora-fp8"]

    assert plan_groups([Entry(one, "no recompute")] * 2, options) == [[Entry(one, "no recompute")]]
    slower = dataclasses.replace(other, peer=Peer("unsloth", "slower", {"x": {"checkpointing": True}}))
    assert len(plan_groups([Entry(one, "no recompute"), Entry(slower, "x")], options)) == 2
    longer = dataclasses.replace(other, steps=7)
    assert len(plan_groups([Entry(one, "no recompute"), Entry(longer, "no recompute")], options)) == 2


@pytest.mark.slow
def test_two_jobs_of_ours_take_turns_with_one_peer_and_each_case_has_a_record_of_its_own(folder, record):
    ran = run(
        make_options(folder, plain=False), vary("one", weight_decay=0.25), vary("two", weight_decay=0.5)
    )

    one, two = ran.records["one"], ran.records["two"]
    assert not ran.failures
    # Ours of one, ours of two, the peer of both; twice, and once more in the end.
    assert ran.told == ["one", "two", "one", "two"] * 2 + ["one", "two"]
    assert one["peer"] == two["peer"]
    assert one["ours"]["rounds"] != two["ours"]["rounds"]
    assert [len(r["ours"]["rounds"]) for r in (one, two)] == [2, 2]
    assert [r["job"]["train"]["weight_decay"] for r in (one, two)] == [0.25, 0.5]
    assert [r["measured_with"] for r in (one, two)] == [["two"], ["one"]]
    for found in (one, two):
        assert "failed" not in found
        assert found["parity"]["ours"]["passed"]
        assert found["parity"]["peer"]["passed"]
        assert compute_ratio(TINY, found)["of_medians"] > 0
    assert (folder / "one-peer" / "ours.log").is_file()
    assert not (folder / "two-peer").exists()


@pytest.mark.slow
def test_a_side_that_fails_costs_only_its_own_cases(folder, record):
    options = make_options(folder, plain=False)

    ran = run(options, vary("good", weight_decay=0.25), vary("bad", no_such_key=1))

    assert list(ran.failures) == ["bad"]
    assert "no_such_key" in ran.records["bad"]["failed"]
    assert "failed" not in ran.records["good"]
    assert ran.records["good"]["num_rounds"] == 2
    assert ran.records["bad"]["peer"]["rounds"] == ran.records["good"]["peer"]["rounds"]


@pytest.mark.slow
def test_one_process_of_ours_is_measured_against_two_peers_also_when_one_of_them_is_missing(folder, record):
    options = make_options(folder, peer_python="/bin/false")

    ran = run(options, vary("missing", peer=TRL), vary("there"))

    assert list(ran.failures) == ["missing"]
    assert ran.records["there"]["num_rounds"] == 2
    assert (folder / "missing-ours" / "ours.log").is_file()
    assert not (folder / "there-ours").exists()


@pytest.mark.slow
def test_a_side_that_never_answers_leaves_the_others_time_to_be_measured(folder, record, tmp_path):
    asleep = tmp_path / "python"
    asleep.write_text("#!/bin/sh\nexec sleep 600\n")
    asleep.chmod(0o755)
    options = make_options(folder, peer_python=str(asleep), skip_parity=True, case_seconds=15)

    ran = run(options, vary("asleep", peer=TRL), vary("awake"))

    assert ran.failures == {"asleep": "trl_peer: no answer to load in time"}
    assert ran.records["awake"]["num_rounds"] == 2


@pytest.mark.slow
def test_rounds_that_would_not_fit_the_time_are_not_begun_and_those_done_are_whole(folder, record, capsys):
    ran = run(make_options(folder, rounds=900, case_seconds=20, skip_parity=True), vary("long"))

    found = ran.records["long"]
    assert not ran.failures
    assert 1 <= found["num_rounds"] < 900
    assert len(found["ours"]["rounds"]) == len(found["peer"]["rounds"]) == found["num_rounds"]
    assert f"time is up after {found['num_rounds']} of 900 rounds" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.slow
def test_a_group_runs_on_a_gpu_with_the_card_to_itself(tmp_path):
    shape = {"shape": "smoke", "rows": Rows("full", 256)}
    cases = [dataclasses.replace(vary(name, weight_decay=0.1 * n), **shape) for n, name in enumerate("ab", 1)]

    ran = run(make_options(tmp_path, device="cuda", plain=False), *cases)

    assert not ran.failures
    for found in ran.records.values():
        assert found["hardware"]["gpu"]
        assert found["ours"]["peak_bytes"] > 0
        assert found["parity"]["ours"]["passed"]


@pytest.mark.trl
@pytest.mark.slow
def test_trl_and_our_engine_beside_it_are_loaded_at_once_and_compute_the_same(folder, record):
    if not TRL_PYTHON.exists():
        pytest.skip("TRL's environment is missing; run: make test-trl")
    options = make_options(folder, peer_python=str(TRL_PYTHON))

    ran = run(options, vary("trl", peer=TRL), vary("itself"))

    assert not ran.failures
    ours, trl = ran.records["trl"]["ours"], ran.records["trl"]["peer"]
    assert trl["facts"]["versions"]["trl"]
    assert trl["first_loss"] == pytest.approx(ours["first_loss"], abs=1e-4)
    assert ours == ran.records["itself"]["ours"]


# --- loading, caches, preparing ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_loading_takes_no_step_and_the_next_steps_are_the_first(folder, record):
    options = make_options(folder)
    made = make_inputs(TINY, options)
    own = folder / "loading"
    own.mkdir()
    task = make_our_task(TINY, {}, made, options, folder=own)
    contender = Contender("ours", task, folder=own, environment=make_environment(options))

    try:
        assert contender.ask({"do": "load"}, timeout=120) == {"did": "load"}
        # The loop, which plans memory before it opens its log of steps, has not begun.
        assert not list((own / "train").rglob("steps.jsonl"))
        answer = contender.ask({"do": "steps", "count": 2}, timeout=120)
    finally:
        contender.stop()

    assert answer["digests"] == made.digests[:2]
    assert answer["losses"][0] == record["ours"]["first_loss"]
    assert len((own / "train" / "steps.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_the_first_pair_of_starts_counts_only_if_caches_are_known_to_be_warm(folder, record, capsys):
    case = dataclasses.replace(TINY, name="start", measure="start", together=False, steps=1, warm_up=1)
    cold = dataclasses.replace(case, batch_rows=2)
    options = make_options(folder, rounds=1)

    warm = run(options, case).records["start"]
    # Both sides have taken steps of this kind in this folder: the speed case's.
    assert "filled the caches" not in capsys.readouterr().err
    first = run(options, cold).records["start"]
    assert capsys.readouterr().err.count("filled the caches") == 2
    second = run(options, cold).records["start"]
    assert "filled the caches" not in capsys.readouterr().err

    for found in (warm, first, second):
        assert "failed" not in found
        assert len(found["ours"]["start_seconds"]) == len(found["peer"]["start_seconds"]) == 1
        assert found["ours"]["start_seconds"][0] > 0.1


def test_what_measured_processes_compile_is_kept_in_the_folder_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    code = "from torch._inductor.runtime.cache_dir_utils import cache_dir; print(cache_dir())"

    done = subprocess.run(
        [sys.executable, "-c", code],
        env=make_environment(make_options(tmp_path)),
        capture_output=True,
        text=True,
        check=True,
    )

    assert Path(done.stdout.strip()).parent == tmp_path / "compiled"


@pytest.mark.slow
def test_what_is_prepared_is_not_made_again(tmp_path, capsys):
    options = make_options(tmp_path)

    prepare_group([Entry(TINY, "same")], options)
    assert "reference gradients in fp32" in capsys.readouterr().err
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/**/*") if path.is_file()}
    prepare_group([Entry(TINY, "same")], options)

    told = capsys.readouterr().err
    assert "writing" not in told
    assert "reference gradients" not in told
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/**/*") if path.is_file()}
    assert any(path.name == "reference.json" for path in made)


@pytest.mark.slow
def test_preparing_from_the_command_line_measures_nothing(tmp_path):
    command = [
        "--case",
        "lora-bf16",
        "--case",
        "first-step",
        "--prepare",
        "--shape",
        "tiny",
        "--device",
        "cpu",
    ]
    command += [
        "--row-tokens",
        "16",
        "--plain",
        "--folder",
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
    ]

    assert gpu.run(gpu.make_parser().parse_args(command))

    # Two groups, the same rows: one reference.
    assert len(list(tmp_path.glob("in/reference-*/reference.json"))) == 1
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_prepared_is_told(tmp_path, capsys):
    command = ["--case", "real-lengths", "--prepare", "--shape", "tiny", "--device", "cpu"]

    assert not gpu.run(gpu.make_parser().parse_args([*command, "--folder", str(tmp_path)]))

    assert "real-lengths is not prepared: CaseFailed: real-lengths needs --rows" in capsys.readouterr().err


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_rows_read_back_as_they_were_written_and_first_tokens_are_no_targets(tmp_path):
    write_random_rows(tmp_path, lengths=[3, 5, 2], vocab_size=100, seed=0)

    rows = StoredRows(tmp_path)

    assert [len(rows[n][0]) for n in range(len(rows))] == [3, 5, 2]
    assert [rows[n][1].tolist() for n in range(3)] == [[0, 1, 1], [0, 1, 1, 1, 1], [0, 1]]


def test_weights_follow_from_their_names_however_they_are_spread_over_files(tmp_path, monkeypatch):
    config = gpu.SHAPES["tiny"].config
    write_model(tmp_path / "one", config, seed=0, device="cpu")
    monkeypatch.setattr(inputs, "SHARD_BYTES", 20_000)
    write_model(tmp_path / "many", config, seed=0, device="cpu")

    def read(folder: Path) -> dict[str, Any]:
        from safetensors.torch import load_file

        return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}

    one, many = read(tmp_path / "one"), read(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    assert one.keys() == many.keys() == dict(list_tensors(config)).keys()
    assert all(bool((one[name] == many[name]).all()) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == one.keys()


def test_random_pairs_have_a_prompt_in_common_and_are_read_as_pairs(tmp_path):
    write_random_rows(tmp_path, lengths=[12] * 4, vocab_size=100, seed=0, pairs=True)

    stored, pairs = StoredRows(tmp_path), load_prepared(tmp_path).examples("train")
    (chosen, kept), (rejected, _) = stored[2], stored[3]
    assert (chosen[:6] == rejected[:6]).all()
    assert (chosen[6:] != rejected[6:]).any()
    assert kept.tolist() == [0] * 6 + [1] * 6
    assert [list(row.ids) for row in pairs[1].rows] == [chosen.tolist(), rejected.tolist()]


def test_prompts_are_a_token_for_each_letter_on_both_sides(tmp_path):
    write_model(tmp_path / "model", SHAPES["tiny"].config, seed=0, device="cpu")
    inputs.write_prompts(tmp_path / "prompts", count=3, tokens=20, model=tmp_path / "model", seed=0)

    texts = json.loads((tmp_path / "prompts" / "prompts.json").read_text())
    tokenizer = load_tokenizer(tmp_path / "model")
    prompts = load_prepared(tmp_path / "prompts").prompts("train")
    assert [list(prompt.ids) for prompt in prompts] == [tokenizer.encode(text) for text in texts]
    assert {len(prompt.ids) for prompt in prompts} == {20}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "rows", "counted"), [("dpo", "pairs", 4 * 2 * 32), ("grpo", "prompts", 4 * 8)]
)
def test_a_step_of_pairs_counts_their_tokens_and_a_rollout_its_answers(tmp_path, objective, rows, counted):
    case = dataclasses.replace(TINY, name=objective, objective=objective, rows=Rows(rows, 32))
    case = dataclasses.replace(case, steps=1, warm_up=1)

    [record] = run(make_options(tmp_path, rounds=1), case).records.values()

    assert "failed" not in record
    for side in (record["ours"], record["peer"]):
        assert [r["tokens"] for r in side["rounds"]] == [[counted]]
    if objective == "dpo":
        # The reference is the model that training begins with, adapters and all.
        assert record["ours"]["first_loss"] == pytest.approx(np.log(2), rel=1e-6)
        assert record["parity"]["ours"]["distance"]["total"] < 1e-5
    else:
        assert record["parity"] == "answers are sampled"
        assert "answers" in make_page(
            {"schema": 1, "cases": {"grpo-1.5b": {**record, "ratio": RATIO}}, "tuned": {}}
        )


def test_rows_of_a_step_may_come_in_any_order_and_nothing_else_may_differ():
    first, second = ([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])

    assert hash_step([first, second]) == hash_step([second, first])
    # A side may or may not mark the first token: nothing precedes it, so it is never trained.
    assert hash_step([first]) == hash_step([([5, 6, 7], [1, 1, 1])])
    assert hash_step([first]) != hash_step([([5, 6, 7], [0, 0, 1])])
    assert hash_step([first]) != hash_step([([5, 6, 8], [0, 1, 1])])


def test_steps_are_whole_and_in_the_order_of_our_engine():
    from tunesmith.data.batch import plan_epoch

    steps = plan_steps(10, batch_rows=4, seed=3)

    assert steps == plan_epoch(10, batch_rows=4, seed=3, epoch=0)[:2]


def test_the_8b_shape_has_eight_billion_weights():
    config = gpu.SHAPES["llama-8b"].config

    assert sum(int(np.prod(shape)) for _, shape in list_tensors(config)) == 8_030_261_248


# --- parity -----------------------------------------------------------------------------------------------------------


def write_reference(folder: Path, *, noise: float) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(0)
    truth = {
        name: drawn.standard_normal((4, 4)).astype(np.float32)
        for name in ("a.q_proj.weight", "a.k_proj.weight", "b.weight")
    }
    save_file(truth, folder / "reference.safetensors")
    for kind, times in (("rounded", 1), ("rounded-fp8", 10)):
        rounded = {name: value * (1 + times * noise) for name, value in truth.items()}
        save_file(rounded, folder / f"{kind}.safetensors")
    (folder / "reference.json").write_text(json.dumps({"reference": 2.0, "rounded": 2.0}))
    return truth


def test_a_merged_matrix_is_compared_with_its_parts(tmp_path):
    truth = write_reference(tmp_path, noise=0.01)
    merged = np.concatenate([truth["a.q_proj.weight"], truth["a.k_proj.weight"]])
    save_file(
        {"a.q_proj+k_proj.weight": merged, "b.weight": truth["b.weight"]}, tmp_path / "ours.safetensors"
    )

    assert split_name("a.q_proj+k_proj.weight") == ["a.q_proj.weight", "a.k_proj.weight"]
    assert measure_distance(tmp_path / "ours.safetensors", tmp_path / "reference.safetensors").total == 0


@pytest.mark.parametrize(("factor", "passed"), [(1.02, True), (1.05, False), (float("nan"), False)])
def test_gradients_may_be_three_times_as_far_as_plain_bf16(tmp_path, factor, passed):
    truth = write_reference(tmp_path, noise=0.01)
    save_file({name: value * np.float32(factor) for name, value in truth.items()}, tmp_path / "x.safetensors")

    parity = check_parity(tmp_path, tmp_path / "x.safetensors", {"loss": 2.0}, fp8=False)

    assert parity.passed is passed
    assert parity.allowed_total == pytest.approx(0.03, rel=1e-3)


@pytest.mark.parametrize(("factor", "passed"), [(1.14, True), (1.17, False)])
def test_gradients_of_an_fp8_base_may_be_half_as_far_again_as_plain_fp8(tmp_path, factor, passed):
    truth = write_reference(tmp_path, noise=0.01)
    save_file({name: value * np.float32(factor) for name, value in truth.items()}, tmp_path / "x.safetensors")

    parity = check_parity(tmp_path, tmp_path / "x.safetensors", {"loss": 2.0}, fp8=True)

    assert parity.passed is passed
    assert parity.allowed_total == pytest.approx(0.15, rel=1e-3)


def test_a_missing_gradient_and_another_loss_are_told(tmp_path):
    truth = write_reference(tmp_path, noise=0.01)
    save_file(truth, tmp_path / "x.safetensors")
    del truth["b.weight"]
    save_file(truth, tmp_path / "y.safetensors")

    assert (
        "the loss is 2.1"
        in check_parity(tmp_path, tmp_path / "x.safetensors", {"loss": 2.1}, fp8=False).reason
    )
    with pytest.raises(ValueError, match=r"no gradient of b\.weight"):
        check_parity(tmp_path, tmp_path / "y.safetensors", {"loss": 2.0}, fp8=False)


# --- results ----------------------------------------------------------------------------------------------------------


def make_side(*seconds: float, peak: float = 0.0) -> dict[str, Any]:
    """Rounds of two steps with 100 tokens, 50 of them targets."""
    rounds = [{"seconds": [s, s], "tokens": [100, 100], "targets": [50, 50]} for s in seconds]
    facts = {"versions": {"torch": "2.11.0"}, "gpu": {}}
    side = {"rounds": rounds, "facts": facts, "first_loss": 11.8, "last_loss": 11.7, "warm_up_seconds": 40.0}
    return side | {"peak_bytes": int(peak * 2**30), "reserved_bytes": int(peak * 2**30)} | summarize(rounds)


def make_record(name: str, ours: dict[str, Any], peer: dict[str, Any], **more: Any) -> dict[str, Any]:
    record = {"ours": ours, "peer": peer, "parity": "skipped", "hardware": {"gpu": "a GPU"}, "steps": 2}
    record |= {"commit": "abc", "code": "c0de", "date": "2026-01-02", "num_rounds": 3} | more
    return record | {"ratio": compute_ratio(CASES[name], record)}


def test_figures_are_medians_over_rounds():
    side = make_side(1.0, 2.0, 4.0)

    assert side["tokens_per_second"] == 50  # of 100, 50 and 25
    assert side["tokens_per_second_range"] == [25, 100]
    assert side["target_tokens_per_second"] == 25
    assert side["step_seconds"] == 2.0


def test_a_ratio_is_of_medians_and_shows_the_pairs():
    ratio = compute_ratio(
        CASES["lora-bf16"], {"ours": make_side(1.0, 1.0, 2.0), "peer": make_side(2.0, 1.0, 2.0)}
    )

    assert ratio == {"of_medians": 2.0, "lowest": 1.0, "highest": 2.0}


def test_bars_and_limits_decide_alike():
    fast, slow = make_side(1.0, peak=19.0), make_side(2.0, peak=19.0)
    large = make_side(1.0, peak=20.0)
    case = CASES["lora-bf16-limit"]

    assert judge(case, None) == "not measured"
    assert judge(case, make_record(case.name, fast, slow)) == "met"
    assert judge(case, make_record(case.name, slow, fast)) == "missed: 0.50 times its speed, the aim is 1.05"
    assert judge(case, make_record(case.name, large, slow)) == "missed: 20.0 GiB, the limit is 19.7"
    assert judge(CASES["full-1.5b"], make_record("full-1.5b", slow, fast)) == "no bar"


def test_for_the_first_step_less_is_better():
    case = CASES["first-step"]
    quick, late = {"start_seconds": [10.0, 12.0]}, {"start_seconds": [30.0, 30.0]}

    assert judge(case, {"ratio": compute_ratio(case, {"ours": quick, "peer": late})}) == "met"
    assert judge(case, {"ratio": compute_ratio(case, {"ours": late, "peer": quick})}).startswith(
        "missed: 2.73"
    )


def test_a_later_measurement_replaces_an_earlier_one_and_a_failure_stands_beside_it():
    old, new = {"ratio": 1, "date": "2026-01-01"}, {"ratio": 2, "date": "2026-01-02"}
    failure = {"failed": "out of memory", "date": "2026-01-03", "commit": "abc"}
    results = {"cases": {"a": old, "b": old}, "tuned": {}}

    merged = merge_results(results, {"cases": {"a": new, "b": failure, "c": failure}, "tuned": {"a": {}}})
    again = merge_results(merged, results)

    assert merged["cases"]["a"] == new
    assert merged["cases"]["b"] == old | {"failed_later": failure}
    assert merged["cases"]["c"] == failure
    assert again["cases"]["a"] == new
    assert merged["tuned"] == {"a": {}}


def test_the_page_names_every_case_also_those_without_a_measurement(tmp_path):
    page = make_page(load_results(tmp_path / "none.json"))

    for case in CASES.values():
        assert f"- {case.what}, against {case.peer.label}: not measured." in page
    assert "Nothing is measured yet." in page


def test_the_page_says_what_falls_short_as_plainly_as_what_does_not():
    fast, slow = make_side(1.0, 1.0), make_side(2.0, 2.0)
    cases = {
        "lora-bf16": make_record("lora-bf16", fast, slow),
        "lora-fp8": make_record("lora-fp8", slow, fast),
        "full-8b": {"failed": "ours ended with 1: out of memory", "date": "2026-01-01", "commit": "abc"},
    }

    page = make_page({"schema": 1, "cases": cases, "tuned": {}})

    assert "| 100 (100 to 100) | 50 (50 to 50) | 2.00 (2.00 to 2.00) | 1.06 | yes |" in page
    assert "| 50 (50 to 50) | 100 (100 to 100) | 0.50 (0.50 to 0.50) | 1.45 | **no** |" in page
    assert (
        "- LoRA, fp8 base, memory free, against Unsloth, no recompute: 0.50 times its speed, the aim is 1.45."
        in page
    )
    assert "failed: ours ended with 1: out of memory." in page
    assert "measured without the gradient check" in page


def test_the_page_says_of_a_peer_with_several_settings_whether_others_were_tried():
    fast, slow = make_side(1.0, 1.0), make_side(2.0, 2.0)
    cases = {
        name: make_record(name, fast, slow) | {"peer_setting": setting}
        for name, setting in (
            ("full-8b", "Liger, 4 rows"),
            ("full-1.5b", "Liger, 8 rows"),
            ("real-lengths-trl", "padding-free"),
        )
    }
    tuned = {"full-8b": {"best": "Liger, 4 rows", "tried": {"Liger, 4 rows": {}, "chunked loss, 4 rows": {}}}}

    page = make_page({"schema": 1, "cases": cases, "tuned": tuned})

    assert "| TRL (Liger, 4 rows; the fastest of 2 settings tried) |" in page
    assert "| TRL (Liger, 8 rows; not tuned: one of 2 settings) |" in page
    assert "| TRL (padding-free; not tuned: the first of 4 settings) |" in page


def test_every_case_compiles_as_the_page_says():
    assert all(case.job["train"]["compile"] is True for case in CASES.values())


def test_slow_steps_of_unsloth_on_real_lengths_are_told_with_their_figures():
    record = make_record("real-lengths", make_side(0.1, 0.1), make_side(0.65, 1.17))

    page = make_page({"schema": 1, "cases": {"real-lengths": record}, "tuned": {}})

    assert "takes 0.65 to 1.17 s, for 100 tokens in the mean. Why so long, we have not found out." in page


def test_the_page_in_the_docs_is_what_the_results_give():
    assert gpu.PAGE.read_text(encoding="utf-8") == gpu.make_whole_page(load_results(gpu.RESULT)), (
        "run: python benchmarks/gpu.py --table"
    )


def test_job_keys_from_the_command_line_nest():
    assert gpu.parse_key("train.compile=true") == {"train": {"compile": True}}
    assert gpu.parse_key("train.memory_limit=19.7GiB") == {"train": {"memory_limit": "19.7GiB"}}
    assert merge_keys({"train": {"a": 1}}, {"train": {"b": 2}}) == {"train": {"a": 1, "b": 2}}


# --- wheels -----------------------------------------------------------------------------------------------------------


def test_a_slim_wheel_lacks_the_files_and_their_lines_in_record(tmp_path):
    kept = ["unsloth/__init__.py", "unsloth-1.dist-info/METADATA", "unsloth-1.dist-info/RECORD"]
    record = "".join(f"{name},sha256=x,1\n" for name in [*kept, "studio/app.js"])
    wheel = tmp_path / "whole" / "unsloth-1-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in [*kept[:2], "studio/app.js"]:
            archive.writestr(name, "x = 1\n")
        archive.writestr(kept[2], record)

    slim = zipfile.ZipFile(slim_wheels.slim_wheel(wheel, tmp_path))

    assert sorted(slim.namelist()) == sorted(kept)
    rows = csv.reader(io.StringIO(slim.read(kept[2]).decode()))
    assert [row[0] for row in rows] == kept


def test_every_line_of_the_log_begins_with_the_seconds_since_the_start(capsys):
    say("one")
    time.sleep(0.3)
    say("two")

    first, second = (line.split() for line in capsys.readouterr().err.splitlines())
    assert [first[1], second[1]] == ["one", "two"]
    assert 0.2 <= float(second[0]) - float(first[0]) < 30


def test_every_listed_wheel_is_pinned():
    assert all("==" in line for line in slim_wheels.read_list())
    assert {"unsloth==2026.10.9", "trl==1.15.0"} <= set(slim_wheels.read_list())


def test_the_gradients_file_of_a_run_is_deleted(folder, record):
    assert not list(folder.glob("reference-*/ours.safetensors"))
    assert load_file(next(folder.glob("reference-*/reference.safetensors")))

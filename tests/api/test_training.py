"""Training through the public functions, on the bundled model: what is left in the folder, resuming, refusing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from tunesmith.core.errors import DataError, JobError, ModelError, RunDirError, SetupError
from tunesmith.core.events import Event
from tunesmith.core.jsonl import read_json, read_jsonl
from tunesmith.core.rundir import RunDir


def job(**train: Any) -> dict[str, Any]:
    return {
        "model": "tunesmith/tiny",
        "data": {"train": "tunesmith/tickets"},
        "method": {"name": "lora", "rank": 4},
        "train": {"steps": 3, "evaluate_every": "never", "learning_rate": 1e-3, **train},
    }


def places_in(rejects: Path) -> list[str]:
    return [row["place"] for _, row in read_jsonl(rejects)]


def test_a_run_leaves_an_adapter_that_peft_loads_with_our_logits(tmp_path: Path) -> None:
    import peft
    import torch
    import transformers

    from tunesmith.api.evaluation import find_target, load_target
    from tunesmith.models.layout import make_layout

    record = tunesmith.train(job(), out=tmp_path)
    assert record.status == "done"
    assert record.steps == 3
    assert record.train_tokens > record.target_tokens > 0
    found = find_target(str(tmp_path))
    ours = load_target(found, precision="fp32")
    base = transformers.AutoModelForCausalLM.from_pretrained(found.model_folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = torch.arange(5, 45)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        logits = ours.head(ours.hidden(ids, make_layout([40])))
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_running_again_returns_the_finished_run(tmp_path: Path) -> None:
    first = tunesmith.train(job(), out=tmp_path)
    events: list[Event] = []
    started = time.monotonic()
    assert tunesmith.train(job(), out=tmp_path, on_event=events.append) == first
    assert time.monotonic() - started < 30
    assert not [event for event in events if event.kind == "step"]


def test_another_job_in_the_folder_is_refused_naming_the_key(tmp_path: Path) -> None:
    tunesmith.train(job(), out=tmp_path)
    with pytest.raises(RunDirError, match=r"begun with train\.learning_rate=0\.001, not 0\.002"):
        tunesmith.train(job(learning_rate=2e-3), out=tmp_path)
    record = tunesmith.train(job(learning_rate=2e-3), out=tmp_path, fresh=True)
    assert record.learning_rate == 2e-3


def test_edited_rows_are_not_answered_with_the_old_run(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Count to {n}:", "completion": " " + " ".join(map(str, range(n)))} for n in range(2, 40)
    ]
    source = tmp_path / "rows.jsonl"
    data = {"train": str(source), "split": {"validation": 0.0, "test": 0.0}}
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tunesmith.train(job() | {"data": data}, out=tmp_path / "run")
    source.write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    with pytest.raises(RunDirError, match="was trained when train was different"):
        tunesmith.train(job() | {"data": data}, out=tmp_path / "run")


def test_fresh_never_deletes_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(RunDirError, match="holds no run of ours"):
        tunesmith.train(job(), out=tmp_path, fresh=True)
    assert (tmp_path / "thesis.txt").read_text() == "x"


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    values = job(steps=6, save_every=1)
    tunesmith.train(values, out=tmp_path / "whole")
    code = (
        "import sys, json, tunesmith\n"
        "from tunesmith.core.errors import TunesmithError\n"
        "def tell(event):\n"
        "    if event.kind == 'step': print(event.done, flush=True)\n"
        f"job = json.loads({json.dumps(json.dumps(values))})\n"
        f"try: tunesmith.train(job, out={str(tmp_path / 'cut')!r}, on_event=tell)\n"
        "except TunesmithError as error: print(error); sys.exit(error.exit_code)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "2":
            child.send_signal(signal.SIGTERM)
            break
    rest = child.stdout.read()
    child.stdout.close()
    assert child.wait() == 143, rest
    assert "saved" in rest
    record = tunesmith.train(values, out=tmp_path / "cut")
    assert record.steps == 6
    assert record.phases is None  # the first process took some of them with it
    same = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")
    ]
    assert same[0] == same[1]
    losses = [
        [row["loss"] for _, row in read_jsonl(tmp_path / name / "steps.jsonl")] for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1]


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with RunDir(tmp_path).lock(), pytest.raises(RunDirError, match="in use by process"):
        tunesmith.train(job(), out=tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "finding"),
    [
        ({"model": "nowhere/at/all"}, ModelError, "no such folder"),
        ({"model": "tunesmith/tyny"}, ModelError, "Did you mean tunesmith/tiny"),
        ({"model": str(Path(__file__))}, ModelError, "is a file"),
        ({"data": {"train": "nowhere.jsonl"}}, DataError, "nowhere.jsonl"),
        ({"methd": "lora"}, JobError, "did you mean 'method'"),
    ],
)
def test_faults_are_one_line_before_anything_is_loaded(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], finding: str
) -> None:
    used = time.process_time()
    with pytest.raises(error, match=finding) as caught:
        tunesmith.train({**job(), **change}, out=tmp_path)
    assert "\n" not in str(caught.value)
    assert time.process_time() - used < 5


def test_the_record_holds_what_a_rerun_needs(tmp_path: Path) -> None:
    tunesmith.train(job(), out=tmp_path)
    record = read_json(tmp_path / "run.json")
    assert record["config"]["train"]["schedule"] == "cosine"
    assert {"train_sha256", "template_sha256", "tokenizer_sha256", "model", "code"} <= record[
        "fingerprints"
    ].keys()
    assert record["versions"]["torch"]
    assert record["hardware"]["cores"] >= 1
    assert record["wall_seconds"] > 0 < record["cpu_seconds"]
    assert record["size_bytes"] == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size


def test_the_phases_of_a_training_add_up_to_it(tmp_path: Path) -> None:
    record = tunesmith.train(job(evaluate_every=1), out=tmp_path)

    phases = record.phases
    assert phases is not None
    assert list(phases) == ["loading", "building", "first step", "steps", "validating", "saving"]
    assert min(phases.values()) > 0
    assert sum(phases.values()) == pytest.approx(record.wall_seconds, abs=0.5)
    # The steps' own clocks, without the validation between them.
    steps = [row["step_seconds"] for _, row in read_jsonl(tmp_path / "steps.jsonl")]
    assert phases["steps"] == pytest.approx(sum(steps[1:]))
    assert phases["first step"] >= steps[0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_training_tells_its_memory_peaks(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    memory = tunesmith.train(job(), out=tmp_path).memory

    assert memory is not None
    assert memory["resident"] > 100 << 20
    if device == "cuda":
        assert memory["reserved"] >= memory["allocated"] > 0
    else:
        assert list(memory) == ["resident"]


def test_new_tokens_are_trained_saved_and_loaded_by_peft(tmp_path: Path) -> None:
    import peft
    import torch
    import transformers

    values = job(steps=2) | {"method": {"name": "lora", "rank": 4, "new_tokens": ["<ticket>", "<done>"]}}
    tunesmith.train(values, out=tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert len(tokenizer("<ticket>", add_special_tokens=False).input_ids) == 1
    from tunesmith.api.evaluation import find_target

    folder = find_target(str(tmp_path)).model_folder
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base.resize_token_embeddings(len(tokenizer))
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    ids = torch.tensor([tokenizer("<ticket> order 48213 <done>").input_ids])
    assert model(ids).logits.shape[-1] == len(tokenizer)
    assert tunesmith.generate(tmp_path, ["Hello"], max_new_tokens=3)


def test_a_streamed_run_sets_bad_rows_aside(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Count to {n}:", "completion": " " + " ".join(map(str, range(n)))} for n in range(2, 40)
    ]
    lines = [json.dumps(row) for row in rows]
    lines.insert(5, '{"prompt": "no completion", "completion": null}')
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    data = {
        "train": str(tmp_path / "rows.jsonl"),
        "streaming": True,
        "split": {"validation": 0.0, "test": 0.0},
    }
    record = tunesmith.train(job(steps=4) | {"data": data}, out=tmp_path / "run", on_bad_row="skip")
    assert record.steps == 4
    preview = tunesmith.preview(job() | {"data": data}, rows=2, on_bad_row="skip")
    assert [row.place for row in preview] == ["rows.jsonl:1", "rows.jsonl:2"]
    report = tunesmith.check(job() | {"data": data}, on_bad_row="skip")
    assert (report.splits["train"].num_rows, report.sources[0].num_rejected) == (38, 1)
    assert places_in(tmp_path / "run" / "rejected_stream_rows.jsonl") == ["rows.jsonl:6"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:5] + lines[6:20]) + "\n")
    with pytest.raises(RunDirError, match="was trained when stream was different"):
        tunesmith.train(job(steps=4) | {"data": data}, out=tmp_path / "run")


def test_bad_rows_of_a_stream_and_of_its_held_out_rows_are_both_kept(tmp_path: Path) -> None:
    good = [json.dumps({"prompt": f"Count to {n}:", "completion": f" {n}"}) for n in range(20)]
    bad = '{"prompt": "no completion", "completion": null}'
    for name, at in (("train", 2), ("held", 4)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("\n".join([*good[:at], bad, *good[at:]]))
    split = {"validation": str(tmp_path / "held" / "rows.jsonl"), "test": 0.0}
    data = {"train": str(tmp_path / "train" / "rows.jsonl"), "streaming": True, "split": split}
    out = tmp_path / "run"
    record = tunesmith.train(job(steps=4) | {"data": data}, out=out, on_bad_row="skip")
    for _ in range(2):
        assert places_in(out / "rejected_rows.jsonl") == ["rows.jsonl:5"]
        assert places_in(out / "rejected_stream_rows.jsonl") == ["rows.jsonl:3"]
        tunesmith.train(job(steps=4) | {"data": data}, out=out, on_bad_row="skip")
    assert record.warnings == ["1 bad row of the stream skipped (see rejected_stream_rows.jsonl)"]


def test_train_and_compare_do_not_share_a_folder(tmp_path: Path) -> None:
    trained, compared = tmp_path / "trained", tmp_path / "compared"
    compare = job() | {
        "evaluate": {"max_rows": 2, "max_new_tokens": 2},
        "compare": {"arms": ["zero-shot"], "seeds": [0]},
    }
    tunesmith.train(job(), out=trained)
    tunesmith.compare(compare, out=compared)
    with pytest.raises(
        RunDirError, match="trained: holds what train wrote; compare wants a folder of its own"
    ):
        tunesmith.compare(compare, out=trained)
    with pytest.raises(
        RunDirError, match="compared: holds what compare wrote; train wants a folder of its own"
    ):
        tunesmith.train(job(), out=compared)
    assert not (trained / "arms").exists()
    assert not (compared / "run.json").exists()
    assert tunesmith.train(job(), out=compared, fresh=True).status == "done"
    assert not (compared / "comparison.json").exists()


def test_a_folder_with_other_peoples_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(RunDirError, match="holds no run of ours"):
        tunesmith.train(job(), out=tmp_path)


@pytest.mark.parametrize(
    ("dropout", "device", "shared"), [(0.0, "cpu", True), (0.1, "cpu", False), (0.0, "cuda", False)]
)
def test_rows_share_their_beginning_unless_dropout_or_a_gpu_kernel_forbids(
    dropout: float, device: str, shared: bool
) -> None:
    import torch

    from tunesmith.api.trainable import shares_prefix
    from tunesmith.job.spec import Job

    described = job() | {"method": {"name": "lora", "dropout": dropout}}
    assert shares_prefix(Job.model_validate(described), torch.device(device)) is shared


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "adamw-bf16", "muon"])
def test_full_fine_tuning_learns_with_every_optimizer(tmp_path: Path, optimizer: str) -> None:
    values = job(steps=8, optimizer=optimizer, learning_rate=3e-4) | {"method": "full"}
    record = tunesmith.train(values, out=tmp_path)
    losses = [row["loss"] for _, row in read_jsonl(tmp_path / "steps.jsonl")]
    assert losses[-1] < 0.9 * losses[0]
    assert record.config["train"]["optimizer"] == optimizer
    assert (tmp_path / "model" / "model.safetensors").stat().st_size == pytest.approx(record.size_bytes)


def test_8_bit_states_train_adapters_too(tmp_path: Path) -> None:
    tunesmith.train(job(optimizer="adamw-8bit"), out=tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_bf16_weights_are_refused_where_the_precision_turns_out_to_be_fp16(tmp_path: Path) -> None:
    from tunesmith.api.trainable import pick_master_dtype

    values = tunesmith.job_from(job(optimizer="adamw-bf16") | {"method": "full"})
    assert pick_master_dtype(values, torch.bfloat16) == torch.bfloat16
    assert pick_master_dtype(values, torch.float32) == torch.bfloat16
    with pytest.raises(SetupError, match=r"train\.precision: auto is fp16 on this GPU"):
        pick_master_dtype(values, torch.float16)

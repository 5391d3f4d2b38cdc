"""A job file is read strictly: every fault is one line with its place, exit code 2, and never needs torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.core.errors import JobError
from tunesmith.job.load import job_from, load_job
from tunesmith.job.spec import FullSpec, LoraSpec, QuantizeSpec

HEAD = "model: tunesmith/tiny\ndata: {train: tunesmith/tickets}\n"


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "job.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("text", "line", "finding"),
    [
        ("", None, "is empty"),
        ("# only a comment\n", None, "is empty"),
        ("- 1\n", 1, "is a list; a job is a mapping"),
        ("just text\n", 1, "is a text"),
        ("model: a\nmodel: b\n", 2, "key 'model' is written twice"),
        ("model: [\n", 2, "not YAML"),
        ("model: x\n data: y\n", 2, "not YAML"),
        ("model: *x\n", 1, "uses a YAML alias"),
        ("model: !!python/object x\n", 1, "uses the YAML tag"),
        ("model: x\n", None, "key 'data' is missing. Add it; tunesmith init writes an example"),
        ("model: 5\ndata: {train: y}\n", 1, "model is 5; it should be text or a mapping"),
        (HEAD + "train:\n  lerning_rate: 1\n", 4, "unknown key 'train.lerning_rate'; did you mean 'train.learning"),
        (HEAD + "train: {zzz: 1}\n", 3, "unknown key 'train.zzz'"),
        (HEAD + "method: {name: lora, rnk: 4}\n", 3, "did you mean 'method.rank'?"),
        (HEAD + "method: lorra\n", 3, "method is 'lorra'; it should be 'full', 'lora' or 'qlora' or a mapping"),
        (HEAD + "compare: {arms: [{method: lora, framework: unslot}]}\n", 3, "'unsloth'. Did you mean 'unsloth'? All"),
        (HEAD + "method: {rank: 4}\n", 3, "key 'method.name' is missing"),
        (HEAD + "method: {name: qlora, base: int8}\n", 3, "qlora trains on an nf4 base"),
        (HEAD + "method: {name: lora, qat: int3}\n", 3, "method.qat is 'int3'; it should be 'int4' or 'int8-int4'"),
        (HEAD + "method: {name: qlora, qat: int4}\n", 3, "this base is nf4; write `name: lora` without base, or leave"),
        (HEAD + "method: {name: lora, base: fp8, qat: int4}\n", 3, "this base is fp8; write"),
        (HEAD + "method: {name: lora, dropout: 0.1, qat: int4}\n", 3, "set dropout: 0, or leave qat out"),
        (HEAD + "method: {name: full, qat: {scheme: int8}}\n", 3, "qat is for int4 and int8-int4; int8 costs little"),
        (HEAD + "method: {name: full, qat: {scheme: int4, group_size: 48}}\n", 3, "group_size is 48; it should be"),
        (HEAD + "compare: {arms: [{method: lora, quantize: {scheme: fp8, group_size: 32}}]}\n", 3, "group_size is for"),
        (HEAD + "compare: {arms: [{method: lora, quantize: int5}]}\n", 3, "'int8', 'int4', 'fp8' or 'int8-int4'"),
        (HEAD + "train:\n  optimizer: muon\n", 4, "optimizer is muon, and the method is lora; muon updates"),
        (HEAD + "train:\n  optimizer_in_backward: true\n", 4, "is on, and the method is lora; adapters' gradients"),
        (HEAD + "method: full\ntrain: {optimizer_in_backward: true}\n", 4, "train.clip_norm is 1; gradients are clip"),
        (HEAD + "method: qlora\ntrain: {optimizer: adamw-bf16}\n", 4, "adamw-bf16, and the method is qlora"),
        (HEAD + "method: full\ntrain: {optimizer: adamw-bf16, precision: fp16}\n", 4, "train.precision is fp16; fp16"),
        (HEAD + "train: {optimizer: adam}\n", 3, "it should be 'adamw', 'adamw-8bit', 'adamw-bf16' or 'muon'"),
        (HEAD + "train: {epochs: no}\n", 3, "train.epochs is 'no'; it should be a number"),
        (HEAD + "train: {epochs: -1}\n", 3, "train.epochs is -1; it should be above 0"),
        (HEAD + "train: {seed: 1.5}\n", 3, "train.seed is 1.5; it should be a whole number"),
        (HEAD + "train: {learning_rate: '1e-4'}\n", 3, "it should be a number or 'auto'"),
        (HEAD + "train: {epochs: .inf}\n", 3, "train.epochs is inf; it should be a finite number"),
        (HEAD + "data2: 1\n", 3, "unknown key 'data2'; did you mean 'data'?"),
        (HEAD + "compare:\n  arms:\n  - {method: {name: lora, rnk: 3}}\n", 5, "mean 'compare.arms.0.method.rank'?"),
        (HEAD + "compare: {arms: []}\n", 3, "compare.arms is empty; it should be a list with at least one entry"),
        (HEAD + "compare:\n  arms:\n  - lora\n  - lroa\n", 6, "unknown arm 'lroa'; arms are zero-shot, few-shot"),
        (HEAD + "compare:\n  seeds: [0, 1, 0]\n", 4, "seed 0 appears twice; each seed is one independent run"),
        (HEAD + "train: {steps: many}\n", 3, "train.steps is 'many'; it should be a whole number. All keys and val"),
        ("model: x\ndata: {train: y, split: {test: 1.5}}\n", 2, "data.split.test is 1.5; it should be below 1"),
        (b"\xef\xbb\xbfmodel: x\n", 1, "byte order mark"),
        (b"model: x\ndata: \xff\n", 2, "is not UTF-8"),
        (b"model: \x00\n", None, "NUL byte; a job file is text. Save it as UTF-8 text"),
        ("a: " + "[" * 50 + "]" * 50, 1, "nested more than 20 deep"),
    ],
)  # fmt: skip
def test_a_bad_job_is_one_line_with_its_place(
    tmp_path: Path, text: str | bytes, line: int | None, finding: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(JobError) as caught:
        load_job(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert finding in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: x\ndata: {train: ''}\n", "data.train: is empty. Name a file or folder"),
        ("model: x\ndata: {train: []}\n", "data.train: is empty. Name a file or folder"),
        (HEAD + "evaluate: {schema_file: gone.json}\n", "evaluate.schema_file: gone.json: no such file"),
    ],
)
def test_paths_that_lead_nowhere_are_told_with_their_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(JobError) as caught:
        load_job(write(tmp_path, text))
    assert str(caught.value).startswith(message)


def test_numbers_and_words_follow_yaml_1_2(tmp_path: Path) -> None:
    job = load_job(
        write(
            tmp_path, HEAD + "method: {name: lora, modules_to_save: [no, on]}\ntrain: {learning_rate: 1e-4}\n"
        )
    )
    assert job.train.learning_rate == 1e-4
    assert isinstance(job.method_spec, LoraSpec)
    assert job.method_spec.modules_to_save == ["no", "on"]


def test_short_forms_mean_their_long_forms() -> None:
    job = job_from({"model": "m", "data": {"train": "t"}})
    assert job.model_spec.name == "m"
    assert job.method_spec == LoraSpec(name="lora")
    assert job_from({"model": "m", "data": {"train": "t"}, "method": "full"}).method_spec == FullSpec(
        name="full"
    )


def test_lora_defaults_follow_the_method() -> None:
    assert LoraSpec(name="lora").scaling_alpha == 64
    assert LoraSpec(name="lora", rank=8).scaling_alpha == 16
    assert LoraSpec(name="lora", alpha=8.0).scaling_alpha == 8
    assert LoraSpec(name="lora").storage == "full"
    assert LoraSpec(name="qlora").storage == "nf4"
    assert LoraSpec(name="lora", base="int8").storage == "int8"


def test_overrides_win_and_open_short_forms(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + "method: lora\ntrain: {epochs: 3}\n")
    job = load_job(path, ["method.rank=8", "train.epochs=0.5", "data.split.test=0.2", "model.revision=main"])
    assert isinstance(job.method_spec, LoraSpec)
    assert job.method_spec.rank == 8
    assert job.train.epochs == 0.5
    assert job.data.split.test == 0.2
    assert job.model_spec.revision == "main"
    job = load_job(path, ["method.qat=int4", "method.qat.group_size=64"])
    assert job.method_spec.qat_spec == QuantizeSpec(scheme="int4", group_size=64)


@pytest.mark.parametrize(
    ("override", "finding"),
    [
        ("train.lr=3", "--set train.lr=3: unknown key 'train.lr'"),
        ("x", "--set x: is not KEY=VALUE"),
        ("=3", "is not KEY=VALUE"),
        ("train=4", "--set train=4: train is 4; it should be a mapping"),
        ("train.epochs.x=4", "train.epochs is a number, not a mapping"),
        ("train.epochs=[", "has a value that is not YAML"),
    ],
)
def test_a_bad_override_is_named_as_such(tmp_path: Path, override: str, finding: str) -> None:
    with pytest.raises(JobError) as caught:
        load_job(write(tmp_path, HEAD + "train: {epochs: 3}\n"), [override])
    assert finding in str(caught.value)


def test_paths_beside_the_job_file_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "base").mkdir()
    text = "model: base\ndata:\n  train: [rows.jsonl, {path: 'r*.jsonl', weight: 2}, org/name]\n"
    text += "  split: {test: rows.jsonl}\n"
    path = write(tmp_path, text)
    monkeypatch.chdir("/")
    job = load_job(path)
    assert job.model == str(tmp_path / "base")
    assert isinstance(job.data.train, list)
    assert job.data.train[0] == str(tmp_path / "rows.jsonl")
    assert job.data.train[2] == "org/name"
    assert job.data.split.test == str(tmp_path / "rows.jsonl")


def test_a_bad_job_answers_without_torch(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + "train: {epoch: 3}\n")
    code = (
        "import sys; from tunesmith.job.load import load_job\n"
        f"try: load_job({str(path)!r})\n"
        "except Exception as e: print(e)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "did you mean 'train.epochs'?" in run.stdout

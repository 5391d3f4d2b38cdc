"""The command line as a person meets it: real processes, results on stdout, one-line faults on stderr, exit codes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

JOB = """\
model: tunesmith/tiny
data: {train: tunesmith/tickets}
method: {name: lora, rank: 4}
train: {steps: 2, evaluate_every: never, learning_rate: 1e-3}
"""


def tunesmith(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tunesmith.cli.main", *arguments]
    return subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1", **(env or {})},
    )


def cpu_seconds() -> float:
    """Used by finished children: what a command takes on a quiet machine, whatever else runs beside the tests."""
    use = resource.getrusage(resource.RUSAGE_CHILDREN)
    return use.ru_utime + use.ru_stime


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


def test_help_answers_at_once_and_without_torch(folder: Path) -> None:
    used = cpu_seconds()
    assert tunesmith("--help", cwd=folder).returncode == 0
    assert cpu_seconds() - used < 0.5
    code = "import sys; import tunesmith.cli.main; assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("verb", ["check", "train", "compare", "preview"])
def test_a_bad_job_answers_in_under_a_second_in_one_line(folder: Path, verb: str) -> None:
    (folder / "bad.yaml").write_text(JOB.replace("learning_rate", "lerning_rate"))
    out = ["--out", "run"] if verb in ("train", "compare") else []
    used = cpu_seconds()
    run = tunesmith(verb, "bad.yaml", *out, cwd=folder)
    assert cpu_seconds() - used < 1.0
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("error: bad.yaml:4: unknown key 'train.lerning_rate'; did you mean")
    assert run.stderr.count("\n") == 1


def test_init_writes_a_job_that_check_accepts(folder: Path) -> None:
    assert tunesmith("init", "new.yaml", cwd=folder).returncode == 0
    run = tunesmith("check", "new.yaml", "--json", cwd=folder)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["splits"]["train"]["num_rows"] > 100
    again = tunesmith("init", "new.yaml", cwd=folder)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_check_and_preview_are_readable_without_torch(folder: Path) -> None:
    run = tunesmith("check", "job.yaml", cwd=folder)
    assert run.returncode == 0, run.stderr
    assert "trained tokens" in run.stdout
    run = tunesmith("preview", "job.yaml", "--rows", "2", cwd=folder)
    assert run.returncode == 0, run.stderr
    assert "tokens," in run.stdout
    code = (
        "import sys; from tunesmith import check, job_from\n"
        "check(job_from({'model': 'tunesmith/tiny', 'data': {'train': 'tunesmith/tickets'}}))\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_train_then_eval_print_one_json_object_each(folder: Path) -> None:
    trained = tunesmith("train", "job.yaml", "--out", "run", "--json", cwd=folder)
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["steps"] == 2
    rows = [
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}]}
    ] * 3
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for target in ("run", "run/adapter", "tunesmith/tiny"):
        scored = tunesmith("eval", target, "--data", "rows.jsonl", "--no-generate", "--json", cwd=folder)
        assert scored.returncode == 0, scored.stderr
        values = json.loads(scored.stdout)
        assert values["num_rows"] == 3
        assert values["num_target_tokens"] > 3
        assert values["perplexity"] > 1


def test_an_unwritable_folder_is_one_line(folder: Path) -> None:
    (folder / "file").write_text("x")
    run = tunesmith("train", "job.yaml", "--out", "file/run", cwd=folder)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: file/run: ")
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "arguments", [["schema"], ["--help"], ["check", "job.yaml", "--json"], ["check", "job.yaml"]]
)
def test_a_full_disk_under_stdout_is_one_line_and_a_closed_pipe_none(
    folder: Path, arguments: list[str]
) -> None:
    command = [sys.executable, "-m", "tunesmith.cli.main", *arguments]
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(command, cwd=folder, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == "error: stdout: no space left on device. Send the output elsewhere\n"
    reader, writer = os.pipe()
    os.close(reader)
    piped = subprocess.run(command, cwd=folder, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (piped.returncode, piped.stderr) == (1, "")


def test_init_where_nothing_can_be_written_is_one_line(folder: Path) -> None:
    (folder / "file").write_text("x")
    run = tunesmith("init", "file/job.yaml", cwd=folder)
    assert run.returncode == 2
    assert (
        run.stderr == "error: file/job.yaml: cannot be written (File exists). Give another name or folder\n"
    )


def test_schema_is_json(folder: Path) -> None:
    run = tunesmith("schema", cwd=folder)
    assert json.loads(run.stdout)["title"] == "Tunesmith job"


@pytest.mark.parametrize(
    ("arguments", "finding"),
    [
        (["nonsense"], "nonsense"),
        (["check", "job.yaml", "--bogus"], "--bogus"),
        (["check", "job.yaml", "--on-bad-row", "maybe"], "maybe"),
        (["train", "job.yaml"], "--out"),
        (["eval", "tunesmith/tiny"], "--pairs or --tasks"),
        (["eval", "tunesmith/tiny", "--data", "x", "--tasks", "blimp"], "--pairs or --tasks"),
        (["eval", "tunesmith/tiny", "--tasks", "blimp", "--no-generate"], "--no-generate"),
    ],
)
def test_a_wrong_command_line_is_one_line(folder: Path, arguments: list[str], finding: str) -> None:
    run = tunesmith(*arguments, cwd=folder)
    assert run.returncode == 2
    assert len(run.stderr.strip().splitlines()) == 1
    assert finding in run.stderr


def test_a_row_of_another_shape_is_skipped_like_any_bad_row(folder: Path) -> None:
    rows = [json.dumps({"prompt": f"Question {n}?", "completion": f"{n * 7}"}) for n in range(30)]
    (folder / "rows.jsonl").write_text("\n".join([*rows[:9], '{"foo": 1}', *rows[9:]]))
    check = ["check", "job.yaml", "--set", "data.train=rows.jsonl"]
    refused = tunesmith(*check, cwd=folder)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: rows.jsonl:10: rows with keys foo")
    skipped = tunesmith(*check, "--on-bad-row", "skip", cwd=folder)
    assert "1 rejected" in skipped.stdout


def test_a_base_for_what_is_no_adapter_is_refused(folder: Path) -> None:
    run = tunesmith("eval", "tunesmith/tiny", "--base", "x", "--data", "tunesmith/tickets", cwd=folder)
    assert run.returncode == 2
    assert run.stderr == (
        "error: tunesmith/tiny: is no adapter folder; --base names the model under an adapter. Leave --base out\n"
    )


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_tasks_without_lm_eval_say_what_to_install(folder: Path) -> None:
    run = tunesmith("eval", "tunesmith/tiny", "--tasks", "blimp", "--json", cwd=folder)
    assert run.returncode == 2
    assert run.stderr == (
        "error: lm-eval: is not installed; its tasks need the extra. Run: pip install 'tunesmith[lm-eval]'\n"
    )


def test_plan_prints_a_row_for_each_method(folder: Path) -> None:
    done = tunesmith("plan", "job.yaml", "--device", "rtx3090", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "RTX 3090, 23.6 GiB; 2 steps" in done.stdout
    for name in ("lora", "full", "qlora", "5 keep"):
        assert name in done.stdout
    told = json.loads(tunesmith("plan", "job.yaml", "--memory", "4GiB", "--json", cwd=folder).stdout)
    assert told["limit_bytes"] == 4 * 2**30
    assert {method["name"] for method in told["methods"]} == {"lora", "full", "qlora"}
    wrong = tunesmith("plan", "job.yaml", "--memory", "4", cwd=folder)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1


THEIRS = """\
model_name_or_path: tunesmith/tiny
dataset_name: tunesmith/tickets
use_peft: true
max_steps: 2
assistant_only_loss: true
"""


def test_an_import_writes_a_job_that_loads_and_reports_each_key_as_json(folder: Path) -> None:
    (folder / "trl.yaml").write_text(THEIRS + "packing: true\n")
    answer = tunesmith("import", "trl.yaml", "--out", "made.yaml", "--json", cwd=folder)
    assert answer.returncode == 0
    report = json.loads(answer.stdout)
    assert (report["framework"], report["job_file"], report["counts"]["not supported"]) == (
        "trl",
        "made.yaml",
        1,
    )
    assert "warning: trl.yaml: 1 not supported" in answer.stderr
    assert (folder / "tunesmith.schema.json").exists()
    assert tunesmith("check", "made.yaml", "--json", cwd=folder).returncode == 0
    again = tunesmith("import", "trl.yaml", "--out", "made.yaml", cwd=folder)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)


def test_an_import_without_a_job_ends_with_1_and_still_reports(folder: Path) -> None:
    (folder / "dpo.yaml").write_text(THEIRS + "beta: 0.1\n")
    answer = tunesmith("import", "dpo.yaml", "--out", "made.yaml", cwd=folder)
    assert answer.returncode == 1
    assert "error: dpo.yaml: no job can be made; beta: learning from preferences" in answer.stderr
    assert "NOT SUPPORTED (1)" in answer.stdout
    assert not (folder / "made.yaml").exists()


def test_an_import_of_a_bad_file_is_one_line_and_needs_no_torch(folder: Path) -> None:
    (folder / "bad.yaml").write_text("- 1\n")
    used = cpu_seconds()
    answer = tunesmith("import", "bad.yaml", cwd=folder)
    assert (answer.returncode, answer.stderr.count("\n")) == (2, 1)
    assert answer.stderr.startswith("error: bad.yaml:1: is a list")
    assert cpu_seconds() - used < 1.5

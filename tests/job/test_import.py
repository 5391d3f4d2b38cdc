"""A configuration of another framework becomes a job in which every one of its keys is accounted for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from tunesmith.core.errors import JobError
from tunesmith.job.importing.engine import FRAMEWORKS, Entry, Import, import_configuration
from tunesmith.job.importing.reference import import_reference
from tunesmith.job.importing.rules import UNSET, Framework
from tunesmith.job.importing.write import job_text, write_job
from tunesmith.job.load import load_job
from tunesmith.job.spec import FullSpec, Job, LoraSpec

EXAMPLES = sorted((Path(__file__).parent / "imports").iterdir())
DOCS = Path(__file__).parents[2] / "docs"
AXOLOTL = """\
base_model: acme/base
datasets: [{path: acme/rows, type: chat_template}]
learning_rate: 1e-4
micro_batch_size: 2
val_set_size: 0.0
"""
LLAMAFACTORY = """\
model_name_or_path: acme/base
stage: sft
finetuning_type: lora
dataset: acme/rows
dataset_dir: ONLINE
"""
TRL = "model_name_or_path: acme/base\ndataset_name: acme/rows\nuse_peft: true\n"
UNSLOTH = "model: acme/base\ndata: {dataset: acme/rows}\ntraining: {max_steps: 100}\n"
ARGUMENTS = "model_name: acme/base\ndataset_name: acme/rows\nr: 16\nmax_steps: 100\n"
MINIMAL = list(zip(FRAMEWORKS, (AXOLOTL, LLAMAFACTORY, TRL, UNSLOTH, ARGUMENTS), strict=True))


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(text: str | bytes, framework: str | None = None, *, out: str = "job.yaml") -> Import:
    Path("theirs.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return import_configuration(Path("theirs.yaml"), framework=framework, out=Path(out))


def job_of(made: Import) -> Job:
    """The job as it loads from the file that is written."""
    path = Path("job.yaml")
    path.unlink(missing_ok=True)
    write_job(made, path)
    return load_job(path)


def entry(made: Import, key: str) -> Entry:
    (found,) = [one for one in made.entries if one.key == key]
    return found


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_becomes_the_job_beside_it(example: Path, inside: Path) -> None:
    shutil.copytree(example, inside, dirs_exist_ok=True)
    (config,) = Path().glob("config.y*ml")
    expected = Path("job.yaml").read_text()
    made = import_configuration(config, out=Path("job.yaml"))
    assert job_text(made) == expected, "run in the example's folder: tunesmith import config.y*ml"
    assert made.framework.name == example.name.split("-")[0]
    job_of(made)


@pytest.mark.parametrize(
    ("framework", "text"), MINIMAL, ids=["axolotl", "llamafactory", "trl", "unsloth", "arguments"]
)
def test_each_minimal_configuration_is_recognised_and_loads(framework: Framework, text: str) -> None:
    made = imported(text)
    assert made.framework is framework
    assert job_of(made).data.split.test == 0


# What rules may meet: all that YAML holds, plausible for some key and nonsense for others.
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    0.05,
    512.0,
    "1e-4",
    "auto",
    "no",
    "lora",
    "steps",
    "none",
]
VALUES += [
    10**400,
    "inf",
    "nan",
    "constant",
    "acme/other",
    "q_proj,v_proj",
    "a.*b",
    ["q_proj"],
    ["all-linear"],
    [],
    {},
    {"a": 1},
    "",
    "ü\n#",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_key_is_accounted_for_exactly_once(data: st.DataObject) -> None:
    framework, text = MINIMAL[data.draw(st.integers(0, len(MINIMAL) - 1))]
    names = data.draw(st.lists(st.sampled_from(sorted(framework.table)), max_size=12, unique=True))
    values: dict[str, Any] = YAML(typ="safe").load(text)
    for name in names:
        _set(values, name, data.draw(st.sampled_from(VALUES)))
    values["no_such_key"] = 1
    # JSON is YAML, and keeps every key on a line of its own.
    try:
        made = imported(json.dumps(values, indent=1), framework.name)
    except JobError as error:
        faults = str(error)
    else:
        faults = ""
    if faults:
        assert faults.startswith("theirs.yaml:")
        return
    told = [one.key for one in made.entries if one.place]
    assert sorted(told) == sorted(_leaves(values, made.framework.table))
    assert all(one.place.startswith("theirs.yaml:") for one in made.entries if one.place)
    assert entry(made, "no_such_key").remark.startswith("unknown key")
    if made.job is None:
        assert made.failures
        return
    job_of(made)
    for one in made.entries:
        if one.status == "mapped" and one.to not in (
            "train.trackers",
            "method.new_tokens",
            "method.modules_to_save",
        ):
            assert _get(made.job, one.to) == one.ours, one


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    node: Any = values
    for parent in parents:
        key = parent.removesuffix("[]")
        if not isinstance(node.get(key), list if parent.endswith("[]") else dict):
            node[key] = [{}] if parent.endswith("[]") else {}
        node = node[key][0] if parent.endswith("[]") else node[key]
    node[last] = value


def _leaves(values: dict[str, Any], table: Any, path: str = "", name: str = "") -> list[str]:
    """Paths of the keys: inside a mapping or a list of mappings only where the table has keys inside."""
    found: list[str] = []
    for key, value in values.items():
        inside = any(known.startswith((f"{name}{key}.", f"{name}{key}[].")) for known in table)
        if (
            inside
            and value
            and isinstance(value, dict)
            and not any(k.startswith(f"{name}{key}[]") for k in table)
        ):
            found += _leaves(value, table, f"{path}{key}.", f"{name}{key}.")
        elif (
            inside
            and value
            and isinstance(value, list)
            and all(item and isinstance(item, dict) for item in value)
        ):
            for index, item in enumerate(value):
                found += _leaves(item, table, f"{path}{key}[{index}].", f"{name}{key}[].")
        else:
            found.append(path + key)
    return found


def _get(job: dict[str, Any], target: str) -> Any:
    node: Any = job
    for part in target.split("."):
        node = node[part]
    return node


def test_defaults_of_theirs_are_written_out_and_named() -> None:
    made = imported(TRL)
    job = job_of(made)
    method = job.method_spec
    assert isinstance(method, LoraSpec)
    assert (method.rank, method.alpha, method.dropout, method.targets) == (16, 32, 0.05, ["q_proj", "v_proj"])
    assert (job.train.learning_rate, job.train.epochs, job.train.batch_rows) == (2e-5, 3, 8)
    assert (job.train.schedule, job.train.warmup, job.train.seed, job.data.max_tokens) == (
        "linear",
        0,
        42,
        1024,
    )
    assert "# learning_rate, TRL's default" in job_text(made)
    assert "defaults of 1.16.0" in job_text(made)


def test_llamafactory_and_unsloth_have_other_defaults() -> None:
    factory = job_of(imported(LLAMAFACTORY))
    assert isinstance(factory.method, LoraSpec)
    assert (factory.method.rank, factory.method.alpha, factory.method.targets) == (8, 16, "all-linear")
    assert (factory.train.learning_rate, factory.data.max_tokens) == (5e-5, 2048)
    cli = job_of(imported(UNSLOTH))
    assert isinstance(cli.method, LoraSpec)
    assert (cli.method.name, cli.method.rank, cli.method.alpha) == ("qlora", 64, 16)
    assert (cli.train.optimizer, cli.train.weight_decay, cli.train.seed) == ("adamw-8bit", 0.01, 3407)
    arguments = job_of(imported(ARGUMENTS))
    assert (arguments.train.learning_rate, arguments.train.warmup, arguments.train.batch_rows) == (
        5e-5,
        0.1,
        8,
    )


def test_axolotl_without_an_adapter_trains_every_weight_for_one_epoch() -> None:
    made = imported(AXOLOTL + "lora_r: 8\n")
    job = job_of(made)
    assert isinstance(job.method_spec, FullSpec)
    assert (job.train.epochs, job.data.max_tokens, job.data.too_long, job.train.warmup) == (
        1,
        512,
        "drop",
        0.03,
    )
    assert entry(made, "lora_r").status == "implied"


def test_a_batch_is_rows_times_accumulation() -> None:
    made = imported(AXOLOTL + "gradient_accumulation_steps: 4\n")
    assert job_of(made).train.batch_rows == 8
    assert entry(made, "micro_batch_size").remark == "2 rows x 4 accumulated, on one GPU"


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("warmup_steps: 10\nmax_steps: 200\n", 0.05),
        ("warmup_steps: 0.1\n", 0.1),
        ("warmup_ratio: 0.2\n", 0.2),
        ("warmup_ratio: 0.2\nwarmup_steps: 0\n", 0.2),
        ("warmup_steps: 10\nmax_steps: 200\nlr_scheduler_type: constant\n", 0.0),
        ("warmup_steps: 10\nmax_steps: 200\nlr_scheduler_type: constant_with_warmup\n", 0.05),
    ],
)
def test_warmup_is_a_share_of_the_steps(text: str, share: float) -> None:
    assert job_of(imported(TRL + text)).train.warmup == share


def test_warmup_in_steps_of_an_unknown_number_is_not_supported() -> None:
    made = imported(TRL + "warmup_steps: 10\n")
    assert entry(made, "warmup_steps").status == "not supported"
    assert "set train.warmup to 10 / steps" in entry(made, "warmup_steps").remark


def test_warmup_in_steps_follows_from_rows_that_can_be_counted() -> None:
    Path("rows.jsonl").write_text('{"text": "a"}\n' * 100)
    made = imported(TRL.replace("acme/rows", "rows.jsonl") + "warmup_steps: 6\nnum_train_epochs: 2\n")
    # 100 rows, 8 a step: 13 steps an epoch, 26 in all.
    assert job_of(made).train.warmup == 0.230769
    assert entry(made, "warmup_steps").status == "mapped"
    assert "6 of about 26 steps" in job_text(made)


def test_numbers_that_yaml_1_1_reads_as_text_are_numbers() -> None:
    assert job_of(imported(TRL + "learning_rate: '2e-4'\nweight_decay: 1e-2\n")).train.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (AXOLOTL + "train_on_inputs: true\n", "train_on_inputs"),
        (AXOLOTL + "sample_packing: true\n", "sample_packing"),
        (AXOLOTL + "plugins: [my.own.Plugin]\n", "plugins"),
        (
            AXOLOTL.replace("chat_template}", "chat_template, roles_to_train: [user]}"),
            "datasets[0].roles_to_train",
        ),
        (LLAMAFACTORY + "mask_history: true\n", "mask_history"),
        (LLAMAFACTORY + "template: qwen\n", "template"),
        (LLAMAFACTORY + "use_galore: true\n", "use_galore"),
        (TRL, "assistant_only_loss"),
        (TRL + "completion_only_loss: false\n", "completion_only_loss"),
        (TRL + "optim: lion_32bit\n", "optim"),
        (UNSLOTH, "training.train_on_completions"),
        (UNSLOTH + "lora: {use_loftq: true}\n", "lora.use_loftq"),
        (ARGUMENTS + "layers_to_transform: [1]\n", "layers_to_transform"),
    ],
)
def test_what_changes_the_result_and_cannot_be_said_is_named(text: str, key: str) -> None:
    made = imported(text)
    assert entry(made, key).status == "not supported"
    assert f"{key}:" in job_text(made).split("model:")[0]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (AXOLOTL + "train_on_inputs: false\n", "train_on_inputs"),
        (AXOLOTL + "plugins: [axolotl.integrations.liger.LigerPlugin]\n", "plugins"),
        (AXOLOTL + "special_tokens: {pad_token: <pad>}\n", "special_tokens.pad_token"),
        (LLAMAFACTORY + "galore_rank: 16\n", "galore_rank"),
        (LLAMAFACTORY + "flash_attn: fa2\n", "flash_attn"),
        (TRL + "gradient_checkpointing: true\n", "gradient_checkpointing"),
        (TRL + "assistant_only_loss: true\n", "assistant_only_loss"),
        (TRL + "resume_from_checkpoint:\n", "resume_from_checkpoint"),
        (UNSLOTH + "lora: {use_loftq: false}\n", "lora.use_loftq"),
    ],
)
def test_what_is_off_or_done_anyway_is_implied(text: str, key: str) -> None:
    assert entry(imported(text), key).status == "implied"


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        (AXOLOTL + "rl: dpo\n", "preferences"),
        (AXOLOTL + "adapter: lora\n", "lora_r: is missing; Axolotl has no default"),
        (AXOLOTL.replace("learning_rate: 1e-4\n", ""), "learning_rate: is missing"),
        (AXOLOTL.replace("chat_template}", "pygmalion}"), "convert them to messages"),
        (AXOLOTL.replace("acme/rows", "s3://acme/rows"), "download them"),
        (LLAMAFACTORY.replace("sft", "dpo"), "preferences"),
        (LLAMAFACTORY.replace("ONLINE", "data"), "data/dataset_info.json is not there"),
        (LLAMAFACTORY.replace("lora\n", "oft\n"), "the method oft"),
        ("model_name_or_path: acme/base\nuse_peft: true\n", "no rows are named"),
        (TRL + "beta: 0.1\n", "preferences"),
        ("data: {dataset: acme/rows}\ntraining: {max_seq_length: 512}\n", "model: is missing"),
    ],
)
def test_without_a_model_rows_or_a_method_of_ours_there_is_no_job(text: str, failure: str) -> None:
    made = imported(text)
    assert made.job is None
    assert failure in "; ".join(made.failures)


def test_llamafactory_data_sets_are_read_from_their_own_list() -> None:
    Path("data").mkdir()
    Path("data/rows.json").write_text("[]")
    info = {
        "mine": {"file_name": "rows.json"},
        "hub": {"hf_hub_url": "acme/rows", "formatting": "sharegpt", "split": "train_sft"},
        "pairs": {"file_name": "rows.json", "ranking": True},
    }
    Path("data/dataset_info.json").write_text(json.dumps(info))
    text = LLAMAFACTORY.replace("ONLINE", "data")
    made = imported(text.replace("acme/rows", "mine, hub"))
    assert made.job is not None
    assert made.job["data"]["train"] == [
        {"path": "data/rows.json", "format": "alpaca"},
        {"path": "acme/rows:train_sft", "format": "sharegpt"},
    ]
    assert imported(text.replace("acme/rows", "pairs")).job is None
    assert "no data set 'other'" in imported(text.replace("acme/rows", "other")).failures[0]
    Path("data/dataset_info.json").write_text("{\n,}")
    with pytest.raises(JobError, match=r"data/dataset_info\.json:2: is not JSON"):
        imported(text)


def test_paths_are_written_relative_to_the_job() -> None:
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    made = imported(AXOLOTL.replace("acme/rows", "rows.jsonl"), out="jobs/new/job.yaml")
    assert made.job is not None
    assert made.job["data"]["train"]["path"] == "../../rows.jsonl"
    write_job(made, Path("jobs/new/job.yaml"))
    assert load_job(Path("jobs/new/job.yaml")).data.train.path == str(Path("rows.jsonl").resolve())  # type: ignore[union-attr]


def test_two_keys_that_say_different_things_are_told() -> None:
    text = (
        AXOLOTL.replace("chat_template}", "chat_template, chat_template: chatml}") + "chat_template: llama3\n"
    )
    made = imported(text)
    assert job_of(made).data.template == "chatml"
    assert "data.template is 'chatml' already" in entry(made, "chat_template").remark


@pytest.mark.parametrize("key", ["hub_token", "run_name"])
def test_secrets_are_not_repeated(key: str) -> None:
    made = imported(TRL + f"{key}: s3cret\n")
    assert ("s3cret" in json.dumps(made.to_json())) == (key == "run_name")


def test_comments_cannot_be_broken_out_of() -> None:
    made = imported(TRL + '"evil\\nmodel: x": 1\nreport_to: ["a\\nmodel: y"]\n')
    assert job_of(made).model == "acme/base"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "theirs.yaml: is empty"),
        ("- base_model: x\n", "theirs.yaml:1: is a list; a configuration is a mapping"),
        ("a: [\n", "theirs.yaml:2: not YAML"),
        (b"\xff\xfe", "theirs.yaml:1: is not UTF-8; a configuration is UTF-8"),
        ("a: &x 1\nb: *x\n", "theirs.yaml:2: uses a YAML alias; a configuration is plain data"),
        ("base_model: a\nbase_model: b\n", "theirs.yaml:2: key 'base_model' is written twice"),
        ("colour: red\n", "theirs.yaml: is no configuration of Axolotl"),
        ("base_model: a\nstage: sft\n", "could be a configuration of Axolotl or of LLaMA-Factory"),
        (TRL + "learning_rate: fast\n", "theirs.yaml:4: learning_rate is 'fast'; it should be a number"),
        (TRL + "seed: 1.5\n", "theirs.yaml:4: seed is 1.5; it should be a whole number"),
        (TRL + "lora_dropout: 5\n", "theirs.yaml:4: method.dropout is 5.0; it should be below 1"),
        (TRL + "num_train_epochs: 0\n", "theirs.yaml:4: train.epochs is 0.0; it should be above 0"),
    ],
)
def test_a_bad_file_is_one_line_with_its_place(text: str | bytes, message: str) -> None:
    with pytest.raises(JobError) as caught:
        imported(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_guess_is_made_for_a_misspelt_key() -> None:
    made = imported(AXOLOTL + "micro_batchsize: 4\n")
    assert entry(made, "micro_batchsize").remark == "unknown key; did you mean 'micro_batch_size'?"


def test_a_job_is_never_overwritten() -> None:
    made = imported(TRL)
    write_job(made, Path("job.yaml"))
    with pytest.raises(JobError, match=r"job\.yaml: exists already"):
        write_job(made, Path("job.yaml"))


def test_every_default_of_theirs_passes_its_own_rule() -> None:
    for framework in FRAMEWORKS:
        assert {name for name in framework.telltale if name not in framework.table} == set(), framework.title
        for name, key in framework.table.items():
            assert key.note or key.to or key.status == "not supported", name
            assert key.default is UNSET or not key.required, name


def test_the_reference_page_is_current() -> None:
    assert (DOCS / "importing-keys.md").read_text() == import_reference(), (
        "run: tunesmith schema --imports > docs/importing-keys.md"
    )

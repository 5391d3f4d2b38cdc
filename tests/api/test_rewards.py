"""Rewards from rules, from functions of the user's own and from reward models; what fails ends in one line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tunesmith
from tunesmith.api.inspection import check, preview
from tunesmith.api.reward_process import MAX_LOG_BYTES
from tunesmith.api.rewards import Scored, check_rewards, open_rewards
from tunesmith.core.errors import DataError, JobError, ModelError, TrainingFailed
from tunesmith.core.types import Conversation, Message, Origin
from tunesmith.data.preview import PromptPreview
from tunesmith.data.prompts import Answer, Prompt
from tunesmith.data.render import Renderer
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.job.load import job_from, load_job
from tunesmith.job.objective import GrpoSpec, RewardTerm
from tunesmith.job.resolve import resolve_model
from tunesmith.methods.objectives import score_answers
from tunesmith.models.layout import make_batch
from tunesmith.models.load import load_model

TINY = "tunesmith/tiny"


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    base = resolve_model(job_from({"model": TINY, "data": {"train": "tunesmith/tickets"}}).model_spec)
    return Renderer(load_tokenizer(base.folder))


def ask(question: Any = "2+2?", truth: str | None = None, **columns: Any) -> Prompt:
    chat = question if isinstance(question, tuple) else (Message("user", question),)
    known = columns if truth is None else {"answer": truth} | columns
    return Prompt((1, 2, 3), chat, truth, known, Origin("p.jsonl:1", "p.jsonl", 1), "id")


def say(text: str, prompt: Prompt | None = None, *, finished: bool = True) -> Answer:
    return Answer(prompt or ask(), text, len(text), finished, [7] * len(text))


@pytest.fixture
def score(tmp_path: Path, renderer: Renderer) -> Callable[..., Scored]:
    """What rewards, given as in a job, make of answers."""

    def score(rewards: list[Any], answers: list[Answer]) -> Scored:
        terms = [RewardTerm.model_validate({"source": r} if isinstance(r, str) else r) for r in rewards]
        prompts = [answer.prompt for answer in answers]
        with open_rewards(terms, prompts=prompts, renderer=renderer, log=tmp_path / "rewards.log") as opened:
            return opened(answers)

    return score


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """Writes a file of functions; gives the path."""

    def write(code: str, name: str = "rewards.py") -> str:
        (tmp_path / name).write_text(code)
        return str(tmp_path / name)

    return write


# --- verifiers --------------------------------------------------------------------------------------------------------


def test_exact_match_forgives_white_space_and_reasoning_and_nothing_else(score: Any) -> None:
    prompt = ask(truth="4")
    said = ["4", " 4\n", "<think>2 and 2</think>4", "four", "4."]
    assert score(["exact_match"], [say(text, prompt) for text in said]).total == [1, 1, 1, 0, 0]


def test_a_prompt_without_truth_is_worth_nothing_and_is_counted(score: Any) -> None:
    found = score(["exact_match"], [say("4", ask(truth="4")), say("4")])
    assert found.total == [1, 0]
    assert found.num_missing == {"exact_match": 1}


def test_fields_are_counted_against_the_truth(score: Any) -> None:
    """Of a, b[0] and b[1]: all three; one wrong; one missing; one invented beside them; no JSON."""
    prompt = ask(truth='{"a":1,"b":[2,3]}')
    said = ['{"b":[2,3],"a":1}', '<think>?</think>{"a":1,"b":[2,4]}', '{"a":1,"b":[2]}']
    said += ['{"a":1,"b":[2,3],"c":0}', '{"a":1,"b":[2,3]']
    found = score(["json_fields"], [say(text, prompt) for text in said])
    assert found.total == pytest.approx([1, 2 / 3, 2 / 3, 3 / 4, 0])


def test_fields_of_a_truth_that_is_no_json_cannot_be_told(score: Any) -> None:
    found = score(["json_fields"], [say("4", ask(truth="4")), say("{}", ask(truth='{"a":1}'))])
    assert found.total == [0, 0]
    assert found.num_missing == {"json_fields": 1}
    with pytest.raises(JobError, match="no prompt has a truth that is a JSON object or list to match"):
        score(["json_fields"], [say("4", ask(truth="4"))])


def test_json_is_strict_and_may_have_a_schema(score: Any, tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    answers = [say(text) for text in ('{"a": 1}', '{"a": "x"}', "[]", '{"a": NaN}', "12", "")]
    terms = ["json_valid", {"source": "json_schema", "schema_file": str(tmp_path / "schema.json")}]
    found = score(terms, answers)
    assert found.terms == {"json_valid": [1, 1, 1, 0, 0, 0], "json_schema": [1, 0, 0, 0, 0, 0]}


def test_length_peaks_where_it_was_asked_for(score: Any) -> None:
    answers = [say("x" * n) for n in (0, 5, 10, 15, 20, 90)]
    assert score([{"source": "length", "characters": 10}], answers).total == [0, 0.5, 1, 0.5, 0, 0]


def test_a_pattern_is_searched(score: Any) -> None:
    found = score([{"source": "regex", "pattern": r"^\d+$"}], [say("42"), say("42 or so"), say("")])
    assert found.total == [1, 0, 0]


def test_a_pattern_that_never_ends_is_ended(score: Any) -> None:
    term = {"source": "regex", "pattern": "(a+)+$", "timeout": 0.5}
    started = time.monotonic()
    with pytest.raises(
        TrainingFailed, match=r"rewards\[0\] \(regex\): took longer than 0.5 s, and was ended"
    ):
        score([term], [say("a" * 60 + "b")])
    assert time.monotonic() - started < 10


def test_rewards_are_weighted_and_summed(score: Any) -> None:
    terms = [
        {"source": "length", "characters": 4, "weight": 0.5},
        {"source": "exact_match", "weight": 2.0},
        {"source": "length", "characters": 2, "weight": -1.0},
    ]
    found = score(terms, [say("full", ask(truth="full")), say("it", ask(truth="full"))])
    assert found.terms == {"length_0": [1, 0.5], "exact_match": [1, 0], "length_2": [0, 1]}
    assert found.total == [2.5, 0.25 - 1]


# --- functions --------------------------------------------------------------------------------------------------------

ECHO = """
import json
seen = []
def echo(prompts, completions, completion_ids, answer, level, **kwargs):
    print(json.dumps([prompts, completions, completion_ids, answer, level, sorted(kwargs)]))
    return [float(n) for n, _ in enumerate(completions)]
"""


def test_a_function_is_called_as_trl_calls_it(score: Any, write: Any, tmp_path: Path) -> None:
    raw = Prompt((1,), "The cat", None, {"level": 3}, Origin("p.jsonl:2", "p.jsonl", 2), "id")
    chat = ask((Message("system", "Be brief"), Message("user", "2+2?")), truth="4", tag="x")
    found = score([f"{write(ECHO)}:echo"], [say("4", chat), say(" sat", raw)])
    assert found.total == [0, 1]
    assert found.terms == {"echo": [0, 1]}
    prompts, completions, ids, answers, levels, others = json.loads((tmp_path / "rewards.log").read_text())
    assert prompts == [
        [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "2+2?"}],
        "The cat",
    ]
    assert completions == [[{"role": "assistant", "content": "4"}], " sat"]
    assert ids == [[7], [7] * 4]
    assert answers == ["4", None]
    assert levels == [None, 3]
    assert others == ["tag"]


@pytest.mark.parametrize(
    ("code", "total"),
    [
        ("def f(completions): return [True, False]", [1, 0]),
        ("def f(**kwargs): return [len(a) for a in kwargs['answer']]", [1, 1]),
        ("def f(completions, bonus=2): return (bonus for _ in completions)", [2, 2]),
        ("import numpy\ndef f(completions): return numpy.array([1, 2])", [1, 2]),
        ("async def f(completions): return [5, 6]", [5, 6]),
        ("class F:\n    def __call__(self, completions): return [3, 4]\nf = F()", [3, 4]),
    ],
)
def test_functions_may_take_little_and_return_anything_like_numbers(
    score: Any, write: Any, code: str, total: list[float]
) -> None:
    prompt = ask(truth="4")
    assert score([f"{write(code)}:f"], [say("a", prompt), say("b", prompt)]).total == total


def test_no_reward_counts_as_zero_and_is_counted(score: Any, write: Any) -> None:
    found = score([f"{write('def f(completions): return [None, 2]')}:f"], [say("a"), say("b")])
    assert found.total == [0, 2]
    assert found.num_missing == {"f": 1}


def test_functions_of_one_file_share_one_process_and_its_folder(
    score: Any, write: Any, tmp_path: Path
) -> None:
    write("SEEN = []", "beside.py")
    code = """
from beside import SEEN
def first(completions):
    SEEN.append(1)
    return [0 for _ in completions]
def second(completions): return [len(SEEN) for _ in completions]
"""
    file = write(code)
    assert score([f"{file}:first", f"{file}:second"], [say("a")]).total == [1]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def f(completions: return", r"cannot be imported: SyntaxError: .* \(rewards.py, line 1\)"),
        ("import nothing_there", r"cannot be imported: ModuleNotFoundError: .*nothing_there.* line 1\)"),
        ("import sys\nsys.exit(3)", r"cannot be imported: SystemExit: 3 \(rewards.py, line 2\)"),
        ("def g(): pass", r"has no function 'f'. Functions there: g"),
        ("f = 3", r"f is no function"),
        ("def f(completions, level): pass", r"asks for 'level'; .*: prompts, completions, completion_ids"),
        ("def f(completions, /): pass", r"takes completions by position"),
        ("import time\ntime.sleep(60)", r"took longer than 0.5 s, and was ended"),
        ("import os\nos._exit(4)", r"ended its process with exit code 4"),
    ],
)
def test_what_is_wrong_with_a_function_is_told_before_training(
    score: Any, write: Any, code: str, said: str
) -> None:
    with pytest.raises(JobError, match=rf"objective.rewards\[0\] \(rewards.py:f\): {said}") as error:
        score([{"source": f"{write(code)}:f", "timeout": 0.5 if "sleep" in code else 60.0}], [say("a")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("\n    raise ValueError('too\\nbad')", r"raised ValueError: too bad \(rewards.py, line 2\)"),
        (" return [float('nan')]", "value 0 is nan; a reward is a finite number"),
        (" return [10 ** 400]", "value 0 is inf"),
        (" return [1, 2]", "returned 2 values for 1 completions"),
        (" return ['good']", r"value 0 is str \('good'\); a reward function returns a list with a number"),
        (" return 1.0", "returned no list"),
        (" return {'a': 1}", "returned no list"),
        (" return None", "returned no list"),
        ("\n    import time\n    time.sleep(60)", "took longer than 1 s, and was ended"),
        (
            "\n    import os\n    os.kill(os.getpid(), 9)",
            "its process was killed, as the kernel does when memory",
        ),
        ("\n    import os\n    os.kill(os.getpid(), 11)", r"its process crashed \(SIGSEGV\)"),
        ("\n    import os\n    os._exit(0)", "ended its process with exit code 0"),
    ],
)
def test_a_function_that_fails_ends_training_in_one_line(
    score: Any, write: Any, body: str, said: str
) -> None:
    file = write(f"def f(completions):{body}\n")
    with pytest.raises(TrainingFailed, match=rf"objective.rewards\[0\] \(rewards.py:f\): {said}") as error:
        score([{"source": f"{file}:f", "timeout": 1.0 if "sleep" in body else 60.0}], [say("a")])
    assert "\n" not in str(error.value)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(pids: list[int]) -> bool:
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_running, pids))


def test_what_a_function_has_started_ends_with_its_process(score: Any, write: Any, tmp_path: Path) -> None:
    code = """
import os, subprocess, time
def f(completions):
    child = subprocess.Popen(["sleep", "600"])
    open(os.path.join(os.path.dirname(__file__), "pids"), "w").write(f"{os.getpid()} {child.pid}")
    return [0]
def hang(completions): time.sleep(600)
"""
    file = write(code)
    score([f"{file}:f"], [say("a")])
    with pytest.raises(TrainingFailed, match="took longer"):
        score([f"{file}:f", {"source": f"{file}:hang", "timeout": 0.5}], [say("a")])
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert wait_for_end(pids)


def test_a_crash_is_told_at_once_though_its_children_live_on(score: Any, write: Any, tmp_path: Path) -> None:
    code = """
import os, time
def f(completions):
    child = os.fork()
    if not child:
        time.sleep(600)
    open(os.path.join(os.path.dirname(__file__), "pid"), "w").write(str(child))
    os._exit(7)
"""
    started = time.monotonic()
    with pytest.raises(TrainingFailed, match="ended its process with exit code 7"):
        score([f"{write(code)}:f"], [say("a")])
    assert time.monotonic() - started < 20
    assert wait_for_end([int((tmp_path / "pid").read_text())])


TRAINING = """
import os, signal, sys
from pathlib import Path
from tunesmith.api.reward_process import RewardProcess
from tunesmith.core.errors import JobError

process = RewardProcess(Path(sys.argv[2]))
asked = {"place": "x", "timeout": 30.0, "fails": JobError}
process.ask({"do": "load", "number": 0, "file": sys.argv[1], "name": "f", "given": ["completions"]}, **asked)
(pid,) = process.ask({"do": "call", "number": 0, "arguments": {"completions": ["a"]}}, **asked)
print(int(pid), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_function_ends_when_training_is_killed(write: Any, tmp_path: Path) -> None:
    file = write("import os\ndef f(completions): return [os.getpid()]")
    argv = [sys.executable, "-c", TRAINING, file, str(tmp_path / "log")]
    training = subprocess.run(argv, stdout=subprocess.PIPE, check=False)
    assert training.returncode == -signal.SIGKILL
    pid = int(training.stdout)
    assert wait_for_end([pid])


def test_what_functions_print_is_kept_up_to_a_limit(score: Any, write: Any, tmp_path: Path) -> None:
    code = f"def f(completions):\n    print('x' * {3 * MAX_LOG_BYTES})\n    return [1]"
    assert score([f"{write(code)}:f"], [say("a")]).total == [1]
    assert (tmp_path / "rewards.log").stat().st_size == MAX_LOG_BYTES


def test_many_answers_go_through(score: Any, write: Any) -> None:
    code = "def f(completions): return [len(c[0]['content']) for c in completions]"
    answers = [say("é" * 5000) for _ in range(500)]
    assert score([f"{write(code)}:f"], answers).total == [5000.0] * 500


# --- names and settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "said"),
    [
        ({"source": "exact-mach"}, r"unknown reward 'exact-mach'; .*Did you mean 'exact_match'\?"),
        ({"source": "models/rm"}, "models/rm: no such folder"),
        ({"source": "nothing.py:f"}, "nothing.py: no such file"),
        ({"source": "nothing.py"}, "names no function. Write nothing.py:NAME"),
        ({"source": "regex"}, "no pattern; regex needs it"),
        ({"source": "regex", "pattern": "(a"}, r"pattern '\(a' does not compile: missing \)"),
        ({"source": "length"}, "no characters; length needs it"),
        ({"source": "json_schema"}, "no schema_file; json_schema needs it"),
        ({"source": "json_schema", "schema_file": "nothing.json"}, "nothing.json: No such file"),
        ({"source": "exact_match", "pattern": "a"}, "has pattern; pattern is of regex"),
    ],
)
def test_a_reward_that_cannot_be_is_refused_without_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, term: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    good = RewardTerm(source="json_valid")
    with pytest.raises(JobError, match=rf"^objective\.rewards\[1\] \(.*\): {said}"):
        check_rewards([good, RewardTerm.model_validate(term)])


def test_a_file_that_is_no_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"type": "objekt"}')
    term = RewardTerm(source="json_schema", schema_file=str(tmp_path / "s.json"))
    with pytest.raises(
        JobError, match=r"rewards\[0\] \(json_schema\): .*not a JSON Schema.*Check schema_file"
    ):
        check_rewards([term])


def test_exact_match_wants_truths(score: Any) -> None:
    with pytest.raises(JobError, match="no prompt has a truth to match"):
        score(["exact_match"], [say("4")])


def test_paths_of_rewards_are_relative_to_the_job_file(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("def f(completions): return [0 for _ in completions]")
    (tmp_path / "schema.json").write_text("{}")
    (tmp_path / "length").mkdir()
    (tmp_path / "job.yaml").write_text(
        "model: tunesmith/tiny\ndata: {train: tunesmith/tickets}\nobjective:\n  name: grpo\n  rewards:\n"
        "    - rewards.py:f\n    - {source: json_schema, schema_file: schema.json}\n"
        "    - {source: length, characters: 9}\n"
    )
    spec = load_job(tmp_path / "job.yaml").objective_spec
    assert isinstance(spec, GrpoSpec)
    terms = spec.terms
    assert terms[0].source == f"{tmp_path.resolve()}/rewards.py:f"
    assert terms[1].schema_file == f"{tmp_path.resolve()}/schema.json"
    assert terms[2].source == "length"
    check_rewards(terms)


# --- reward models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that likes polite answers."""
    root = tmp_path_factory.mktemp("reward")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Is {a} darker than {b}?"}],
            "chosen": f"Gladly: {a} is darker.",
            "rejected": f"Stupid question. {b}.",
        }
        for a in ("red", "green", "blue", "white", "black", "brown")
        for b in ("pink", "grey", "gold")
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tunesmith.train(
        {
            "model": TINY,
            "data": {"train": str(root / "pairs.jsonl"), "split": {"validation": 0.0, "test": 0.0}},
            "method": "lora",
            "objective": "reward",
            "train": {"steps": 15, "batch_rows": 6, "learning_rate": 1e-3, "precision": "fp32"},
        },
        out=root / "run",
    )
    return root / "run"


def test_a_reward_model_scores_answers_as_in_its_training(
    score: Any, reward_run: Path, renderer: Renderer
) -> None:
    question = (Message("user", "Is red darker than gold?"),)
    said = ["Gladly: red is darker.", "Stupid question. gold."]
    prompt = Prompt(renderer.render_prompt(question), question, None, {}, Origin("p:1", "p", 1), "id")
    answers = [Answer(prompt, text, 9, True, renderer.tokenizer.encode_continuation(text)) for text in said]
    found = score([str(reward_run / "model")], answers)
    assert found.total[0] > found.total[1] + 0.5
    rows = [
        row
        for text in said
        for row in renderer.render_conversation(
            Conversation((*question, Message("assistant", text)), prompt.origin)
        )
    ]
    model = load_model(reward_run / "model", classifier=True)
    with torch.no_grad():
        expected = score_answers(model, make_batch(rows)).tolist()
    assert found.total == pytest.approx(expected, abs=1e-5)


def test_what_is_no_reward_model_is_refused(score: Any, reward_run: Path, renderer: Renderer) -> None:
    with pytest.raises(ModelError, match=r"rewards\[0\] \(run\): .*is no model folder. Its reward model is"):
        score([str(reward_run)], [say("a")])
    assert renderer.tokenizer.folder is not None
    with pytest.raises(ModelError, match=r"rewards\[0\] \(.*\): is no sequence classifier"):
        score([str(renderer.tokenizer.folder)], [say("a")])


def save_classifier(family: str, folder: Path, renderer: Renderer, *, labels: int = 1) -> Any:
    """A random classifier of transformers' own, with the tokenizer of the model that is trained."""
    sizes = {"vocab_size": renderer.tokenizer.vocab_size, "num_labels": labels, "pad_token_id": 0}
    if family == "gpt2":
        config: Any = transformers.GPT2Config(
            **sizes, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1
        )
        model: Any = transformers.GPT2ForSequenceClassification(config)
    else:
        config = transformers.LlamaConfig(
            **sizes, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
        model = transformers.LlamaForSequenceClassification(config)
    model.eval().save_pretrained(folder)
    renderer.tokenizer.save(folder)
    return model


def test_a_classifier_of_transformers_is_a_reward_model(
    score: Any, renderer: Renderer, tmp_path: Path
) -> None:
    model = save_classifier("llama", tmp_path / "rm", renderer)
    answers = [say("yes", finished=False), say("no", finished=False)]
    with torch.no_grad():
        rows = [[*answer.prompt.ids, *answer.ids] for answer in answers]
        expected = [model(torch.tensor([row])).logits.item() for row in rows]
    assert score([str(tmp_path / "rm")], answers).terms == {"rm": pytest.approx(expected, abs=1e-5)}


@pytest.mark.parametrize(
    ("family", "labels", "said"),
    [
        ("llama", 2, "gives 2 scores; a reward is one number"),
        ("gpt2", 1, "is a classifier of type gpt2; reward models are of architectures"),
    ],
)
def test_a_classifier_that_gives_no_reward_is_refused(
    renderer: Renderer, tmp_path: Path, family: str, labels: int, said: str
) -> None:
    save_classifier(family, tmp_path / "rm", renderer, labels=labels)
    with pytest.raises(ModelError, match=rf"rewards\[0\] \(rm\): .*{said}"):
        check_rewards([RewardTerm(source=str(tmp_path / "rm"))])


def test_a_reward_model_with_another_vocabulary_is_refused(
    score: Any, reward_run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(reward_run / "model", other)
    known = json.loads((other / "tokenizer.json").read_text())
    vocabulary = known["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(known))
    with pytest.raises(ModelError, match=r"rewards\[0\] \(other\): its vocabulary is not that of the model"):
        score([str(other)], [say("a")])


# --- check and preview ------------------------------------------------------------------------------------------------


def test_check_and_preview_of_a_job_with_rewards(tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"Spell {w}"}], "answer": " ".join(w)} for w in "abcdefgh"
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {
        "model": TINY,
        "data": {"train": str(tmp_path / "p.jsonl"), "split": {"validation": 0.0, "test": 0.0}},
        "objective": {"name": "grpo", "rewards": ["exact_match"]},
    }
    report = check(job)
    assert report.splits["train"].num_rows == 8
    assert not report.warnings
    (shown,) = preview(job, rows=1)
    assert isinstance(shown, PromptPreview)
    assert shown.truth == "a"
    assert [kind for _, kind in shown.segments] == ["masked"]
    job["objective"] = {"name": "grpo", "rewards": ["regex"]}
    with pytest.raises(JobError, match="no pattern"):
        check(job)
    job |= {"objective": "sft"}
    with pytest.raises(DataError, match="rows with keys answer, prompt"):
        check(job)

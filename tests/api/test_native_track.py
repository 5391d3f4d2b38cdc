"""The native track, for real: TRL prepares raw rows by itself, and what is reported of it is what it did."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from native_arms import compare_native, gates, join_tickets, kinds, read_both, read_tickets

from tunesmith import api
from tunesmith.core.jsonl import read_json, read_jsonl
from tunesmith.data.prepare import load_prepared
from tunesmith.frameworks.adding import add_environment
from tunesmith.frameworks.handoff import Handoff
from tunesmith.frameworks.port import Translation
from tunesmith.frameworks.ports import PORTS
from tunesmith.frameworks.trl import Trl

pytestmark = [pytest.mark.trl, pytest.mark.slow, pytest.mark.timeout(300)]

TRL_PYTHON = Path(__file__).parents[2] / ".venv-trl" / "bin" / "python"
ARM = "lora-trl"
# The tiny model's own words for turns. The end of an answer stands outside of what the marks enclose.
MARKED = (
    "{{- bos_token -}}{%- for m in messages -%}{{- '<|' + m.role + '|>' -}}"
    "{%- if m.role == 'assistant' -%}{% generation %}{{- m.content -}}{% endgeneration %}{{- '<|end|>' -}}"
    "{%- else -%}{{- m.content + '<|end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A data folder with TRL in it."""
    if not TRL_PYTHON.exists():
        pytest.skip("TRL's environment is missing; run: make test-trl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(tmp_path_factory.mktemp("home")))
        add_environment("trl", str(TRL_PYTHON))
        yield


def test_trl_makes_the_same_rows_of_tickets(tmp_path: Path) -> None:
    comparison = compare_native(tmp_path, read_tickets())

    assert kinds(comparison) == {}
    assert comparison.native[ARM].same_rows == comparison.native[ARM].rows >= 10
    for ids, mask, their_ids, labels in read_both(tmp_path):
        assert their_ids == ids
        assert labels == [token if kept else -100 for token, kept in zip(ids, mask, strict=True)]
    assert set(gates(comparison).values()) == {"PASS"}
    assert "Native track" not in " ".join(comparison.details)


def test_an_end_that_the_template_does_not_mark_is_not_trained(tmp_path: Path) -> None:
    (tmp_path / "marked.jinja").write_text(MARKED, encoding="utf-8")
    comparison = compare_native(tmp_path, read_tickets(), template=str(tmp_path / "marked.jinja"))

    both = read_both(tmp_path)
    assert kinds(comparison) == {"untrained stop": (len(both), len(both))}
    for ids, mask, their_ids, labels in both:
        assert their_ids == ids
        assert [label != -100 for label in labels] == [*map(bool, mask[:-1]), False]
    assert comparison.native[ARM].says.startswith(f"trl trains {len(both)} fewer tokens; ")
    words = gates(comparison)
    assert words["tokens"] == "DIFFERS"
    assert {words[name] for name in ("loss", "gradient", "curve")} == {"UNVERIFIED"}
    assert {words[name] for name in ("parameters", "optimizer")} == {"PASS"}
    assert comparison.find_arm(ARM).not_comparable == ""
    assert comparison.details[0].startswith("Native track: frameworks saw other tokens")
    assert any("does not train the stop token" in text for text in comparison.warnings)
    shown = api.comparison_json(comparison, tmp_path / "out")["arms"][0]["native"]
    assert shown["kinds"][0]["name"] == "untrained stop"
    assert shown["kinds"][0]["examples"][0]["ours"] == "<|end|>"
    file = tmp_path / "out" / "arms" / ARM / "native.json"
    assert read_json(file)["says"] == shown["says"]

    silent = compare_native(tmp_path, read_tickets(), samples=False, template=str(tmp_path / "marked.jinja"))
    assert kinds(silent) == kinds(comparison)
    assert silent.native[ARM].kinds[0].examples == []
    assert read_json(file)["kinds"][0]["examples"] == []
    # From files alone, the same is said again.
    assert api.report(tmp_path / "out").native == silent.native
    assert "does not train the stop token" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_all_answers_of_a_conversation_are_trained_where_the_template_marks_them(tmp_path: Path) -> None:
    inside = MARKED.replace("{% endgeneration %}{{- '<|end|>' -}}", "{{- '<|end|>' -}}{% endgeneration %}")
    assert inside != MARKED
    (tmp_path / "inside.jinja").write_text(inside, encoding="utf-8")
    template = str(tmp_path / "inside.jinja")
    comparison = compare_native(tmp_path, join_tickets(), template=template, max_tokens=2048)

    assert kinds(comparison) == {}
    assert comparison.native[ARM].rows >= 10
    for _, mask, _, labels in read_both(tmp_path):
        assert [label != -100 for label in labels] == list(map(bool, mask))
        assert sum(b > a for a, b in itertools.pairwise(mask)) == 2
    assert gates(comparison)["tokens"] == "PASS"


class Short(Trl):
    """TRL, told of a limit that is not the job's."""

    max_length = 0

    def translate(self, handoff: Handoff) -> Translation:
        assert handoff.raw
        raw = dataclasses.replace(handoff.raw, max_tokens=self.max_length)
        return super().translate(dataclasses.replace(handoff, raw=raw))


def test_rows_that_trl_cuts_and_leaves_out_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A limit that leaves something of most answers, and nothing of the answer with the longest prompt.
    rows = read_tickets()
    monkeypatch.setitem(PORTS, "trl", Short())
    monkeypatch.setattr(Short, "max_length", 160)
    comparison = compare_native(tmp_path, rows)

    ours = load_prepared(tmp_path / "out" / "prepared").rows("train")
    kept = [sum(row.mask[:160]) for row in ours]
    left_out = [len(row.ids) for row, targets in zip(ours, kept, strict=True) if not targets]
    cut = [len(row.ids) - 160 for row, t in zip(ours, kept, strict=True) if t and len(row.ids) > 160]
    assert left_out
    assert cut
    assert kinds(comparison) == {
        "missing row": (len(left_out), sum(left_out)),
        "cut end": (len(cut), sum(cut)),
    }
    found = comparison.native[ARM]
    assert found.their_targets == sum(kept)
    # It trains on what is left, in steps of as many rows.
    steps = [line for _, line in read_jsonl(tmp_path / "out" / "arms" / ARM / "seed-0" / "steps.jsonl")]
    assert sum(step["num_target_tokens"] for step in steps) >= sum(kept)


def test_a_named_template_without_the_models_own_end_loses_it(tmp_path: Path) -> None:
    # `<|im_end|>` is no token of the tiny model: we end such rows with its EOS, TRL with the template's newline.
    comparison = compare_native(tmp_path, read_tickets(), template="chatml", max_tokens=2048)

    both = read_both(tmp_path)
    newline = both[0][2][-1]
    for ids, _, their_ids, labels in both:
        assert their_ids == [*ids[:-1], newline]
        assert labels[-1] == newline
    assert kinds(comparison) == {
        "missing stop": (len(both), len(both)),
        "trained template": (len(both), len(both)),
    }
    assert comparison.native[ARM].says.startswith("trl trains as many tokens as we do, and ")


def test_a_completion_that_goes_on_in_a_word_is_tokenised_otherwise(tmp_path: Path) -> None:
    rows = [{"prompt": f"Order {n}: the parcel is la", "completion": f"te since May {n}."} for n in range(14)]
    comparison = compare_native(tmp_path, rows)

    split = 0
    for ids, mask, their_ids, labels in read_both(tmp_path):
        same = their_ids == ids
        split += not same
        if same:
            assert [label != -100 for label in labels] == list(map(bool, mask))
        assert their_ids[-1] == ids[-1] == labels[-1]
    assert kinds(comparison).keys() == ({"other tokens"} if split else set())
    assert split

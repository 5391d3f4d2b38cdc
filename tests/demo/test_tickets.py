"""The bundled data set is what its card says."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from tunesmith.demo import make_tickets
from tunesmith.demo.instruction_records import make_record_pairs
from tunesmith.demo.instruction_tasks import load_concepts, make_conversation
from tunesmith.demo.instruction_values import Stock

FOLDER = Path(make_tickets.__file__).with_name("tickets")
SPLITS = ("train", "validation", "test")
NEAR_DUPLICATE_JACCARD = 0.7  # of word 3-grams


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    texts = {split: (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8") for split in SPLITS}
    return {split: [json.loads(line) for line in text.splitlines()] for split, text in texts.items()}


def list_shingles(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return frozenset(tuple(words[at : at + 3]) for at in range(len(words) - 2))


def test_the_script_writes_the_committed_files_byte_for_byte(tmp_path: Path) -> None:
    make_tickets.write_tickets(tmp_path, seed=0)
    for path in sorted(tmp_path.iterdir()):
        assert path.read_bytes() == (FOLDER / path.name).read_bytes(), path.name


def test_another_seed_gives_other_rows(tmp_path: Path) -> None:
    make_tickets.write_tickets(tmp_path, seed=1)
    assert (tmp_path / "test.jsonl").read_bytes() != (FOLDER / "test.jsonl").read_bytes()


def test_every_family_belongs_to_one_split(rows: dict[str, list[dict]]) -> None:
    families = {split: {row["family"] for row in rows[split]} for split in SPLITS}
    assert [len(families[split]) for split in SPLITS] == [138, 12, 30]
    assert [len(rows[split]) for split in SPLITS] == [2400, 240, 300]
    assert not families["train"] & families["test"]
    assert not families["train"] & families["validation"]
    assert not families["validation"] & families["test"]
    # Test families are the clusters of the report's intervals: at least 30, all of the same size.
    assert set(Counter(row["family"] for row in rows["test"]).values()) == {10}


def test_no_sentence_frame_is_shared_between_splits() -> None:
    """Frames and clauses of three words or more, and the whole pool; the shared plain cores are not looked at."""
    frames: dict[str, set[str]] = {split: set() for split in SPLITS}
    not_frames = ("cores", "pool", "clauses", "name", "split", "layout", "style")
    for family in make_tickets.load_families():
        parts = [family[key] for key in family if key not in not_frames]
        parts += list(family["clauses"].values())
        said = {frame.lower() for part in parts for frame in part if len(frame.split()) > 2}
        said |= {frame.lower() for part in family["pool"].values() for frame in part}
        frames[family["split"]] |= said
    assert not frames["train"] & frames["test"]
    assert not frames["train"] & frames["validation"]
    assert not frames["validation"] & frames["test"]


def test_a_writer_says_the_item_once_and_has_at_least_two_frames_for_most_parts() -> None:
    for family in make_tickets.load_families():
        for part in ("context", "dated"):
            assert all(frame.count("{product}") == 1 for frame in family[part]), family["name"]
            assert all(("{date}" in frame) == (part == "dated") for frame in family[part]), family["name"]
        for part in ("order", "amount", "say", "ask"):
            assert len(family[part]) >= 2, (family["name"], part)
        assert {"order", "context", "issues", "amount", "want", "urgency"} <= set(family["layout"]), family[
            "name"
        ]
        if "opening_anonymous" in family:
            assert all("{name}" in frame for frame in family["opening"]), family["name"]
        else:
            assert "sign" in family["layout"], family["name"]
            assert all("{name}" in frame for frame in family["sign"]), family["name"]


def test_no_core_says_two_labels() -> None:
    cores = make_tickets.load_families()[0]["cores"]
    said = [core for label in cores for core in cores[label]]
    assert len(said) == len(set(said))
    assert all(len(cores[label]) >= 10 for label in cores)


def test_every_answer_fits_the_schema_and_is_compact_json(rows: dict[str, list[dict]]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((FOLDER / "schema.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    for split in SPLITS:
        for row in rows[split]:
            answer = json.loads(row["messages"][2]["content"])
            validator.validate(answer)
            assert (
                json.dumps(answer, ensure_ascii=False, separators=(",", ":")) == row["messages"][2]["content"]
            )


def test_copied_values_stand_in_the_message(rows: dict[str, list[dict]]) -> None:
    for split in SPLITS:
        for row in rows[split]:
            answer = json.loads(row["messages"][2]["content"])
            message = row["messages"][1]["content"]
            copied = [answer[key] for key in ("order", "name", "item", "date") if key in answer]
            copied += [str(answer["amount"]["value"])] if "amount" in answer else []
            for value in copied:
                assert value.lower() in message.lower(), (value, message)


def test_an_absent_fact_is_an_absent_key_in_some_rows(rows: dict[str, list[dict]]) -> None:
    answers = [json.loads(row["messages"][2]["content"]) for row in rows["test"]]
    for key, low, high in (
        ("order", 0.75, 0.95),
        ("name", 0.6, 0.9),
        ("date", 0.35, 0.65),
        ("amount", 0.3, 0.6),
    ):
        assert low < sum(key in answer for answer in answers) / len(answers) < high, key


def test_no_test_message_is_a_near_duplicate_of_a_training_message(rows: dict[str, list[dict]]) -> None:
    train = [list_shingles(row["messages"][1]["content"]) for row in rows["train"]]
    for row in rows["test"]:
        mine = list_shingles(row["messages"][1]["content"])
        nearest = max(len(mine & other) / len(mine | other) for other in train)
        assert nearest < NEAR_DUPLICATE_JACCARD, row["messages"][1]["content"]


def test_pretraining_tasks_never_use_the_fields_of_the_tickets() -> None:
    fields = set(make_tickets.build_schema()["properties"])
    words: list[str] = [*"river stone lamp happy tree walk green window house quick table cloud".split()]
    stock = Stock(words, ["The old man went to the sea and looked at the waves."], load_concepts())
    draw = random.Random(0)
    for _ in range(400):
        for _, answer in make_record_pairs(draw, stock)[1]:
            assert len(fields & set(json.loads(answer))) <= 4


def test_pretraining_tasks_do_not_speak_of_the_desk(rows: dict[str, list[dict]]) -> None:
    """No run of eight words of a message occurs in the tasks' own wording."""
    words: list[str] = [*"river stone lamp happy tree walk green window house quick table cloud".split()]
    stock = Stock(words, ["It was the best of times."], load_concepts())
    draw = random.Random(1)
    texts = [" ".join(turn["content"] for turn in make_conversation(draw, stock)) for _ in range(400)]

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[at : at + 8]) for at in range(len(words) - 7)}

    seen = set().union(*(runs(text) for text in texts))
    messages = [row["messages"][1]["content"] for split in SPLITS for row in rows[split]]
    assert not any(runs(message) & seen for message in messages)


def test_general_text_is_there_and_names_its_sources() -> None:
    passages = [
        json.loads(line) for line in (FOLDER / "general.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert 30_000 < sum(len(passage["text"]) for passage in passages) < 80_000
    assert all(passage["author"] and passage["title"] for passage in passages)

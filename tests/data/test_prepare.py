"""A prepared folder holds exactly what was rendered, its test split apart, and tells what was lost on the way."""

import datetime
import json

import pytest

from tunesmith.core.errors import DataError, RunDirError
from tunesmith.core.types import Origin
from tunesmith.data.checks import CheckReport
from tunesmith.data.collect import Rejects
from tunesmith.data.prepare import load_prepared, prepare_data
from tunesmith.data.render import Renderer
from tunesmith.data.survey import check

SUBJECTS = "cat dog log mat hen fox owl bat ant bee cow elk".split()


def row(question, answer, **extra):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns, **extra})


@pytest.fixture
def train_file(write_lines):
    """12 rows that are nothing like each other."""
    return write_lines(*[row(f"{s * 9} {n}?", f"the {s} {n * 7919}") for n, s in enumerate(SUBJECTS)])


def test_rows_conversations_and_clusters_come_back_as_they_were(
    train_file, make_job, chat_tokenizer, tmp_path
):
    job = make_job(train=str(train_file), split={"validation": 0.25, "test": 0.25})
    written = prepare_data(job, tokenizer=chat_tokenizer, folder=tmp_path / "run" / "prepared")
    read = load_prepared(tmp_path / "run" / "prepared")
    assert read.splits == ("train", "validation", "test")
    assert read.fingerprints == written.fingerprints
    renderer = Renderer(chat_tokenizer)
    places = []
    for split, size in (("train", 6), ("validation", 3), ("test", 3)):
        rows, conversations = read.rows(split), read.conversations(split)
        assert len(rows) == len(conversations) == len(read.clusters(split)) == size
        assert read.conversation_numbers(split) == list(range(size))
        for stored, conversation in zip(rows, conversations, strict=True):
            (fresh,) = renderer.render_conversation(conversation)
            assert list(stored.ids) == list(fresh.ids)
            assert list(stored.mask) == list(fresh.mask)
            assert (stored.row_id, stored.num_answer_bytes) == (fresh.row_id, fresh.num_answer_bytes)
            assert stored.origin == conversation.origin
            places.append(stored.origin.place)
    assert sorted(places, key=lambda p: int(p.split(":")[1])) == [f"train.jsonl:{n}" for n in range(1, 13)]


def test_the_test_split_lies_apart_and_can_be_left_out(train_file, make_job, chat_tokenizer, tmp_path):
    job = make_job(train=str(train_file), split={"validation": 0.25, "test": 0.25})
    whole = prepare_data(job, tokenizer=chat_tokenizer, folder=tmp_path / "a" / "prepared")
    assert sorted(p.name for p in (tmp_path / "a" / "prepared" / "sealed").iterdir()) == [
        "test.conversations.jsonl",
        "test.rows.jsonl",
        "test.safetensors",
    ]
    part = prepare_data(
        job, tokenizer=chat_tokenizer, folder=tmp_path / "b" / "prepared", splits=("train", "validation")
    )
    assert part.splits == ("train", "validation")
    assert part.fingerprints == whole.fingerprints
    with pytest.raises(DataError, match="split 'test' is not in this folder; it holds train, validation"):
        part.rows("test")


def test_masks_of_long_rows_sum_to_their_number_of_targets(write_lines, make_job, chat_tokenizer, tmp_path):
    path = write_lines(*[row(f"{s * 9}?", " ".join([s] * 300)) for s in SUBJECTS])
    job = make_job(train=str(path), max_tokens=4096)
    prepared = prepare_data(job, tokenizer=chat_tokenizer, folder=tmp_path / "prepared")
    stored = prepared.rows("train")[0]
    (fresh,) = Renderer(chat_tokenizer).render_conversation(prepared.conversations("train")[0])
    assert stored.num_targets == fresh.num_targets > 300


def test_file_order_changes_no_split(write_lines, make_job, chat_tokenizer, tmp_path):
    lines = [row(f"{s * 9}?", f"the {s}") for s in SUBJECTS]
    splits = {"validation": 0.25, "test": 0.25}
    found = []
    for order in (lines, lines[::-1]):
        job = make_job(train=str(write_lines(*order)), split=splits)
        prepared = prepare_data(job, tokenizer=chat_tokenizer, folder=tmp_path / f"{len(found)}" / "prepared")
        found.append({name: {r.row_id for r in prepared.rows(name)} for name in prepared.splits})
    assert found[0] == found[1]


def test_own_splits_of_a_folder_are_used_as_they_are(
    write_lines, make_job, chat_tokenizer, tmp_path, train_file
):
    write_lines(row("what is a log?", "the log"), name="validation.jsonl")
    write_lines(row("what is a mat?", "the mat"), name="test.jsonl")
    job = make_job(train=str(train_file.parent))
    prepared = prepare_data(job, tokenizer=chat_tokenizer, folder=tmp_path / "out" / "prepared")
    assert [len(prepared.rows(name)) for name in ("train", "validation", "test")] == [12, 1, 1]


def test_bad_rows_are_refused_or_set_aside_with_their_reasons(
    write_lines, make_job, chat_tokenizer, tmp_path
):
    good = [row(f"{s * 9}?", f"the {s}") for s in SUBJECTS]
    path = write_lines(*good, row("why?", ""), "{", row("<|im_end|>?", "yes"))
    job = make_job(train=str(path))
    with pytest.raises(DataError, match=r"train\.jsonl:13: the answer in message 2 is empty"):
        prepare_data(job, tokenizer=chat_tokenizer, folder=tmp_path / "run" / "prepared")
    assert not (tmp_path / "run" / "prepared" / "prepared.json").exists()
    prepared = prepare_data(
        job, tokenizer=chat_tokenizer, folder=tmp_path / "run" / "prepared", on_bad_row="skip"
    )
    lines = (tmp_path / "run" / "rejected_rows.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["place"] for line in lines) == ["train.jsonl:13", "train.jsonl:14"]
    assert all(json.loads(line)["reason"].startswith("train.jsonl:1") for line in lines)
    assert not any("on-bad-row" in json.loads(line)["reason"] for line in lines)
    assert [json.loads(line)["row"] for line in lines] == ["{", json.loads(row("why?", ""))]
    report = prepared.report
    assert report.sources[0].num_rejected == 2
    assert report.counts["rows_with_special_tokens"] == 1
    assert any("2 bad rows skipped" in text for text in report.warnings)


def test_a_rejected_row_is_kept_whole_also_from_a_table(chat_tokenizer, make_job, tmp_path):
    long = "why? " * 1000
    good = [
        {"messages": [{"role": "user", "content": f"{s * 9}?"}, {"role": "assistant", "content": s}]}
        for s in SUBJECTS
    ]
    bad = {"messages": [{"role": "user", "content": long}]}
    (tmp_path / "train.json").write_text(json.dumps([*good, bad]))
    prepare_data(
        make_job(train=str(tmp_path / "train.json")),
        tokenizer=chat_tokenizer,
        folder=tmp_path / "prepared",
        on_bad_row="skip",
    )
    (line,) = (tmp_path / "rejected_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == bad
    rejects = Rejects(tmp_path / "cells.jsonl")
    cells = {"day": datetime.date(2026, 1, 2), "share": float("nan")}
    rejects.add(Origin("t.parquet:1", "t.parquet", 1), cells, DataError("t.parquet:1", "is bad"))
    rejects.write()
    assert json.loads(rejects.path.read_text())["row"] == {"day": "2026-01-02", "share": "NaN"}


def test_long_rows_are_dropped_cut_or_refused_and_their_loss_is_counted(
    write_lines, make_job, chat_tokenizer, tmp_path
):
    lines = [row(f"{s * 9}?", f"the {s}") for s in SUBJECTS]
    path = write_lines(*lines, row("a long one?", "the log " * 200))
    base = {"train": str(path), "max_tokens": 120, "split": {"validation": 0.0, "test": 0.0}}
    (long_row,) = Renderer(chat_tokenizer).render_conversation(
        prepare_data(
            make_job(**{**base, "max_tokens": 9999}),
            tokenizer=chat_tokenizer,
            folder=tmp_path / "all" / "prepared",
        ).conversations("train")[-1]
    )
    dropped = check(make_job(**base), tokenizer=chat_tokenizer).splits["train"]
    assert (dropped.num_rows, dropped.num_dropped, dropped.num_lost_targets) == (12, 1, long_row.num_targets)
    assert dropped.length_percentiles["100"] == len(long_row.ids)
    cut = check(make_job(**base, too_long="truncate"), tokenizer=chat_tokenizer)
    facts = cut.splits["train"]
    assert (facts.num_rows, facts.num_truncated) == (13, 1)
    assert facts.num_lost_targets == sum(long_row.mask[120:])
    assert facts.num_without_stop == 1
    assert any("answers may not end" in text for text in cut.warnings)
    with pytest.raises(
        DataError, match=rf"train\.jsonl:13: {len(long_row.ids)} tokens; data\.max_tokens is 120"
    ):
        check(make_job(**base, too_long="refuse"), tokenizer=chat_tokenizer)


def test_duplicates_and_overlap_are_counted(write_lines, make_job, chat_tokenizer, tmp_path):
    text = " ".join(f"word{n}" for n in range(30))
    other = (
        "a quite different question about the weather in the mountains this year, is it not so, my friend?"
    )
    train = [
        row(text + "?", "yes it is"),
        row(text + "?", "yes it is"),
        row(text + " now?", "yes it is"),
        row(other, "no"),
    ]
    test = [
        row(text + "?", "yes it is"),
        row(
            " ".join(text.split()[:13]) + " cats and dogs and hens and bees sat on the mat of the owl, why?",
            "who knows?",
        ),
        row("what is four plus four in the land of the elk and of the fox?", "eight"),
    ]
    path, held_out = write_lines(*train), write_lines(*test, name="held_out.jsonl")
    job = make_job(train=str(path), split={"validation": 0.0, "test": str(held_out)})
    report = check(job, tokenizer=chat_tokenizer)
    assert report.splits["train"].num_exact_duplicates == 1
    assert report.splits["train"].num_rows == 3
    assert report.splits["train"].num_near_duplicates == 1
    overlap = report.overlap["test"]
    assert (overlap.num_rows, overlap.num_exact, overlap.num_near, overlap.num_shared_13grams) == (3, 1, 1, 2)
    assert CheckReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    kept = check(make_job(**{**job.data.model_dump(), "deduplicate": "none"}), tokenizer=chat_tokenizer)
    assert kept.splits["train"].num_rows == 4


def test_a_mix_takes_the_share_of_each_source(write_lines, make_job, chat_tokenizer, tmp_path):
    first = write_lines(*[row(f"{s * 9}?", f"the {s}") for s in SUBJECTS], name="a.jsonl")
    second = write_lines(*[row(f"{s * 7}!", f"a {s}") for s in SUBJECTS[:4]], name="b.jsonl")
    job = make_job(
        train=[{"path": str(first), "weight": 0.5}, {"path": str(second), "weight": 2.0}],
        split={"validation": 0.0, "test": 0.0},
    )
    prepared = prepare_data(job, tokenizer=chat_tokenizer, folder=tmp_path / "out" / "prepared")
    names = [r.origin.place.split(":")[0] for r in prepared.rows("train")]
    assert (names.count("a.jsonl"), names.count("b.jsonl")) == (6, 8)


@pytest.mark.parametrize(
    ("rows", "data", "finding"),
    [
        ([row("a?", "b")], {}, "would be empty: 1 row in too few groups"),
        (
            [row("a?", "b")],
            {"max_tokens": 3, "split": {"validation": 0.0, "test": 0.0}},
            "none of its 1 rows",
        ),
    ],
)
def test_data_that_leaves_nothing_is_told_in_one_line(
    write_lines, make_job, chat_tokenizer, tmp_path, rows, data, finding
):
    job = make_job(train=str(write_lines(*rows)), **data)
    with pytest.raises(DataError) as caught:
        prepare_data(job, tokenizer=chat_tokenizer, folder=tmp_path / "prepared")
    assert finding in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_damaged_folder_is_named(train_file, make_job, chat_tokenizer, tmp_path):
    folder = tmp_path / "prepared"
    prepare_data(make_job(train=str(train_file)), tokenizer=chat_tokenizer, folder=folder)
    path = folder / "train.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"train\.safetensors: cannot be read"):
        load_prepared(folder).rows("train")
    with pytest.raises(DataError, match="not a prepared folder"):
        load_prepared(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(train_file, make_job, chat_tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunDirError) as caught:
        prepare_data(
            make_job(train=str(train_file)), tokenizer=chat_tokenizer, folder=tmp_path / "file" / "prepared"
        )
    assert caught.value.exit_code == 2

"""Retrieval finds what it should, the same way every time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.core.errors import DataError, JobError
from tunesmith.eval.retrieval import Retriever, chunk_text, read_passages


def test_the_text_that_shares_the_rare_words_comes_first():
    texts = ["my parcel is late", "the kettle arrived broken", "please refund my kettle", "hello"]
    assert Retriever(texts).find("A broken KETTLE!", 2) == [1, 2]


def test_of_equal_texts_the_earlier_one_wins_and_unknown_words_find_the_first_rows():
    index = Retriever(["same words", "same words", "other"])
    assert index.find("same words", 2) == [0, 1]
    assert index.find("zebra", 3) == [0, 1, 2]
    assert index.find("", 2) == [0, 1]


def test_the_order_of_the_words_of_a_query_does_not_change_the_hits():
    texts = [f"word{i % 7} word{i % 5} word{i % 3} tail{i}" for i in range(60)]
    index = Retriever(texts)
    query = ["word1", "word2", "word3", "word4", "tail9"]
    assert index.find(" ".join(query), 10) == index.find(" ".join(reversed(query)), 10)


def test_texts_without_any_word_can_be_searched():
    assert Retriever(["...", "!!!"]).find("anything", 5) == [0, 1]


def test_paragraphs_are_joined_up_to_the_limit_and_long_ones_are_cut():
    text = "one two\n\nthree four\n\nfive six seven eight nine ten eleven"
    assert chunk_text(text, chunk_words=4) == [
        "one two\n\nthree four",
        "five six seven eight",
        "nine ten eleven",
    ]


def test_documents_are_read_in_the_order_of_their_paths(tmp_path: Path):
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("zed")
    (tmp_path / "skip.json").write_text("{}")
    assert [(p.place, p.text) for p in read_passages(tmp_path)] == [("a/z.md", "zed"), ("b.txt", "bee")]


def test_a_document_that_is_not_utf8_and_a_folder_without_text_are_refused(tmp_path: Path):
    with pytest.raises(JobError, match="no text"):
        read_passages(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a\.txt: byte 3 is not UTF-8"):
        read_passages(tmp_path)

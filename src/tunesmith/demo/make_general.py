"""Make `tickets/general.jsonl`: held-out general English for the forgetting measure.

The passages come from the documents that `pretrain.py` never trains on (`Document.is_held_out`, a hash of the name).
A passage that shares any run of 13 words with a training document is refused.

    python -m tunesmith.demo.make_general --text DIR --out FILE
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from tunesmith.demo.pretrain_text import Document, read_documents

RUN_WORDS = 13
PASSAGE_CHARS = 1500
PASSAGES_PER_BOOK = 4


def list_runs(text: str) -> set[int]:
    """Hashes of all runs of 13 lower-case words."""
    words = re.findall(r"[a-z']+", text.lower())
    return {hash(tuple(words[at : at + RUN_WORDS])) for at in range(len(words) - RUN_WORDS + 1)}


def cut_passages(document: Document) -> list[str]:
    """Whole paragraphs of about 1,500 characters at even distances, clear of front matter and end notes."""
    found = []
    for at in range(1, 3 * PASSAGES_PER_BOOK + 1):
        start = document.text.find("\n\n", len(document.text) * at // (3 * PASSAGES_PER_BOOK + 2))
        end = document.text.find("\n\n", start + PASSAGE_CHARS)
        passage = document.text[start:end].strip()
        if start > 0 and PASSAGE_CHARS * 0.9 < len(passage) < PASSAGE_CHARS * 2 and "http" not in passage:
            found.append(passage)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the general held-out text.")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    held_out, seen = [], []
    for document in read_documents(arguments.text):
        # Books only: proposals for a programming language are not general English.
        if document.is_held_out and " | " in document.name:
            held_out.append((document, cut_passages(document)))
        elif not document.is_held_out:
            seen.append(document.text)
    wanted = {run for _, passages in held_out for passage in passages for run in list_runs(passage)}
    leaked = {run for text in seen for run in list_runs(text) & wanted}
    lines = []
    for document, passages in held_out:
        clean = [passage for passage in passages if not list_runs(passage) & leaked]
        author, title = document.name.split(" | ")
        for passage in clean[:: max(1, len(clean) // PASSAGES_PER_BOOK)][:PASSAGES_PER_BOOK]:
            lines.append(
                json.dumps({"text": passage, "author": author, "title": title}, ensure_ascii=False) + "\n"
            )
    arguments.out.write_text("".join(lines), encoding="utf-8", newline="\n")
    print(f"{len(lines)} passages, {sum(map(len, lines)):,} characters, {len(leaked)} shared runs refused")


if __name__ == "__main__":
    main()

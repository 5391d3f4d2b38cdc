"""Hub data sets, shown on a local folder under a hub-like name: nothing here reaches a network."""

import json
import subprocess
import sys
import textwrap

import pytest

from tunesmith.data.hub import is_hub_id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", True),
        ("org/name:test", True),
        ("rows.jsonl", False),
        ("data/rows.jsonl", False),
        ("a/b/c", False),
    ],
)
def test_hub_ids_are_told_from_paths(text, expected):
    assert is_hub_id(text) is expected


def test_splits_and_rows_come_through_datasets(tmp_path):
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    for split, texts in (("train", ["a", "b"]), ("test", ["c"])):
        lines = [json.dumps({"text": text, "note": None}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    code = textwrap.dedent(
        """
        import json
        from tunesmith.core.errors import DataError
        from tunesmith.data.hub import list_hub_splits, read_hub
        splits, revision = list_hub_splits("org/name", revision=None)
        rows = {ours: list(read_hub(*theirs, revision=revision)) for ours, theirs in splits.items()}
        only, _ = list_hub_splits("org/name:test", revision=None)
        try:
            list_hub_splits("org/name:dev", revision=None)
        except DataError as error:
            print(json.dumps([rows, only, str(error)]))
        """
    )
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    import os

    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment},
    )
    rows, only, error = json.loads(run.stdout.splitlines()[-1])
    assert rows == {"train": [{"text": "a"}, {"text": "b"}], "test": [{"text": "c"}]}
    assert only == {"train": ["org/name", "test"]}
    assert error == "org/name:dev: no split 'dev'; its splits are train, test"

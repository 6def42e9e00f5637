"""Preference data from files, folders and the hub: every TRL format, and bad rows by name."""

from __future__ import annotations

import json

import pytest

datasets = pytest.importorskip("datasets")

from everytoken.core.errors import BadInputError
from everytoken.training.datasets.pairs import load_pairs

GOOD = [
    {"prompt": "a", "chosen": " b", "rejected": " c"},
    {"prompt": "d", "chosen": " e", "rejected": " f"},
]
CHAT = [
    {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Hello!"}],
        "rejected": [{"role": "assistant", "content": "What?"}],
    }
]
IMPLICIT = [
    {
        "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
        "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "What?"}],
    }
]
TOKENS = [
    {
        "prompt_ids": [1],
        "chosen_ids": [2, 3],
        "rejected_ids": [4],
        "chosen_contrast": [0.1, 0.2],
        "rejected_contrast": [0.3],
    }
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("rows", [GOOD, CHAT, IMPLICIT, TOKENS], ids=["text", "chat", "implicit", "tokens"])
def test_every_format_from_every_kind_of_file(tmp_path, rows):
    paths = [
        write(tmp_path / "rows.jsonl", rows),
        tmp_path / "rows.json",
        tmp_path / "rows.parquet",
        tmp_path / "folder",
    ]
    paths[1].write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(paths[2])
    datasets.Dataset.from_list(rows).save_to_disk(paths[3])
    for path in paths:
        assert load_pairs(path).to_list() == rows, path


def test_splits_of_a_folder(tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(GOOD)}).save_to_disk(tmp_path / "folder")
    assert len(load_pairs(tmp_path / "folder")) == 2
    with pytest.raises(BadInputError, match="no split 'test'"):
        load_pairs(tmp_path / "folder", split="test")


BAD = [
    ({"prompt": "a", "chosen": " b", "rejected": " b"}, "line 2: chosen and rejected are identical"),
    ({"prompt": "a", "chosen": "", "rejected": " b"}, "line 2: 'chosen' must be non-empty"),
    ({"prompt": "a", "chosen": " b"}, "line 2: 'rejected' must be"),
    ({"prompt": 3, "chosen": " b", "rejected": " c"}, "line 2: 'prompt' must be"),
    ({"prompt": "a", "chosen": [{"role": "user"}], "rejected": " c"}, "line 2: 'chosen': every message"),
    ({"prompt": "a", "chosen": [], "rejected": " c"}, "line 2: 'chosen' has no messages"),
    ({"prompt": "a", "chosen": [{"role": "assistant", "content": " "}], "rejected": " c"}, "last message is empty"),
    ({"prompt": "a", "chosen": [{"role": "assistant", "content": "x"}], "rejected": " c"}, "all be text"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(BadInputError, match=message):
        load_pairs(write(tmp_path / "rows.jsonl", [GOOD[0], row]))


def test_bad_rows_of_parquet_are_named(tmp_path):
    rows = [GOOD[0], {"prompt": "a", "chosen": " b", "rejected": " b"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(BadInputError, match="row 1: chosen and rejected are identical"):
        load_pairs(tmp_path / "rows.parquet")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    (tmp_path / "rows.csv").write_text("a,b\n")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "columns.jsonl", [{"text": "x"}])
    for name, message in (
        ("bad.jsonl", "line 1: not JSON"),
        ("list.jsonl", "line 1: not an object"),
        ("empty.jsonl", "holds no pairs"),
        ("bytes.jsonl", "UTF-8"),
        ("bad.parquet", "Parquet"),
        ("rows.csv", "neither JSONL nor Parquet"),
        ("folder", "not a saved dataset"),
        ("columns.jsonl", "'chosen' must be"),
        ("nothing.jsonl", "There is no file"),
    ):
        with pytest.raises(BadInputError, match=message):
            load_pairs(tmp_path / name)


def test_the_hub_is_reached_only_for_hub_ids_and_its_absence_is_explained():
    with pytest.raises(BadInputError, match="could not be loaded from the hub"):
        load_pairs("nobody/nothing-at-all")

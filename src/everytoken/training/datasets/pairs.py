"""Preference data as users have it: any TRL format, from a file, a folder or the hub, checked before training starts.

Rows have ``prompt``, ``chosen`` and ``rejected``, as text or as lists of messages (a text prompt may stand beside
lists: ``messages.with_prompt_messages`` says what is read then); without ``prompt``, chosen and rejected hold it both,
and TRL takes out what they share. Rows that are tokenized already (``prompt_ids``,
``chosen_ids``, ``rejected_ids``) pass, with any per-token columns they carry.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import BadInputError, require
from ...core.settings import read_text
from .messages import plain_messages, prompts_as_messages, says_something

if TYPE_CHECKING:
    from datasets import Dataset


def load_pairs(source: str | Path, split: str = "train", identical: bool = False) -> Any:
    """A ``datasets.Dataset`` of preference rows.

    Args:
        source: a ``.jsonl``, ``.json`` or ``.parquet`` file, a folder that ``Dataset.save_to_disk`` wrote, or a hub id.
        split: for a hub id.
        identical: let pairs of identical responses pass, for ``without_identical``.

    Raises:
        BadInputError: nothing there, a file that cannot be read, or a bad row, which it names.
        MissingExtraError: ``datasets`` is not installed.
    """
    require("datasets", "train", "Reading preference data")
    import datasets

    path = Path(source)
    label = str(source)
    if path.is_file() and path.suffix in (".jsonl", ".ndjson", ".json"):
        rows = _read_jsonl(path, identical)  # checked line by line
        return prompts_as_messages(dataset_of([_plain_row(row) for row in rows]), label)
    elif path.is_file() and path.suffix == ".parquet":
        import pyarrow

        try:
            dataset = datasets.Dataset.from_parquet(str(path))
        except (OSError, pyarrow.ArrowException, datasets.exceptions.DatasetGenerationError) as error:
            raise BadInputError(f"{path} cannot be read as Parquet: {error}.") from error
    elif path.is_file():
        raise BadInputError(f"{path} is neither JSONL nor Parquet.", "Name it .jsonl, .json or .parquet.")
    elif path.is_dir():
        try:
            dataset = datasets.load_from_disk(str(path))
        except (FileNotFoundError, ValueError) as error:
            raise BadInputError(
                f"{path} is not a saved dataset: {error}.", "Give a .jsonl or .parquet file in it."
            ) from error
        if isinstance(dataset, datasets.DatasetDict):
            dataset = _split(dataset, split, label)
    elif "/" in label and not path.suffix and not path.is_absolute() and len(path.parts) == 2:
        try:
            dataset = datasets.load_dataset(label, split=split)
        except (OSError, ValueError, ConnectionError) as error:
            raise BadInputError(
                f"The dataset {label!r} could not be loaded from the hub: {str(error).splitlines()[0]}",
                "Check its name, the split, and the network; HF_HUB_OFFLINE must not be set.",
            ) from error
    else:
        raise BadInputError(f"There is no file {label}.", "Give a .jsonl or .parquet file, a folder, or a hub id.")
    check_pairs(dataset, label, identical)
    return prompts_as_messages(dataset, label)


def read_rows(source: str | Path) -> list[dict[str, Any]]:
    """Rows of a ``.jsonl``, ``.json`` or ``.parquet`` file, whatever their columns.

    Raises:
        BadInputError: no such file, or one that cannot be read.
    """
    path = Path(source)
    if not path.is_file():
        raise BadInputError(f"There is no file {source}.", "Give a .jsonl, .json or .parquet file.")
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise BadInputError(f"{path} cannot be read as Parquet: {error}.") from error
    else:
        rows = _parse(path)[1]
    if not rows:
        raise BadInputError(f"{path} holds no rows.")
    return rows


def dataset_of(rows: list[dict[str, Any]]) -> Dataset:
    """A table of rows with every column that any of them has; where a row lacks one, its value there is None.

    ``Dataset.from_list`` would take the first row's columns and drop the others.
    """
    import datasets

    names = list(dict.fromkeys(name for row in rows for name in row))
    whole = [{name: row.get(name) for name in names} for row in rows]
    # dictionaries of different keys, such as arguments of tool calls, keep their own
    return datasets.Dataset.from_list(whole, on_mixed_types="use_json")


def _split(dataset: Dataset, split: str, label: str) -> Any:
    if split not in dataset:
        raise BadInputError(f"{label} has no split {split!r}.", f"It has: {', '.join(dataset)}.")
    return dataset[split]


def _plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose messages have their content as text, so that all rows fit into one table."""
    names = [name for name in ("prompt", "chosen", "rejected") if isinstance(row.get(name), list)]
    return row | {name: plain_messages(row[name]) for name in names}


def _read_jsonl(path: Path, identical: bool) -> list[dict[str, Any]]:
    places, rows = _parse(path)
    if not rows:
        raise BadInputError(f"{path} holds no pairs.")
    # checked here as well: rows of different types have no common Arrow schema, and its error names no row
    check_rows(rows, str(path), places, identical)
    return rows


def _parse(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Where each row stands (``line 3``, ``row 2``), and the rows."""
    places: list[str] = []
    text = read_text(path)
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise BadInputError(f"{path} is not JSON: {error}.") from error
        places = [f"row {index}" for index in range(len(rows))]
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise BadInputError(f"{path}, line {number}: not JSON ({error}).") from error
            if not isinstance(rows[-1], dict):
                raise BadInputError(f"{path}, line {number}: not an object.")
            places.append(f"line {number}")
    return places, rows


def without_identical(dataset: Dataset, names: tuple[str, str], label: str = "The data") -> Dataset:
    """The rows whose columns ``names`` differ.

    Raises:
        BadInputError: none is left.
    """
    one, other = (dataset[name] for name in names)
    kept = [index for index, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]]
    if not kept:
        raise BadInputError(f"{label}: chosen and rejected are identical in every row.", "There is nothing to learn.")
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def check_pairs(dataset: Dataset, label: str = "The data", identical: bool = False) -> None:
    """Refuses an empty dataset, unknown columns, and the first bad row.

    Raises:
        BadInputError: it names the row (from 0) and what is wrong there.
    """
    names = set(dataset.column_names or [])
    if {"chosen_ids", "rejected_ids", "prompt_ids"} <= names:
        needed: tuple[str, ...] = ("prompt_ids", "chosen_ids", "rejected_ids")
    elif {"chosen", "rejected"} <= names:
        needed = tuple(name for name in ("prompt", "chosen", "rejected") if name in names)
    else:
        raise BadInputError(
            f"{label} has the columns {', '.join(sorted(names)) or 'none'}; "
            "preference data needs prompt, chosen and rejected.",
            "Rename its columns.",
        )
    if not len(dataset):
        raise BadInputError(f"{label} holds no pairs.")
    columns = [dataset[name] for name in needed]
    rows = [dict(zip(needed, row, strict=True)) for row in zip(*columns, strict=True)]
    check_rows(rows, label, identical=identical)


def check_rows(
    rows: list[dict[str, Any]], label: str, places: list[str] | None = None, identical: bool = False
) -> None:
    """As ``check_pairs``, for rows in memory; ``places`` says where each stands, by default ``row N`` from 0."""
    tokenized = "chosen_ids" in rows[0]
    responses = ("chosen_ids", "rejected_ids") if tokenized else ("chosen", "rejected")
    names = (*(("prompt_ids",) if tokenized else ("prompt",) if "prompt" in rows[0] else ()), *responses)
    for index, row in enumerate(rows):
        where = f"{label}, {places[index] if places is not None else f'row {index}'}"
        for name in names:
            check_value(row.get(name), f"{where}: {name!r}", tokenized)
        if row[responses[0]] == row[responses[1]] and not identical:
            hint = "Remove such rows, or have them dropped and counted: drop_identical=True."
            if tokenized:  # differing messages can give the same tokens
                hint += " Where they call tools, look whether the chat template shows the calls."
            raise BadInputError(f"{where}: chosen and rejected are identical.", hint)
        kinds = [isinstance(row[name], str) for name in names]
        if len(set(kinds)) > 1 and kinds != [True, False, False]:  # a text prompt may stand beside messages
            raise BadInputError(f"{where}: prompt, chosen and rejected must all be text, or all be messages.")


def check_value(value: Any, where: str, tokenized: bool = False) -> None:
    """Refuses a prompt or a response that is neither text nor messages (or, where ``tokenized``, token ids), or empty.

    Raises:
        BadInputError: it begins with ``where``.
    """
    if tokenized:
        if not isinstance(value, (list, tuple)) or not value:
            raise BadInputError(f"{where} must be a non-empty list of token ids.")
        return
    if isinstance(value, str):
        if not value:
            raise BadInputError(f"{where} must be non-empty text.", "Remove or mend that row.")
        return
    if isinstance(value, list):
        if not value:
            raise BadInputError(f"{where} has no messages.", "Remove or mend that row.")
        for message in value:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise BadInputError(f"{where}: every message needs a role.")
            if not isinstance(message.get("content", ""), (str, list, type(None))):
                raise BadInputError(f"{where}: a message's content must be text, or a list of parts.")
            if message.get("content") is None and not message.get("tool_calls"):
                raise BadInputError(f"{where}: every message needs a content, or tool calls.")
        if not says_something(value[-1]):
            raise BadInputError(f"{where}: the last message is empty.", "Remove or mend that row.")
        return
    raise BadInputError(f"{where} must be non-empty text, or a list of messages.", "Remove or mend that row.")

"""Prompts of a user's file."""

from __future__ import annotations

import json
from pathlib import Path

from ...core.errors import BadInputError
from ...core.settings import read_text


def read_prompts(file: str, key: str = "prompt") -> list[str]:
    """Prompts of a file: one a line, or JSONL objects with a ``prompt``.

    Args:
        key: what holds it, where it is no prompt.

    Raises:
        BadInputError: no such file, one that is no UTF-8, a line of JSONL without a prompt, or fewer than two prompts.
    """
    path, prompts = Path(file), []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            try:
                line = json.loads(line)[key]
            except (ValueError, KeyError, TypeError) as error:
                raise BadInputError(f"{file}, line {number}: no object with a text {key!r}.") from error
            if not isinstance(line, str) or not line.strip():
                raise BadInputError(f"{file}, line {number}: no object with a text {key!r}.")
        prompts.append(line)
    if len(prompts) < 2:
        raise BadInputError(f"{file} holds {len(prompts)} {key}s; two are needed at least.", "Give one a line.")
    return prompts

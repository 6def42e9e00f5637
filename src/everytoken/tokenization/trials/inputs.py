"""What the trials of this station share: the text that they work on, and the options of a request."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from ...core.errors import BadInputError
from ...core.settings import read_text
from ...core.vocabulary import utf8
from ...decoding.trial import TrialRequest

EXAMPLE = "Strawberry fields: how many r's are in strawberry? Tokenizers rarely know, and 1234 + 5678 is 6912."


def text_of(request: TrialRequest, example: str) -> str:
    """The user's text, or the example.

    Raises:
        BadInputError: an empty text, no such file, one that is no UTF-8, or a lone surrogate.
    """
    text = request.prompt if request.prompt is not None else example
    if request.data is not None:
        text = read_text(Path(request.data))
    if not text:
        raise BadInputError("The text is empty.", 'Give some: --prompt "Strawberry"')
    utf8(text)
    return text


def seed_of(request: TrialRequest) -> int:
    """The seed of the request; 0 if none was given."""
    return int(request.options.get("seed", 0))


class Sampling(TypedDict, total=False):
    """Arguments of ``generate``."""

    do_sample: bool
    temperature: float


def sampling_of(request: TrialRequest) -> Sampling:
    """``do_sample`` and, above temperature 0, ``temperature``."""
    temperature = float(request.options.get("temperature", 0.0))
    return {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}

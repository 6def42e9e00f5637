"""Decoders by name, for whatever names them in a request or on a command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..catalog.cards import find_card
from ..core.errors import BadInputError
from ..core.settings import parse_settings
from ..decoding.base import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def make_decoder(name: str, settings: dict[str, Any]) -> Decoder:
    """A decoder of this package by its name, with settings.

    Raises:
        UnknownNameError: no method is called so.
        BadInputError: it is no decoder, or a setting is wrong.
    """
    card = find_card(name)
    kind = card.load() if card.implementation else None
    if not (isinstance(kind, type) and issubclass(kind, Decoder)):
        raise BadInputError(f"{card.slug} is no decoder.", "everytoken papers --status implemented lists what is.")
    given = parse_settings(card.slug, kind, [f"{key}={value}" for key, value in settings.items()])
    return kind(**given)


def ready(decoder: Decoder, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Decoder:
    """The decoder with all that it needs of a model before it writes.

    Raises:
        BadInputError: a model that it cannot work with.
    """
    decoder.check_model(model.config)
    decoder.load_helpers(model)
    return decoder.prepare(tokenizer, int(model.config.get_text_config().vocab_size))

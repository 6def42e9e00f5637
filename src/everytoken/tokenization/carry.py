"""What of a model and its tokenizer names tokens, besides the embeddings: configurations and the chat template.

Token ids stand in a model's configuration and generation configuration: stop tokens, suppressed and forced ones, words
that must not be written. Under another tokenizer the same numbers mean other tokens. ``MovedIds`` says what they
become.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from ..core.errors import BadInputError
from .base import own_ids, token_bytes
from .byte_view import ByteView

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

Value: TypeAlias = "int | list[int] | list[list[int]] | list[list[list[int]]] | dict[tuple[int, ...], float] | None"
"""What a field of a configuration may hold."""
ROLES = (
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "unk_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
)
"""In the order in which they are matched: a token with several roles is the first."""
MODEL_ROLES = ROLES[:3]
"""Roles that a configuration gets from the new tokenizer even if it had none."""


class MovedIds:
    """Token ids of one tokenizer as those of another.

    Args:
        old, new: the tokenizers.
    """

    def __init__(self, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase):
        self.new = new
        self._bytes, self._theirs = token_bytes(old), token_bytes(new)
        self._own = own_ids(new)
        self._names = {index: name for name, index in old.get_vocab().items()}
        self._vocabulary: dict[str, int] = new.get_vocab()
        self._roles: dict[int, int] = {}
        for role in ROLES:
            ours, theirs = getattr(old, role, None), getattr(new, role, None)
            if ours is not None and theirs is not None:
                self._roles.setdefault(ours, theirs)

    def one(self, token: int) -> int | None:
        """The new id of a token: by role, by name, by its bytes; None if there is none."""
        if token in self._roles:
            return self._roles[token]
        data = self._spelling(token)
        index = self._vocabulary.get(self._names.get(token, ""), -1)
        if 0 <= index < len(self._theirs) and self._theirs[index] == data:
            return index
        return self._own.get(data) if data else None

    def several(self, tokens: Sequence[int]) -> list[int] | None:
        """A sequence of tokens in new ones: each by itself, or else their text as the new tokenizer cuts it.

        None if it holds a special token that the new tokenizer lacks, which can never be written.

        Raises:
            BadInputError: the text cannot be written with the new tokenizer.
        """
        single = [self.one(token) for token in tokens]
        if None not in single:
            return [token for token in single if token is not None]
        spelt = [self._spelling(token) for token in tokens]
        if None in spelt:
            return None
        data = b"".join(item or b"" for item in spelt)
        view = ByteView.of(self.new, lossless=False)
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            ids = None
        else:
            ids = view.encode(data) or (view.encode(view.lead + data) if not data.startswith(view.lead) else None)
        if ids is None:
            raise BadInputError(f"The new tokenizer cannot write {data.decode('utf-8', 'replace')!r}.")
        return ids[1:] if view.lead and len(ids) > 1 and view.bytes[ids[0]] == view.lead != data[:1] else ids

    def _spelling(self, token: int) -> bytes | None:
        return self._bytes[token] if 0 <= token < len(self._bytes) else None

    # -- fields of configurations --------------------------------------------------------------------------------------
    def changes(self, config: PreTrainedConfig | GenerationConfig) -> dict[str, Value]:
        """New values of all fields of a configuration that hold token ids.

        Roles are the new tokenizer's. Stop tokens beside EOS and suppressed special tokens that the new tokenizer lacks
        are dropped: they can never be written.

        Raises:
            BadInputError: a field holds a token that the new tokenizer has nothing for.
        """
        found: dict[str, Value] = {}
        for role in MODEL_ROLES:
            if hasattr(config, role) or getattr(self.new, role, None) is not None:
                found[role] = getattr(self.new, role, None)
        for name, value in vars(config).items():
            if value is None or name.startswith("_"):
                continue
            try:
                if name == "eos_token_id":
                    found[name] = self._stops(_as_list(value))
                elif name in ROLES:
                    found[name] = getattr(self.new, name, None)
                elif name in ("suppress_tokens", "begin_suppress_tokens"):
                    found[name] = self._suppressed(value)
                elif name == "bad_words_ids":
                    found[name] = self._words(value)
                elif name == "force_words_ids":
                    nested = [item if isinstance(item[0], list) else [item] for item in value]
                    found[name] = [self._forced_words(item) for item in nested]
                elif name == "sequence_bias":
                    pairs = value.items() if isinstance(value, dict) else value
                    moved = [(self.several(tokens), bias) for tokens, bias in pairs]
                    found[name] = {tuple(tokens): bias for tokens, bias in moved if tokens}
                elif name == "forced_decoder_ids":
                    found[name] = [[place, self._must(token)] for place, token in value]
                elif name.endswith(("_token_id", "_token_index", "_token_ids")):
                    found[name] = [self._must(item) for item in value] if isinstance(value, list) else self._must(value)
            except BadInputError as error:
                raise BadInputError(
                    f"{type(config).__name__}.{name} cannot be carried to the new tokenizer: {error.message}",
                    f"Set it to None on the model before, if it is not needed: its value is {value}.",
                ) from error
        return found

    def _must(self, token: int) -> int:
        moved = self.one(token)
        if moved is None:
            raise BadInputError(f"There is no token like {self._name(token)}.")
        return moved

    def _stops(self, tokens: Sequence[int]) -> int | list[int] | None:
        own = self.new.eos_token_id
        moved = [self.one(token) for token in tokens]
        stops = [token for token in dict.fromkeys([own, *moved]) if token is not None]
        return stops[0] if len(stops) == 1 else stops or None

    def _suppressed(self, tokens: Iterable[int]) -> list[int]:
        moved = {token: self.one(token) for token in tokens}
        for token, new in moved.items():
            if new is None and self._spelling(token) is not None:
                raise BadInputError(f"There is no token like {self._name(token)}.")
        return [new for new in moved.values() if new is not None]

    def _words(self, words: Iterable[Sequence[int]]) -> list[list[int]]:
        return [moved for word in words if (moved := self.several(word))]

    def _forced_words(self, words: Sequence[Sequence[int]]) -> list[list[int]]:
        moved = self._words(words)
        if len(moved) < len(words):
            raise BadInputError("A forced word holds a special token that the new tokenizer lacks.")
        return moved

    def _name(self, token: int) -> str:
        return repr(self._names.get(token, f"number {token}"))


def _as_list(value: int | list[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def with_chat_template(
    old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase
) -> tuple[PreTrainedTokenizerBase, str | None]:
    """The new tokenizer with the old one's chat template, where it has none and can write what the template holds.

    Returns:
        The tokenizer (a copy if it changed), and a sentence on the template; None if there is nothing to say.
    """
    template = getattr(old, "chat_template", None)
    if not template or getattr(new, "chat_template", None):
        return new, None
    text = template if isinstance(template, str) else "\n".join(template.values())
    table, known = token_bytes(old), new.get_vocab()
    special = [name for name, index in old.get_added_vocab().items() if table[index] is None and name in text]
    missing = [name for name in special if name not in known]
    if missing:
        return new, f"The chat template was left out: the new tokenizer has no {', '.join(sorted(missing))}."
    changed = copy.deepcopy(new)
    changed.chat_template = template
    return changed, "The chat template came along."

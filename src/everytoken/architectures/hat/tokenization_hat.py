"""Bytes with the ends of words: what HAT reads in place of tokens."""

from __future__ import annotations

from typing import Any

from transformers import AddedToken
from transformers.tokenization_python import PreTrainedTokenizer

from .configuration_hat import PADDING, TEXT_END, WORD_END
from .splitter import split


class HATTokenizer(PreTrainedTokenizer):
    """Text -> ``[W] bytes [W] bytes [W] bytes``: the end of a word stands behind every word but the last, which may go
    on, and one stands at the start, for the empty word before the text.

    Args:
        max_word_bytes: longer words are cut.
        close: end the last word too, for texts that are complete.
        kwargs: of ``PreTrainedTokenizer``.
    """

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, max_word_bytes: int = 100, close: bool = False, **kwargs: Any):
        self.max_word_bytes, self.close = max_word_bytes, close
        special = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "bos_token": "<|word|>"}
        places = {"pad_token": PADDING, "eos_token": TEXT_END, "bos_token": WORD_END}
        for name in special:
            kwargs.pop(name, None)
        self._added_tokens_decoder = {places[k]: AddedToken(text, special=True) for k, text in special.items()}
        super().__init__(max_word_bytes=max_word_bytes, close=close, **special, **kwargs)

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {self._convert_id_to_token(index): index for index in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        words = split(text, self.max_word_bytes)
        end = chr(WORD_END)
        pieces = [word.decode("latin-1") if isinstance(word, bytes) else word for word in words]
        return list(end.join(pieces) + (end if self.close and pieces else ""))

    def _convert_token_to_id(self, token: str) -> int | None:
        return ord(token) if len(token) == 1 else None

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [WORD_END, *token_ids_0, *(token_ids_1 or [])]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The bytes as text; the ends of words are no text, and bytes that are no UTF-8 become the replacement sign."""
        ends = {chr(WORD_END), chr(PADDING), chr(TEXT_END), *self.added_tokens_encoder}
        return bytes(ord(token) for token in tokens if token not in ends).decode("utf-8", "replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """There is no vocabulary to save."""
        return ()

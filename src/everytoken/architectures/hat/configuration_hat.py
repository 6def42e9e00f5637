"""The shape of a HAT: three Llamas, of which two read bytes and one reads words."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from ...core.errors import BadInputError

WORD_END, PADDING, TEXT_END = 0xC0, 0xC1, 0xF5
"""Symbols that are no bytes of UTF-8: the end of a word ([W]), padding, and the end of a text."""
SYMBOLS = 256


class HATConfig(PreTrainedConfig):
    """Three nested Llamas and the longest word.

    Args:
        encoder_config, decoder_config: of the byte-level parts; dicts of ``LlamaConfig`` or None for small ones.
        backbone_config: of the causal network over words; its ``max_position_embeddings`` is the context in words.
        max_word_bytes: longer words are cut by the tokenizer, and ended in generation.

    Raises:
        BadInputError: no room for a byte, or a part that knows fewer symbols than bytes.
    """

    model_type = "hat"
    sub_configs = {"encoder_config": LlamaConfig, "backbone_config": LlamaConfig, "decoder_config": LlamaConfig}

    encoder_config: Any = None
    backbone_config: Any = None
    decoder_config: Any = None
    max_word_bytes: int = 100
    vocab_size: int = SYMBOLS
    pad_token_id: int | None = PADDING
    bos_token_id: int | None = WORD_END
    eos_token_id: int | list[int] | None = TEXT_END
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        small = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        large = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6}
        for name, default in (("encoder_config", small), ("backbone_config", large), ("decoder_config", small)):
            given = getattr(self, name)
            if given is None or isinstance(given, dict):
                settings = {**(default if given is None else given), "vocab_size": SYMBOLS}
                settings |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
                given = LlamaConfig(**settings)
            setattr(self, name, given)
        if self.max_word_bytes < 1:
            raise BadInputError(f"A word has one byte at least; got max_word_bytes={self.max_word_bytes}.")
        if self.vocab_size != SYMBOLS:
            raise BadInputError(f"HAT reads {SYMBOLS} byte values and has no other vocabulary; got {self.vocab_size}.")
        for part in (self.encoder_config, self.decoder_config):
            if part.max_position_embeddings <= self.max_word_bytes:
                raise BadInputError(
                    f"A byte-level part has {part.max_position_embeddings} places for words of {self.max_word_bytes}.",
                    "Raise its max_position_embeddings above max_word_bytes.",
                )
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """The backbone's width."""
        return int(self.backbone_config.hidden_size)

    @property
    def num_hidden_layers(self) -> int:
        """The backbone's layers."""
        return int(self.backbone_config.num_hidden_layers)

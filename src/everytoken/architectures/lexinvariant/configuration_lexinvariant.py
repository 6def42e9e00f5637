"""The shape of a lexinvariant language model: a decoder of transformers, and how its symbols get their vectors."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ...core.errors import BadInputError

KINDS = ("sequences", "symbols")


class LexinvariantConfig(PreTrainedConfig):
    """A decoder around vectors that are drawn anew for every sequence.

    Args:
        decoder_config: of any decoder of transformers that reads ``inputs_embeds``, a dict or None for a small Llama.
        vocab_size: V, how many symbols; no weight depends on it where ``random_share`` is 1.
        random_share: q: 1 is the method, 0 an ordinary tied model, between them random vectors regularise a learned
            table.
        random_kind: what a share of q is taken of: ``"sequences"``, or ``"symbols"`` of each sequence.
        learned_symbols: so many first ids keep learned vectors (padding, starts and ends of texts); the model is
            invariant over the others.
        orthogonal: rows that are orthonormal, not only nearly; V is at most the decoder's width then.
        probe_symbols: classes of a linear probe that tells from a symbol's state which symbol it is; 0 has none.
        largest_table: numbers that the tables of one batch may have together.

    Raises:
        BadInputError: settings that contradict each other.
    """

    model_type = "lexinvariant"
    sub_configs = {"decoder_config": AutoConfig}

    decoder_config: Any = None
    vocab_size: int = 27
    random_share: float = 1.0
    random_kind: str = "sequences"
    learned_symbols: int = 0
    orthogonal: bool = False
    probe_symbols: int = 0
    largest_table: int = 2**28
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.decoder_config
        if given is None or isinstance(given, dict):
            small = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6}
            settings = dict(small if given is None else given)
            kind = CONFIG_MAPPING[settings.pop("model_type", "llama")]
            settings |= {"vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
            self.decoder_config = kind(**settings)
        if not 0 <= self.random_share <= 1 or self.random_kind not in KINDS:
            raise BadInputError(
                f"random_share is a share of {' or '.join(KINDS)}; got {self.random_share} of {self.random_kind!r}."
            )
        if self.vocab_size < 2 or not 0 <= self.learned_symbols < self.vocab_size or self.probe_symbols < 0:
            raise BadInputError("There are two symbols at least, and one of them has no learned vector.")
        if self.orthogonal and self.vocab_size > self.hidden_size:
            raise BadInputError(
                f"{self.vocab_size} symbols cannot be orthogonal in {self.hidden_size} dimensions.",
                "Leave orthogonal out, or widen the decoder.",
            )
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """The decoder's width."""
        return int(self.decoder_config.hidden_size)

    @property
    def num_hidden_layers(self) -> int:
        """The decoder's layers."""
        return int(self.decoder_config.num_hidden_layers)

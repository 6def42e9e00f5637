"""Supertokens: a BPE tokenizer whose tokens may span several words (arXiv 2505.09738).

BPE never merges across the spaces that its pre-tokenizer cuts at, however frequent "of the" is. Here the training text
is cut into chunks of a random number of words, so that merges across spaces are learned where they are frequent and
never depend on one place of the cut::

    word    = optional space + letters
    run     = words with one space between them        (digits, punctuation and line ends are hard boundaries)
    chunks  = the run, cut after n_1, n_2, ... words,  P(n = k) = chunk_sizes[k - 1]
    merges  = BPE on the chunks

In use a text is cut into runs only, and the learned merges decide which words a token joins. The paper does not give
the distribution of chunk sizes; the default here is this project's choice. ``chunk_sizes=(1,)`` gives plain BPE.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import BadInputError
from ..core.trace import TokenTrace
from .base import token_bytes, utf8

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

WORD = r"\p{L}[\p{L}\p{M}]*(?:['’]\p{L}[\p{L}\p{M}]*)*"
RUNS = rf" ?{WORD}(?: {WORD})*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How text is cut in use, for ``tokenizers``: runs of words, single digits, punctuation, line ends, other spaces."""
_SPACE = re.compile(r"(?<=\S) ")


@dataclass
class SupertokenTrainer:
    """Trains a tokenizer with tokens that span words.

    ::

        tokenizer = SupertokenTrainer(vocab_size=16_000).train(texts)
        tokenizer.save_pretrained("supertokens")                       # AutoTokenizer loads it

    Args:
        vocab_size: tokens in all, the 256 bytes and the special tokens included.
        chunk_sizes: probabilities that a chunk has 1, 2, 3... words; normalised.
        min_frequency: least count of a merge.
        special_tokens: the first is BOS and EOS (and is what padding uses).
        seed: for the cuts.
        progress: show the trainer's bar.

    Raises:
        BadInputError: a setting out of its range.
    """

    vocab_size: int = 16_000
    chunk_sizes: Sequence[float] = (0.4, 0.3, 0.2, 0.1)
    min_frequency: int = 2
    special_tokens: Sequence[str] = ("<|endoftext|>",)
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        least = 256 + len(self.special_tokens)
        if self.vocab_size < least:
            raise BadInputError(f"vocab_size is at least {least} (bytes and special tokens); got {self.vocab_size}.")
        if not self.chunk_sizes or min(self.chunk_sizes) < 0 or not sum(self.chunk_sizes) > 0:
            raise BadInputError(f"chunk_sizes are probabilities, for example (0.5, 0.5); got {self.chunk_sizes}.")
        if self.min_frequency < 1:
            raise BadInputError(f"min_frequency is at least 1; got {self.min_frequency}.")

    def _sizes(self) -> Iterator[int]:
        """Words of one chunk after the other, without end."""
        rng = np.random.default_rng(self.seed)
        shares = np.array(self.chunk_sizes, np.float64) / sum(self.chunk_sizes)
        while True:
            yield from reversed((rng.choice(len(shares), 4096, p=shares) + 1).tolist())

    def chunks(self, texts: Iterable[str]) -> Iterator[str]:
        """The training text in chunks; joined they are the text again."""
        from tokenizers import Regex, pre_tokenizers

        cut = pre_tokenizers.Split(Regex(RUNS), "isolated")
        sizes = self._sizes()
        for text in texts:
            utf8(text)  # a lone surrogate is refused by name
            for run, _ in cut.pre_tokenize_str(text):
                places = [match.start() for match in _SPACE.finditer(run)] if run.strip() else []
                first, words, size = 0, 0, next(sizes)
                for place in places:
                    words += 1
                    if words == size:
                        yield run[first:place]
                        first, words, size = place, 0, next(sizes)
                yield run[first:]

    def train(self, texts: Iterable[str]) -> PreTrainedTokenizerFast:
        """A lossless byte-level PreTrainedTokenizerFast.

        Raises:
            BadInputError: one string in place of several texts, or no text at all.
        """
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        if isinstance(texts, str):
            raise BadInputError("train takes several texts.", "Put the one in a list: train([text]).")
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            min_frequency=self.min_frequency,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=list(self.special_tokens),
            show_progress=self.progress,
        )
        seen = False

        def counted() -> Iterator[str]:
            nonlocal seen
            for chunk in self.chunks(texts):
                seen = True
                yield chunk

        backend.train_from_iterator(counted(), trainer)
        if not seen:
            raise BadInputError("There is no text to train on.", "Give an iterable of strings that are not empty.")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(RUNS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        roles = {}
        if self.special_tokens:
            roles = dict.fromkeys(("bos_token", "eos_token", "pad_token"), self.special_tokens[0])
        return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles)


def words_in(token: bytes | None) -> int:
    """Words that a token touches: spaces between other characters, plus one."""
    if not token or not token.strip():
        return 0
    return token.strip().count(b" ") + 1


def trace(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenTrace:
    """A text's tokens with the number of words that each touches."""
    utf8(text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    table = token_bytes(tokenizer)
    found = TokenTrace(ids, title="supertokens", station="tokenization")
    return found.add("words", [words_in(table[item]) for item in ids]).with_text(tokenizer)

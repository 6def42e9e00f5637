"""The digits that Token-Shuffle draws: their codes, and the texts that ask for them ("seven, thick").

An image of 8 x 8 pixels has 17 grey levels: each pixel is a token of itself (``levels``). A tokenizer with a codebook
makes other codes (``digits-vq``). A digit is thin, medium or thick by its ink: each third of the images of a digit has
one of these words.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import torch
from transformers import PreTrainedTokenizerFast

from ...core.errors import BadInputError, TokenizerMismatchError
from ...core.rng import numpy_generator
from ..images.data import CLASSES, SIDE, check_labels, digit_images, digit_split

if TYPE_CHECKING:
    from .configuration_token_shuffle import TokenShuffleConfig

PAD, BOI, EOI, UNKNOWN = "<pad>", "<boi>", "<eoi>", "<unk>"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STROKES = ("thin", "medium", "thick")
TEXT = (PAD, BOI, EOI, UNKNOWN, *WORDS, *STROKES)
"""The text tokens by id; image tokens follow."""
LEVELS = 17
FIRST_WORD, FIRST_STROKE = TEXT.index("zero"), TEXT.index("thin")


# -- codes -------------------------------------------------------------------------------------------------------------
class ImageCodes(Protocol):
    """Codes of images.

    Attributes:
        name: as for ``image_codes``.
        identity: says which codes they are; those of another identity mean something else.
        count: how many there are.
        grid: rows and columns of an image.
        blank: the code of a black place.
    """

    name: str
    identity: str
    count: int
    grid: tuple[int, int]
    blank: int

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images ``[B, 1, height, width]`` from -1 to 1 -> codes ``[B, rows, columns]``."""
        ...

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The inverse, as far as there is one."""
        ...


class LevelCodes:
    """A token for each pixel: its grey level, 0 (black) to 16 (white). Nothing is lost."""

    name, identity, count, grid, blank = "levels", "levels-17", LEVELS, (SIDE, SIDE), 0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return ((images[:, 0] + 1) * (LEVELS - 1) / 2).round().long().clamp(0, LEVELS - 1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return (codes.float() * 2 / (LEVELS - 1) - 1)[:, None]


class LearnedCodes:
    """The codes of a tokenizer with a codebook.

    Args:
        name: of the tokenizer, as for ``images.tokenizers.load_image_tokenizer``.

    Raises:
        BadInputError: a tokenizer without a codebook.
    """

    def __init__(self, name: str):
        from ..images.tokenizers import VQImageTokenizer, load_image_tokenizer

        found = load_image_tokenizer(name)
        if not isinstance(found, VQImageTokenizer):
            raise BadInputError(f"{name} has no codebook.", "Take digits-vq.")
        self.tokenizer, self.name, self.identity = found, name, found.identity
        self.count, self.grid = found.config.codes, found.config.grid
        side = found.config.image_size
        self.blank = int(found.encode(-torch.ones(1, 1, side, side)).mode().values.mode().values)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.encode(images)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.decode(codes.cpu())


@lru_cache(maxsize=4)
def image_codes(name: str) -> ImageCodes:
    """The codes of a name: ``levels``, or a tokenizer's (``digits-vq``, or a folder).

    Raises:
        UnknownNameError: no such tokenizer.
        BadInputError: a tokenizer without a codebook.
    """
    return LevelCodes() if name == LevelCodes.name else LearnedCodes(name)


def codes_of(config: TokenShuffleConfig) -> ImageCodes:
    """The codes that a network draws.

    Raises:
        BadInputError: the configuration does not say which.
        TokenizerMismatchError: their tokenizer is another one now.
    """
    if not config.image_codes:
        raise BadInputError("This network does not say what its image tokens stand for.", "Set config.image_codes.")
    found = image_codes(config.image_codes)
    if found.identity != config.image_codes_identity:
        raise TokenizerMismatchError(
            f"This network draws codes of the image tokenizer {config.image_codes_identity}; {config.image_codes} is "
            f"{found.identity}.",
            "Take the tokenizer that it was trained with, or train it anew.",
        )
    return found


# -- texts -------------------------------------------------------------------------------------------------------------
def text_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; commas and spaces between words do not count."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    core = Tokenizer(models.WordLevel({token: number for number, token in enumerate(TEXT)}, unk_token=UNKNOWN))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[\s,.]+"), " ")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def text_ids(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask ``[B, T]`` of texts, padded on the left; an empty text is all padding.

    Raises:
        BadInputError: a word that the network does not know.
    """
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if any(item < FIRST_WORD for item in row):
            raise BadInputError(
                f"{text!r} has words that the network does not know.",
                f"It knows {', '.join(WORDS)}, and {', '.join(STROKES)}: 'seven, thick'.",
            )
    longest = max(map(len, rows), default=0)
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows], dtype=torch.long)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return ids.view(len(rows), longest), mask.view(len(rows), longest)


def words_for(labels: torch.Tensor, strokes: torch.Tensor | None = None) -> list[str]:
    """The texts that ask for digits ``[B]``, and perhaps for strokes ``[B]``.

    Raises:
        BadInputError: labels that are no digits, or strokes that are not 0 to 2.
    """
    check_labels(labels, CLASSES)
    if strokes is None:
        return [WORDS[label] for label in labels.tolist()]
    check_labels(strokes, len(STROKES))
    pairs = zip(labels.tolist(), strokes.tolist(), strict=True)
    return [f"{WORDS[label]}, {STROKES[stroke]}" for label, stroke in pairs]


@lru_cache(maxsize=1)
def _ink_edges() -> torch.Tensor:
    """``[10, 2]``: the ink at which a digit is no longer thin, and is thick; from the digits to learn from."""
    images, labels = digit_images()
    known = digit_split()[0]
    images, labels = images[known], labels[known]
    thirds = torch.tensor([1 / 3, 2 / 3])
    return torch.stack([ink(images[labels == label]).quantile(thirds) for label in range(CLASSES)])


def ink(images: torch.Tensor) -> torch.Tensor:
    """Mean brightness from 0 to 1 of images ``[B, 1, height, width]``: ``[B]``."""
    return (images.flatten(1).float().mean(1) + 1) / 2


def strokes_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """0 (thin), 1 or 2 (thick) for images ``[B, 1, height, width]`` of digits ``[B]``: ``[B]``."""
    return (ink(images)[:, None] >= _ink_edges()[labels]).sum(1)


# -- rows --------------------------------------------------------------------------------------------------------------
def image_rows(
    codes: torch.Tensor, labels: torch.Tensor, strokes: torch.Tensor, words: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Rows of text and image: ids, mask and labels ``[B, 2 + 1 + H W + 1]``, padded on the left.

    Args:
        codes: ``[B, H, W]``.
        labels, strokes: ``[B]``.
        words: ``[B]`` how many words the text has: 0, 1 (the digit) or 2.
    """
    count = len(codes)
    one = torch.full((count, 1), TEXT.index(BOI))
    end = torch.full((count, 1), TEXT.index(EOI))
    digit, stroke = labels + FIRST_WORD, strokes + FIRST_STROKE
    nothing = torch.zeros_like(digit)  # padding
    first = torch.where(words == 2, digit, nothing)
    second = torch.where(words == 2, stroke, torch.where(words == 1, digit, nothing))
    ids = torch.cat([first[:, None], second[:, None], one, codes.flatten(1) + len(TEXT), end], 1)
    mask = ids != TEXT.index(PAD)
    wanted = ids.masked_fill(~mask, -100)
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0))
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": wanted.masked_fill(~before, -100)}


def learned_rows(
    codes: ImageCodes, count: int, seed: int, step: int, digit_only: float = 0.2, empty: float = 0.1
) -> dict[str, torch.Tensor]:
    """A batch to learn from, drawn for one step of a run; texts lose words now and then.

    Args:
        digit_only: share of texts that name the digit alone.
        empty: share of rows without a text, for guidance.
    """
    images, labels = digit_images()
    known = digit_split()[0]
    rng = numpy_generator(seed, "token-shuffle", step)
    rows = known[torch.from_numpy(rng.integers(0, len(known), count))]
    drawn = torch.from_numpy(rng.random(count))
    words = 2 - (drawn < digit_only + empty).long() - (drawn < empty).long()
    return image_rows(_all_codes(codes.name)[rows], labels[rows], strokes_of(images[rows], labels[rows]), words)


def held_rows(codes: ImageCodes, count: int | None = None) -> dict[str, torch.Tensor]:
    """Held-out images with their whole texts; None takes all."""
    images, labels = digit_images()
    rows = digit_split()[1][:count]
    strokes = strokes_of(images[rows], labels[rows])
    return image_rows(_all_codes(codes.name)[rows], labels[rows], strokes, torch.full((len(rows),), 2))


@lru_cache(maxsize=4)
def _all_codes(name: str) -> torch.Tensor:
    """The codes ``[1797, rows, columns]`` of all digits."""
    return torch.cat([image_codes(name).encode(part).cpu() for part in digit_images()[0].split(256)])

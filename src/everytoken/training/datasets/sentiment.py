"""Controlled sentiment: preference pairs from a model's own continuations, ranked by VADER's lexicon.

The classic small test bed of preference optimisation (a language model should continue openings positively), with
everything inside packages: openings are made here, the model samples the continuations, and VADER (arXiv-free: Hutto
and Gilbert, 2014) scores them between -1 and 1.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import BadInputError, require
from ...core.progress import Report, silent
from .base import DataKind, MadeRows, load_seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUBJECTS = [
    "The film",
    "The hotel",
    "The restaurant",
    "The new phone",
    "My weekend",
    "The concert",
    "The novel",
    "The train ride",
    "The museum",
    "Our teacher",
    "The service",
    "The city",
    "My first day at work",
    "The food",
    "The game",
    "The garden",
    "The lecture",
    "The weather",
    "The old house",
    "The play",
]
OPENINGS = [
    "{} was",
    "{} turned out to be",
    "Everyone said that {}",
    "In the end, {}",
    "I never thought that {}",
    "Looking back, {}",
]


def openings(split: str = "train") -> list[str]:
    """Openings such as ``The hotel turned out to be``; ``train`` and ``test`` share no subject.

    Raises:
        BadInputError: another split.
    """
    if split not in ("train", "test"):
        raise BadInputError(f"There is no split {split!r}.", "Use train or test.")
    subjects = SUBJECTS[:14] if split == "train" else SUBJECTS[14:]

    def fill(template: str, subject: str) -> str:
        middle = subject if template.startswith("{}") else subject[0].lower() + subject[1:]
        return template.format(middle)

    return [fill(template, subject) for subject, template in itertools.product(subjects, OPENINGS)]


def positivity(texts: list[str]) -> list[float]:
    """VADER's compound score of each text, from -1 to 1.

    Raises:
        MissingExtraError: vaderSentiment is not installed.
    """
    require("vaderSentiment", "train", "Scoring sentiment")
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    return [analyser.polarity_scores(text)["compound"] for text in texts]


def continuation_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int = 20,
    batch: int = 64,
    sample: bool = True,
) -> list[list[int]]:
    """The new token ids of one continuation for every prompt, in order: sampled (temperature 1) or greedy; padded
    behind an end token.
    """
    import torch

    choice: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    rows: list[list[int]] = []
    for first in range(0, len(prompts), batch):
        encoded = tokenizer(prompts[first : first + batch], return_tensors="pt", padding=True, padding_side="left").to(
            model.device
        )
        with torch.no_grad():
            output = model.generate(**encoded, max_new_tokens=max_new_tokens, **choice)
        rows += output[:, encoded["input_ids"].shape[1] :].tolist()
    return rows


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int = 20,
    batch: int = 64,
    sample: bool = True,
) -> list[str]:
    """``continuation_ids`` as texts."""
    return tokenizer.batch_decode(
        continuation_ids(model, tokenizer, prompts, max_new_tokens, batch, sample), skip_special_tokens=True
    )


def sentiment_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    margin: float = 0.2,
    max_new_tokens: int = 20,
    prompts: list[str] | None = None,
    report: Report = silent,
) -> list[dict[str, str]]:
    """``count`` preference rows (``prompt``, ``chosen``, ``rejected``) from the model's own continuations.

    Two continuations of an opening make a pair if their scores differ by ``margin`` at least. Uses torch's global
    generator: seed it first.

    Args:
        prompts: openings; default the package's own, for training.
        report: called with ``(stage, pairs so far, count)``.

    Raises:
        BadInputError: after many rounds too few pairs differ by ``margin``.
    """
    import torch

    rows: list[dict[str, str]] = []
    pool = prompts or openings("train")
    rounds = 0
    while len(rows) < count:
        rounds += 1
        if rounds > 40 + count // 8:
            raise BadInputError(
                f"After {rounds} rounds only {len(rows)} of {count} pairs differ by {margin}.", "Lower margin."
            )
        order = torch.randperm(len(pool)).tolist()[:64]
        picked = [pool[index] for index in order]
        texts = continuations(model, tokenizer, picked * 2, max_new_tokens, batch=128)
        scores = positivity([p + t for p, t in zip(picked * 2, texts, strict=True)])
        half = len(picked)
        for index, prompt in enumerate(picked):
            one, other = (texts[index], scores[index]), (texts[index + half], scores[index + half])
            better, worse = (one, other) if one[1] > other[1] else (other, one)
            if better[1] - worse[1] >= margin and better[0].strip() and worse[0].strip():
                rows.append({"prompt": prompt, "chosen": better[0], "rejected": worse[0]})
        report("sampling continuations", min(len(rows), count), count)
    return rows[:count]


@dataclass
class SentimentData:
    """Continuations of openings, the better of two by VADER's lexicon preferred.

    Args:
        count: pairs.
        seed: of sampling.
        margin: least difference of the two scores (of -1 to 1).
        max_new_tokens: of a continuation.
        prompts: a text file of openings, one a line; None for the package's own (84 for training).

    Raises:
        BadInputError: a count below 1.
    """

    count: int = 256
    seed: int = 0
    margin: float = 0.3
    max_new_tokens: int = 20
    prompts: str | None = None

    def __post_init__(self) -> None:
        for name in ("count", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} must be at least 1; got {getattr(self, name)}.")

    def own_openings(self) -> list[str] | None:
        """The lines of ``prompts``; None for the package's own.

        Raises:
            BadInputError: no such file, or nothing in it.
        """
        from ...core.settings import read_text

        if self.prompts is None:
            return None
        found = [line.strip() for line in read_text(Path(self.prompts)).splitlines() if line.strip()]
        if not found:
            raise BadInputError(f"{self.prompts} holds no prompts.", "One a line.")
        return found


def make_rows(settings: SentimentData, model: str | None, report: Report) -> MadeRows:
    """Samples, ranks and pairs."""
    require("vaderSentiment", "train", "Ranking by sentiment")
    loaded, tokenizer = load_seeded(model, settings.seed)
    rows = sentiment_pairs(
        loaded, tokenizer, settings.count, settings.margin, settings.max_new_tokens, settings.own_openings(), report
    )
    scores = {side: positivity([row["prompt"] + row[side] for row in rows]) for side in ("chosen", "rejected")}
    means = {f"mean score, {side}": sum(found) / len(found) for side, found in scores.items()}
    return MadeRows(rows, {"pairs": float(len(rows))} | means)


DATA_KIND = DataKind("sentiment", SentimentData, make_rows, SentimentData.own_openings)

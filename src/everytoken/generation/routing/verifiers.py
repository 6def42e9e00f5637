"""Verifiers of R2R's labels: do two continuations of one text differ in what they say?

``AnswerVerifier`` lets both continuations run to the end and compares what a function makes of them (for tasks that can
be checked); ``SimilarityVerifier`` compares sentence embeddings; ``JudgeVerifier`` asks a language model, as the paper
does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.scoring import turn_ids


@runtime_checkable
class Verifier(Protocol):
    """``(contexts, continuations with the small model's token, with the large one's) -> divergent?`` for N mismatches.

    ``to_the_end`` says whether the continuations should run to the answer's end instead of the sentence's.
    """

    to_the_end: ClassVar[bool]

    def __call__(self, contexts: list[str], small: list[str], large: list[str]) -> list[bool]: ...


@dataclass
class AnswerVerifier:
    """Divergent where the whole answer comes out different.

    Args:
        outcome: ``text -> anything comparable``, for example the number after "#".
    """

    outcome: Callable[[str], Any]
    to_the_end: ClassVar[bool] = True

    def __call__(self, contexts: list[str], small: list[str], large: list[str]) -> list[bool]:
        pairs = zip(contexts, small, large, strict=True)
        return [self.outcome(context + a) != self.outcome(context + b) for context, a, b in pairs]


@dataclass
class SimilarityVerifier:
    """Divergent where the embeddings of the two sentences have a cosine below ``threshold``; needs the ``search``
    extra."""

    threshold: float = 0.9
    to_the_end: ClassVar[bool] = False

    def __call__(self, contexts: list[str], small: list[str], large: list[str]) -> list[bool]:
        from ...core.embedding import embed

        sides = [
            [context[-80:] + text for context, text in zip(contexts, side, strict=True)] for side in (small, large)
        ]
        left, right = (torch.as_tensor(embed(side, "Comparing sentences")) for side in sides)
        return ((left * right).sum(-1) < self.threshold).tolist()


@dataclass
class JudgeVerifier:
    """Divergent where a language model says so, at temperature 0.

    Args:
        model, tokenizer: an instruction-tuned model; the stronger the better.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    question: str = (
        "Two continuations of one text follow. Do they differ in meaning, reasoning or conclusion? Answer Yes or No.\n"
        "Text: {context}\nA: {small}\nB: {large}"
    )
    to_the_end: ClassVar[bool] = False

    @torch.inference_mode()
    def __call__(self, contexts: list[str], small: list[str], large: list[str]) -> list[bool]:
        words = [self.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No")]
        answers = []
        for context, a, b in zip(contexts, small, large, strict=True):
            text = self.question.format(context=context[-600:], small=a, large=b)
            ids = turn_ids(self.tokenizer, text if self.tokenizer.chat_template else text + "\nAnswer:")
            logits = self.model(torch.tensor([ids], device=self.model.device), logits_to_keep=1).logits[0, -1]
            answers.append(bool(logits[words[0]] >= logits[words[1]]))
        return answers

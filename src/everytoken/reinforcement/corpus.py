"""Positions of texts as prompts: what stands before a token, the token, and how uncertain a model is of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import BadInputError
from ..core.logprobs import token_stats
from ..core.rng import derive_seed
from ..core.scoring import PromptResponse, output_head, response_hidden, score_rows
from ..training.datasets.arithmetic import messages_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CLASSES = 3
"""Easy, medium, hard."""


def position_entropies(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Entropy in nats of a model's prediction of every token but the first, ``[length - 1]`` a sequence."""
    weight, bias, rule = output_head(model)

    def score(ids: torch.Tensor, mask: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden = response_hidden(model, ids, mask, attention)
            stats = token_stats(hidden, weight, ids[mask], bias=bias, rule=rule, entropy=True)
        assert stats.entropy is not None
        return torch.zeros(ids.shape, device=ids.device).masked_scatter(mask, stats.entropy)

    return score_rows([PromptResponse(ids[:1], ids[1:]) for ids in sequences], score, device=model.device)


def next_token_rows(
    texts: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int = 256,
    positions: int = 32,
    thresholds: Sequence[float] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows for the prediction of single tokens.

    A position is left out where its token is special, or where the tokenizer does not read prefix and token as the
    text's own tokens: there no written prediction could be right.

    Args:
        texts: the corpus; of each the first ``context + 1`` tokens.
        model: whose entropies say how hard a position is.
        context: tokens of a prefix at most.
        positions: of a text at most, drawn by the seed.
        thresholds: two entropies in nats; None takes thirds of the positions.

    Returns:
        ``prompt`` (the prefix; messages where there is a chat template), ``target`` and ``target_text``, ``entropy``
        and ``difficulty`` (0 to 2), ``text``, ``position`` and ``sequence`` (the text's ids).

    Raises:
        BadInputError: no position is left.
    """
    sequences, numbers = [], []
    for number, text in enumerate(texts):
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])[: context + 1]
        if len(ids) > 1:
            sequences.append(ids)
            numbers.append(number)
    special = set(tokenizer.all_special_ids)
    entropies = position_entropies(model, sequences) if sequences else []
    rows = []
    for number, ids, values in zip(numbers, sequences, entropies, strict=True):
        places = list(range(1, len(ids)))
        random.Random(derive_seed(seed, "positions", number)).shuffle(places)
        kept = 0
        for at in places:
            if kept == positions:
                break
            prefix = tokenizer.decode(ids[:at])
            whole = tokenizer.decode(ids[: at + 1])
            exact = whole.startswith(prefix) and _reads(tokenizer, prefix, ids[:at])
            if ids[at] in special or not exact or not _reads(tokenizer, whole, ids[: at + 1]):
                continue
            kept += 1
            rows.append(
                {
                    "prompt": messages_of(prefix) if tokenizer.chat_template else prefix,
                    "target": ids[at],
                    "target_text": whole[len(prefix) :],
                    "entropy": float(values[at - 1]),
                    "text": number,
                    "position": at,
                    "sequence": ids,
                }
            )
    if not rows:
        raise BadInputError("No text has a token that could be predicted.", "Give texts of two tokens and more.")
    found = torch.tensor([row["entropy"] for row in rows]).double()
    bounds = found.quantile(torch.tensor([1 / 3, 2 / 3]).double()).tolist() if thresholds is None else list(thresholds)
    for row in rows:
        row["difficulty"] = sum(row["entropy"] > bound for bound in bounds)
    return rows


def _reads(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> bool:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) == ids

"""cDPO: critical tokens by contrastive estimation, and DPO weighted by them (arXiv 2411.19943).

In a wrong line of reasoning a few tokens decide the failure. Rolling out from every prefix finds them
(``RolloutOracle``); contrastive estimation finds them in two forwards, by comparing p+ (the base model tuned on its own
correct traces) with p- (tuned on incorrect ones), over the whole vocabulary::

    s_t = softmax( (1 + a) l+_t - a l-_t )[y_t]          in (0, 1); a low s_t marks a critical token

cDPO weights the rejected side of DPO by how critical each token is, ``w_t = 1 - s_t``; the chosen side keeps
``c_t = 1``, or takes ``s_t`` (``weight_chosen``)::

    u_t(y) = log pi(y_t|x,y_<t) - log ref(y_t|x,y_<t)
    z = sum_t c_t u_t(y_w) - sum_t w_t u_t(y_l)          loss = -log sigmoid(beta z)

The authors' code leaves the per-token difference unsummed, pairing token t of one response with token t of the other
inside the sigmoid; the paper's equation sums, and so does this. ``per_position=True`` is their code's form; its mean is
over a pair's response positions, and ``position_mean="grid"`` is their code's own, over every position of the padded
batch, where those outside both responses count log 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn import functional as F

from ..core.errors import BadInputError
from ..core.logprobs import masked_mean, tokens_per_chunk
from ..core.progress import Report, silent
from ..core.scoring import (
    PromptResponse,
    check_guide,
    end_tokens,
    model_fingerprint,
    output_head,
    response_hidden,
    score_rows,
)
from ..training.column_makers import ColumnMaker, ColumnSources, Example, TokenAnnotator
from .base import PairScores, PreferenceOutput, log_ratios, weighted_log_ratios

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Contrast:
    """Makes the column ``contrast``: finds p+ and p-, or tunes copies on the chosen and on the rejected responses.

    Args:
        positive, negative: hub ids or folders of p+ and p-; None tunes them first.
        contrast: a, how strongly p- is subtracted.
        guide_steps, tune_lr: optimiser steps and learning rate of that tuning.
        guide_lora_r: rank of its adapters; 0 tunes all weights.

    Raises:
        BadInputError: a value out of range.
    """

    positive: str | None = None
    negative: str | None = None
    contrast: float = 1.0
    guide_steps: int = 50
    tune_lr: float = 3e-4
    guide_lora_r: int = 8

    def __post_init__(self) -> None:
        if self.guide_steps < 1 or self.tune_lr <= 0 or self.guide_lora_r < 0:
            raise BadInputError("guide_steps and tune_lr must be positive, and guide_lora_r not negative.")

    def __call__(self, sources: ColumnSources) -> TokenAnnotator:
        from ..training.distributed import frozen, load_unplaced

        positive, negative = (
            self.tuned(sources, side) if path is None else frozen(load_unplaced(path))
            for side, path in (("chosen", self.positive), ("rejected", self.negative))
        )
        return ContrastiveEstimator(positive, negative, self.contrast)

    def tuned(self, sources: ColumnSources, side: str) -> Any:
        """A copy tuned on the responses of one side; prompts are read, not learnt."""
        from ..training.supervised import tune_copy

        rows = [
            {
                "input_ids": [*row["prompt_ids"], *row[f"{side}_ids"]],
                "labels": [-100] * len(row["prompt_ids"]) + list(row[f"{side}_ids"]),
            }
            for row in sources.rows.select_columns(["prompt_ids", f"{side}_ids"])
        ]
        return tune_copy(
            sources.load(),
            sources.tokenizer,
            rows,
            steps=sources.steps(self.guide_steps),
            lr=self.tune_lr,
            lora_r=self.guide_lora_r,
            batch_size=sources.batch_size,
            seed=sources.seed,
            bf16=sources.bf16,
            report=sources.report,
            stage=f"tuning on {side} responses",
        )


@dataclass
class CDPOLoss:
    """DPO whose rejected tokens count as much as they are critical.

    Args:
        beta: strength of the pull towards the reference (0.1).
        weight_chosen: also weight chosen tokens, by ``s_t`` (default: only the rejected side).
        label_smoothing: as in DPO, the probability that a pair is labelled the wrong way round.
        per_position: the form of the authors' code: one sigmoid a position, averaged.
        position_mean: of that average: ``"tokens"`` takes the positions of either response; ``"grid"`` all positions of
            the batch, prompt and padding too, as the authors' code does. The gradient then shrinks with the batch's
            longest row.

    Raises:
        BadInputError: a setting out of range.
    """

    beta: float = 0.1
    weight_chosen: bool = False
    label_smoothing: float = 0.0
    per_position: bool = False
    position_mean: str = "tokens"
    data_columns: ClassVar[Mapping[str, type[ColumnMaker]]] = {"contrast": Contrast}

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise BadInputError(f"beta must be positive; got {self.beta}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise BadInputError(f"label_smoothing lies in [0, 0.5); got {self.label_smoothing}.")
        if self.position_mean not in ("tokens", "grid"):
            raise BadInputError(f"Unknown position_mean {self.position_mean!r}.", "Use tokens or grid.")
        if self.position_mean == "grid" and not self.per_position:
            raise BadInputError("position_mean='grid' averages positions, which are summed.", "Set per_position=True.")

    def __call__(self, policy: PairScores, reference: PairScores) -> PreferenceOutput:
        """See the module's docstring; ``policy.chosen["contrast"]`` and ``policy.rejected["contrast"]`` are s,
        ``[B, T]``.
        """
        criticality = 1 - policy.rejected["contrast"].detach()
        kept = policy.chosen["contrast"].detach() if self.weight_chosen else torch.ones_like(policy.chosen_logps)
        if self.per_position:
            z = torch.where(policy.chosen_mask, kept * (policy.chosen_logps - reference.chosen_logps), 0.0)
            z = z - torch.where(
                policy.rejected_mask, criticality * (policy.rejected_logps - reference.rejected_logps), 0.0
            )
            everywhere = torch.ones_like(policy.chosen_mask)
            counted = everywhere if self.position_mean == "grid" else policy.chosen_mask | policy.rejected_mask
            losses = masked_mean(self._loss(z), counted)
        else:
            chosen, rejected = weighted_log_ratios(policy, reference, kept, criticality)
            losses = self._loss(chosen - rejected)
        plain_chosen, plain_rejected = log_ratios(policy, reference)
        return PreferenceOutput(
            losses=losses,
            chosen_rewards=self.beta * plain_chosen.detach(),
            rejected_rewards=self.beta * plain_rejected.detach(),
            metrics={"criticality": masked_mean(criticality, policy.rejected_mask, dim=None)},
        )

    def trace_columns(self, policy: PairScores, reference: PairScores) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """How critical each token is, ``1 - s_t``."""
        return {"criticality": (1 - policy.chosen["contrast"], 1 - policy.rejected["contrast"])}

    def _loss(self, z: torch.Tensor) -> torch.Tensor:
        smoothing = self.label_smoothing
        return -(1 - smoothing) * F.logsigmoid(self.beta * z) - smoothing * F.logsigmoid(-self.beta * z)


@dataclass
class ContrastiveEstimator:
    """s_t from a model of correct and a model of incorrect traces; makes the column ``contrast``.

    Args:
        positive_model, negative_model: p+ and p-, which share the policy's tokenizer.
        alpha: a, how strongly p- is subtracted (1).
        batch_size: rows a forward.

    Raises:
        TokenizerMismatchError: the two have vocabularies of different size.
    """

    positive_model: PreTrainedModel
    negative_model: PreTrainedModel
    alpha: float = 1.0
    batch_size: int = 16
    column: str = "contrast"

    def __post_init__(self) -> None:
        check_guide(self.positive_model, self.negative_model, "negative model")

    @torch.no_grad()
    def score(self, ids: torch.Tensor, mask: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """``s_t`` of every token where ``mask``: ``[B, T]`` float32, at the token's own position (logits at t predict t
        + 1); 0 elsewhere.

        The ``[N, V]`` logits exist in chunks only.
        """
        kept = mask.bool().clone()
        kept[:, 0] = False
        models = (self.positive_model, self.negative_model)
        hidden = [response_hidden(model, ids, kept, attention_mask) for model in models]
        heads = [output_head(model) for model in models]
        labels = ids[kept]
        values = torch.empty(len(labels), device=ids.device)
        size = tokens_per_chunk(len(heads[0].weight), heads[0].weight.device)
        for first in range(0, len(labels), size):
            part = slice(first, first + size)
            plus, minus = (head.logits(h[part]) for h, head in zip(hidden, heads, strict=True))
            mixed = (1 + self.alpha) * plus - self.alpha * minus
            values[part] = (mixed.gather(1, labels[part, None])[:, 0] - mixed.logsumexp(-1)).exp()
        return torch.zeros(ids.shape, device=ids.device).masked_scatter(kept, values)

    def annotate(self, examples: Sequence[Example], report: Report = silent) -> list[torch.Tensor]:
        rows = [PromptResponse(item.prompt_ids, item.response_ids) for item in examples]
        return score_rows(rows, self.score, self.batch_size, self.positive_model.device, report)

    def fingerprint(self) -> str:
        return (
            f"contrast {self.alpha} {model_fingerprint(self.positive_model)} {model_fingerprint(self.negative_model)}"
        )


@dataclass
class RolloutOracle:
    """The share of k continuations from every prefix of a trace that end correct: exact, and expensive.

    Args:
        model, tokenizer: the base model.
        correct: ``(prompt text, response text) -> bool``.
        rollouts: k continuations a position (64).
        max_new_tokens: of a continuation.
        temperature: of sampling.
        batch_size: continuations a forward.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    correct: Callable[[str, str], bool]
    rollouts: int = 64
    max_new_tokens: int = 64
    temperature: float = 1.0
    batch_size: int = 256

    @torch.inference_mode()
    def score(
        self,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        report: Report = silent,
    ) -> torch.Tensor:
        """``[len(response_ids)]``: value t is the share of correct endings after ``response_ids[: t + 1]``.

        A prefix that has ended (its last token ends a text) is graded as it is.
        """
        prompt = self.tokenizer.decode(prompt_ids, skip_special_tokens=True)
        ends = end_tokens(self.model)
        scores = torch.zeros(len(response_ids))
        open_prefixes = [t for t in range(len(response_ids)) if response_ids[t] not in ends]
        for t in set(range(len(response_ids))) - set(open_prefixes):
            text = self.tokenizer.decode(response_ids[: t + 1], skip_special_tokens=True)
            scores[t] = float(self.correct(prompt, text))
        group = max(1, self.batch_size // self.rollouts)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else next(iter(ends))
        for first in range(0, len(open_prefixes), group):
            picked = open_prefixes[first : first + group]
            width = len(prompt_ids) + picked[-1] + 1
            ids = torch.full((len(picked), width), pad)
            attention = torch.zeros_like(ids)
            for line, t in enumerate(picked):
                row = torch.tensor([*prompt_ids, *response_ids[: t + 1]])
                ids[line, width - len(row) :] = row
                attention[line, width - len(row) :] = 1
            device = self.model.device
            output = self.model.generate(
                ids.to(device),
                attention_mask=attention.to(device),
                do_sample=True,
                temperature=self.temperature,
                top_k=0,
                top_p=1.0,
                num_return_sequences=self.rollouts,
                max_new_tokens=self.max_new_tokens,
                pad_token_id=pad,
            )
            for line, t in enumerate(picked):
                rows = output[line * self.rollouts : (line + 1) * self.rollouts, width:].tolist()
                texts = self.tokenizer.batch_decode(
                    [[*response_ids[: t + 1], *row] for row in rows], skip_special_tokens=True
                )
                scores[t] = sum(self.correct(prompt, text) for text in texts) / self.rollouts
            report("rolling out", min(first + group, len(open_prefixes)), len(open_prefixes))
        return scores


def critical_tokens(scores: torch.Tensor, low: float = 0.05, before: float = 0.05) -> list[int]:
    """Positions where a rollout score drops to ``low`` or less and stays there, having been above ``before``.

    The first token is critical if the score is low from the start: nothing before it is known, so ``before`` is not
    asked there.
    """
    values = scores.tolist()
    for t in range(len(values)):
        if all(value <= low for value in values[t:]):
            return [t] if t == 0 or values[t - 1] > before else []
    return []

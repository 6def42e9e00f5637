"""T-REG: token-level reward regularization (arXiv 2412.02685).

DPO learns a reward for every token, ``h_t = beta [log pi(y_t|x,y_<t) - log ref(y_t|x,y_<t)]``, but only their sum is
supervised. T-REG asks the initial model pi_0 under two opposite instructions (answer better: x+, answer worse: x-) how
likely each token is; the contrast is a noisy token reward that says how the sum should be spread::

    q_t(y) = sigmoid( log pi_0(y_t|x+,y_<t) - log pi_0(y_t|x-,y_<t) ) - 1/2                    in (-1/2, 1/2), constant
    v      = sg( sigmoid( sum_t h_t(y_l) - sum_t h_t(y_w) ) )                                  DPO's own gradient weight
    L_reg  = - v [ sum_t q_t(y_w) h_t(y_w) + sum_t q_t(y_l) h_t(y_l) ]
    loss   = L_DPO + alpha L_reg

With ``base="simpo"`` (arXiv 2405.14734), h_t is ``beta log pi(y_t|...) / |y|``, without a reference, and a margin gamma
is asked for.

The idea and q are the paper's; where v stands, sums against means, and alpha are reconstructed, so ``pair_weight``,
``reduction`` and ``alpha`` can be set.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn import functional as F

from ..core.errors import BadInputError, check_choices
from ..core.logprobs import masked_mean, masked_sum
from ..core.progress import Report, silent, within
from ..core.scoring import PromptResponse, head_module, model_fingerprint, prompt_ids, response_logps, score_rows
from ..training.column_makers import ColumnMaker, ColumnSources, Example, TokenAnnotator
from ..training.datasets.messages import Message, instructed, plain_messages, template_options
from .base import PairScores, PreferenceOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BETTER = "Answer as well as you can: helpful, correct, clear and kind.\n\n"
WORSE = "Answer as badly as you can: unhelpful, wrong, confusing and unkind.\n\n"


@dataclass
class TokenRewards:
    """Makes the column ``token_reward``: asks the initial model under two instructions.

    Args:
        better, worse: the two instructions; None for the module's own.
    """

    better: str | None = None
    worse: str | None = None

    def __call__(self, sources: ColumnSources) -> TokenAnnotator:
        from ..training.distributed import frozen

        texts = (self.better or BETTER, self.worse or WORSE)
        return ContrastivePromptRewards(frozen(sources.initial_model()), sources.tokenizer, *texts)


@dataclass
class TREGLoss:
    """DPO or SimPO with a regulariser on the implicit reward of every token.

    Args:
        beta: strength of the implicit reward (DPO: 0.1; SimPO: 2).
        alpha: weight of the regulariser (0.25; 0.1 to 0.5 are sensible).
        base: ``"dpo"`` or ``"simpo"``.
        gamma: SimPO's margin (0.5).
        pair_weight: ``"dpo"`` weights a pair's regulariser by v, so that solved pairs stop pulling; ``"none"`` by 1.
        reduction: ``"sum"`` over a response's tokens, or ``"mean"``.

    Raises:
        BadInputError: an unknown option or a strength out of range.
    """

    beta: float = 0.1
    alpha: float = 0.25
    base: str = "dpo"
    gamma: float = 0.5
    pair_weight: str = "dpo"
    reduction: str = "sum"
    data_columns: ClassVar[Mapping[str, type[ColumnMaker]]] = {"token_reward": TokenRewards}

    def __post_init__(self) -> None:
        check_choices(self, base=("dpo", "simpo"), pair_weight=("dpo", "none"), reduction=("sum", "mean"))
        if self.beta <= 0 or self.alpha < 0:
            raise BadInputError(f"T-REG needs beta > 0 and alpha >= 0; got {self.beta} and {self.alpha}.")

    @property
    def loss_at_start(self) -> float | None:
        """Where policy and reference agree: DPO's log 2; SimPO reads no reference, so its value depends on the data."""
        return math.log(2) if self.base == "dpo" else None

    def implicit_rewards(self, policy: PairScores, reference: PairScores) -> tuple[torch.Tensor, torch.Tensor]:
        """``h_t`` of chosen and rejected, two ``[B, T]`` tensors with gradient."""
        sides = (
            (policy.chosen_logps, reference.chosen_logps, policy.chosen_mask),
            (policy.rejected_logps, reference.rejected_logps, policy.rejected_mask),
        )
        if self.base == "dpo":
            return tuple(self.beta * torch.where(mask, logps - ref, 0.0) for logps, ref, mask in sides)  # type: ignore[return-value]
        return tuple(  # type: ignore[return-value]
            self.beta * torch.where(mask, logps, 0.0) / mask.sum(-1, keepdim=True).clamp(min=1)
            for logps, _, mask in sides
        )

    def __call__(self, policy: PairScores, reference: PairScores) -> PreferenceOutput:
        """See the module's docstring; ``policy.chosen["token_reward"]`` and ``policy.rejected["token_reward"]`` are q,
        ``[B, T]``.
        """
        h_chosen, h_rejected = self.implicit_rewards(policy, reference)
        chosen, rejected = masked_sum(h_chosen, policy.chosen_mask), masked_sum(h_rejected, policy.rejected_mask)
        margin = chosen - rejected - (self.gamma if self.base == "simpo" else 0.0)
        v = torch.sigmoid(-margin).detach() if self.pair_weight == "dpo" else torch.ones_like(chosen)
        reduce = masked_sum if self.reduction == "sum" else masked_mean
        agreement = reduce(policy.chosen["token_reward"].detach() * h_chosen, policy.chosen_mask)
        agreement = agreement + reduce(policy.rejected["token_reward"].detach() * h_rejected, policy.rejected_mask)
        regulariser = -v * agreement
        return PreferenceOutput(
            losses=-F.logsigmoid(margin) + self.alpha * regulariser,
            chosen_rewards=chosen.detach(),
            rejected_rewards=rejected.detach(),
            metrics={"regulariser": regulariser.detach().mean(), "pair_weight": v.mean()},
        )

    def trace_columns(self, policy: PairScores, reference: PairScores) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """q, the contrast of the two prompts."""
        return {"contrast_of_prompts": (policy.chosen["token_reward"], policy.rejected["token_reward"])}


@dataclass
class ContrastivePromptRewards:
    """q_t of every response token from one frozen model under two opposite instructions; makes the column
    ``token_reward``.

    The response's own token ids follow either prompt: they are never tokenized again, so q belongs to the very tokens
    that are trained.

    Args:
        model: the initial model pi_0.
        tokenizer: its tokenizer, which is the policy's.
        better, worse: put before a text prompt; with a chat template, in front of the conversation's system message, or
            of the one that the template writes by itself. The row's tools stay.
        max_prompt_length: longer prompts lose tokens behind the instruction, never the response; None keeps them whole.
        batch_size: rows a forward.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    better: str = BETTER
    worse: str = WORSE
    max_prompt_length: int | None = None
    batch_size: int = 16
    column: str = "token_reward"

    def __post_init__(self) -> None:
        head_module(self.model)

    def wrap(self, example: Example, instruction: str) -> list[int]:
        """Ids of the example's prompt with an instruction in front.

        Raises:
            BadInputError: messages that do not give the row's ``prompt_ids`` by this tokenizer's chat template.
        """
        body = list(example.prompt_ids)
        head: list[int] = []
        if isinstance(example.prompt, list):
            body = self._instructed(example, instruction)
        else:
            head = self.tokenizer(instruction, add_special_tokens=False)["input_ids"]
            start = self.tokenizer.bos_token_id
            if body and start is not None and body[0] == start:  # keep a leading start token in front
                head, body = [start, *head], body[1:]
        limit = self.max_prompt_length
        if limit is not None and len(head) + len(body) > limit:
            body = body[len(body) - max(limit - len(head), 1) :]
        return [*head, *body]

    def _instructed(self, example: Example, instruction: str) -> list[int]:
        """Messages by the chat template, as the policy's own prompt but for the instruction in their system message."""
        messages = plain_messages(example.prompt)
        template = template_options(example.tools, example.chat_template_kwargs)

        def ids(shown: list[Message]) -> list[int]:
            return prompt_ids(self.tokenizer, shown, **template)

        def text(shown: list[Message]) -> str:
            options: dict[str, Any] = {"add_generation_prompt": True, **template}
            return str(self.tokenizer.apply_chat_template(shown, tokenize=False, **options))

        plain, read = ids(messages), list(example.prompt_ids)
        if plain[: len(read)] != read and plain[len(plain) - len(read) :] != read:
            raise BadInputError(
                "The messages of a prompt do not give the tokens that the policy reads.",
                "T-REG asks with another system message: the row must be tokenized by this tokenizer's chat template.",
            )
        # where the answer begins before the template's own opening of it, the policy's prompt is shorter
        behind = len(plain) - len(read) if plain[: len(read)] == read else 0
        found = ids(instructed(messages, instruction.strip(), text))
        return found[: len(found) - behind]

    def annotate(self, examples: Sequence[Example], report: Report = silent) -> list[torch.Tensor]:
        def score(ids: torch.Tensor, mask: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
            return response_logps(self.model, ids, mask, attention)

        sides = []
        for number, instruction in enumerate((self.better, self.worse)):
            rows = [PromptResponse(self.wrap(item, instruction), item.response_ids) for item in examples]
            part = within(report, "asking with two prompts", number * len(rows), 2 * len(rows))
            sides.append(score_rows(rows, score, self.batch_size, self.model.device, part))
        return [torch.sigmoid(up - down) - 0.5 for up, down in zip(*sides, strict=True)]

    def fingerprint(self) -> str:
        text = "\0".join((self.better, self.worse, str(self.max_prompt_length), str(self.tokenizer.chat_template)))
        return f"contrastive prompts 2 {hashlib.sha256(text.encode()).hexdigest()} {model_fingerprint(self.model)}"

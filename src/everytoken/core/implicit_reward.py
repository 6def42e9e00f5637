"""Implicit rewards: what a preference-trained model thinks each token is worth (arXiv 2305.18290, 2404.12358).

In the token-level decision process (state: the text so far; action: the next token) a model pi trained with DPO against
a reference is the optimal policy of some reward, so its log-ratio is a credit for every token, up to a potential of the
state::

    r_t = beta [log pi(y_t | s_t) - log ref(y_t | s_t)] = Q*(s_t, y_t) - V*(s_t) - beta log ref(y_t | s_t)

Sums telescope: over a whole answer they are ``sum_t r(s_t, y_t) - V*(s_0)``, so differences between answers to one
prompt are differences of their true rewards.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import BadInputError

if TYPE_CHECKING:
    import torch


@dataclass
class ImplicitReward:
    """Credit per token from two models.

    Args:
        policy: a causal language model trained on preferences.
        reference: the model it started from; None takes a PEFT policy without its adapter.
        beta: the strength that it was trained with; credits are in its units.

    Raises:
        BadInputError: no reference, or vocabularies of different size.
    """

    policy: Any
    reference: Any = None
    beta: float = 0.1

    def __post_init__(self) -> None:
        if self.reference is None and not hasattr(self.policy, "disable_adapter"):
            raise BadInputError("An implicit reward compares with a reference.", "Pass reference=...")
        if self.reference is not None:
            sizes = [model.get_output_embeddings().weight.shape[0] for model in (self.policy, self.reference)]
            if sizes[0] != sizes[1]:
                raise BadInputError(
                    f"Policy and reference have vocabularies of {sizes[0]} and {sizes[1]} tokens.",
                    "The reference is the model that training started from.",
                )

    def score(self, ids: torch.Tensor, mask: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """``r_t`` of every answer token: ``[B, T]`` float32, 0 where ``mask`` is False. No gradient.

        Args:
            ids: ``[B, T]`` prompts and answers.
            mask: ``[B, T]`` True on the tokens to score; a row's first token cannot be scored (nothing precedes it).
            attention_mask: ``[B, T]``, 0 on padding (either side); default no padding.
        """
        stats = self.statistics(ids, mask, attention_mask)
        return self.beta * (stats["logps"] - stats["ref_logps"])

    def statistics(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        forward_kl: bool = False,
        reverse_kl: bool = False,
        entropy: bool = False,
    ) -> dict[str, torch.Tensor]:
        """``logps``, ``ref_logps`` (``forward_kl``, ``reverse_kl``, ``entropy``) per token, ``[B, T]``, aligned to the
        scored tokens; see ``score``.
        """
        import torch

        from .logprobs import OutputHead, token_stats
        from .scoring import output_head, response_hidden

        kept = mask.bool().clone()
        kept[:, 0] = False
        with torch.no_grad():
            hidden: list[torch.Tensor] = []
            heads: list[OutputHead] = []
            for model in (self.policy, self.reference):
                if model is self.policy and hidden:  # compared with itself: one forward is enough
                    hidden, heads = 2 * hidden, 2 * heads
                    continue
                scope = self.policy.disable_adapter() if model is None else contextlib.nullcontext()
                model = self.policy if model is None else model
                with scope:  # the head as well: PEFT may hold a trained copy of it
                    hidden.append(response_hidden(model, ids, kept, attention_mask))
                    heads.append(output_head(model))
            stats = token_stats(
                hidden[0],
                heads[0].weight,
                ids[kept],
                bias=heads[0].bias,
                rule=heads[0].rule,
                ref_hidden=hidden[1],
                ref_weight=heads[1].weight,
                ref_bias=heads[1].bias,
                ref_rule=heads[1].rule,
                forward_kl=forward_kl,
                reverse_kl=reverse_kl,
                entropy=entropy,
            )
        result = {}
        for name in ("logps", "ref_logps", "forward_kl", "reverse_kl", "entropy"):
            values = getattr(stats, name)
            if values is not None:
                result[name] = torch.zeros(ids.shape, device=ids.device).masked_scatter(kept, values)
        return result

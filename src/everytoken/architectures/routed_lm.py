"""A causal language model whose loss also asks something of its routers; what mixtures of experts share.

It is transformers' ``MixtralForCausalLM`` but for two things. The balance of the experts is a loss of each layer, and
not of all layers pooled. The losses of the routers are part of ``loss`` in training mode, and in evaluation only where
``output_router_logits`` asks for them, so that an evaluated loss is one of the text alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.mixtral.modeling_mixtral import (
    MixtralForCausalLM,
    MixtralModel,
    MixtralPreTrainedModel,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
)
from transformers.utils.generic import can_return_tuple

from .base import OwnWeights
from .routing import balance_loss

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig


def real_tokens(attention_mask: torch.Tensor | None, width: int) -> torch.Tensor | None:
    """``[B, width]``, true for the tokens of this forward that are no padding; None where there is no such mask.

    Args:
        attention_mask: ``[B, past + width]``; a prepared mask of four dimensions says nothing of padding.
        width: tokens of this forward.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -width:].bool()


class RoutedPreTrainedModel(OwnWeights, MixtralPreTrainedModel):
    """What transformers reads from a model's own source, which here stands in Mixtral's."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True


class RoutedModel(RoutedPreTrainedModel, MixtralModel):
    """``MixtralModel`` with layers of another kind, which ``make_layer`` builds."""

    def __init__(self, config: PreTrainedConfig):
        MixtralPreTrainedModel.__init__(self, config)  # MixtralModel's own would build its layers first
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([self.make_layer(config, number) for number in range(config.num_hidden_layers)])
        self.norm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MixtralRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.add_modules(config)
        self.post_init()

    def make_layer(self, config: PreTrainedConfig, number: int) -> nn.Module:
        """The layer of a number from 0 on."""
        raise NotImplementedError

    def add_modules(self, config: PreTrainedConfig) -> None:
        """Builds what the layers share."""


class RoutedForCausalLM(RoutedPreTrainedModel, MixtralForCausalLM):
    """See the module. A subclass names its backbone in ``backbone`` and may extend ``router_loss``."""

    backbone: type[RoutedModel]

    def __init__(self, config: PreTrainedConfig):
        MixtralPreTrainedModel.__init__(self, config)
        self.model = self.backbone(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # names that trainers look for
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts, self.num_experts_per_tok = config.num_local_experts, config.num_experts_per_tok
        self.post_init()

    def router_loss(self, balance: torch.Tensor, router_logits: tuple[torch.Tensor, ...], mask: Any) -> torch.Tensor:
        """What the routers add to the loss: the balance loss times its coefficient.

        Args:
            balance: the balance loss, a scalar.
            router_logits: ``[B * S, E]`` for each router.
            mask: ``[B, S]``, true for tokens that are no padding; or None.
        """
        return self.config.router_aux_loss_coef * balance

    def text_loss(self, logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The cross entropy of the labels, which are shifted here."""
        return self.loss_function(logits, labels, self.vocab_size, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """The forward of ``MixtralForCausalLM``; see the module for what ``loss`` is.

        Args:
            input_ids: ``[B, S]``; or ``inputs_embeds`` ``[B, S, d]``.
            attention_mask: ``[B, past + S]``, 0 for padding on either side.
            labels: ``[B, S]``, -100 where none; they are shifted here.
            output_router_logits: None takes the configuration's.

        Returns:
            With ``aux_loss``, the balance loss without its coefficient, and ``router_logits``, ``[B * S, E]`` a router,
            in training with labels or where they were asked for.
        """
        asked = self.config.output_router_logits if output_router_logits is None else output_router_logits
        taught = labels is not None and self.training
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=asked or taught,
            **kwargs,
        )
        hidden = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden)
        loss = None if labels is None else self.text_loss(logits, labels, **kwargs)
        balance = None
        if outputs.router_logits:
            mask = real_tokens(attention_mask, outputs.last_hidden_state.shape[1])
            balance = self.balance(outputs.router_logits, mask)
            if loss is not None:
                loss = loss + self.router_loss(balance, outputs.router_logits, mask).to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=balance,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def balance(self, router_logits: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> torch.Tensor:
        """The balance loss, without its coefficient."""
        return balance_loss(router_logits, self.config.num_experts_per_tok, mask)

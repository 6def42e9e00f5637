"""OpenMoE: a decoder with a mixture of experts in every few layers, beside a dense block (arXiv 2402.01739).

A layer with experts computes::

    x <- x + Attn(LN x)
    x <- x + MoE(LN x) + FFN(LN x)
    MoE(x) = sum over served choices e of p_e SwiGLU_e(x),    p = softmax(W x) over all experts

An expert serves a limited number of choices (``capacity``); one that is not served adds nothing, and the dense block
still acts. So a row's outputs depend on the batch that it stands in, and generation with a cache, which reads one token
at a time and drops none, need not equal a forward over the whole text, which may. Both are equal where nothing drops.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralDecoderLayer,
    MixtralExperts,
    MixtralRMSNorm,
    MixtralTopKRouter,
)
from transformers.utils.output_capturing import OutputRecorder

from ..base import register
from ..routed_lm import RoutedForCausalLM, RoutedModel, RoutedPreTrainedModel, real_tokens
from ..routing import router_z_loss, top_experts
from .capacity import expert_capacity, serve
from .configuration_openmoe import OpenMoeConfig

FILL_SEED = 0
"""Of the order in which a random filling serves tokens in evaluation, so that results repeat."""


class OpenMoeRouter(MixtralTopKRouter):
    """A linear router in float32 whose experts serve a limited number of choices."""

    def __init__(self, config: OpenMoeConfig):
        super().__init__(config)
        self.config = config

    def forward(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Routes all tokens.

        Args:
            hidden_states: ``[B, S, d]``.
            token_mask: ``[B, S]``, false for padding.

        Returns:
            Logits ``[B * S, E]``, and weights and experts ``[B * S, k]``; the weight is 0 where a choice is dropped.
        """
        batch, width, _ = hidden_states.shape
        config = self.config
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float())
            chosen, indices = top_experts(logits.softmax(-1), self.top_k)
        if config.renormalise:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        factor = config.capacity_factor_train if self.training else config.capacity_factor_eval
        if factor is not None and config.may_drop(self.training):
            groups = batch if config.routing_group == "sequence" else 1
            mask = None if token_mask is None else token_mask.reshape(groups, -1)
            count = torch.full((groups,), batch * width // groups, device=logits.device)
            count = count if mask is None else mask.sum(-1)
            capacity = expert_capacity(count, self.num_experts, self.top_k, factor, config.min_capacity)
            order = self._order(batch * width // groups, logits.device) if config.fill_order == "random" else None
            served = serve(indices.reshape(groups, -1, self.top_k), self.num_experts, capacity, mask, order)
            chosen = chosen * served.view_as(chosen)
        elif token_mask is not None:
            chosen = chosen * token_mask[..., None]
        return logits.flatten(0, 1), chosen.flatten(0, 1), indices.flatten(0, 1)

    def _order(self, tokens: int, device: torch.device) -> torch.Tensor:
        """A permutation of the tokens: a new one every time in training, the same one in evaluation."""
        generator = None if self.training else torch.Generator().manual_seed(FILL_SEED)
        return torch.randperm(tokens, generator=generator).to(device)


class OpenMoeExperts(nn.Module):
    """The router and Mixtral's experts."""

    def __init__(self, config: OpenMoeConfig):
        super().__init__()
        self.gate = OpenMoeRouter(config)
        self.experts = MixtralExperts(config)

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        _, weights, indices = self.gate(hidden_states, token_mask)
        flat = hidden_states.flatten(0, 1)
        return self.experts(flat, indices, weights.to(flat.dtype)).view_as(hidden_states)


class OpenMoeDecoderLayer(MixtralDecoderLayer):
    """A dense layer, or one with experts beside its dense block (``moe``)."""

    def __init__(self, config: OpenMoeConfig, layer_idx: int):
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = MixtralAttention(config, layer_idx)
        self.mlp = MistralMLP(config)
        self.moe = OpenMoeExperts(config) if (layer_idx + 1) % config.moe_every == 0 else None
        self.input_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        added = self.mlp(normed)
        if self.moe is not None:
            added = added + self.moe(normed, token_mask)
        return hidden_states + added


class OpenMoePreTrainedModel(RoutedPreTrainedModel):
    """Initialisation, and what of a forward can be recorded."""

    config: OpenMoeConfig
    config_class = OpenMoeConfig
    _no_split_modules = ["OpenMoeDecoderLayer"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(OpenMoeRouter, index=0),
        "hidden_states": OpenMoeDecoderLayer,
        "attentions": MixtralAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OpenMoeRouter):
            init.normal_(module.weight, mean=0.0, std=(0.1 / self.config.hidden_size) ** 0.5)


class OpenMoeModel(OpenMoePreTrainedModel, RoutedModel):
    """The backbone."""

    def __init__(self, config: OpenMoeConfig):
        RoutedModel.__init__(self, config)

    def make_layer(self, config: OpenMoeConfig, number: int) -> nn.Module:
        return OpenMoeDecoderLayer(config, number)

    def forward(self, input_ids: torch.Tensor | None = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        """As ``MixtralModel``'s; padding takes no capacity. Arguments and shapes are those of the model with a head."""
        given = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        mask = None if given is None else real_tokens(attention_mask, given.shape[1])
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, token_mask=mask, **kwargs)


class OpenMoeForCausalLM(OpenMoePreTrainedModel, RoutedForCausalLM):
    """The language model; ``loss`` adds the balance loss, the routers' z-loss and the vocabulary's in training mode."""

    backbone = OpenMoeModel

    def __init__(self, config: OpenMoeConfig):
        RoutedForCausalLM.__init__(self, config)

    def router_loss(self, balance: torch.Tensor, router_logits: tuple[torch.Tensor, ...], mask: Any) -> torch.Tensor:
        config = self.config
        return config.router_aux_loss_coef * balance + config.router_z_loss_coef * router_z_loss(router_logits, mask)

    def text_loss(self, logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        loss = super().text_loss(logits, labels, **kwargs)
        if self.training and self.config.output_z_loss_coef:
            normaliser = torch.logsumexp(logits.float(), -1) ** 2
            counted = labels != -100
            mean = (normaliser * counted).sum() / counted.sum().clamp(min=1)
            loss = loss + self.config.output_z_loss_coef * mean
        return loss

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate``, which says so where a capacity limit may make the cache matter."""
        if self.config.may_drop():
            warnings.warn(
                "Experts serve a limited number of tokens, so text written with a cache can differ from that written "
                "without one, and a row's text depends on the other rows. Set capacity_factor_eval=None to serve all.",
                stacklevel=2,
            )
        return super().generate(*args, **kwargs)


register(OpenMoeConfig, OpenMoeForCausalLM, "AutoModelForCausalLM")
register(OpenMoeConfig, OpenMoeModel, "AutoModel")

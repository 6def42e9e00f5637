"""RMoE: the routers of successive layers are joined by a recurrent cell (arXiv 2408.06793).

Every token has a state of its own, which walks up the layers and not along the text::

    r_i = P_i x_i                     x_i: input of the experts of layer i
    h_i = GRU(r_i, h_{i-1})           h_0 = 0; one cell for all layers
    f_i = R_i h_i                     router logits; then softmax, top-k, weights that sum to 1

Nothing is carried from token to token, so all tokens run at once, and a cache holds keys and values alone. Between the
layers the gradient has a second path, through the state.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralDecoderLayer,
    MixtralExperts,
    MixtralRMSNorm,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..base import register
from ..decoder import begin
from ..routed_lm import RoutedForCausalLM, RoutedModel, RoutedPreTrainedModel
from ..routing import balance_loss, top_experts
from .configuration_rmoe import RMoeConfig

if TYPE_CHECKING:
    from transformers import Cache

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
CELLS: dict[str, type[nn.GRUCell] | type[nn.RNNCell]] = {"gru": nn.GRUCell, "rnn": nn.RNNCell}


class RecurrentRouter(nn.Module):
    """A router that chooses from a state, which it updates and hands on.

    Args:
        hidden_size: ``d``.
        num_experts: ``E``.
        top_k: experts a token.
        router_size: ``p``, width of the state.
        detach_state: hand the state on without its gradient.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, router_size: int = 128, detach_state: bool = False
    ):
        super().__init__()
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.router_size, self.detach_state = router_size, detach_state
        self.projection = nn.Parameter(torch.empty(router_size, hidden_size))
        self.weight = nn.Parameter(torch.empty(num_experts, router_size))

    def forward(
        self, hidden_states: torch.Tensor, state: torch.Tensor | None = None, cell: nn.RNNCellBase | None = None
    ) -> Routed:
        """Routes tokens.

        Args:
            hidden_states: ``[..., d]``; all tokens alike, ``n`` in all.
            state: ``[n, p]`` of the layer below; None before the first.
            cell: the model's own; None chooses from the projection alone and hands no state on.

        Returns:
            Logits ``[n, E]``, weights and experts ``[n, k]``, and the state ``[n, p]`` in float32 or None.
        """
        hidden_states = hidden_states.reshape(-1, self.hidden_size)
        projected = F.linear(hidden_states, self.projection)
        if cell is None:
            logits, state = F.linear(projected, self.weight), None
        else:
            state = _step(cell, projected, state)
            logits = F.linear(state, self.weight.float())
        chosen, indices = top_experts(logits.float().softmax(-1), self.top_k)
        chosen = chosen / chosen.sum(-1, keepdim=True)
        return logits, chosen, indices, state.detach() if state is not None and self.detach_state else state


def _step(cell: nn.RNNCellBase, projected: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
    """One step of the cell in float32, whatever the model's own precision: a state's small changes must not be lost."""
    with torch.autocast(projected.device.type, enabled=False):
        weights = {name: weight.float() for name, weight in cell.named_parameters()}
        arguments = (projected.float(),) if state is None else (projected.float(), state.float())
        return functional_call(cell, weights, arguments)


class RMoeExperts(nn.Module):
    """A recurrent router, Mixtral's experts, and a shared expert where there is one."""

    def __init__(self, config: RMoeConfig):
        super().__init__()
        self.gate = RecurrentRouter(
            config.hidden_size,
            config.num_local_experts,
            config.num_experts_per_tok,
            config.router_size,
            config.detach_state,
        )
        self.experts = MixtralExperts(config)
        self.shared = MistralMLP(config) if config.shared_expert else None

    def forward(
        self, hidden_states: torch.Tensor, state: torch.Tensor | None, cell: nn.RNNCellBase | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        flat = hidden_states.flatten(0, 1)
        _, weights, indices, state = self.gate(flat, state, cell)
        output = self.experts(flat, indices, weights.to(flat.dtype)).view_as(hidden_states)
        if self.shared is not None:
            output = 0.5 * output + 0.5 * self.shared(hidden_states)
        return output, state


class RMoeDecoderLayer(MixtralDecoderLayer):
    """Mixtral's layer with the routers' state as a further input and output; a dense layer hands it on untouched."""

    def __init__(self, config: RMoeConfig, layer_idx: int):
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = MixtralAttention(config, layer_idx)
        self.mlp = RMoeExperts(config) if config.has_experts(layer_idx) else MistralMLP(config)
        self.input_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        router_state: torch.Tensor | None = None,
        router_cell: nn.RNNCellBase | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if isinstance(self.mlp, RMoeExperts):
            output, router_state = self.mlp(normed, router_state, router_cell)
        else:
            output = self.mlp(normed)
        return hidden_states + output, router_state


class RMoePreTrainedModel(RoutedPreTrainedModel):
    """Initialisation, and what of a forward can be recorded."""

    config: RMoeConfig
    config_class = RMoeConfig
    _no_split_modules = ["RMoeDecoderLayer"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(RecurrentRouter, index=0),
        "hidden_states": OutputRecorder(RMoeDecoderLayer, index=0),
        "attentions": MixtralAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RecurrentRouter):
            for weight in module.parameters():
                init.normal_(weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, nn.RNNCellBase):
            bound = 1 / math.sqrt(self.config.router_size)
            for weight in module.parameters():
                init.uniform_(weight, -bound, bound)


class RMoeModel(RMoePreTrainedModel, RoutedModel):
    """The backbone, which owns the cell that its layers share."""

    def __init__(self, config: RMoeConfig):
        RoutedModel.__init__(self, config)

    def make_layer(self, config: RMoeConfig, number: int) -> nn.Module:
        return RMoeDecoderLayer(config, number)

    def add_modules(self, config: RMoeConfig) -> None:
        self.router_cell = None if config.cell == "none" else CELLS[config.cell](config.router_size, config.router_size)

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """As ``MixtralModel``'s, with a state that starts at 0 in every forward and walks through the layers.

        Args:
            input_ids: ``[B, S]``; or ``inputs_embeds`` ``[B, S, d]``, not both.

        Raises:
            BadInputError: neither or both were given.
        """
        begun = begin(self, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache)
        hidden = begun.hidden
        state = None
        for layer in self.layers:
            # by place: what a reentrant checkpoint shall give gradients to
            hidden, state = layer(hidden, state, router_cell=self.router_cell, **begun.arguments, **kwargs)
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=begun.past_key_values)


class RMoeForCausalLM(RMoePreTrainedModel, RoutedForCausalLM):
    """The language model; ``loss`` adds the balance loss in training mode."""

    backbone = RMoeModel

    def __init__(self, config: RMoeConfig):
        RoutedForCausalLM.__init__(self, config)

    def balance(self, router_logits: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> torch.Tensor:
        config = self.config
        return balance_loss(router_logits, config.num_experts_per_tok, mask, pooled=config.pooled_balance)


register(RMoeConfig, RMoeForCausalLM, "AutoModelForCausalLM")
register(RMoeConfig, RMoeModel, "AutoModel")

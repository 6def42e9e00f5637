"""Duo-LLM: a small feed-forward block beside each large one, and a choice for every token and layer.

Of every layer a token takes one of {skip, small, big} (arXiv 2410.10846)::

    x <- x + Attn(LN x)
    x <- x + {0, F_small(LN x), F_big(LN x)}[a],    a: the token's route in this layer

Trained with random routes, every path works, and any rule may choose: a fixed one, a learned router, or an oracle that
knows the next token (``oracle.py``). Costs are counted in large blocks; attention always runs and is no part of them.
A router returns ``(logits, scores, indices)``, as those of mixtures of experts do.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ...core.errors import BadInputError
from ..base import OwnWeights, register
from ..decoder import begin
from ..routed_lm import real_tokens
from .configuration_duo_llm import BIG, POLICIES, SKIP, SMALL, DuoLlmConfig

if TYPE_CHECKING:
    from transformers import Cache

Route = str | torch.Tensor | None
FIXED = {"big": BIG, "small": SMALL, "skip": SKIP}


@dataclass
class DuoLlmModelOutput(BaseModelOutputWithPast):
    """With ``routes`` ``[B, S, L]``, what each token took, and ``costs`` ``[B, S, L]`` in large blocks."""

    routes: torch.Tensor | None = None
    costs: torch.Tensor | None = None


@dataclass
class DuoLlmOutput(CausalLMOutputWithPast):
    """With ``routes`` ``[B, S, L]``, and the mean ``cost`` of a layer over all tokens that are no padding."""

    routes: torch.Tensor | None = None
    cost: torch.Tensor | None = None


class DuoRouter(nn.Module):
    """Chooses skip, small or big for every token of one layer, or says what was chosen for it."""

    def __init__(self, config: DuoLlmConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(3, config.hidden_size))

    def forward(
        self, hidden_states: torch.Tensor, route: torch.Tensor | int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Routes tokens.

        Args:
            hidden_states: ``[n, d]``.
            route: ``[n]`` choices, or one for all; None lets the router choose.

        Returns:
            Logits ``[n, 3]`` in float32 (a skip that is not allowed has the lowest number), weights of the choice
            ``[n, 1]``, and the choice ``[n, 1]``. In training the router's weights carry its gradient.
        """
        logits = F.linear(hidden_states.float(), self.weight.float())
        if not self.config.allow_skip:
            forbidden = torch.tensor([True, False, False], device=logits.device)
            logits = logits.masked_fill(forbidden, torch.finfo(logits.dtype).min)
        if isinstance(route, int):
            indices = torch.full_like(logits[:, :1], route, dtype=torch.long)
        elif route is not None:
            indices = route[:, None]
        else:
            indices = self.noisy(logits).argmax(-1, keepdim=True)
        return logits, torch.ones_like(logits[:, :1]), indices

    def noisy(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits, with Gumbel noise in straight-through training, where a choice is a draw."""
        if self.training and self.config.router_training == "straight_through":
            return logits - torch.empty_like(logits).exponential_().log()
        return logits


class DuoFeedForward(nn.Module):
    """A small and a large block. Each runs on the tokens that take it, and on no other."""

    def __init__(self, config: DuoLlmConfig):
        super().__init__()
        narrow = copy.copy(config)
        narrow.intermediate_size = config.small_intermediate_size
        self.small, self.big = LlamaMLP(narrow), LlamaMLP(config)

    def forward(self, hidden_states: torch.Tensor, route: torch.Tensor | int) -> torch.Tensor:
        """``[n, d]`` for tokens ``[n, d]``.

        Args:
            route: ``[n]``, or one choice for all.
        """
        if isinstance(route, int):
            if route == SKIP:
                return torch.zeros_like(hidden_states)
            return (self.big if route == BIG else self.small)(hidden_states)
        if torch.compiler.is_compiling():  # a graph has no shapes that depend on values
            return self.weighted(hidden_states, F.one_hot(route, 3).to(hidden_states.dtype))
        output = torch.zeros_like(hidden_states)
        for choice, block in ((SMALL, self.small), (BIG, self.big)):
            rows = (route == choice).nonzero()[:, 0]  # a block without tokens runs on none, so that its gradient is 0
            output = output.index_copy(0, rows, block(hidden_states[rows]).to(output.dtype))
        return output

    def weighted(self, hidden_states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Both blocks on all tokens, weighted: what training the routers needs.

        Args:
            weights: ``[n, 3]``.
        """
        weights = weights.to(hidden_states.dtype)
        small, big = self.small(hidden_states), self.big(hidden_states)
        return weights[:, SMALL, None] * small + weights[:, BIG, None] * big


class DuoDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with a choice of feed-forward blocks."""

    def __init__(self, config: DuoLlmConfig, layer_idx: int):
        nn.Module.__init__(self)
        self.hidden_size, self.config = config.hidden_size, config
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = DuoFeedForward(config)
        self.router = DuoRouter(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, route: torch.Tensor | int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states ``[B, S, d]``, and each token's choice and its cost ``[B, S]``."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        shape = hidden_states.shape[:2]
        normed = self.post_attention_layernorm(hidden_states).flatten(0, 1)
        given = route.flatten() if isinstance(route, torch.Tensor) else route
        logits, _, indices = self.router(normed, given)
        chosen, table = indices[:, 0], logits.new_tensor(self.config.costs)
        if given is None and self.training:
            weights = self._soft(logits, chosen)
            output, cost = self.mlp.weighted(normed, weights), weights @ table
        else:
            output, cost = self.mlp(normed, chosen if given is None else given), table[chosen]
        return hidden_states + output.view_as(hidden_states), chosen.view(shape), cost.view(shape)

    def _soft(self, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """``[n, 3]`` weights with a gradient: probabilities, or the choice with the gradient of its probabilities."""
        probabilities = logits.softmax(-1)
        if self.config.router_training == "expectation":
            return probabilities
        return F.one_hot(chosen, 3) - probabilities.detach() + probabilities


class DuoLlmPreTrainedModel(OwnWeights, LlamaPreTrainedModel):
    """Initialisation, and what of a forward can be recorded."""

    config: DuoLlmConfig
    config_class = DuoLlmConfig
    _no_split_modules = ["DuoDecoderLayer"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(DuoRouter, index=0),
        "hidden_states": OutputRecorder(DuoDecoderLayer, index=0),
        "attentions": LlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DuoRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class DuoLlmModel(DuoLlmPreTrainedModel):
    """The backbone."""

    def __init__(self, config: DuoLlmConfig):
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([DuoDecoderLayer(config, number) for number in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        route: Route = None,
        **kwargs: Any,
    ) -> DuoLlmModelOutput:
        """As ``LlamaModel``'s.

        Args:
            input_ids: ``[B, S]``; or ``inputs_embeds`` ``[B, S, d]``, not both.
            route: ``[B, S, L]`` choices, or a policy's name; None takes the configuration's.

        Raises:
            BadInputError: neither or both inputs were given; an unknown policy; routes of another shape, with unknown
                choices, or with skips where none are allowed.
        """
        given = inputs_embeds if input_ids is None else input_ids
        by_layer = self.routes(route, given)
        begun = begin(self, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache)
        hidden, routes, costs = begun.hidden, [], []
        for layer, choice in zip(self.layers, by_layer, strict=True):
            hidden, chosen, cost = layer(hidden, route=choice, **begun.arguments, **kwargs)
            routes.append(chosen)
            costs.append(cost)
        return DuoLlmModelOutput(
            last_hidden_state=self.norm(hidden),
            past_key_values=begun.past_key_values,
            routes=torch.stack(routes, -1),
            costs=torch.stack(costs, -1),
        )

    def routes(self, route: Route, given: torch.Tensor | None) -> list[Any]:
        """For every layer what its tokens take: one choice for all, ``[B, S]`` choices, or None for the router's."""
        config, layers = self.config, self.config.num_hidden_layers
        if route is None:
            route = config.train_route if self.training else config.route
        if isinstance(route, torch.Tensor):
            wanted = (*(given.shape[:2] if given is not None else ()), layers)
            if tuple(route.shape) != wanted or route.is_floating_point():
                raise BadInputError(
                    f"Routes are whole numbers of shape {wanted} (rows, tokens, layers); got {tuple(route.shape)}."
                )
            if route.numel() and not torch.compiler.is_compiling():
                low, high = int(route.min()), int(route.max())
                if low < SKIP or high > BIG or (low == SKIP and not config.allow_skip):
                    allowed = "0 (skip), 1 (small) and 2 (big)" if config.allow_skip else "1 (small) and 2 (big)"
                    raise BadInputError(f"Routes of this network are made of {allowed}; got {low} to {high}.")
            return list(route.unbind(-1))
        if route not in POLICIES or (route == "skip" and not config.allow_skip):
            known = [name for name in POLICIES if name != "skip" or config.allow_skip]
            raise BadInputError(f"This network has no route called {route!r}.", f"It has: {', '.join(known)}.")
        if route == "router" or given is None:
            return [None] * layers
        if route in FIXED:
            return [FIXED[route]] * layers
        shares = torch.tensor(config.route_probabilities, device=given.device)
        drawn = torch.multinomial(shares, given.shape[0] * given.shape[1] * layers, replacement=True)
        return list(drawn.view(*given.shape[:2], layers).unbind(-1))


class DuoLlmForCausalLM(DuoLlmPreTrainedModel, GenerationMixin):
    """The language model. Where routers choose in training, ``loss`` adds what their routes cost."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DuoLlmConfig):
        super().__init__(config)
        self.model = DuoLlmModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        logits_to_keep: int | torch.Tensor = 0,
        route: Route = None,
        **kwargs: Any,
    ) -> DuoLlmOutput:
        """The forward of ``LlamaForCausalLM`` with ``route``; see ``DuoLlmModel.forward`` for it and what is raised."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            route=route,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        cost = mean_cost(outputs.costs, real_tokens(attention_mask, outputs.last_hidden_state.shape[1]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
            if self.training and (self.config.train_route if route is None else route) == "router":
                loss = loss + self.cost_loss(cost)
        return DuoLlmOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            routes=outputs.routes,
            cost=cost,
        )

    def cost_loss(self, cost: torch.Tensor) -> torch.Tensor:
        """``weight * (cost - target)^2``, or ``weight * cost`` without a target."""
        target = self.config.cost_target
        return self.config.cost_weight * (cost if target is None else (cost - target) ** 2)

    def generate(self, *args: Any, route: Route = None, **kwargs: Any) -> Any:
        """transformers' ``generate``; every token is read by the policy ``route``.

        Raises:
            BadInputError: routes as a tensor, which cannot know the tokens to come.
        """
        if isinstance(route, torch.Tensor):
            raise BadInputError("Text is written by a policy, not by routes of its tokens.", "Give a policy's name.")
        return super().generate(*args, **kwargs, **({} if route is None else {"route": route}))


def mean_cost(costs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean of ``[B, S, L]`` costs over layers and real tokens.

    Args:
        mask: ``[B, S]``, false for padding; None counts all.
    """
    if mask is None:
        return costs.mean()
    weight = mask[..., None].to(costs.dtype)
    return (costs * weight).sum() / (weight.sum() * costs.shape[-1]).clamp(min=1)


register(DuoLlmConfig, DuoLlmForCausalLM, "AutoModelForCausalLM")
register(DuoLlmConfig, DuoLlmModel, "AutoModel")

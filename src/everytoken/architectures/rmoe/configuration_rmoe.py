"""The configuration of RMoE (arXiv 2408.06793): Mixtral with routers that know the earlier layers' choices."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import MixtralConfig

from ...core.errors import BadInputError, check_choices


@strict
class RMoeConfig(MixtralConfig):
    """Mixtral's settings, and those of the recurrent router.

    Args:
        router_size: width ``p`` of the routers' state.
        cell: what carries the state from layer to layer: ``"gru"``, ``"rnn"``, or ``"none"`` for a projection without
            recurrence.
        detach_state: cut the gradient between layers, so that only the values are handed on.
        moe_num_layers: the last so many layers have experts, those before are dense; None gives them to all.
        shared_expert: add a dense block beside the experts; each has half of the weight.
        pooled_balance: take the balance loss over the tokens of all layers together, as the released code does. Layers
            that are unbalanced in opposite ways then look balanced.

    Raises:
        BadInputError: settings out of range, or more choices than experts.
    """

    model_type = "rmoe"

    router_size: int = 256
    cell: str = "gru"
    detach_state: bool = False
    moe_num_layers: int | None = None
    shared_expert: bool = False
    pooled_balance: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_choices(self, cell=("gru", "rnn", "none"))
        if self.router_size < 1:
            raise BadInputError(f"router_size is at least 1; got {self.router_size}.")
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise BadInputError(
                f"A token takes 1 to {self.num_local_experts} of the experts; got {self.num_experts_per_tok}."
            )
        if self.moe_num_layers is not None and not 1 <= self.moe_num_layers <= self.num_hidden_layers:
            raise BadInputError(
                f"moe_num_layers lies between 1 and the {self.num_hidden_layers} layers; got {self.moe_num_layers}."
            )
        if self.cell == "none" and self.detach_state:
            raise BadInputError("Without a cell there is no state to detach.", "Leave detach_state at False.")
        if self.router_jitter_noise:
            raise BadInputError("RMoE's router takes no jitter noise.", "Leave router_jitter_noise at 0.")

    def has_experts(self, layer: int) -> bool:
        """Whether the layer of a number from 0 on has experts."""
        return self.moe_num_layers is None or layer >= self.num_hidden_layers - self.moe_num_layers

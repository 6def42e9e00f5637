"""The configuration of OpenMoE; the defaults are those of the paper's Base/16E (arXiv 2402.01739)."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import MixtralConfig

from ...core.errors import BadInputError, check_choices


@strict
class OpenMoeConfig(MixtralConfig):
    """Mixtral's settings (``num_local_experts``, ``num_experts_per_tok``, ...), and those of a limited capacity.

    Args:
        moe_every: every so-manieth layer has experts; 4 gives them to layers 3, 7, 11, ...
        capacity_factor_train, capacity_factor_eval: an expert serves ``floor(k * factor * tokens / E)`` choices, made
            even by adding one; None serves all.
        min_capacity: choices that an expert always serves.
        renormalise: make the weights of the chosen experts sum to 1.
        routing_group: what shares the capacity: all tokens of the ``"batch"``, or those of one ``"sequence"``. With
            ``"batch"`` the other rows change what a row gets, as in the paper.
        fill_order: who is served first within a round of choices: the earlier ``"token"``, or a ``"random"`` one.
        router_aux_loss_coef, router_z_loss_coef, output_z_loss_coef: weights of the balance loss, of the routers'
            squared log-normalisers, and of the vocabulary's.

    Raises:
        BadInputError: settings out of range, or more choices than experts.
    """

    model_type = "openmoe"

    vocab_size: int = 256384
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 12
    max_position_embeddings: int = 2048
    pad_token_id: int | None = 0
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    num_local_experts: int = 16
    moe_every: int = 4
    capacity_factor_train: float | int | None = 1.25
    capacity_factor_eval: float | int | None = 2.0
    min_capacity: int = 4
    renormalise: bool = False
    routing_group: str = "batch"
    fill_order: str = "token"
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 1e-4
    output_z_loss_coef: float = 1e-3

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_choices(self, routing_group=("batch", "sequence"), fill_order=("token", "random"))
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise BadInputError(
                f"A token takes 1 to {self.num_local_experts} of the experts; got {self.num_experts_per_tok}."
            )
        if not 1 <= self.moe_every <= self.num_hidden_layers:
            raise BadInputError(
                f"moe_every lies between 1 and the {self.num_hidden_layers} layers; got {self.moe_every}.",
                "With a larger one no layer has experts.",
            )
        for name in ("capacity_factor_train", "capacity_factor_eval"):
            factor = getattr(self, name)
            if factor is not None and factor <= 0:
                raise BadInputError(f"{name} is positive, or None for no limit; got {factor}.")
        if self.min_capacity < 0:
            raise BadInputError(f"min_capacity must not be negative; got {self.min_capacity}.")
        if self.router_jitter_noise:
            raise BadInputError("OpenMoE's router takes no jitter noise.", "Leave router_jitter_noise at 0.")

    def may_drop(self, training: bool = False) -> bool:
        """Whether some batch could lose a choice; never where one expert may serve every token."""
        factor = self.capacity_factor_train if training else self.capacity_factor_eval
        return factor is not None and factor * self.num_experts_per_tok < self.num_local_experts

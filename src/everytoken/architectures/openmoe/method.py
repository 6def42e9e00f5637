"""OpenMoE for the command line: which experts serve every token of a text, and which choices are dropped."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from transformers import PreTrainedModel

from ...core.errors import BadInputError
from ..base import Architecture, Network, Observation
from ..byte_text import VOCABULARY, byte_tokenizer, text_ids, written
from ..routed_recipe import RoutedRecipe
from ..routing import record_routing
from ..routing_traces import EXPERT_COLUMNS, expert_trace, routing_figures
from .configuration_openmoe import OpenMoeConfig
from .modeling_openmoe import OpenMoeForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class OpenMoeRecipe(RoutedRecipe):
    """OpenMoE on bytes of text.

    Args:
        moe_every: every so-manieth layer has experts.
        capacity: the factor in training; 0 for no limit.
        capacity_eval: the factor in evaluation; 0 for no limit.
        fill_order: who is served first, ``token`` or ``random``.
        routing_group: what shares the capacity, the ``batch`` or each ``sequence``.
    """

    moe_every: int = 2
    capacity: float = 1.25
    capacity_eval: float = 1.25
    fill_order: str = "token"
    routing_group: str = "batch"
    summary: ClassVar[str] = "a mixture of experts with a capacity limit, from scratch on the bytes of a text"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.config()

    def config(self) -> OpenMoeConfig:
        """The network's configuration; raises for settings that contradict each other."""
        return OpenMoeConfig(
            **self.shape(),
            num_local_experts=self.experts,
            num_experts_per_tok=self.chosen,
            moe_every=self.moe_every,
            capacity_factor_train=self.capacity or None,
            capacity_factor_eval=self.capacity_eval or None,
            fill_order=self.fill_order,
            routing_group=self.routing_group,
        )

    def begin(self, model: str | None) -> PreTrainedModel:
        self.from_scratch(model, "OpenMoE")
        return OpenMoeForCausalLM(self.config())


@dataclass
class OpenMoe(Architecture):
    """A mixture of experts whose experts serve a limited number of tokens.

    Args:
        capacity: the capacity factor on the text; None takes the network's own for evaluation, 0 sets no limit.
        fill_order: who is served first, ``"token"`` or ``"random"``; None takes the network's own.

    Raises:
        BadInputError: a negative factor or an unknown order.
    """

    capacity: float | None = None
    fill_order: str | None = None
    declares: ClassVar[Network] = Network(OpenMoeConfig, OpenMoeForCausalLM, EXPERT_COLUMNS)
    weights: ClassVar[str] = "openmoe-prose"
    headline: ClassVar[str] = "nats per token"
    example: ClassVar[str] = "The value of the expression is the object that the name is bound to."
    recipe: ClassVar[type | None] = OpenMoeRecipe

    def __post_init__(self) -> None:
        if self.capacity is not None and self.capacity < 0:
            raise BadInputError(f"capacity must not be negative; got {self.capacity}.")
        if self.fill_order not in (None, "token", "random"):
            raise BadInputError(f"fill_order is token or random; got {self.fill_order!r}.")

    @classmethod
    def tiny(cls) -> PreTrainedModel:
        """With a limit on rows of training, and none in evaluation: there rows and caches change nothing."""
        return OpenMoeForCausalLM(
            OpenMoeConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=4,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_local_experts=4,
                moe_every=2,
                min_capacity=1,
                capacity_factor_train=1.0,
                capacity_factor_eval=None,
                max_position_embeddings=128,
                eos_token_id=None,
            )
        ).eval()

    @classmethod
    def tiny_tokenizer(cls) -> PreTrainedTokenizerBase | None:
        return byte_tokenizer()

    def arms(self) -> dict[str, Architecture]:
        return {"no limit": OpenMoe(capacity=0.0)}

    def observe(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text: str, new_tokens: int = 0
    ) -> Observation:
        config, tokenizer = model.config, tokenizer or byte_tokenizer()
        ids = text_ids(model, tokenizer, text)
        own = config.capacity_factor_eval, config.fill_order
        try:
            if self.capacity is not None:
                config.capacity_factor_eval = self.capacity or None
            config.fill_order = self.fill_order or config.fill_order
            with record_routing(model) as records:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                behind = written(model, tokenizer, ids, new_tokens)
        finally:
            config.capacity_factor_eval, config.fill_order = own
        tokens = ids[0].tolist()
        traces = [
            expert_trace(record, tokens, tokenizer, f"router {number + 1} of {len(records)}")
            for number, record in enumerate(records)
        ]
        figures = routing_figures(records) | {self.headline: float(loss)}
        return Observation(traces, figures, behind, notes=[str(item.message) for item in said])

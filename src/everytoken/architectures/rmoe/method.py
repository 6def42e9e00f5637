"""RMoE for the command line: which experts serve every token, and how far each layer changes the routers' state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from transformers import PreTrainedModel

from ..base import Architecture, Network, Observation
from ..byte_text import VOCABULARY, byte_tokenizer, text_ids, written
from ..routed_recipe import RoutedRecipe, expert_tables
from ..routing import RouterRecord, record_routing
from ..routing_traces import EXPERT_COLUMNS, expert_trace, routing_figures
from .configuration_rmoe import RMoeConfig
from .modeling_rmoe import RMoeForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..training import Curves

CHANGED = "% of choices that the history changes"


@dataclass(frozen=True)
class RMoeRecipe(RoutedRecipe):
    """RMoE on bytes of text.

    Args:
        router_size: width of the routers' state.
        cell: ``gru``, ``rnn`` or ``none``.
        detach_state: cut the gradient between layers.
        balance: weight of the balance loss.
    """

    steps: int = 400
    intermediate: int = 96
    router_size: int = 48
    cell: str = "gru"
    detach_state: bool = False
    balance: float = 0.01
    summary: ClassVar[str] = "a mixture of experts with recurrent routers, from scratch on the bytes of a text"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.config()

    def config(self) -> RMoeConfig:
        """The network's configuration; raises for settings that contradict each other."""
        return RMoeConfig(
            **self.shape(),
            num_local_experts=self.experts,
            num_experts_per_tok=self.chosen,
            router_size=self.router_size,
            cell=self.cell,
            detach_state=self.detach_state,
            router_aux_loss_coef=self.balance,
        )

    def begin(self, model: str | None) -> PreTrainedModel:
        self.from_scratch(model, "RMoE")
        return RMoeForCausalLM(self.config())

    def pictures(self, model: PreTrainedModel, curves: Curves, windows: torch.Tensor) -> dict[str, str]:
        from ...core.charts import bars_svg, inline_image

        analysis = self.analysis(model, windows)
        between = {f"routers {i + 1} and {i + 2}": float(v) for i, v in enumerate(analysis.layer_information())}
        found = {}
        if between:
            chart = bars_svg(between, "nats that one choice says about the next")
            found["What neighbouring routers know of each other"] = inline_image(chart, "information between routers")
        return found | expert_tables(analysis)


@dataclass
class RMoe(Architecture):
    """A mixture of experts whose routers are joined by a recurrent cell.

    Args:
        forget: start every layer from an empty state, which shows what the routers would choose without their history.
    """

    forget: bool = False
    declares: ClassVar[Network] = Network(RMoeConfig, RMoeForCausalLM, (*EXPERT_COLUMNS, "state change"))
    weights: ClassVar[str] = "rmoe-prose"
    headline: ClassVar[str] = "nats per token"
    example: ClassVar[str] = "The value of the expression is the object that the name is bound to."
    recipe: ClassVar[type | None] = RMoeRecipe

    @classmethod
    def tiny(cls) -> PreTrainedModel:
        return RMoeForCausalLM(
            RMoeConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_local_experts=4,
                router_size=6,
                max_position_embeddings=128,
                eos_token_id=None,
                pad_token_id=0,
            )
        ).eval()

    @classmethod
    def tiny_tokenizer(cls) -> PreTrainedTokenizerBase | None:
        return byte_tokenizer()

    def arms(self) -> dict[str, Architecture]:
        return {"no history": RMoe(forget=True)}

    def observe(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text: str, new_tokens: int = 0
    ) -> Observation:
        tokenizer = tokenizer or byte_tokenizer()
        ids = text_ids(model, tokenizer, text)
        handles = [_forgets(layer) for layer in model.model.layers] if self.forget else []
        try:
            with record_routing(model) as records:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            behind = written(model, tokenizer, ids, new_tokens)
        finally:
            for handle in handles:
                handle.remove()
        traces, before = [], None
        for number, record in enumerate(records):
            trace = expert_trace(record, ids[0].tolist(), tokenizer, f"router {number + 1} of {len(records)}")
            state = record.state
            change = None if state is None else state - (0 if before is None or self.forget else before)
            trace.add("state change", [None] * len(trace) if change is None else change.norm(dim=-1))
            traces.append(trace)
            before = state
        figures = routing_figures(records) | {self.headline: float(loss)}
        if not self.forget and before is not None:
            figures[CHANGED] = 100 * self._changed(model, ids, records)
        return Observation(traces, figures, behind)

    @staticmethod
    def _changed(model: PreTrainedModel, ids: torch.Tensor, records: list[RouterRecord]) -> float:
        """The share of first choices behind the first router that the routers would not make with an empty state."""
        cell, others = model.model.router_cell, []
        gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
        inputs: list[torch.Tensor] = []
        handles = [gate.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for gate in gates]
        try:
            model.model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        for gate, given, record in list(zip(gates, inputs, records, strict=True))[1:]:
            others.append((gate(given, None, cell)[2][:, 0] != record.indices[:, 0]).float().mean())
        return float(torch.stack(others).mean()) if others else 0.0


def _forgets(layer: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
    """A hook that hands a layer no state."""
    return layer.register_forward_pre_hook(lambda _, args: (args[0], None))

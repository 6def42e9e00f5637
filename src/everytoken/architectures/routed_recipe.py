"""What the recipes of networks with routers share: how many experts there are, and what a report shows of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .byte_text import ByteRecipe, as_ids
from .routing_analysis import RoutingAnalysis
from .routing_traces import byte_name, expert_table

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .training import Curves


@dataclass(frozen=True)
class RoutedRecipe(ByteRecipe):
    """A mixture of experts on bytes of text.

    Args:
        experts, chosen: how many there are in a layer, and how many a token takes.
    """

    experts: int = 8
    chosen: int = 2

    def measure(self, model: PreTrainedModel, windows: torch.Tensor) -> dict[str, float]:
        return super().measure(model, windows) | self.analysis(model, windows).figures()

    def analysis(self, model: PreTrainedModel, windows: torch.Tensor) -> RoutingAnalysis:
        """What the routers do on held-out windows."""
        return RoutingAnalysis.from_model(model, as_ids(windows).tolist(), max_length=windows.shape[1])

    def pictures(self, model: PreTrainedModel, curves: Curves, windows: torch.Tensor) -> dict[str, str]:
        return expert_tables(self.analysis(model, windows))


def expert_tables(analysis: RoutingAnalysis) -> dict[str, str]:
    """The bytes that every router's experts take most often: title -> HTML."""
    return {
        f"Experts of router {number + 1}": expert_table(analysis, byte_name, number)
        for number in range(len(analysis.layers))
    }

"""The configuration of Duo-LLM (arXiv 2410.10846): Llama with a small feed-forward block beside each large one."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from ...core.errors import BadInputError, check_choices

SKIP, SMALL, BIG = 0, 1, 2
"""What a token takes in a layer; routes are made of these."""
POLICIES = ("random", "router", "big", "small", "skip")
"""Routes that have a name."""


@strict
class DuoLlmConfig(LlamaConfig):
    """Llama's settings (``intermediate_size`` is that of the large blocks), and those of the routes.

    Args:
        small_intermediate_size: width of the small blocks.
        allow_skip: whether a token may take neither block.
        route, train_route: the policy where a forward names none, in evaluation and in training: ``"random"``,
            ``"router"``, ``"big"``, ``"small"`` or ``"skip"``.
        route_probabilities: of skip, small and big in random routes.
        router_training: how the routers' choice gets a gradient: ``"straight_through"`` (a Gumbel choice forward, its
            probability backward), or ``"expectation"`` (all blocks, weighted by probability).
        cost_weight: weight of the routes' cost in the loss of routers.
        cost_target: mean cost a layer that the routers aim at, in units of a large block; None pushes it down.

    Raises:
        BadInputError: settings out of range, or those that contradict each other.
    """

    model_type = "duo_llm"

    small_intermediate_size: int = 1376
    allow_skip: bool = False
    route: str = "big"
    train_route: str = "random"
    route_probabilities: list[float] | tuple[float, ...] = (0.0, 0.5, 0.5)
    router_training: str = "straight_through"
    cost_weight: float = 1.0
    cost_target: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_choices(self, route=POLICIES, train_route=POLICIES, router_training=("straight_through", "expectation"))
        shares = [float(share) for share in self.route_probabilities]
        self.route_probabilities = shares
        if not 1 <= self.small_intermediate_size <= self.intermediate_size:
            raise BadInputError(
                f"The small blocks are at least 1 and at most {self.intermediate_size} wide; got "
                f"{self.small_intermediate_size}."
            )
        if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise BadInputError(
                f"route_probabilities are those of skip, small and big, which sum to 1; got {shares}.",
                "For example (0, 0.5, 0.5).",
            )
        if not self.allow_skip and (shares[SKIP] > 0 or "skip" in (self.route, self.train_route)):
            raise BadInputError("This network may not skip a block.", "Set allow_skip=True, or give skips no share.")
        if self.cost_weight < 0:
            raise BadInputError(f"cost_weight must not be negative; got {self.cost_weight}.")
        if self.cost_target is not None and not 0 <= self.cost_target <= 1:
            raise BadInputError(f"cost_target lies between 0 and 1 large blocks a layer; got {self.cost_target}.")

    @property
    def costs(self) -> tuple[float, float, float]:
        """Cost of skip, small and big, in units of a large block."""
        return (0.0, self.small_intermediate_size / self.intermediate_size, 1.0)

"""The configuration of a Mamba whose token dynamics are constrained (arXiv 2410.03292)."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import MambaConfig

from .analysis import KINDS, check_kind, check_states


@strict
class MambaDynamicsConfig(MambaConfig):
    """Mamba's settings, and which way tokens may go.

    Args:
        dynamics: ``"positive"`` lets tokens diverge only, ``"negative"`` converge only, ``"mixed"`` has half of the
            directions each way; ``"free"`` is Mamba itself.

    Raises:
        BadInputError: unknown dynamics, or more states than channels.
    """

    model_type = "mamba_dynamics"

    dynamics: str = "positive"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_kind(self.dynamics, ("free", *KINDS))
        if self.dynamics != "free":
            check_states(self.state_size, self.intermediate_size)

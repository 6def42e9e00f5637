"""The shape of an MrT5: that of a T5, with a gate before one of the encoder's blocks."""

from __future__ import annotations

from typing import Any

from transformers import T5Config

from ...core.errors import BadInputError


class MrT5Config(T5Config):
    """A T5 with a delete gate.

    Args:
        delete_gate_layer: l, the encoder block (from 0) before which the gate stands; that block works with it already.
        delete_gate_scale: k, below 0: the gate's value G of a byte lies in (k, 0); 0 keeps, k deletes.
        delete_threshold: a byte is kept where G lies above; None is k / 2.
        softmax_1: all attention may attend to nothing: ``exp(x_i) / (1 + sum_j exp(x_j))``.
        deletion_weight: alpha, how much the mean of G counts in the loss; a controller replaces it.
        scores_weight: beta, how much attention scores above 5 count in the loss, behind the gate. Without it a network
            that learns from scratch may raise all scores until k no longer matters.
        kwargs: of ``T5Config``.

    Raises:
        BadInputError: settings that contradict each other.
    """

    model_type = "mrt5"

    delete_gate_layer: int = 3
    delete_gate_scale: float = -30.0
    delete_threshold: float | None = None
    softmax_1: bool = True
    deletion_weight: float = 0.0
    scores_weight: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not 0 <= self.delete_gate_layer < self.num_layers:
            raise BadInputError(
                f"The gate stands before one of the encoder's {self.num_layers} blocks, 0 to {self.num_layers - 1}; "
                f"got delete_gate_layer={self.delete_gate_layer}."
            )
        if self.delete_gate_scale >= 0:
            raise BadInputError(f"delete_gate_scale is below 0; got {self.delete_gate_scale}.")
        if not self.delete_gate_scale < self.threshold < 0:
            raise BadInputError(
                f"delete_threshold lies between delete_gate_scale and 0, {self.delete_gate_scale} and 0; got "
                f"{self.threshold}.",
                "Leave it out for half of the scale.",
            )
        if self.deletion_weight < 0 or self.scores_weight < 0:
            raise BadInputError("deletion_weight and scores_weight are 0 or more.")

    @property
    def threshold(self) -> float:
        """A byte is kept where G lies above."""
        return self.delete_gate_scale / 2 if self.delete_threshold is None else self.delete_threshold

"""Arguments of TRL's trainers that a trainer here cannot honour: each is refused by its name, before any work.

A trainer lists them as ``{name: (value, why)}``: the value that asks for nothing, and why another is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

from ..core.errors import BadInputError

if TYPE_CHECKING:
    from transformers import TrainingArguments

Refusals: TypeAlias = Mapping[str, tuple[object, str]]

EVERYWHERE: Refusals = {
    "label_smoothing_factor": (0.0, "it belongs to a cross-entropy over whole logits, which are never built here"),
    "use_liger_kernel": (False, "the head is fused here already"),
    "liger_kernel_config": (None, "the head is fused here already"),
}
"""What no trainer of this package honours."""


def check_arguments(trainer: str, args: TrainingArguments | None, refusals: Refusals, model: object = None) -> None:
    """Refuses settings that would change nothing.

    Args:
        trainer: its name, for the message.
        args: the configuration, or None for TRL's default one.
        refusals: beyond ``EVERYWHERE``.
        model: as given to the trainer: what says how to load a model is refused beside a loaded one.

    Raises:
        BadInputError: it names the first such setting.
    """
    if args is None:
        return
    for name, (nothing, why) in {**EVERYWHERE, **refusals}.items():
        value = getattr(args, name, nothing)
        if value is not None and value != nothing:
            raise BadInputError(f"{trainer} does not support {name}={value!r}: {why}.", f"Leave {name} out.")
    if getattr(args, "model_init_kwargs", None) is not None and not isinstance(model, str):
        raise BadInputError(
            f"{trainer} got model_init_kwargs beside a loaded model, which they cannot change.",
            "Give the model by its name, or load it with these arguments.",
        )

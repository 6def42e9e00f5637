"""Draft models for speculative decoding, and the trained one of the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import EverytokenError, UnsupportedModelError
from ...core.loading import quiet_transformers
from ...core.weights import check_no_pickle, weights_folder, weights_for

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from .modeling_feature_draft import FeatureDraftForCausalLM

EMBEDDED_DRAFT = "dyspec-smollm2-135m"


def draft_folder() -> Path:
    """The folder of the embedded model's draft: see ``core.weights``."""
    return weights_folder(EMBEDDED_DRAFT)


def check_draft_ships(config: PreTrainedConfig) -> Path:
    """The folder of the draft that ships for a model of this configuration.

    Raises:
        UnsupportedModelError: none does.
    """
    folder = weights_for(config, "draft")
    if folder is None:
        raise UnsupportedModelError(
            f"No draft model ships for this {config.get_text_config().model_type} model.",
            "Pass a small causal language model with the same tokenizer, or train a feature draft with "
            "scripts/train_draft.py.",
        )
    return folder


def load_draft(target: PreTrainedModel, folder: str | Path | None = None) -> FeatureDraftForCausalLM:
    """A feature draft attached to ``target``: the one that ships for this model, or one from ``folder``.

    Raises:
        UnsupportedModelError: no draft ships for this model.
        EverytokenError: the folder holds no draft, or one that is not saved as safetensors.
    """
    from .modeling_feature_draft import FeatureDraftForCausalLM

    path = Path(folder).expanduser() if folder is not None else check_draft_ships(target.config)
    check_no_pickle(path)
    if not (path / "model.safetensors").is_file():
        raise EverytokenError(
            f"{path} holds no draft (no model.safetensors).", "Train one with scripts/train_draft.py."
        )
    with quiet_transformers():
        draft = FeatureDraftForCausalLM.from_pretrained(path, dtype=target.dtype, use_safetensors=True)
    return draft.attach(target).eval()


def check_feature_target(draft: PreTrainedModel, target: PreTrainedModel) -> bool:
    """Whether ``draft`` is a ``FeatureDraftForCausalLM``, which reads its target's hidden states and weights.

    Raises:
        UnsupportedModelError: it is, and accelerate offloads the target's weights.
    """
    from ...decoding.inputs import is_offloaded
    from .modeling_feature_draft import FeatureDraftForCausalLM

    if not isinstance(draft, FeatureDraftForCausalLM):
        return False
    if is_offloaded(target):
        raise UnsupportedModelError(
            "A feature draft computes with its target's embeddings and head; this target's weights are offloaded.",
            "Use a plain causal language model as the draft.",
        )
    return True

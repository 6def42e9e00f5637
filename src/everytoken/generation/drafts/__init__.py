"""Draft models for speculative decoding, and the trained one of the embedded model."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import EverytokenError, UnsupportedModelError
from ...core.loading import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .modeling_feature_draft import FeatureDraftForCausalLM

EMBEDDED_DRAFT = "smollm2-135m"


def draft_folder() -> Path:
    """The folder of the shipped draft: ``model.safetensors``, ``config.json`` and ``training.json`` (its curve)."""
    return Path(str(files(__package__).joinpath(EMBEDDED_DRAFT)))


def load_draft(target: PreTrainedModel, folder: str | Path | None = None) -> FeatureDraftForCausalLM:
    """A feature draft attached to ``target``: the shipped one for the embedded model, or one from ``folder``.

    Raises:
        UnsupportedModelError: no draft ships for this model.
        EverytokenError: the folder holds no draft.
    """
    from .modeling_feature_draft import FeatureDraftForCausalLM

    path = Path(folder) if folder is not None else draft_folder()
    if folder is None:
        config = target.config.get_text_config()
        shape = (config.model_type, config.hidden_size, config.num_hidden_layers, config.vocab_size)
        if shape != ("llama", 576, 30, 49152):
            raise UnsupportedModelError(
                f"No draft model ships for this {config.model_type} model.",
                "Pass draft_model=..., a small causal language model with the same tokenizer, or train a feature draft with "
                "scripts/train_draft.py.",
            )
    if not (path / "model.safetensors").is_file():
        raise EverytokenError(
            f"{path} holds no draft (no model.safetensors).", "Train one with scripts/train_draft.py."
        )
    with quiet_transformers():
        draft = FeatureDraftForCausalLM.from_pretrained(path, dtype=target.dtype)
    return draft.attach(target).eval()

"""Draft models for speculative decoding, and the trained one of the embedded model."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import EverytokenError, UnsupportedModelError
from ...core.loading import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from .modeling_feature_draft import FeatureDraftForCausalLM

EMBEDDED_DRAFT = "smollm2-135m"


def draft_folder() -> Path:
    """The folder of the shipped draft: ``model.safetensors``, ``config.json`` and ``training.json`` (its curve)."""
    return Path(str(files(__package__).joinpath(EMBEDDED_DRAFT)))


def check_draft_ships(config: PreTrainedConfig) -> None:
    """Raises UnsupportedModelError unless a draft ships for a model of this configuration."""
    text = config.get_text_config()
    if (text.model_type, text.hidden_size, text.num_hidden_layers, text.vocab_size) != ("llama", 576, 30, 49152):
        raise UnsupportedModelError(
            f"No draft model ships for this {text.model_type} model.",
            "Pass a small causal language model with the same tokenizer, or train a feature draft with "
            "scripts/train_draft.py.",
        )


def load_draft(target: PreTrainedModel, folder: str | Path | None = None) -> FeatureDraftForCausalLM:
    """A feature draft attached to ``target``: the shipped one for the embedded model, or one from ``folder``.

    Raises:
        UnsupportedModelError: no draft ships for this model.
        EverytokenError: the folder holds no draft.
    """
    from .modeling_feature_draft import FeatureDraftForCausalLM

    path = Path(folder) if folder is not None else draft_folder()
    if folder is None:
        check_draft_ships(target.config)
    if not (path / "model.safetensors").is_file():
        raise EverytokenError(
            f"{path} holds no draft (no model.safetensors).", "Train one with scripts/train_draft.py."
        )
    with quiet_transformers():
        draft = FeatureDraftForCausalLM.from_pretrained(path, dtype=target.dtype)
    return draft.attach(target).eval()

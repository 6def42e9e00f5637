"""Draft models for speculative decoding, and the trained one of the embedded model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.converted import cache_dir
from ...core.errors import EverytokenError, UnsupportedModelError
from ...core.loading import load_model
from ...core.quiet import quiet_transformers
from ...core.settings import read_text
from ...core.weights import SAFETENSORS, check_no_pickle, weights_folder, weights_for

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
            "Train one (everytoken train dyspec --model ...), or pass a small causal language model with the same "
            "tokenizer.",
        )
    return folder


def trained_draft_folder(target: PreTrainedModel) -> Path:
    """Where a draft that the user trains for ``target`` is kept: in the cache, by the model's shape and weights.

    A few weights that every way of loading leaves alone are rounded to bfloat16 and hashed, so the folder is the same
    for every dtype of the target.
    """
    import torch

    config, embedding = target.config.get_text_config(), target.get_input_embeddings()
    rows = embedding.weight[:: max(len(embedding.weight) // 64, 1)]
    norms = [weight for _, weight in sorted(target.named_parameters()) if weight.dim() == 1][-8:]
    seen = hashlib.sha256()
    for weight in (rows, *norms):
        seen.update(weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    size = f"{getattr(config, 'hidden_size', 0)}x{getattr(config, 'num_hidden_layers', 0)}"
    return cache_dir() / "drafts" / f"{config.model_type}-{size}-{seen.hexdigest()[:16]}"


def find_draft(target: PreTrainedModel) -> Path | None:
    """The folder of the draft that was trained for ``target``, or that ships for it; None if there is none."""
    from ...decoding.inputs import is_offloaded

    if not is_offloaded(target):
        folder = trained_draft_folder(target)
        if (folder / SAFETENSORS).is_file():
            return folder
    return weights_for(target.config, "draft")


def load_named_draft(target: PreTrainedModel, name: str | Path) -> PreTrainedModel:
    """A folder's feature draft, attached to ``target``, or the causal language model of a folder or hub id."""
    from ...decoding.inputs import device_of
    from .configuration_feature_draft import FeatureDraftConfig

    config = Path(name).expanduser() / "config.json"
    if config.is_file() and json.loads(read_text(config)).get("model_type") == FeatureDraftConfig.model_type:
        return load_draft(target, name)
    return load_model(name, dtype=target.dtype, device=device_of(target))


def load_draft(target: PreTrainedModel, folder: str | Path | None = None) -> FeatureDraftForCausalLM:
    """A feature draft attached to ``target``: from ``folder``, else the one that was trained for it or ships for it.

    Raises:
        UnsupportedModelError: none was trained, and none ships for this model.
        EverytokenError: the folder holds no draft, or one that is not saved as safetensors.
    """
    from .modeling_feature_draft import FeatureDraftForCausalLM

    path = Path(folder).expanduser() if folder is not None else find_draft(target) or check_draft_ships(target.config)
    check_no_pickle(path)
    if not (path / "model.safetensors").is_file():
        raise EverytokenError(
            f"{path} holds no draft (no model.safetensors).", "Train one: everytoken train dyspec --model ..."
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

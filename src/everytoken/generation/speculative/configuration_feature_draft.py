"""Configuration of the feature draft (see ``modeling_feature_draft``)."""

from __future__ import annotations

from transformers import LlamaConfig


class FeatureDraftConfig(LlamaConfig):
    """A Llama-shaped configuration of one decoder block plus what ties it to its target.

    Args:
        feature_layers: indices into the target's ``hidden_states`` (0 is the embedding output, ``num_hidden_layers``
            the normalised last state) that the draft reads at every verified position.
        draft_vocab_size: number of frequent tokens that the draft's head covers.
        target_vocab_size: vocabulary size of the target; logits are scattered into that size.
    """

    model_type = "feature_draft"

    feature_layers: list[int] | None = None
    draft_vocab_size: int = 8192
    target_vocab_size: int = 49152

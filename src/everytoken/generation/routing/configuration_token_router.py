"""Configuration of the token router (see ``modeling_token_router``)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class TokenRouterConfig(PretrainedConfig):
    """Sizes of a router and the threshold chosen for it.

    Args:
        state_size: size of the small model's hidden states.
        embedding_size: size of its token embeddings.
        top_logits: logits read, the largest first.
        width, num_blocks, expansion: of the residual network; the paper's are 1024, 6 and 4.
        dropout: in its blocks, while training.
        threshold: probability from which a token counts as divergent.
        small_model, large_model: what it was trained for, for the reader.
    """

    model_type = "token_router"

    def __init__(
        self,
        state_size: int = 576,
        embedding_size: int = 576,
        top_logits: int = 100,
        width: int = 1024,
        num_blocks: int = 6,
        expansion: int = 4,
        dropout: float = 0.1,
        threshold: float = 0.5,
        small_model: str = "",
        large_model: str = "",
        **kwargs: Any,
    ):
        self.state_size, self.embedding_size, self.top_logits = state_size, embedding_size, top_logits
        self.width, self.num_blocks, self.expansion = width, num_blocks, expansion
        self.dropout, self.threshold = dropout, threshold
        self.small_model, self.large_model = small_model, large_model
        super().__init__(**kwargs)

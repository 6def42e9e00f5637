"""Token router: does this token of the small model send the reasoning another way? (R2R, arXiv 2505.21600)

With the small model's last hidden state h, the embedding e_y of the token y that it chose, and its largest logits l in
falling order::

    x = W_in [h ; e_y ; W_l l]          x <- x + MLP(LayerNorm(x)), several times          p = sigmoid(w LayerNorm(x))

Inputs are normalised to unit root mean square first (a choice of ours: sizes of states and logits differ between models
by orders of magnitude), and logits are taken relative to the largest.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .configuration_token_router import TokenRouterConfig


class RouterBlock(nn.Module):
    """A pre-norm residual block of two layers."""

    def __init__(self, config: TokenRouterConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, config.expansion * config.width)
        self.down = nn.Linear(config.expansion * config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(self.dropout(F.gelu(self.up(self.norm(x))))))


class TokenRouter(PreTrainedModel):
    """``(hidden [N, D], embedding [N, E], logits [N, K]) -> [N]``: the logit of "divergent"."""

    config_class = TokenRouterConfig
    base_model_prefix = "router"

    def __init__(self, config: TokenRouterConfig):
        super().__init__(config)
        self.read_logits = nn.Linear(config.top_logits, config.state_size)
        self.entry = nn.Linear(2 * config.state_size + config.embedding_size, config.width)
        self.blocks = nn.ModuleList(RouterBlock(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.width)
        self.exit = nn.Linear(config.width, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The logit of "divergent" for each of N tokens.

        Args:
            hidden: ``[N, state_size]`` the small model's last hidden states (the head's input).
            embedding: ``[N, embedding_size]`` input embeddings of the tokens it chose.
            logits: ``[N, top_logits]`` its largest logits, in falling order.
        """
        dtype = self.entry.weight.dtype
        logits = self.read_logits((logits - logits[:, :1]).float().clamp(min=-50).to(dtype) / 10)
        parts = [F.rms_norm(part.to(dtype), part.shape[-1:]) for part in (hidden, embedding)]
        x = self.entry(torch.cat([*parts, logits], -1))
        for block in self.blocks:
            x = block(x)
        return self.exit(self.norm(x))[:, 0]


def top_logits(logits: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` largest of ``[N, V]``, falling; a smaller vocabulary is filled up with its lowest."""
    top = logits.float().topk(min(count, logits.shape[-1]), -1).values
    return torch.cat([top, top[:, -1:].expand(-1, count - top.shape[-1])], -1)

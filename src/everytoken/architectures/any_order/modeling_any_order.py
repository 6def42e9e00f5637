"""AnyOrderLM: a transformer that reads a text from both sides and predicts every position of it.

Layers are pre-norm with rotary positions. The mask is the caller's: ``[B, T]`` for padding, or ``[B, T, T]`` (bool,
True where row i may see column j) for any order. With two streams a position can be predicted without its token::

    content   h_i = attend(h_i; h_j that i may see, and i itself)         query   g_i = attend(g_i; h_j that i may see)

so that one forward gives all conditionals ``p(x_i | x_j, j before i)`` of an order (XLNet, arXiv 1906.08237).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils.generic import can_return_tuple

from ...core.errors import BadInputError
from ..base import OwnWeights, register
from .configuration_any_order import AnyOrderConfig


@dataclass
class AnyOrderOutput(MaskedLMOutput):
    """Logits ``[B, T, V]``, of a query stream ``[B, K, V]``, and of a stop head ``stop_logits [B, 2]``."""

    stop_logits: torch.Tensor | None = None


Angles = tuple[torch.Tensor, torch.Tensor]


def _rotated(x: torch.Tensor, angles: Angles) -> torch.Tensor:
    """``[B, H, T, D]`` turned by the angles of its positions."""
    cos, sin = (part[:, None] for part in angles)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class AnyOrderAttention(nn.Module):
    """Attention of some rows to the content stream."""

    def __init__(self, config: AnyOrderConfig):
        super().__init__()
        self.config, self.heads = config, config.num_attention_heads
        width = config.hidden_size
        self.q_proj, self.k_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.v_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(
        self, rows: torch.Tensor, content: torch.Tensor, visible: torch.Tensor, here: Angles, there: Angles
    ) -> torch.Tensor:
        """``[B, K, d]`` for rows ``[B, K, d]`` that see what ``visible [B, 1, K, T]`` says of the content."""

        def split(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k = _rotated(split(self.q_proj(rows)), here), _rotated(split(self.k_proj(content)), there)
        v = split(self.v_proj(content))
        if self.config._attn_implementation == "eager":
            scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
            weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32)
            found = weights.to(v.dtype) @ v
        else:
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.o_proj(found.transpose(1, 2).flatten(2))


class AnyOrderMLP(nn.Module):
    """A gated feed-forward block."""

    def __init__(self, config: AnyOrderConfig):
        super().__init__()
        assert config.intermediate_size is not None
        inner = config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return found


class AnyOrderLayer(GradientCheckpointingLayer):
    """One layer, for one stream or two with the same weights."""

    def __init__(self, config: AnyOrderConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = AnyOrderAttention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = AnyOrderMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        content: torch.Tensor,
        query: torch.Tensor | None,
        visible: torch.Tensor,
        query_visible: torch.Tensor | None,
        angles: Angles,
        query_angles: Angles | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        normed = self.attention_norm(content)
        if query is not None:
            assert query_visible is not None and query_angles is not None
            sees = query_visible.any(-1, keepdim=True)  # [B, 1, K, 1]; a row that sees nothing gets nothing
            found = self.attention(self.attention_norm(query), normed, query_visible | ~sees, query_angles, angles)
            query = query + self.dropout(found * sees[:, 0].to(found.dtype))
            query = query + self.dropout(self.mlp(self.mlp_norm(query)))
        content = content + self.dropout(self.attention(normed, normed, visible, angles, angles))
        return content + self.dropout(self.mlp(self.mlp_norm(content))), query


class AnyOrderLM(OwnWeights, PreTrainedModel, GenerationMixin):
    """The network; see the module's docstring.

    ``generate`` takes a sampler: ``model.generate(ids, max_new_tokens=32, custom_generate=DenoisingSampler())``.
    """

    config_class = AnyOrderConfig
    config: AnyOrderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["AnyOrderLayer"]
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: AnyOrderConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([AnyOrderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.query = nn.Parameter(torch.zeros(config.hidden_size)) if config.streams == 2 else None
        self.stop_head = nn.Linear(config.hidden_size, 2) if config.stop_head else None
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if module is self and self.query is not None:
            init.normal_(self.query, std=self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value  # type: ignore[assignment]

    def _angles(self, positions: torch.Tensor, dtype: torch.dtype) -> Angles:
        half = self.config.hidden_size // self.config.num_attention_heads // 2
        rates = self.config.rope_theta ** (-torch.arange(half, device=positions.device).float() / half)
        angles = positions[..., None].float() * rates
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _visible(self, attention_mask: torch.Tensor | None, rows: int, length: int, device: Any) -> torch.Tensor:
        """``[B, 1, T, T]`` bool; every position sees itself, so that no row of padding is empty."""
        own = torch.eye(length, dtype=torch.bool, device=device)
        if attention_mask is None:
            return torch.ones_like(own)[None, None].expand(rows, 1, length, length)
        if attention_mask.dim() == 2:
            return attention_mask.bool()[:, None, None, :] | own
        mask = attention_mask if attention_mask.dim() == 4 else attention_mask[:, None]
        if mask.dtype.is_floating_point:  # additive
            mask = mask >= 0
        return mask.bool() | own

    @staticmethod
    def _first(content: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """``[B, d]``, the state of each row's first token, behind padding on the left."""
        if attention_mask is None or attention_mask.dim() != 2:
            return content[:, 0]
        return content[torch.arange(len(content), device=content.device), attention_mask.long().argmax(1)]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        perm_mask: torch.Tensor | None = None,
        target_mapping: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        stop_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> AnyOrderOutput:
        """Logits, and the loss of ``labels``.

        Args:
            input_ids: ``[B, T]``, or ``inputs_embeds [B, T, d]``.
            attention_mask: ``[B, T]``, 1 where there is a token; or ``[B, T, T]`` or ``[B, 1, T, T]``, bool (True is
                visible) or additive.
            position_ids: ``[B, T]``; None counts the tokens that are there.
            perm_mask: ``[B, T, T]``, 1 where row i must not see column j; needs two streams. The content stream sees
                itself all the same.
            target_mapping: ``[B, K, T]`` one-hot, the positions that the query stream predicts; None predicts all.
            labels: ``[B, T]``, or ``[B, K]`` with ``target_mapping``; -100 is left out. Nothing is shifted but by
                ``config.shift_logits``.
            stop_labels: ``[B]``, 0 where nothing is missing and 1 elsewhere; their loss is added.

        Raises:
            BadInputError: neither ids nor embeddings or both, an order for a network of one stream, or stop labels
                without a stop head.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise BadInputError("Give input_ids or inputs_embeds, and not both.")
        if perm_mask is not None and self.query is None:
            raise BadInputError(
                "perm_mask needs a query stream, and this network has one stream.", "Make it with streams=2."
            )
        if target_mapping is not None and perm_mask is None:
            raise BadInputError("target_mapping names rows of the query stream.", "Give perm_mask too.")
        if stop_labels is not None and self.stop_head is None:
            raise BadInputError("This network has no stop head.", "Make it with stop_head=True.")
        content = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rows, length = content.shape[:2]
        if position_ids is None:
            if attention_mask is not None and attention_mask.dim() == 2:
                position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            else:
                position_ids = torch.arange(length, device=content.device).expand(rows, length)
        angles = self._angles(position_ids, content.dtype)
        visible = self._visible(attention_mask, rows, length, content.device)
        query, query_visible, query_angles = None, None, None
        if perm_mask is not None:
            assert self.query is not None
            seen = perm_mask == 0
            if attention_mask is not None and attention_mask.dim() == 2:
                seen = seen & attention_mask.bool()[:, None]
            visible = (seen | torch.eye(length, dtype=torch.bool, device=content.device))[:, None]
            where = position_ids
            if target_mapping is not None:
                place = target_mapping.argmax(-1)
                where = position_ids.gather(1, place)
                seen = seen.gather(1, place[..., None].expand(-1, -1, length))
            query_visible, query_angles = seen[:, None], self._angles(where, content.dtype)
            query = self.query.to(content.dtype).expand(rows, where.shape[1], -1)
        for layer in self.layers:
            content, query = layer(content, query, visible, query_visible, angles, query_angles)
        hidden = self.norm(content if query is None else query)
        logits = self.lm_head(hidden)
        stop = None
        if self.stop_head is not None:
            stop = self.stop_head(self.norm(self._first(content, attention_mask)))
        loss = None
        if labels is not None:
            aligned = labels
            shown = logits
            if self.config.shift_logits:
                shown, aligned = logits[:, :-1], labels[:, 1:]
            loss = F.cross_entropy(shown.flatten(0, 1).float(), aligned.flatten(), ignore_index=-100)
        if stop_labels is not None:
            assert stop is not None
            ends = F.cross_entropy(stop.float(), stop_labels)
            loss = ends if loss is None else loss + ends
        return AnyOrderOutput(loss=loss, logits=logits, stop_logits=stop)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' ``generate``, by a sampler.

        Raises:
            BadInputError: without one; this network does not write from left to right.
        """
        if not callable(kwargs.get("custom_generate")):
            raise BadInputError(
                "This network writes in any order, which plain generate does not.",
                "Give a sampler: custom_generate=DenoisingSampler().",
            )
        return super().generate(*args, **kwargs)


register(AnyOrderConfig, AnyOrderLM, "AutoModelForMaskedLM")

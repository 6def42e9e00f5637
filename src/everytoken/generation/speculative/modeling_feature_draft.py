"""Feature draft: one transformer block that predicts the target's next token from the target's own hidden states.

A draft that sees only the text must redo in miniature what the target has just computed. This one reads it instead: at
position ``i`` its input is the embedding of token ``x_i`` and the target's hidden states at ``i - 1`` (several layers),
and its output predicts ``x_{i+1}``. Where the target has not been yet (inside a drafted tree), the draft's own output
at ``i - 1`` stands in for the missing states. This is the family of EAGLE (arXiv 2401.15077) and EAGLE-3 (arXiv
2503.01840).

Embeddings and output head are the target's (the head restricted to the most frequent tokens), so the weights on disk
are one block and a few projections. ``attach`` ties a draft to its target; without it the model cannot run.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from ...core.errors import UnsupportedModelError
from ...core.packing import pack_linears
from .configuration_feature_draft import FeatureDraftConfig

if TYPE_CHECKING:
    from transformers import Cache

FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "ln_final", "final_norm")


def decoder_parts(target: PreTrainedModel) -> tuple[nn.ModuleList, nn.Module]:
    """A model's blocks, and the module that gives its last state: the norm behind them, or the last block.

    Raises:
        UnsupportedModelError: it has no list of as many blocks as its configuration says.
    """
    depth = getattr(target.config.get_text_config(decoder=True), "num_hidden_layers", None)
    for parent in target.get_decoder().modules():
        for child in parent.children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                norms = [
                    getattr(parent, name) for name in FINAL_NORMS if isinstance(getattr(parent, name, None), nn.Module)
                ]
                return child, norms[0] if norms else child[-1]
    raise UnsupportedModelError(
        f"A feature draft reads the states between a model's blocks; {type(target).__name__} shows no list of "
        f"{depth} blocks.",
        "Use a plain causal language model as draft, or draft_model='text'.",
    )


class FeatureTap:
    """Records the hidden states of a model's last forwards by position, through forward hooks.

    Positions are absolute; a later forward over the same positions overwrites them, as a cropped cache would.

    Args:
        hooked: by hooks on the target; otherwise whoever calls the target hands its states to ``see``.

    Attributes:
        last: ``[B, q, len(layers) * hidden]`` features of the most recent forward.
    """

    def __init__(self, target: PreTrainedModel, layers: list[int], hooked: bool = True):
        blocks, last = decoder_parts(target)
        self.layers = list(layers)
        self.last: Any = None
        self._thread = threading.get_ident()
        self._parts: dict[int, torch.Tensor] = {}
        self._handles = []
        for layer in self.layers if hooked else ():
            module = last if layer == len(blocks) else blocks[layer - 1]
            self._handles.append(module.register_forward_hook(self._recorder(layer)))

    def _recorder(self, layer: int) -> Any:
        def record(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if threading.get_ident() != self._thread:  # the target may serve another thread meanwhile
                return
            self._parts[layer] = output[0] if isinstance(output, tuple) else output
            if len(self._parts) == len(self.layers):
                self.last = torch.cat([self._parts[key] for key in self.layers], dim=-1)
                self._parts = {}

        return record

    def see(self, states: torch.Tensor) -> None:
        """Takes what a forward without hooks computed: ``[L + 1, q, hidden]``, as ``hidden_states`` are numbered."""
        self.last = torch.cat([states[layer] for layer in self.layers], dim=-1)[None]

    def remove(self) -> None:
        """Takes the hooks off the target."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class FeatureDraftForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    """A draft model for speculative decoding that reads its target's hidden states.

    Use it with ``DySpec`` (which feeds ``features`` itself), or as ``assistant_model`` of transformers' assisted
    generation after ``attach(target, follow=True)``: then features are picked up from the target's own forwards by
    position.
    """

    config_class = FeatureDraftConfig
    base_model_prefix = "draft"
    _no_split_modules = ["LlamaDecoderLayer"]

    def __init__(self, config: FeatureDraftConfig):
        super().__init__(config)
        hidden = config.hidden_size
        n_features = len(config.feature_layers or [])
        self.embed_norm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
        self.feature_norms = nn.ModuleList(LlamaRMSNorm(hidden, eps=config.rms_norm_eps) for _ in range(n_features))
        self.embed_proj = nn.Linear(hidden, hidden, bias=False)
        self.feature_proj = nn.Linear(n_features * hidden, hidden, bias=False)
        self.hidden_proj = nn.Linear(hidden, hidden, bias=False)
        self.block = LlamaDecoderLayer(config, layer_idx=0)
        self.norm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.register_buffer("draft_token_ids", torch.arange(config.draft_vocab_size, dtype=torch.int32))
        self._target: list[Any] = []
        self._head_layer: list[nn.Linear] = []
        self._follow: _Follower | None = None
        self.post_init()

    # -- the tie to the target -----------------------------------------------------------------------------------------
    def attach(self, target: PreTrainedModel, follow: bool = False) -> FeatureDraftForCausalLM:
        """Takes embeddings and head rows from ``target`` (shared, not copied to disk).

        Args:
            target: the model to draft for; hidden size and vocabulary must match the configuration.
            follow: also hook the target, so that plain ``forward(input_ids)`` calls find the target's features by
                position (what transformers' assisted generation needs).

        Raises:
            ValueError: the target's hidden size or vocabulary is not the one that this draft was trained for.
        """
        embedding, head = target.get_input_embeddings(), target.get_output_embeddings()
        if embedding.weight.shape != (self.config.target_vocab_size, self.config.hidden_size):
            raise ValueError(
                f"This draft was trained for a target with vocabulary {self.config.target_vocab_size} and hidden size "
                f"{self.config.hidden_size}; got {tuple(embedding.weight.shape)}. Train one for this target "
                "(everytoken train dyspec), or pass a small causal language model with the same tokenizer."
            )
        self.to(device=head.weight.device, dtype=head.weight.dtype)
        self._target = [target, embedding]
        rows = head.weight.detach()[self.draft_token_ids.long()].contiguous()
        bias = getattr(head, "bias", None)
        layer = nn.Linear(rows.shape[1], rows.shape[0], bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(rows, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach()[self.draft_token_ids.long()].contiguous(), requires_grad=False)
        self._head_layer = [layer]  # in a list: the target's weights are not this module's to save
        if not self.training:
            pack_linears(self)
            pack_linears(layer.eval())
        if self._follow is not None:
            self._follow.remove()
        self._follow = _Follower(target, self.config.feature_layers) if follow else None
        return self

    def detach_target(self) -> None:
        """Forgets the target and removes every hook."""
        if self._follow is not None:
            self._follow.remove()
        self._target, self._head_layer, self._follow = [], [], None

    @property
    def _head(self) -> torch.Tensor | None:
        """The target's head rows for the draft's vocabulary, ``[draft_vocab_size, D]``; None while detached."""
        return self._head_layer[0].weight if self._head_layer else None

    def get_input_embeddings(self) -> nn.Module | None:
        return self._target[1] if self._target else None

    # -- forward -------------------------------------------------------------------------------------------------------
    def mix_inputs(
        self, embeds: torch.Tensor, features: torch.Tensor | None, hidden: torch.Tensor | None, has_features: Any = None
    ) -> torch.Tensor:
        """The block's input ``[B, q, D]`` from token embeddings and the previous position's states.

        Args:
            embeds: ``[B, q, D]`` target embeddings of the tokens at these positions.
            features: ``[B, q, len(feature_layers) * D]`` target states one position earlier, or None.
            hidden: ``[B, q, D]`` the draft's own output one position earlier, or None.
            has_features: ``[B, q]`` bool, where both are given: which of the two holds.
        """
        mixed = self.embed_proj(self.embed_norm(embeds))
        from_features = from_hidden = None
        if features is not None:
            parts = features.chunk(len(self.feature_norms), dim=-1)
            normed = [norm(part) for norm, part in zip(self.feature_norms, parts, strict=True)]
            from_features = self.feature_proj(torch.cat(normed, dim=-1))
        if hidden is not None:
            from_hidden = self.hidden_proj(hidden)
        if from_features is not None and from_hidden is not None:
            return mixed + torch.where(has_features[..., None], from_features, from_hidden)
        state = from_features if from_features is not None else from_hidden
        return mixed if state is None else mixed + state

    def run_block(
        self,
        inputs: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """The transformer block and the final norm: ``[B, q, D] -> [B, q, D]``."""
        rope = self.rotary_emb(inputs, position_ids=position_ids)
        output = self.block(
            inputs,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            position_embeddings=rope,
        )
        return self.norm(output[0] if isinstance(output, tuple) else output)

    def forward(
        self,
        input_ids: torch.Tensor,
        features: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = True,
        logits_to_keep: int = 0,
        reduced_logits: bool = False,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Draft logits and states.

        Args:
            input_ids: ``[B, q]`` tokens.
            features: ``[B, q, F]`` the target's states one position earlier (zeros for the first position of a text).
            hidden: ``[B, q, D]`` the draft's own states one position earlier, where ``features`` is None.
            attention_mask: None (causal), or a boolean ``[B, 1, q, kv]`` (a tree). A 2D mask must be all ones.
            position_ids: ``[B, q]``; default continues the cache.
            past_key_values: a transformers cache of one layer.
            logits_to_keep: 0 for all positions, or the number of last ones.
            reduced_logits: return ``[B, q, draft_vocab_size]`` in the order of ``draft_token_ids`` instead of
                scattering into the target's vocabulary (tokens outside the draft's vocabulary get the dtype's lowest
                value).

        Raises:
            RuntimeError: the draft is not attached to a target.
        """
        if self._head is None:
            raise RuntimeError("This draft has no target yet: call draft.attach(target) first.")
        batch, length = input_ids.shape
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        if position_ids is None:
            position_ids = (torch.arange(length, device=input_ids.device) + past_length)[None].expand(batch, -1)
        if attention_mask is None or attention_mask.dim() == 2:
            if attention_mask is not None and not bool(attention_mask.bool().all()):
                raise ValueError("A feature draft takes no padding: decode one prompt at a time.")
            attention_mask = None
            if length > 1:
                attention_mask = torch.ones(length, past_length + length, dtype=torch.bool, device=input_ids.device)
                attention_mask = attention_mask.tril(past_length)[None, None]
        has_features = None
        if features is None and hidden is None and self._follow is not None:
            features, hidden, has_features = self._follow.lookup(self, input_ids, past_length)
        embeds = self._target[1](input_ids)
        states = self.run_block(
            self.mix_inputs(embeds, features, hidden, has_features), position_ids, attention_mask, past_key_values
        )
        if self._follow is not None:
            self._follow.remember(states, past_length)
        kept = states[:, -logits_to_keep:] if logits_to_keep else states
        logits = self._head_layer[0](kept)
        if not reduced_logits:
            full = logits.new_full((*logits.shape[:-1], self.config.target_vocab_size), torch.finfo(logits.dtype).min)
            logits = full.index_copy_(-1, self.draft_token_ids.long(), logits)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values, hidden_states=(states,))

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, past_key_values: Cache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        return {
            "input_ids": input_ids[:, past_length:],
            "past_key_values": past_key_values,
            "use_cache": True,
            "logits_to_keep": 1,
        }


class _Follower:
    """Remembers the target's features and the draft's states by position, for callers that pass neither."""

    def __init__(self, target: PreTrainedModel, layers: list[int]):
        self.tap = FeatureTap(target, layers)
        self.features: Any = None
        self.feature_ids: Any = None
        self.states: Any = None
        self.state_ids: Any = None
        self._start = 0
        backbone = target.base_model
        self._handles = [
            backbone.register_forward_pre_hook(self._before, with_kwargs=True),
            backbone.register_forward_hook(self._after, with_kwargs=True),
        ]

    def _before(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        self._start = cache.get_seq_length() if cache is not None else 0

    def _after(self, _module: nn.Module, args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.features = _write(self.features, self._start, self.tap.last)
        self.feature_ids = _write(self.feature_ids, self._start, ids)

    def lookup(self, draft: FeatureDraftForCausalLM, input_ids: torch.Tensor, start: int) -> tuple[Any, ...]:
        """States one position before each of ``input_ids``, which begin at absolute position ``start``."""
        batch, length = input_ids.shape
        self.state_ids = _write(self.state_ids, start, input_ids)
        width = len(draft.feature_norms) * draft.config.hidden_size
        assert draft._head is not None
        dtype = draft._head.dtype
        features = torch.zeros(batch, length, width, dtype=dtype, device=input_ids.device)
        hidden = torch.zeros(batch, length, draft.config.hidden_size, dtype=dtype, device=input_ids.device)
        known = torch.ones(batch, length, dtype=torch.bool, device=input_ids.device)
        for offset in range(length):
            previous = start + offset - 1
            if previous < 0:
                continue
            seen = self.feature_ids is not None and previous < self.feature_ids.shape[1]
            if seen and bool((self.feature_ids[:, previous] == self.state_ids[:, previous]).all()):
                features[:, offset] = self.features[:, previous].to(dtype)
            else:
                known[:, offset] = False
                if self.states is not None and previous < self.states.shape[1]:
                    hidden[:, offset] = self.states[:, previous]
        return features, hidden, known

    def remember(self, states: torch.Tensor, start: int) -> None:
        self.states = _write(self.states, start, states.detach())

    def remove(self) -> None:
        self.tap.remove()
        for handle in self._handles:
            handle.remove()


def _write(store: torch.Tensor | None, start: int, values: Any) -> torch.Tensor:
    """``values`` placed at ``start`` along dimension 1; what lay beyond is dropped."""
    values = values.detach()
    if store is None or start == 0:
        return values
    return torch.cat([store[:, :start], values], dim=1)

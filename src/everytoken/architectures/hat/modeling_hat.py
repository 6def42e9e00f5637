"""HAT: a byte-level encoder makes one vector of each word, a causal backbone reads those, and a byte-level decoder
spells the next word (arXiv 2501.10322, the paper's variant).

A text is a row of symbols, bytes with [W] behind every word and one [W] in front::

    e_i = W_in encoder([W] c_1 .. c_n)          read at [W]; attention inside the word, both ways
    p_i = backbone(e_1 .. e_i)                  causal over words
    decoder(W_out p_i, c_1, c_2, ..)            attention inside word i + 1, causal: predicts c_1, c_2, .., [W]

Position t of the logits predicts symbol t + 1, as in every causal language model of transformers: at [W] the decoder
reads ``W_out p`` of the word that ends there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, DynamicCache, GenerationMixin, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ...core.errors import BadInputError, UnsupportedModelError
from ..base import OwnWeights, register
from .configuration_hat import SYMBOLS, WORD_END, HATConfig
from .tokenization_hat import HATTokenizer


@dataclass
class WordLayout:
    """Where the words of rows of symbols lie.

    Attributes:
        real: ``[B, L]``, False for padding.
        ends: ``[B, L]``, True at every [W].
        started: ``[B, L]`` words that ended at or before a symbol: what its decoder reads belongs to this word.
        offset: ``[B, L]`` place in the decoder's word: 0 at the [W] before it, 1 at its first byte.
        counts: ``[B]`` words that ended.
    """

    real: torch.Tensor
    ends: torch.Tensor
    started: torch.Tensor
    offset: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, mask: torch.Tensor | None) -> WordLayout:
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        ends = (ids == WORD_END) & real
        started = ends.cumsum(1)
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        first = real.to(torch.int8).argmax(1, keepdim=True)
        last_end = torch.where(ends, places, first - 1).cummax(1).values
        return cls(real, ends, started, (places - last_end).clamp_min(0), started[:, -1])

    def end_places(self) -> torch.Tensor:
        """``[B, T]`` places of each row's [W]s, ascending; behind a row's last one they mean nothing."""
        longest = max(int(self.counts.max()), 1)
        return (~self.ends).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]


def allowed(group: torch.Tensor, real: torch.Tensor, causal: bool, dtype: torch.dtype) -> torch.Tensor:
    """``[B, 1, L, L]``: 0 where a symbol may attend to another of its group, the lowest number elsewhere."""
    same = (group[:, :, None] == group[:, None, :]) & real[:, None, :]
    if causal:
        same = same & torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril()
    return torch.where(same, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


class HATCache(DynamicCache):
    """The backbone's keys and values, and what the decoder needs of the words so far.

    Attributes:
        filled: ``[B, N]``, True where a slot holds a word of that row; rows end words at different steps.
        counts: ``[B]`` words of each row.
        last: ``[B, d]`` ``W_out p`` of each row's last word.
    """

    filled: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    last: torch.Tensor | None = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.filled, self.counts, self.last = (
            None if item is None else item.index_select(0, beam_idx) for item in (self.filled, self.counts, self.last)
        )


class HATForCausalLM(OwnWeights, PreTrainedModel, GenerationMixin):
    """A language model without a vocabulary: symbols are bytes and the ends of words.

    Its tokenizer is ``HATTokenizer``. With ``past_key_values`` a forward takes the whole row and gives the logits of
    its last position alone: the backbone reads new words only, and the decoder the word that is being written.
    """

    config_class = HATConfig
    config: HATConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["LlamaDecoderLayer"]

    def __init__(self, config: HATConfig):
        super().__init__(config)
        self.encoder, self.decoder = LlamaModel(config.encoder_config), LlamaModel(config.decoder_config)
        self.backbone = LlamaModel(config.backbone_config)
        self.backbone.embed_tokens = None  # it reads vectors of words alone
        widths = [part.hidden_size for part in (config.encoder_config, config.backbone_config, config.decoder_config)]
        self.word_in = nn.Linear(widths[0], widths[1], bias=False)
        self.word_out = nn.Linear(widths[1], widths[2], bias=False)
        self.lm_head = nn.Linear(widths[2], SYMBOLS, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: HATCache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, L, 256]`` of the next symbol, and the mean loss of ``labels`` (the ids, -100 for none).

        Args:
            input_ids: ``[B, L]``; always the whole row, with a cache too.
            attention_mask: ``[B, L]``, 0 for padding on either side.
            past_key_values: of an earlier forward on the start of these rows.

        Raises:
            BadInputError: embeddings in place of ids, another shape of mask, a word or a row beyond its limit.
            UnsupportedModelError: another kind of cache.
        """
        if input_ids is None or inputs_embeds is not None:
            raise BadInputError("HAT finds words from bytes: give input_ids, not inputs_embeds.")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise BadInputError(f"attention_mask must be [B, L], {tuple(input_ids.shape)}.")
        layout = WordLayout.of(input_ids, attention_mask)
        self._check_limits(layout)
        if past_key_values is not None and not isinstance(past_key_values, HATCache):
            raise UnsupportedModelError(f"HAT keeps words in a HATCache, not in a {type(past_key_values).__name__}.")
        cache = past_key_values if past_key_values is not None or not use_cache else HATCache()
        if cache is not None and cache.counts is not None:
            logits = self._next(input_ids, layout, cache)
        else:
            words = self._words(self._encoded(input_ids, layout), layout, cache)
            hidden = self._spelt(input_ids, layout, words)
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self._capped(self.lm_head(hidden[:, keep]), layout.offset[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=SYMBOLS, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _check_limits(self, layout: WordLayout) -> None:
        longest, words = int((layout.offset * layout.real).max()), int(layout.counts.max())
        if longest > self.config.max_word_bytes:
            raise BadInputError(
                f"A word has {longest} bytes; this network reads {self.config.max_word_bytes}.",
                "Let HATTokenizer(max_word_bytes=...) cut words.",
            )
        if words > (limit := self.config.backbone_config.max_position_embeddings):
            raise BadInputError(f"A text has {words:,} words; this network reads {limit:,}.", "Cut it.")

    def _capped(self, logits: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """A word as long as it may be can only end."""
        others = torch.arange(SYMBOLS, device=logits.device) != WORD_END
        full = (offset >= self.config.max_word_bytes)[..., None] & others
        return logits.masked_fill(full, torch.finfo(logits.dtype).min)

    # -- the three parts -----------------------------------------------------------------------------------------------
    def _encoded(self, ids: torch.Tensor, layout: WordLayout) -> torch.Tensor:
        """The encoder's states at every [W], as ``[B, T, D]`` for the backbone."""
        embeds = self.encoder.embed_tokens(ids)
        group = layout.started - layout.ends.long()  # a [W] belongs to the word that it ends
        mask = allowed(group, layout.real, False, embeds.dtype)
        places = torch.where(layout.ends, 0, layout.offset)
        states = self.encoder(
            inputs_embeds=embeds, attention_mask=mask, position_ids=places, use_cache=False
        ).last_hidden_state
        index = layout.end_places()[..., None].expand(-1, -1, states.shape[-1])
        return self.word_in(states.gather(1, index))

    def _words(self, words: torch.Tensor, layout: WordLayout, cache: HATCache | None) -> torch.Tensor:
        """``W_out p`` of every word, ``[B, T, d]``; fills an empty cache."""
        filled = torch.arange(words.shape[1], device=words.device) < layout.counts[:, None]
        states = self.backbone(
            inputs_embeds=words, attention_mask=filled, past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state
        states = self.word_out(states)
        if cache is not None:
            cache.filled, cache.counts = filled, layout.counts
            cache.last = states[torch.arange(len(states), device=states.device), (layout.counts - 1).clamp_min(0)]
        return states

    def _spelt(self, ids: torch.Tensor, layout: WordLayout, words: torch.Tensor) -> torch.Tensor:
        """The decoder's states ``[B, L, d]``."""
        embeds = self.decoder.embed_tokens(ids)
        index = (layout.started - 1).clamp_min(0)[..., None].expand(-1, -1, words.shape[-1])
        embeds = torch.where(layout.ends[..., None], words.gather(1, index), embeds)
        mask = allowed(layout.started, layout.real, True, embeds.dtype)
        return self.decoder(
            inputs_embeds=embeds, attention_mask=mask, position_ids=layout.offset, use_cache=False
        ).last_hidden_state

    def _next(self, ids: torch.Tensor, layout: WordLayout, cache: HATCache) -> torch.Tensor:
        """Logits ``[B, 1, 256]`` of the last position, from a cache: new words pass the backbone, the current one the
        decoder.
        """
        assert cache.counts is not None and cache.filled is not None and cache.last is not None
        rows, device = torch.arange(len(ids), device=ids.device), ids.device
        new = int((layout.counts - cache.counts).max())
        if new > 0:
            number = cache.counts[:, None] + torch.arange(new, device=device)  # of each new word in its row
            there = number < layout.counts[:, None]
            places = layout.end_places()
            ends = places.gather(1, number.clamp_max(places.shape[1] - 1))
            vectors = self.word_in(self._encode_words(ids, layout, ends))
            cache.filled = torch.cat([cache.filled, there], 1)
            states = self.backbone(
                inputs_embeds=vectors,
                attention_mask=cache.filled,
                position_ids=number,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            last = (there.sum(1) - 1).clamp_min(0)
            cache.last = torch.where(there.any(1)[:, None], self.word_out(states[rows, last]), cache.last)
            cache.counts = layout.counts
        # the current word: its [W], then its bytes so far
        length = layout.offset[:, -1]
        steps = torch.arange(int(length.max()) + 1, device=device)
        index = (ids.shape[1] - 1 - length)[:, None] + steps
        embeds = self.decoder.embed_tokens(ids.gather(1, index.clamp(0, ids.shape[1] - 1)))
        opened = (steps == 0) & (cache.counts > 0)[:, None]
        embeds = torch.where(opened[..., None], cache.last[:, None], embeds)
        known = (steps <= length[:, None]) & ((steps > 0) | opened)
        mask = allowed(torch.zeros_like(index), known, True, embeds.dtype)
        positions = steps.expand_as(index)
        hidden = self.decoder(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state[rows, length]
        return self._capped(self.lm_head(hidden), length)[:, None]

    def _encode_words(self, ids: torch.Tensor, layout: WordLayout, ends: torch.Tensor) -> torch.Tensor:
        """The encoder's states ``[B, M, d]`` of words that end at ``ends`` ``[B, M]``, each word a row of its own."""
        before = (ends - 1).clamp_min(0)
        lengths = torch.where(ends > 0, layout.offset.gather(1, before), 0)  # bytes; 0 of an empty word
        steps = torch.arange(int(lengths.max()) + 1, device=ids.device)
        index = (ends[..., None] - steps).clamp_min(0)  # [W] first, then the bytes from the last to the first
        symbols = ids.gather(1, index.flatten(1)).reshape(-1, len(steps))
        lengths = lengths.reshape(-1, 1)
        places = torch.where(steps == 0, 0, lengths - steps + 1).clamp_min(0)
        real = steps <= lengths
        embeds = self.encoder.embed_tokens(symbols)
        mask = allowed(torch.zeros_like(symbols), real, False, embeds.dtype)
        states = self.encoder(
            inputs_embeds=embeds, attention_mask=mask, position_ids=places, use_cache=False
        ).last_hidden_state[:, 0]
        return states.reshape(*ends.shape, -1)

    # -- generation ----------------------------------------------------------------------------------------------------
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: HATCache | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> bool:
        given = model_kwargs.get("past_key_values")
        if generation_config.cache_implementation is not None or not isinstance(given, (HATCache, type(None))):
            what = generation_config.cache_implementation or type(given).__name__
            raise UnsupportedModelError(f"HAT keeps words in a HATCache, not in a {what} cache.")
        if generation_config.use_cache and given is None:
            model_kwargs["past_key_values"] = HATCache()
        return False


register(HATConfig, HATForCausalLM, "AutoModelForCausalLM", "AutoModel")
AutoTokenizer.register(HATConfig, slow_tokenizer_class=HATTokenizer, exist_ok=True)

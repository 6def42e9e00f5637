"""A lexinvariant language model: no symbol has a vector of its own (arXiv 2305.16349).

Every sequence b draws a fresh table ``E [V, d]`` with entries from N(0, 1/d), which is never a weight::

    u_t = sqrt(d) E[x_t]          h = decoder(u)          logits_t = scale * h_t E^T          the same E

The same symbol has one vector within a sequence and another in the next, so its meaning must come from the context.
Renaming the symbols changes nothing: ``E'[pi(v)] = E[v]`` gives the same logits under their new names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ...core.errors import BadInputError
from ..base import OwnWeights, register
from .configuration_lexinvariant import LexinvariantConfig
from .symbols import LexinvariantEmbedding

if TYPE_CHECKING:
    from transformers import Cache


@dataclass
class LexinvariantOutput(CausalLMOutputWithPast):
    """Logits, and of a network with a probe ``probe_logits [B, L, probe_symbols]``: which symbol each one is."""

    probe_logits: torch.Tensor | None = None


class LexinvariantForCausalLM(OwnWeights, PreTrainedModel, GenerationMixin):
    """A decoder of transformers around tables that are drawn.

    Without ``table_seeds`` every row of every forward draws anew, by torch's generator: in training this is the method.
    ``generate`` draws once a prompt and keeps it.
    """

    config_class = LexinvariantConfig
    config: LexinvariantConfig
    base_model_prefix = "decoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: LexinvariantConfig):
        super().__init__(config)
        self.decoder = AutoModel.from_config(config.decoder_config)
        self.decoder.set_input_embeddings(None)
        self.symbols = LexinvariantEmbedding(config.vocab_size, config.hidden_size, orthogonal=config.orthogonal)
        learned = config.vocab_size if config.random_share < 1 else config.learned_symbols
        self.learned = nn.Embedding(learned, config.hidden_size) if learned else None
        self.scale = nn.Parameter(torch.ones(()))
        self.probe = nn.Linear(config.hidden_size, config.probe_symbols) if config.probe_symbols else None
        self._kept: tuple[list[int], torch.Tensor] | None = None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is getattr(self, "learned", None) and module is not None:
            init.normal_(module.weight, std=self.config.hidden_size**-0.5)  # as those that are drawn
        if module is self:
            init.constant_(module.scale, 0.3)  # nearly uniform at first: rows of length 1 would be sure at random

    def get_input_embeddings(self) -> nn.Module:
        return self.symbols

    # -- tables --------------------------------------------------------------------------------------------------------
    def draw_seeds(self, batch: int) -> torch.Tensor:
        """``[batch]`` fresh seeds by torch's generator, others on every process of a distributed run."""
        seeds = torch.randint(0, 2**31 - 1, (batch,))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            seeds = (seeds + 7919 * torch.distributed.get_rank()) % (2**31 - 1)
        return seeds

    def table(self, seeds: torch.Tensor) -> torch.Tensor:
        """The tables ``[B, V, d]`` of rows with these seeds, learned rows put in as the configuration says.

        Raises:
            BadInputError: tables that are too large together.
        """
        config, count = self.config, len(seeds) * self.config.vocab_size * self.config.hidden_size
        if count > config.largest_table:
            raise BadInputError(
                f"{len(seeds)} tables of {config.vocab_size:,} x {config.hidden_size} have {count:,} numbers.",
                f"Take fewer rows a batch, or raise largest_table ({config.largest_table:,}).",
            )
        share = config.random_share if self.training or config.random_share == 1 else 0.0
        key = seeds.tolist()
        if self._kept is not None and self._kept[0] == key and not self.training and self.learned is None:
            return self._kept[1]
        table = self.symbols.sample(seeds).to(self.scale.device, self.scale.dtype)
        if self.learned is None:
            self._kept = None if self.training else (key, table)
            return table
        known = nn.functional.pad(self.learned.weight, (0, 0, 0, config.vocab_size - len(self.learned.weight)))
        shape = (1, 1) if config.random_kind == "sequences" else (config.vocab_size, 1)
        drawn = torch.stack([
            torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < share for seed in key
        ])  # fmt: skip
        drawn = drawn.expand(-1, config.vocab_size, 1).clone()
        drawn[:, : config.learned_symbols] = False
        return torch.where(drawn.to(table.device), table, known)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        table_seeds: torch.Tensor | None = None,
        symbol_table: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        position_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> LexinvariantOutput:
        """Logits ``[B, L, V]`` and the loss of ``labels``.

        Args:
            input_ids: ``[B, L]``.
            table_seeds: ``[B]``, one a row: the same seed is the same table. None draws.
            symbol_table: ``[B, V, d]`` in place of drawn ones.

        Raises:
            BadInputError: embeddings in place of ids, ids beyond the alphabet, seeds or a table of another shape, or a
                cache without either of them.
        """
        if input_ids is None or inputs_embeds is not None:
            raise BadInputError("The table that embeds a text gives its logits too: give input_ids, not inputs_embeds.")
        batch, (symbols, width) = len(input_ids), (self.config.vocab_size, self.config.hidden_size)
        if not torch.compiler.is_compiling() and input_ids.numel() and int(input_ids.max()) >= symbols:
            raise BadInputError(
                f"The text has symbol {int(input_ids.max())}; this alphabet has {symbols}.",
                "config.vocab_size may be raised: no weight depends on it.",
            )
        if symbol_table is None:
            if table_seeds is None and past_key_values is not None and past_key_values.get_seq_length():
                raise BadInputError("A cache holds a text under one table.", "Give the table_seeds that it began with.")
            seeds = self.draw_seeds(batch) if table_seeds is None else table_seeds
            if seeds.shape != (batch,):
                raise BadInputError(f"table_seeds are one a row, [{batch}]; got {tuple(seeds.shape)}.")
            symbol_table = self.table(seeds)
        elif symbol_table.shape != (batch, symbols, width):
            raise BadInputError(
                f"symbol_table must be [B, V, d], {(batch, symbols, width)}; got {tuple(symbol_table.shape)}."
            )
        output = self.decoder(
            inputs_embeds=self.symbols.embed(symbol_table, input_ids),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = output.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.symbols.logits(symbol_table, hidden[:, keep]) * self.scale
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=symbols, **kwargs)
        return LexinvariantOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            probe_logits=None if self.probe is None else self.probe(hidden.detach()),
        )

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' ``generate``; each prompt draws one table, which all of its beams and samples share."""
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if ids is not None and kwargs.get("table_seeds") is None and kwargs.get("symbol_table") is None:
            kwargs["table_seeds"] = self.draw_seeds(len(ids))
        return super().generate(inputs, *args, **kwargs)


register(LexinvariantConfig, LexinvariantForCausalLM, "AutoModelForCausalLM", "AutoModel")

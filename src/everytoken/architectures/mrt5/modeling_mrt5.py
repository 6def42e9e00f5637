"""MrT5: a T5 over bytes whose encoder deletes those that it needs no longer (arXiv 2410.20771).

A gate stands before encoder block l. With h ``[B, S, d]`` the states that enter it::

    G = k sigmoid(-(W . norm(h) + b))           [B, S], in (k, 0): 0 keeps a byte, k deletes it
    soft    score_ij <- score_ij + G_j          in every later self-attention and all cross-attention
    hard    bytes with G <= threshold leave     hidden states, mask and position bias are gathered
    loss    cross-entropy + alpha mean(G) + beta mean(max(score, 5) - 5)

Training deletes softly, evaluation hard; ``hard_delete`` chooses. All attention is ``softmax_1``, which may attend to
nothing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import T5ForConditionalGeneration
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.t5.modeling_t5 import T5PreTrainedModel, T5Stack
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...core.errors import BadInputError, UnsupportedModelError
from ..base import OwnWeights, register
from .configuration_mrt5 import MrT5Config
from .deletion import SUFFIX, DeleteGate, compacted

if TYPE_CHECKING:
    from torch import nn
    from transformers import Cache


@dataclass
class MrT5EncoderOutput(BaseModelOutput):
    """What the encoder leaves.

    Attributes:
        last_hidden_state: ``[B, M, d]``; M is S where deletion was soft.
        delete_gate: G ``[B, S]``.
        kept_positions: ``[B, M]`` places in the full text, -1 in unused slots; None where deletion was soft.
        encoder_mask: ``[B, M]``, True for a real byte that is left.
        text_mask: ``[B, S]``, True for a real byte.
    """

    delete_gate: torch.Tensor | None = None
    kept_positions: torch.Tensor | None = None
    encoder_mask: torch.Tensor | None = None
    text_mask: torch.Tensor | None = None


@dataclass
class MrT5Output(Seq2SeqLMOutput):
    """T5's output with the encoder's ``delete_gate`` and ``kept_positions``; see ``MrT5EncoderOutput``."""

    delete_gate: torch.Tensor | None = None
    kept_positions: torch.Tensor | None = None


class MrT5PreTrainedModel(OwnWeights, T5PreTrainedModel):
    """T5 whose attention may attend to nothing, whichever of eager and sdpa is asked for."""

    config_class = MrT5Config
    config: MrT5Config
    _supports_flex_attn = False
    _supports_flash_attn = False

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Takes eager and sdpa, and gives their names with ``softmax_1`` where the configuration asks for it.

        Raises:
            UnsupportedModelError: another implementation.
        """
        plain = None if requested_attention is None else requested_attention.removesuffix(SUFFIX)
        if plain not in (None, "eager", "sdpa"):
            raise UnsupportedModelError(f"MrT5 runs with eager or sdpa attention, not with {plain}.")
        found = super().get_correct_attn_implementation(plain, is_init_check)
        return found + SUFFIX if self.config.softmax_1 else found

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeleteGate):
            init.xavier_uniform_(module.linear.weight)
            init.constant_(module.linear.bias, 1.0)  # a new gate keeps


class MrT5Decoder(MrT5PreTrainedModel, T5Stack):
    """T5's decoder with ``softmax_1``."""


class MrT5Encoder(MrT5PreTrainedModel, T5Stack):
    """T5's encoder with the gate before one of its blocks."""

    def __init__(self, config: MrT5Config):
        super().__init__(config)
        self.delete_gate = DeleteGate(config.d_model, config.delete_gate_scale, config.layer_norm_epsilon)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        hard_delete: bool | None = None,
        delete_gate: torch.Tensor | None = None,
        scores_excess: list[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> MrT5EncoderOutput:
        """Reads a text and deletes.

        Args:
            input_ids: ``[B, S]``; or ``inputs_embeds`` ``[B, S, d]``.
            attention_mask: ``[B, S]``, 0 for padding.
            hard_delete: None deletes softly in training and hard in evaluation.
            delete_gate: G ``[B, S]`` in place of the learned gate's: zeros delete nothing.
            scores_excess: filled with what the scores loss needs.

        Raises:
            BadInputError: both or neither of ids and embeddings, a mask that is not ``[B, S]``, or a gate of another
                shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise BadInputError("Give input_ids or inputs_embeds, one of them.")
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = text_mask = self._checked_mask(states, attention_mask, delete_gate)
        hard = not self.training if hard_delete is None else hard_delete
        bias_mask = create_bidirectional_mask(self.config, states, None if attention_mask is None else mask)
        states, position_bias, kept, gate = self.dropout(states), None, None, delete_gate
        for number, block in enumerate(self.block):
            if number == self.config.delete_gate_layer:
                gate = (
                    self.delete_gate(states, mask) if gate is None else torch.where(mask, gate, self.delete_gate.scale)
                )
                if position_bias is None:
                    position_bias = block.layer[0].SelfAttention.compute_bias(*states.shape[1:2] * 2, states.device)
                if hard:
                    kept = compacted(gate, mask, self.config.threshold)
                    states, mask, position_bias = kept.hidden(states), kept.mask, kept.bias(position_bias)
                    bias_mask = create_bidirectional_mask(self.config, states, mask)
                else:
                    bias_mask = additive_mask(mask, gate, states.dtype)
                kwargs["scores_excess"] = scores_excess  # the gate is seen from here on
            states, position_bias, _ = block(states, bias_mask, position_bias, None, None, None, **kwargs)
        states = self.dropout(self.final_layer_norm(states))
        return MrT5EncoderOutput(
            last_hidden_state=states,
            delete_gate=gate,
            kept_positions=None if kept is None else kept.positions,
            encoder_mask=mask,
            text_mask=text_mask,
        )

    def _checked_mask(
        self, states: torch.Tensor, attention_mask: torch.Tensor | None, gate: torch.Tensor | None
    ) -> torch.Tensor:
        shape = states.shape[:2]
        for name, tensor in (("attention_mask", attention_mask), ("delete_gate", gate)):
            if tensor is not None and tensor.shape != shape:
                raise BadInputError(f"{name} must be [B, S], {tuple(shape)}; got {tuple(tensor.shape)}.")
        if attention_mask is None:
            return torch.ones(shape, dtype=torch.bool, device=states.device)
        return attention_mask.bool()


def additive_mask(mask: torch.Tensor, gate: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[B, 1, 1, S]``: what soft deletion adds to the scores of every byte; the lowest number where it is padding."""
    return torch.where(mask, gate.to(dtype), torch.finfo(dtype).min)[:, None, None]


class MrT5ForConditionalGeneration(MrT5PreTrainedModel, T5ForConditionalGeneration):
    """A byte-level T5 that deletes bytes inside its encoder; used as transformers' T5 is.

    ``deletion_weight`` is alpha, which ``DeletionController`` moves; ``deletion_share`` is the share of real bytes that
    the last forward deleted.
    """

    def __init__(self, config: MrT5Config):
        super().__init__(config)
        plain: Any = self
        encoder, decoder = copy.deepcopy(plain.encoder.config), copy.deepcopy(plain.decoder.config)
        self.encoder: MrT5Encoder = MrT5Encoder(encoder)
        self.decoder: MrT5Decoder = MrT5Decoder(decoder)
        self.deletion_weight = config.deletion_weight
        self.deletion_share: torch.Tensor | None = None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        hard_delete: bool | None = None,
        delete_gate: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MrT5Output:
        """As ``T5ForConditionalGeneration.forward``, with ``hard_delete`` and ``delete_gate`` of the encoder.

        In training mode the loss has the terms of alpha and beta; in evaluation it is the cross-entropy alone.

        Raises:
            BadInputError: see ``MrT5Encoder.forward``; or a scores loss together with gradient checkpointing.
        """
        beta = self.config.scores_weight if self.training and labels is not None else 0.0
        if beta and self.encoder.gradient_checkpointing:
            raise BadInputError(
                "The scores loss needs all scores: scores_weight cannot go with gradient checkpointing."
            )
        excess: list[torch.Tensor] | None = [] if beta else None
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                hard_delete=hard_delete,
                delete_gate=delete_gate,
                scores_excess=excess,
                **kwargs,
            )
        gate: Any = None
        kept: Any = None
        real: Any = None
        left: Any = None
        if isinstance(encoder_outputs, MrT5EncoderOutput):
            gate, kept, real = encoder_outputs.delete_gate, encoder_outputs.kept_positions, encoder_outputs.text_mask
            # generate hands on the mask of the full text: the encoder's own says what is left of it
            left = encoder_outputs.encoder_mask
            attention_mask = additive_mask(real, gate, encoder_outputs[0].dtype) if kept is None else left
            remaining = (gate > self.config.threshold) & real if kept is None else left
            self.deletion_share = (1 - remaining.sum() / real.sum().clamp_min(1)).detach()
        if excess is not None:
            kwargs["scores_excess"] = excess
        output = super().forward(
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            decoder_inputs_embeds=decoder_inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        if output.loss is not None and self.training and gate is not None:
            output.loss = output.loss + self.deletion_weight * (gate * real).sum() / real.sum().clamp_min(1)
            if excess:
                output.loss = output.loss + beta * torch.stack(excess).mean()
        return MrT5Output(**output, delete_gate=gate, kept_positions=kept)


register(MrT5Config, MrT5ForConditionalGeneration, "AutoModelForSeq2SeqLM", "AutoModel")

"""Token-Shuffle around any causal language model: fewer positions for images, the same loss (arXiv 2504.17789).

A row is text, ``<boi>``, the H W tokens of an image in raster order, ``<eoi>``. The backbone reads text as ever, and
each window of the image as one position. The state at ``<boi>`` gives the first window, the state of a window the
next::

    backbone:  text  <boi>    u_1      u_2    ..  u_M    <eoi>        u_m = TokenShuffle(window m)
    predicts:        window 1 window 2 ..     ..  <eoi>               TokenUnshuffle, then the backbone's own head

Logits stand where those of every causal model stand: position p predicts token p + 1, image tokens in raster order
too. So ``labels`` are the ids, and the loss is the mean over all tokens of text and images.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ...core.errors import BadInputError, UnsupportedModelError
from ...core.modes import evaluating
from ...core.progress import Report, silent
from ...core.quiet import quiet_transformers
from ..base import OwnWeights, register
from ..grid import Grid
from .configuration_token_shuffle import TokenShuffleConfig
from .layout import FusedLayout, Grids
from .sampling import ImageGeneration, Sampling, draw_images
from .shuffle import ResidualMLP, TokenShuffle, TokenUnshuffle


class TokenShuffleForConditionalGeneration(OwnWeights, PreTrainedModel):
    """A causal model that reads and writes images by windows.

    ``from_backbone`` puts it around a trained language model, or around that of a stage before.

    Raises:
        UnsupportedModelError: a backbone whose logits are not its head of its last hidden state.
    """

    config_class = TokenShuffleConfig
    config: TokenShuffleConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: TokenShuffleConfig):
        super().__init__(config)
        self.backbone = AutoModelForCausalLM.from_config(config.backbone_config)
        window: Grid = tuple(config.window)  # type: ignore[arg-type,assignment]
        modules = (config.hidden_size, window, config.num_blocks, config.block_ratio)
        self.shuffle = TokenShuffle(*modules, config.fuse_activation)
        self.unshuffle = TokenUnshuffle(*modules)
        self.post_init()
        check_head(self.backbone)

    @classmethod
    def from_backbone(
        cls, backbone: PreTrainedModel, new_image_tokens: int | None = None, **settings: Any
    ) -> TokenShuffleForConditionalGeneration:
        """A network around a causal language model, whose weights it takes over.

        Args:
            backbone: any that takes ``inputs_embeds``; its embeddings grow where tokens are new.
            new_image_tokens: puts ``<boi>``, ``<eoi>`` and so many image tokens behind its vocabulary. None: it is the
                backbone of a stage before and has them; say by the settings where.
            settings: of ``TokenShuffleConfig``.

        Raises:
            BadInputError: settings that contradict each other.
            UnsupportedModelError: a backbone whose logits are not its head of its last hidden state.
        """
        check_head(backbone)
        if new_image_tokens is not None:
            known = backbone.get_input_embeddings().num_embeddings
            given = backbone.config.pad_token_id
            new = {"boi_token_id": known, "eoi_token_id": known + 1, "image_token_start": known + 2}
            if clash := sorted({*new, "num_image_tokens"} & settings.keys()):
                raise BadInputError(
                    f"new_image_tokens says where new tokens are, and {', '.join(clash)} too.", "Leave these out."
                )
            settings = {"pad_token_id": given} | settings | new | {"num_image_tokens": new_image_tokens}
            grown = copy.deepcopy(backbone.config)
            grown.vocab_size = known + 2 + new_image_tokens
            TokenShuffleConfig(backbone_config=grown, **settings)  # refuses before the backbone is changed
            with quiet_transformers():
                backbone.resize_token_embeddings(grown.vocab_size)
        config = TokenShuffleConfig(backbone_config=backbone.config, **settings)
        with torch.device("meta"):
            network = cls._from_config(config)
        network.backbone = backbone
        for part in (network.shuffle, network.unshuffle):
            part.to_empty(device=backbone.device).to(backbone.dtype).apply(network._init_weights)
        return network.train(backbone.training)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if isinstance(module, nn.Linear):  # the size of what passes stays, whatever the width of a piece
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ResidualMLP):  # after its maps: a block begins near the identity
            init.normal_(module.down.weight, std=0.1 * module.down.in_features**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def is_image(self, ids: torch.Tensor) -> torch.Tensor:
        """True for image tokens."""
        first = self.config.image_token_start
        assert first is not None
        return (ids >= first) & (ids < first + self.config.num_image_tokens)

    # -- forward -------------------------------------------------------------------------------------------------------
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        grid: Grids | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, L, V]`` of the next token, and the mean loss of ``labels`` (the ids, -100 for none).

        Args:
            input_ids: ``[B, L]``, images whole and in raster order, each behind ``<boi>``.
            attention_mask: ``[B, L]``, 0 for padding on either side.
            grid: rows and columns of all images, or ``[images, 2]``; None takes the configuration's.
            use_cache: also return a cache; it counts fused positions.
            past_key_values: an empty cache to fill.

        Raises:
            BadInputError: embeddings in place of ids, a filled cache, an image that does not fill its grid or is not
                behind ``<boi>``, a grid that windows do not tile, or more positions than the backbone has.
        """
        if input_ids is None or inputs_embeds is not None:
            raise BadInputError("Token-Shuffle finds images by their ids: give input_ids, not inputs_embeds.")
        if past_key_values is not None and past_key_values.get_seq_length():
            raise BadInputError("A forward reads whole rows.", "generate(...) goes on from a cache.")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise BadInputError(f"attention_mask must be [B, L], {tuple(input_ids.shape)}.")
        config = self.config
        layout = FusedLayout.of(
            input_ids,
            attention_mask,
            self.is_image(input_ids),
            config.grid if grid is None else grid,  # type: ignore[arg-type]
            tuple(config.window),  # type: ignore[arg-type]
            config.boi_token_id,
        )
        cache = past_key_values if past_key_values is not None or not use_cache else self.new_cache()
        states, cache = self.read(self._fused(input_ids, layout), layout.mask, cache, layout.position_ids)
        logits = self.get_output_embeddings()(self._spread(states, input_ids, layout))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs)
            if config.z_loss:
                loss = loss + config.z_loss * squared_partition(logits, labels, kwargs.get("num_items_in_batch"))
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def new_cache(self) -> DynamicCache:
        """An empty cache of the backbone."""
        return DynamicCache(config=self.config.backbone_config)

    def read(
        self, embeds: torch.Tensor, mask: torch.Tensor, cache: Cache | None, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, Cache | None]:
        """The backbone's last hidden states ``[B, U, d]`` of fused positions, and the cache.

        Args:
            embeds: ``[B, U, d]``.
            mask: ``[B, past + U]``.
            position_ids: ``[B, U]``.

        Raises:
            BadInputError: more positions than the backbone has.
        """
        limit = getattr(self.config.backbone_config, "max_position_embeddings", None)
        if limit is not None and mask.shape[1] > limit:
            raise BadInputError(
                f"{mask.shape[1]:,} positions are more than the {limit:,} of the backbone.", "Take a larger window."
            )
        output = self.backbone.base_model(
            inputs_embeds=embeds,
            attention_mask=mask.long(),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state, cache

    def _fused(self, ids: torch.Tensor, layout: FusedLayout) -> torch.Tensor:
        """What the backbone reads, ``[B, U, d]``."""
        embeds = self.get_input_embeddings()(ids)
        rows, at = layout.fused.nonzero(as_tuple=True)
        first = layout.tokens[:, :, :1].expand(-1, -1, embeds.shape[-1])
        fused = self.shuffle(embeds[rows[:, None], layout.tokens[rows, at]])
        return embeds.gather(1, first).index_put((rows, at), fused.to(embeds.dtype))

    def _spread(self, states: torch.Tensor, ids: torch.Tensor, layout: FusedLayout) -> torch.Tensor:
        """The hidden state ``[B, L, d]`` before the head, at p that of token p + 1."""
        before = torch.cat([layout.position[:, 1:] - 1, layout.position[:, -1:]], 1)
        hidden = states.gather(1, before[..., None].expand(-1, -1, states.shape[-1]))
        rows, at = layout.fused.nonzero(as_tuple=True)
        pieces = self.unshuffle(states[rows, at - 1])
        places = layout.tokens[rows, at] - 1
        hidden = hidden.index_put((rows[:, None], places), pieces.to(hidden.dtype))
        # where an image is still to come, its first token is next
        after = torch.nn.functional.pad(layout.image[:, 1:], (0, 1))
        open_rows, open_at = ((ids == self.config.boi_token_id) & ~after).nonzero(as_tuple=True)
        first = self.unshuffle(states[open_rows, layout.position[open_rows, open_at]])[:, 0]
        return hidden.index_put((open_rows, open_at), first.to(hidden.dtype))

    # -- drawing -------------------------------------------------------------------------------------------------------
    def next_window(self, state: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, w, V]`` of the next window, from the last hidden states ``[B, d]``."""
        logits: torch.Tensor = self.get_output_embeddings()(self.unshuffle(state))
        return logits

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        grid: Grid | None = None,
        seeds: list[int] | range | None = None,
        report: Report = silent,
        use_cache: bool = True,
        **settings: Any,
    ) -> ImageGeneration:
        """Draws one image for each text, a window a step.

        Args:
            input_ids: ``[B, T]`` texts; a ``<boi>`` follows of itself. T may be 0: no text.
            attention_mask: ``[B, T]``, 0 for padding on either side.
            grid: rows and columns of the images; None takes the configuration's.
            seeds: one for each image: an image depends on its own seed, not on the rest of the batch. None draws them
                by torch's generator.
            report: called with the windows drawn and their number.
            use_cache: False computes everything anew at each step.
            settings: of ``Sampling``: ``guidance``, ``schedule``, ``temperature``, ``top_k``, ``top_p``, ``do_sample``.

        Raises:
            BadInputError: a text with image ids or ``<boi>``, a grid that windows do not tile, another number of seeds,
                settings out of range, or more positions than the backbone has; before anything is computed.
        """
        sampling = Sampling(**settings)
        sides: Grid = tuple(self.config.grid if grid is None else grid)  # type: ignore[arg-type,assignment]
        with evaluating(self):  # dropout would make an image depend on more than its seed
            return draw_images(self, input_ids, attention_mask, sides, sampling, seeds, report, use_cache)


def squared_partition(
    logits: torch.Tensor, labels: torch.Tensor, count: int | torch.Tensor | None = None
) -> torch.Tensor:
    """The mean of ``log(sum exp logits)^2`` where a label is predicted.

    Args:
        logits: ``[B, L, V]``.
        labels: ``[B, L]``, -100 for none.
        count: divides the sum in place of the number of labels, as for the loss of a batch in parts.
    """
    there = labels[:, 1:] != -100
    partition = logits[:, :-1].float().logsumexp(-1)
    total: torch.Tensor = (partition.square() * there).sum()
    return total / (there.sum().clamp_min(1) if count is None else count)


@torch.no_grad()
def check_head(backbone: PreTrainedModel) -> None:
    """Raises UnsupportedModelError for a model whose logits are not its head of its last hidden state: some scale or
    cap them, and what this network computes would silently differ from the backbone.
    """
    head, config = backbone.get_output_embeddings(), backbone.config
    if head is None or (isinstance(config, PreTrainedConfig) and config.is_encoder_decoder):
        raise UnsupportedModelError(f"{type(backbone).__name__} is no causal language model with a head.")
    if backbone.device.type == "meta":
        return
    width = backbone.get_input_embeddings().weight.shape[1]
    embeds = torch.linspace(-1, 1, 2 * width, device=backbone.device, dtype=backbone.dtype).sin().view(1, 2, width)
    training = backbone.training
    backbone.eval()
    try:
        wanted = backbone(inputs_embeds=embeds, use_cache=False).logits
        states = backbone.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        same = torch.allclose(head(states), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"{type(backbone).__name__} takes no inputs_embeds: {error}") from error
    finally:
        backbone.train(training)
    if not same:
        raise UnsupportedModelError(
            f"{type(backbone).__name__} changes its logits behind its head.",
            "Take one that does not cap or scale them.",
        )


register(TokenShuffleConfig, TokenShuffleForConditionalGeneration, "AutoModel", "AutoModelForCausalLM")

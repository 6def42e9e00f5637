"""xAR: the next entity of an image by flow matching, given those before it (arXiv 2502.20388).

Latents are cut into entities X_1 to X_N. In training each gets a time of its own and is noised by it. One pass predicts
all velocities, where entity n sees all tokens of entities up to n in their noised form::

    F_n = (1 - t_n) X_n + t_n e_n        loss = mean over n of (v_n(F_1..F_n; class, t_1..t_n) - (e_n - X_n))^2

So the network learns to go on after entities with errors, which it will meet when it draws. Drawing is one entity after
the other: keys and values of finished entities are kept, and the steps of the current one only read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput

from ...core.errors import BadInputError
from ...core.modes import evaluating
from ...core.rng import derive_seed
from ..base import OwnWeights, register
from ..grid import inverse_order
from ..images.adaptive import AdaptiveLayerNorm, AdaptiveModulation, ClassEmbedding, TimeEmbedding, modulate, plain_norm
from ..images.data import check_labels
from ..images.guidance import both_ways, check_guidance, drop_labels, guidance_scale, guide
from .configuration_xar import XARConfig
from .sampling import check_sampling, noised, sample

Progress = Callable[[int, int, torch.Tensor], None]
"""``(entity, step, latents [B, channels, rows, columns])`` after every step; what is not begun is zero."""
Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass
class XAROutput(ModelOutput):
    """What a forward gives.

    Attributes:
        loss: ``[]``.
        logits: velocities ``[B, N, m, channels]``, entity by entity.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class EntityCache:
    """Keys and values of finished entities, for all layers, with room for the whole image.

    The current entity writes its keys behind them at every step, and attention reads a view: nothing is copied or
    computed again. ``keep`` makes what was written count.
    """

    def __init__(self, layers: int, batch: int, heads: int, tokens: int, size: int, like: torch.Tensor):
        self.store = like.new_empty(layers, 2, batch, heads, tokens, size)
        self.kept = 0

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values ``[B, heads, new, size]`` behind what is kept; returns views of all so far."""
        end = self.kept + keys.shape[2]
        store = self.store[layer, :, : keys.shape[0]]
        store[0, :, :, self.kept : end], store[1, :, :, self.kept : end] = keys, values
        return store[0, :, :, :end], store[1, :, :, :end]

    def keep(self, tokens: int) -> None:
        """Counts the first tokens of what was written last as finished."""
        self.kept += tokens


class XARAttention(nn.Module):
    """Attention with rotary positions in two dimensions: ``[B, T, d] -> [B, T, d]``."""

    def __init__(self, config: XARConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: torch.Tensor, rotary: Rotary, mask: torch.Tensor | None, cache: EntityCache | None
    ) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotated(q, rotary), rotated(k, rotary)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)
        dropout = self.config.dropout if self.training else 0.0
        if self.config._attn_implementation == "eager":
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            found = F.dropout(scores.softmax(-1), dropout) @ v
        else:
            found = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        return self.out_proj(found.transpose(1, 2).flatten(2))


class XARMLP(nn.Module):
    """SwiGLU, with as many weights as an MLP of four times the width."""

    def __init__(self, config: XARConfig):
        super().__init__()
        inner = max(8, int(8 * config.hidden_size / 3) // 8 * 8)
        self.up_proj = nn.Linear(config.hidden_size, 2 * inner)
        self.down_proj = nn.Linear(inner, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class XARLayer(GradientCheckpointingLayer):
    """Attention and MLP, each shifted, scaled and gated by the condition of its entity."""

    def __init__(self, config: XARConfig, layer: int):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.modulation = AdaptiveModulation(config.hidden_size, config.hidden_size)
        self.attention, self.mlp = XARAttention(config, layer), XARMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: torch.Tensor,
        condition: torch.Tensor,
        rotary: Rotary,
        mask: torch.Tensor | None,
        cache: EntityCache | None,
    ) -> torch.Tensor:
        """``x [B, E, m, d]`` and ``condition [B, E, 1, d]`` -> ``[B, E, m, d]``."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition)
        mixed = modulate(plain_norm(x, self.eps, rms=True), shift_a, scale_a)
        heard = self.attention(mixed.flatten(1, 2), rotary, mask, cache).view_as(x)
        x = x + gate_a * self.dropout(heard)
        return x + gate_m * self.dropout(self.mlp(modulate(plain_norm(x, self.eps, rms=True), shift_m, scale_m)))


class XARModel(OwnWeights, PreTrainedModel):
    """The network, its loss, and drawing."""

    config_class = XARConfig
    base_model_prefix = "xar"
    main_input_name = "latents"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["XARLayer"]

    def __init__(self, config: XARConfig):
        super().__init__(config)
        width = config.hidden_size
        self.embed = nn.Linear(config.channels, width)
        self.positions = nn.Parameter(torch.empty(config.tokens, width))
        self.classes = ClassEmbedding(config.num_classes, width)
        self.times = TimeEmbedding(width, config.frequencies, floored=config.floored_times)
        self.layers = nn.ModuleList(XARLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.between = nn.Linear(width, width)
        self.positions_between = nn.Parameter(torch.empty(config.tokens, width))
        self.norm = AdaptiveLayerNorm(width, width, config.rms_norm_eps, rms=True)
        self.head = nn.Linear(width, config.channels)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, XARModel):
            init.normal_(module.positions, std=0.02)
            init.normal_(module.positions_between, std=0.02)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    # -- entities ------------------------------------------------------------------------------------------------------
    def split(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents ``[B, channels, rows, columns]`` as entities ``[B, N, m, channels]``.

        Raises:
            BadInputError: latents of another shape, or integers.
        """
        rows, columns = self.config.grid
        wanted = (self.config.channels, rows, columns)
        if latents.dim() != 4 or tuple(latents.shape[1:]) != wanted or not latents.is_floating_point():
            raise BadInputError(
                f"Latents are floats of shape [B, {', '.join(map(str, wanted))}]; got {latents.dtype} "
                f"{[*latents.shape]}.",
                "Those of another image tokenizer have another shape.",
            )
        tokens = latents.flatten(2).transpose(1, 2)
        return tokens[:, self.config.entity_order(latents.device)].unflatten(1, (self.config.entities, -1))

    def merge(self, entities: torch.Tensor) -> torch.Tensor:
        """The inverse of ``split``."""
        inverse = inverse_order(self.config.entity_order(entities.device))
        tokens = entities.flatten(1, 2)[:, inverse]
        return tokens.transpose(1, 2).unflatten(2, tuple(self.config.grid))

    def mask(self, entities: torch.Tensor) -> torch.Tensor:
        """Which token sees which, ``[T, T]``, for the entities ``[E]`` of a sequence in order: those up to its own."""
        number = entities.repeat_interleave(self.config.entity_tokens)
        return number[:, None] >= number[None]

    def clean_context_mask(self, device: torch.device | None = None) -> torch.Tensor:
        """Which token sees which, ``[2 L, 2 L]``, where clean entities stand before the noised ones.

        A noised entity sees the clean ones before it, and itself.
        """
        number = torch.arange(self.config.entities, device=device).repeat_interleave(self.config.entity_tokens)
        up_to, same = number[:, None] >= number[None], number[:, None] == number[None]
        return torch.cat([torch.cat([up_to, up_to & ~up_to], 1), torch.cat([up_to & ~same, same], 1)])

    # -- the network ---------------------------------------------------------------------------------------------------
    def velocity(
        self,
        noisy: torch.Tensor,
        class_labels: torch.Tensor,
        times: torch.Tensor,
        entities: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: EntityCache | None = None,
    ) -> torch.Tensor:
        """Velocities of entities.

        Args:
            noisy: ``[B, E, m, channels]``.
            class_labels: ``[B]``; ``num_classes`` is no class.
            times: ``[B, E]``, of each entity.
            entities: ``[E]``, their numbers, for positions; None are all of an image in order.
            mask: ``[T, S]``, True where a token sees another; None sees all.
            cache: finished entities before these.

        Returns:
            ``[B, E, m, channels]``.
        """
        config, m = self.config, self.config.entity_tokens
        if entities is None:
            entities = torch.arange(config.entities, device=noisy.device)
        order = config.entity_order(noisy.device).view(config.entities, m)[entities]  # [E, m], raster
        rotary = self.rotary(order.flatten())
        dtype = self.embed.weight.dtype
        condition = (self.classes(class_labels)[:, None] + self.times(times).to(dtype))[:, :, None]
        x = self.embed(noisy.to(dtype)) + self.positions[order]
        for number, layer in enumerate(self.layers):
            if number == (len(self.layers) + 1) // 2:
                x = self.between(x) + self.positions_between[order]
            x = layer(x, condition, rotary, mask, cache)
        if len(self.layers) < 2:
            x = self.between(x) + self.positions_between[order]
        found: torch.Tensor = self.head(self.norm(x, condition))
        return found

    def rotary(self, places: torch.Tensor) -> Rotary:
        """Cosines and sines ``[T, size of a head / 2]`` of raster indices ``[T]``: half for rows, half for columns."""
        config = self.config
        quarter = config.hidden_size // config.num_attention_heads // 4
        rates = config.rope_theta ** (-torch.arange(quarter, device=places.device) / quarter)
        columns = config.grid[1]
        angles = torch.cat([(places // columns)[:, None] * rates, (places % columns)[:, None] * rates], -1)
        return angles.cos(), angles.sin()

    def forward(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor,
        times: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> XAROutput | tuple[Any, ...]:
        """The loss of latents, and the velocities that were predicted.

        Args:
            latents: ``[B, channels, rows, columns]`` of standard deviation about 1.
            class_labels: ``[B]``.
            times: ``[B, N]`` from 0 to 1; None draws them from a logit-normal distribution. An entity of time 0 counts
                in no loss, for its noise cannot be known.
            noise: as latents; None draws it.

        Raises:
            BadInputError: latents, labels, times or noise of another shape or range; latents that are no numbers.
        """
        config = self.config
        clean = self.split(latents)
        if not torch.compiler.is_compiling():
            check_labels(class_labels, config.num_classes)
            if len(class_labels) != len(clean):
                raise BadInputError(f"There are {len(clean)} images and {len(class_labels)} labels.")
            if not bool(latents.isfinite().all()):
                raise BadInputError("Some latents are no numbers.")
        if times is None:
            times = self.draw_times(len(clean), clean.device)
        elif tuple(times.shape) != tuple(clean.shape[:2]):
            raise BadInputError(f"times have shape {[*clean.shape[:2]]}; got {[*times.shape]}.")
        elif not torch.compiler.is_compiling() and not bool(((times >= 0) & (times <= 1)).all()):
            raise BadInputError("times lie from 0 to 1.")
        if noise is None:
            noise = torch.randn_like(latents)
        elif noise.shape != latents.shape:
            raise BadInputError(f"noise has the shape of latents, {[*latents.shape]}; got {[*noise.shape]}.")
        if self.training:
            class_labels = drop_labels(class_labels, self.classes.null, config.label_dropout)
        e = self.split(noise)
        noisy = noised(clean, e, times[..., None, None])
        numbers = torch.arange(config.entities, device=clean.device)
        if config.noisy_context:
            found = self.velocity(noisy, class_labels, times, mask=self.mask(numbers))
        else:
            both = self.velocity(
                torch.cat([clean, noisy], 1),
                class_labels,
                torch.cat([torch.zeros_like(times), times], 1),
                numbers.repeat(2),
                self.clean_context_mask(clean.device),
            )
            found = both[:, config.entities :]
        apart = (found.float() - (e.float() - clean.float())).square().mean((-1, -2))
        counts = (times > 0).to(apart.dtype)
        output = XAROutput(loss=(apart * counts).sum() / counts.sum().clamp(min=1), logits=found)
        plain = config.return_dict if return_dict is None else return_dict
        return output if plain else output.to_tuple()

    def draw_times(self, batch: int, device: torch.device | None = None) -> torch.Tensor:
        """Times ``[B, N]``: the sigmoid of normal numbers, and 0 for ``clean_share`` of them."""
        shape = batch, self.config.entities
        times = torch.randn(shape, device=device).sigmoid()
        if self.config.clean_share and self.config.noisy_context:
            times = times.masked_fill(torch.rand(shape, device=device) < self.config.clean_share, 0.0)
        return times

    # -- drawing -------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def generate(
        self,
        class_labels: torch.Tensor,
        steps: int = 25,
        guidance: float = 2.7,
        sampler: str = "sde",
        seed: int = 0,
        noise: torch.Tensor | None = None,
        use_cache: bool = True,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """Draws images of classes.

        Args:
            class_labels: ``[B]``; ``num_classes`` draws without a class.
            steps: S, calls of the network an entity.
            guidance: w; entity n of N (from 0) is guided by ``1 + (w - 1) n / (N - 1)``, the only one by w.
            sampler: ``"sde"`` or ``"ode"``.
            seed: of the noise; an image's noise follows from it and its place in the batch.
            noise: ``[B, N, S, m, channels]`` in its place.
            use_cache: keep keys and values of finished entities; False computes them anew for every step.
            progress: called after every step.

        Returns:
            Latents ``[B, channels, rows, columns]`` in float32, on the network's device.

        Raises:
            BadInputError: settings or labels out of range, or noise of another shape; before any step.
        """
        config = self.config
        n_entities, m = config.entities, config.entity_tokens
        check_sampling(sampler, steps)
        check_guidance("linear", guidance)
        check_labels(class_labels, config.num_classes + 1)
        labels = class_labels.to(self.device)
        shape = (len(labels), n_entities, steps, m, config.channels)
        if noise is None:
            numbers = [torch.Generator().manual_seed(derive_seed(seed, "image", row)) for row in range(len(labels))]
            rows_of = [torch.randn(shape[1:], generator=generator) for generator in numbers]
            noise = torch.stack(rows_of) if rows_of else torch.empty(shape)
        elif tuple(noise.shape) != shape:
            raise BadInputError(f"noise has shape {[*shape]}; got {[*noise.shape]}.")
        noise = noise.to(self.device, torch.float32)  # many small steps are added up: not in the network's precision
        heads, rows = config.num_attention_heads, len(labels) * (2 if guidance != 1 else 1)
        cache = None
        if use_cache:
            like = torch.empty(0, device=self.device, dtype=self.dtype)
            cache = EntityCache(len(self.layers), rows, heads, config.tokens, config.hidden_size // heads, like)
        drawn = noise.new_zeros(len(labels), n_entities, m, config.channels)
        with evaluating(self):
            for n in range(n_entities):
                share = n / (n_entities - 1) if n_entities > 1 else 1.0
                scale = guidance_scale("linear", guidance, share)
                current = _Current(self, labels, drawn[:, :n], guidance != 1, scale, cache)

                def after(x: torch.Tensor, step: int, n: int = n) -> None:
                    drawn[:, n] = x
                    if progress is not None:
                        progress(n, step, self.merge(drawn))

                drawn[:, n] = sample(current, noise[:, n].transpose(0, 1), sampler, after)
        return self.merge(drawn)


class _Current:
    """The velocity of the entity after some finished ones, as ``sampling.sample`` asks for it.

    The first step's call also reads the last finished entity and keeps its keys and values. Later calls only read them.
    """

    def __init__(
        self,
        model: XARModel,
        labels: torch.Tensor,
        before: torch.Tensor,
        guided: bool,
        scale: float,
        cache: EntityCache | None,
    ):
        self.model, self.before, self.scale, self.cache = model, before, scale, cache
        n = before.shape[1]
        # where no entity is guided yet, only a later one's keys could want the pass without a class: it comes with them
        self.twice = guided and (n > 0 or scale != 1)
        self.labels = both_ways(labels, model.classes.null) if self.twice else labels

    def __call__(self, x: torch.Tensor, time: float, step: int) -> torch.Tensor:
        n, m = self.before.shape[1], self.model.config.entity_tokens
        since = 0 if self.cache is None else (n if step else max(0, n - 1))  # the first entity that is computed
        seen = torch.cat([self.before[:, since:], x[:, None]], 1)
        times = x.new_zeros(seen.shape[:2], dtype=torch.float32)
        times[:, -1] = time
        numbers = torch.arange(since, n + 1, device=x.device)
        mask = None
        if len(numbers) > 1:
            mask = self.model.mask(numbers)
            if self.cache is not None:  # all see what is kept
                mask = torch.cat([mask.new_ones(len(mask), self.cache.kept), mask], 1)
        if self.twice:
            seen, times = seen.repeat(2, 1, 1, 1), times.repeat(2, 1)
        found = self.model.velocity(seen, self.labels, times, numbers, mask, self.cache)[:, -1].float()
        if self.cache is not None and len(numbers) > 1:
            self.cache.keep(m)
        if not self.twice:
            return found
        with_class, without = found.chunk(2)
        return guide(with_class, without, self.scale)


def rotated(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Heads ``[..., T, size]`` turned by their positions, in pairs of one number of each half."""
    cos, sin = (item.to(x.dtype) for item in rotary)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


register(XARConfig, XARModel, "AutoModel")

"""TokenBridge: pictures from latents that are cut into bins and spelt channel by channel (arXiv 2503.16430).

Positions are predicted in random order by a masked autoregressive model (MAR, arXiv 2406.11838). The encoder reads the
class and the values of the positions that are known; the decoder adds mask tokens and gives a vector g_i for each
position that is not. A head turns every vector into a token of C channels::

    p(x_unknown | known, class) = prod_i p(q_i | g_i)          p(q_i | g_i) = prod_j p(q_(i,o_j) | g_i, q_(i,o_<j))

Sampling reveals more and more positions, those of one iteration at once. Guidance mixes vectors, not logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.vit.modeling_vit import ViTLayer
from transformers.utils.generic import ModelOutput, can_return_tuple

from ...core.errors import BadInputError
from ...core.modes import evaluating
from ...core.progress import Report, silent
from ...core.rng import numpy_generator
from ..base import OwnWeights, register
from ..images.adaptive import ClassEmbedding
from ..images.data import check_labels
from ..images.guidance import both_ways, check_guidance, drop_labels, guidance_scale, guide
from .configuration_tokenbridge import TokenBridgeConfig
from .continuous import ContinuousHead
from .head import ChannelARHead
from .schedules import drawn_masked, masked_after


@dataclass
class TokenBridgeOutput(ModelOutput):
    """What a forward returns, for the M positions that are not known.

    Attributes:
        loss: mean over positions and channels: cross-entropy in nats, or a squared error of the continuous head.
        logits: ``[B, M, C, bins]``, each given the channels before it; None from the continuous head.
        unknown: ``[B, M]``, the positions, ascending.
        vectors: ``[B, M, hidden_size]``, what the head was given.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    unknown: torch.Tensor | None = None
    vectors: torch.Tensor | None = None


@dataclass
class TokenBridgeSample:
    """Sampled pictures.

    Attributes:
        latents: ``[B, n, C]``, for the decoder of the autoencoder.
        codes: ``[B, n, C]``; None from the continuous head.
        revealed: ``[B, n]``, the iteration at which each position was predicted, from 0.
        entropies: ``[B, n, C]`` in nats, of what each channel was drawn from; None from the continuous head.
        masked: how many positions were still masked after every iteration.
    """

    latents: torch.Tensor
    codes: torch.Tensor | None
    revealed: torch.Tensor
    entropies: torch.Tensor | None
    masked: list[int]


class TokenBridgePreTrainedModel(OwnWeights, PreTrainedModel):
    """How weights begin."""

    config_class = TokenBridgeConfig
    config: TokenBridgeConfig
    base_model_prefix = "model"
    main_input_name = "latents"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTLayer", "ChannelBlock"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        deviation = self.config.initializer_range
        if isinstance(module, (ChannelARHead, ContinuousHead)):  # after their layers, whose start they change
            module.init_weights()
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=deviation)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, TokenBridgeModel):
            for table in (module.encoder_positions, module.decoder_positions, module.mask_token):
                init.normal_(table, std=deviation)


class TokenBridgeModel(TokenBridgePreTrainedModel):
    """Encoder, decoder and head."""

    def __init__(self, config: TokenBridgeConfig):
        super().__init__(config)
        width, length = config.hidden_size, config.num_class_tokens + config.positions
        self.quantizer = config.quantizer()
        self.classes = ClassEmbedding(config.num_classes, width)
        self.read = nn.Linear(config.channels, width)
        self.encoder_positions = nn.Parameter(torch.empty(length, width))
        self.encoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.encoder = nn.ModuleList(ViTLayer(config) for _ in range(config.num_hidden_layers))  # type: ignore[arg-type]
        self.encoded_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.bridge = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.decoder_positions = nn.Parameter(torch.empty(length, width))
        self.decoder = nn.ModuleList(ViTLayer(config) for _ in range(config.num_decoder_layers))  # type: ignore[arg-type]
        self.decoded_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head: ChannelARHead | ContinuousHead
        if config.head == "continuous":
            self.head = ContinuousHead(width, config.channels, config.head_width, config.head_layers)
        else:
            self.head = ChannelARHead(
                width,
                config.channels,
                config.bins,
                config.head_width,
                config.head_layers,
                config.head_heads,
                config.channel_order,
                independent=config.head == "independent",
                released_first_input=config.released_first_input,
            )
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.read

    # -- likelihood ----------------------------------------------------------------------------------------------------
    @can_return_tuple
    def forward(
        self,
        latents: torch.Tensor | None = None,
        codes: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> TokenBridgeOutput:
        """Predicts the positions that are not known from those that are.

        Args:
            latents: ``[B, n, C]``, as the autoencoder gives them, row by row; they are quantised here.
            codes: ``[B, n, C]`` in their place.
            class_labels: ``[B]``; None is no class. In training mode some are left out (``label_dropout``).
            known: ``[B, K]``, positions that the encoder sees, K < n. None draws how many, once for the batch, and
                which, for every image, by torch's generator.

        Raises:
            BadInputError: neither latents nor codes or both, other shapes, codes beyond the bins, labels out of range,
                positions that are given twice or do not exist, or codes for the continuous head.
        """
        values, codes = self._read(latents, codes)
        batch, positions = values.shape[:2]
        labels = self._labels(class_labels, batch, values.device)
        if self.training:
            labels = drop_labels(labels, self.classes.null, self.config.label_dropout)
        if known is None:
            known = self.draw_known(batch, values.device)
        else:
            self._check_known(known, batch)
        unknown = others(known, positions)
        g = self.vectors(rows_at(values, known), known, labels, unknown)
        if isinstance(self.head, ContinuousHead):
            wanted = rows_at(values, unknown)
            noise, time = torch.randn_like(wanted), torch.rand(wanted.shape[:2], device=wanted.device)
            return TokenBridgeOutput(self.head.losses(g, wanted, noise, time).mean(), None, unknown, g)
        assert codes is not None
        wanted = rows_at(codes, unknown)
        logits = self.head(g, wanted)
        loss = nn.functional.cross_entropy(logits.flatten(0, 2).float(), wanted.flatten())
        return TokenBridgeOutput(loss, logits, unknown, g)

    def vectors(
        self, values: torch.Tensor, known: torch.Tensor, labels: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        """The vectors ``[B, M, hidden_size]`` of some positions.

        Args:
            values: ``[B, K, C]``, scaled latents of the known positions.
            known, wanted: positions ``[B, K]`` and ``[B, M]``.
            labels: ``[B]``; ``num_classes`` is no class.
        """
        config = self.config
        count, width = config.num_class_tokens, config.hidden_size
        classes = self.classes(labels)[:, None].expand(-1, count, -1)
        x = torch.cat([classes, self.read(values.to(self.read.weight.dtype))], 1)
        places = torch.arange(count, device=known.device).expand(len(known), -1)
        x = self.encoder_norm(x + self.encoder_positions[torch.cat([places, known + count], 1)])
        for layer in self.encoder:
            x = layer(x)
        x = self.bridge(self.encoded_norm(x))
        grid = self.mask_token.to(x.dtype).expand(len(x), config.positions, -1)
        grid = grid.scatter(1, known[..., None].expand(-1, -1, width), x[:, count:])
        x = torch.cat([x[:, :count], grid], 1) + self.decoder_positions
        for layer in self.decoder:
            x = layer(x)
        return rows_at(self.decoded_norm(x[:, count:]), wanted)

    def draw_known(self, batch: int, device: torch.device | None = None) -> torch.Tensor:
        """Known positions ``[B, K]`` as learning draws them: K once, which ones for every image."""
        generator = np.random.default_rng(int(torch.randint(2**31, ())))
        masked = drawn_masked(self.config.positions, self.config.least_masked, generator)
        noise = torch.rand(batch, self.config.positions, device=device)
        return noise.argsort(1)[:, masked:]

    # -- sampling ------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def generate(
        self,
        class_labels: torch.Tensor | Sequence[int] | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        guidance_schedule: str = "linear",
        temperature: float = 1.0,
        seed: int | Sequence[int] = 0,
        batch: int | None = None,
        cache: bool = True,
        progress: Report = silent,
    ) -> TokenBridgeSample:
        """Samples pictures, all of them at once.

        Args:
            class_labels: ``[B]``, one a picture; None draws pictures of no class.
            steps: iterations S, from 1 to n; None takes one a position, and 64 at most.
            guidance: w; at 1 the second pass, without the class, is not run.
            guidance_schedule: of ``images.guidance.SCHEDULES``, over the share of positions that are revealed.
            temperature: of the channels' logits; 0 takes the likeliest. The continuous head multiplies its noise.
            seed: of the first picture, the next ones counting up; or one a picture. A picture follows from its label
                and its seed, not from the others of its batch.
            batch: how many pictures, where there are no labels.
            cache: as for ``head.ChannelARHead.sample``.
            progress: called with the iterations that are done.

        Raises:
            BadInputError: labels out of range, steps, guidance, temperature or seeds that cannot be; guidance without
                a class. Before any work.
        """
        config, device = self.config, self.mask_token.device
        if (class_labels is None) == (batch is None):
            raise BadInputError("Give class_labels, or batch for pictures of no class.")
        asked = None if class_labels is None else torch.as_tensor(class_labels).to(device)
        count = asked.numel() if asked is not None else int(batch or 0)
        if count < 1:
            raise BadInputError("One picture at least is asked for.")
        if asked is not None:
            check_labels(asked, config.num_classes)
        labels = self._labels(asked, count, device)
        check_guidance(guidance_schedule, guidance)
        if asked is None and guidance != 1:
            raise BadInputError("Guidance needs a class.", "Give class_labels, or leave guidance at 1.")
        if not 0 <= temperature < float("inf"):
            raise BadInputError(f"A temperature is 0 or more; got {temperature}.")
        n, channels = config.positions, config.channels
        masked = masked_after(n, min(n, 64) if steps is None else steps)
        order, noise = self._noise(seed, count)
        values = torch.zeros(count, n, channels, device=device)
        revealed = torch.zeros(count, n, dtype=torch.long, device=device)
        discrete = isinstance(self.head, ChannelARHead)
        codes = torch.zeros(count, n, channels, dtype=torch.long, device=device) if discrete else None
        entropies = torch.zeros_like(values) if discrete else None
        means = self.quantizer.values.to(device, torch.float32)
        first = 0
        with evaluating(self):  # dropout would make a picture depend on more than its label and seed
            for step, left in enumerate(masked):
                known, wanted = order[:, :first], order[:, first : n - left]
                given = rows_at(values, known)
                if guidance == 1:
                    g = self.vectors(given, known, labels, wanted)
                else:
                    two = [torch.cat([item, item]) for item in (given, known, wanted)]
                    both = self.vectors(two[0], two[1], both_ways(labels, self.classes.null), two[2])
                    scale = guidance_scale(guidance_schedule, guidance, (n - left) / n)
                    g = guide(both[:count], both[count:], scale)
                own = rows_at(noise, wanted)
                place = wanted[..., None].expand(-1, -1, channels)
                if isinstance(self.head, ChannelARHead):
                    assert codes is not None and entropies is not None
                    drawn = self.head.sample(g, temperature, cache, uniforms=own)
                    codes.scatter_(1, place, drawn.codes)
                    entropies.scatter_(1, place, drawn.entropies)
                    found = means[drawn.codes] * config.latent_scale  # codes of the head's own need no check
                else:
                    found = self.head.sample(g, own, config.flow_steps, temperature)
                values.scatter_(1, place, found)
                revealed.scatter_(1, wanted, step)
                first = n - left
                progress("sampling", step + 1, len(masked))
        return TokenBridgeSample(values / config.latent_scale, codes, revealed, entropies, masked)

    def _noise(self, seed: int | Sequence[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Orders ``[B, n]`` and random numbers ``[B, n, C]``, of every picture by its own seed."""
        seeds = [seed + number for number in range(count)] if isinstance(seed, int) else [int(item) for item in seed]
        if len(seeds) != count:
            raise BadInputError(f"{len(seeds)} seeds were given for {count} pictures.")
        if any(not 0 <= item < 2**32 for item in seeds):
            raise BadInputError("Seeds lie from 0 to 2^32 - 1.")
        shape = self.config.positions, self.config.channels
        discrete = isinstance(self.head, ChannelARHead)
        orders, numbers = [], []
        for item in seeds:
            generator = numpy_generator(item, "picture")
            orders.append(generator.permutation(shape[0]))
            numbers.append(generator.random(shape) if discrete else generator.standard_normal(shape))
        device = self.mask_token.device
        noise = torch.from_numpy(np.stack(numbers)).to(device, torch.float32)
        return torch.from_numpy(np.stack(orders)).to(device), noise.clamp(max=1 - 2**-24) if discrete else noise

    # -- checks --------------------------------------------------------------------------------------------------------
    def _read(
        self, latents: torch.Tensor | None, codes: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scaled values ``[B, n, C]`` that the encoder may see, and their codes."""
        config = self.config
        if (latents is None) == (codes is None):
            raise BadInputError("A forward takes latents or codes, one of them.")
        given = latents if latents is not None else codes
        assert given is not None
        if given.dim() != 3 or given.shape[1:] != (config.positions, config.channels) or not len(given):
            raise BadInputError(
                f"Latents and codes are [B, {config.positions}, {config.channels}]; got {[*given.shape]}.",
                "The grid and the channels are those of the network's autoencoder.",
            )
        if config.head == "continuous":
            if latents is None:
                raise BadInputError("The continuous head takes latents, not codes.")
            return latents.float() * config.latent_scale, None
        codes = self.quantizer.encode(latents) if latents is not None else codes
        assert codes is not None
        return self.quantizer.decode(codes) * config.latent_scale, codes

    def _labels(self, labels: torch.Tensor | None, batch: int, device: torch.device) -> torch.Tensor:
        if labels is None:
            return torch.full((batch,), self.classes.null, device=device)
        if labels.shape != (batch,):
            raise BadInputError(f"One label an image is expected, [{batch}]; got {[*labels.shape]}.")
        if not torch.compiler.is_compiling():
            check_labels(labels, self.config.num_classes)
        return labels

    def _check_known(self, known: torch.Tensor, batch: int) -> None:
        n = self.config.positions
        if known.dtype != torch.long or known.dim() != 2 or len(known) != batch or known.shape[1] >= n:
            raise BadInputError(
                f"Known positions are long [{batch}, K] with K below {n}; got {known.dtype} {[*known.shape]}."
            )
        if torch.compiler.is_compiling() or not known.numel():
            return
        low, high = (int(end) for end in known.aminmax())
        if low < 0 or high >= n or bool((known.sort(1).values.diff(dim=1) == 0).any()):
            raise BadInputError(f"Known positions lie from 0 to {n - 1}, each once an image.")


def rows_at(items: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rows ``[B, M, d]`` of ``items [B, n, d]`` at ``places [B, M]``."""
    return items.gather(1, places[..., None].expand(-1, -1, items.shape[-1]))


def others(places: torch.Tensor, count: int) -> torch.Tensor:
    """The positions ``[B, count - K]`` from 0 to ``count - 1`` that are not among ``places [B, K]``, ascending."""
    taken = torch.zeros(len(places), count, dtype=torch.long, device=places.device).scatter(1, places, 1)
    return taken.argsort(dim=1, stable=True)[:, : count - places.shape[1]]


register(TokenBridgeConfig, TokenBridgeModel, "AutoModel")

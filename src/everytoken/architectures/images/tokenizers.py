"""Small tokenizers of images: an autoencoder with continuous latents, and one with a codebook.

Two for digits ship: ``digits-kl`` turns 16 x 16 pixels into 4 x 4 latents of 8 channels with standard deviation 1, and
``digits-vq`` turns them into 8 x 8 codes of 64. ``scripts/train_images.py`` trains both anew. A tokenizer has an
*identity*, a hash of its weights. What was made with one is refused by another::

    tokenizer = load_image_tokenizer("digits-kl")
    latents = tokenizer.encode(images)                     # [B, 8, 4, 4]
    images = tokenizer.decode(latents, made_by=tokenizer.identity)
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from ...core.errors import BadInputError, TokenizerMismatchError
from ...core.files import write_whole
from ...core.quiet import quiet_transformers
from ...core.weights import check_no_pickle, weights_folder
from ..base import OwnWeights
from .data import resized

KINDS = ("kl", "vq")


@strict
class ImageTokenizerConfig(PreTrainedConfig):
    """Sizes of a tokenizer.

    Args:
        kind: ``"kl"`` has continuous latents, ``"vq"`` has codes.
        image_size, num_channels: of the images.
        halvings: how often both sides are halved.
        width: channels inside.
        latent_channels: of a latent, or of a vector of the codebook.
        codes: of the codebook.
        latent_scale: latents are multiplied by it, so that their standard deviation is 1.

    Raises:
        BadInputError: settings out of range, or sides that cannot be halved so often.
    """

    model_type = "image-tokenizer"

    kind: str = "kl"
    image_size: int = 16
    num_channels: int = 1
    halvings: int = 2
    width: int = 32
    latent_channels: int = 8
    codes: int = 64
    latent_scale: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.kind not in KINDS:
            raise BadInputError(f"kind is {' or '.join(KINDS)}; got {self.kind!r}.")
        sizes = ("image_size", "num_channels", "width", "latent_channels", "codes")
        if wrong := [name for name in sizes if getattr(self, name) < 1]:
            raise BadInputError(f"{wrong[0]} is 1 or more; got {getattr(self, wrong[0])}.")
        if self.halvings < 0 or self.image_size % 2**self.halvings or self.width % 8:
            raise BadInputError(
                f"Sides of {self.image_size} pixels are halved {self.halvings} times, and width is a multiple of 8; "
                f"got width {self.width}."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens of an image."""
        side = self.image_size // 2**self.halvings
        return side, side


class _Block(nn.Module):
    """A convolution around which the input passes."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(F.silu(self.norm(x)))


def _encoder(config: ImageTokenizerConfig, out: int) -> nn.Sequential:
    width = config.width
    parts: list[nn.Module] = [nn.Conv2d(config.num_channels, width, 3, padding=1)]
    for _ in range(config.halvings):
        parts += [_Block(width), nn.Conv2d(width, width, 4, stride=2, padding=1)]
    return nn.Sequential(*parts, _Block(width), nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, out, 1))


def _decoder(config: ImageTokenizerConfig) -> nn.Sequential:
    width = config.width
    parts: list[nn.Module] = [nn.Conv2d(config.latent_channels, width, 3, padding=1), _Block(width)]
    for _ in range(config.halvings):
        parts += [nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), _Block(width)]
    return nn.Sequential(*parts, nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, config.num_channels, 3, padding=1))


class ImageTokenizer(OwnWeights, PreTrainedModel):
    """What both tokenizers share."""

    config_class = ImageTokenizerConfig
    main_input_name = "pixel_values"
    kind = ""

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__(config)
        if config.kind != self.kind:
            raise BadInputError(f"A {type(self).__name__} is of kind {self.kind!r}; got {config.kind!r}.")
        self.encoder = _encoder(config, config.latent_channels * (2 if config.kind == "kl" else 1))
        self.decoder = _decoder(config)

    def _init_weights(self, module: nn.Module) -> None:
        """Keeps torch's own start."""

    @property
    def identity(self) -> str:
        """Sixteen hexadecimal digits that follow from the weights and the scale of the latents."""
        text = hashlib.sha256(f"{self.kind} {self.config.halvings} {self.config.latent_scale}".encode())
        for name, weight in sorted(self.state_dict().items()):
            text.update(name.encode() + weight.detach().float().cpu().contiguous().numpy().tobytes())
        return text.hexdigest()[:16]

    def check(self, made_by: str | None) -> None:
        """Refuses what another tokenizer made.

        Args:
            made_by: that tokenizer's identity; None asks nothing.

        Raises:
            TokenizerMismatchError: it is another one.
        """
        if made_by is not None and made_by != self.identity:
            raise TokenizerMismatchError(
                f"These latents are of the image tokenizer {made_by}; this one is {self.identity}.",
                "Decode with the tokenizer that made them, or encode the images anew.",
            )

    def _images(self, images: torch.Tensor) -> torch.Tensor:
        channels, side = self.config.num_channels, self.config.image_size
        if images.dim() != 4 or images.shape[1] != channels or not images.is_floating_point():
            raise BadInputError(
                f"Images are floats of shape [B, {channels}, height, width]; got {images.dtype} {[*images.shape]}."
            )
        return resized(images, side).to(self.dtype)


class KLImageTokenizer(ImageTokenizer):
    """An autoencoder whose latents are kept near a normal distribution (Kingma and Welling, arXiv 1312.6114)."""

    kind = "kl"

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__(config)
        self.post_init()

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents ``[B, latent_channels, rows, columns]`` of images, which are resized where need be.

        Raises:
            BadInputError: no images of this tokenizer's channels.
        """
        found: torch.Tensor = self.encoder(self._images(images)).chunk(2, 1)[0] * self.config.latent_scale
        return found

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, made_by: str | None = None) -> torch.Tensor:
        """Images ``[B, channels, side, side]`` of latents ``[B, latent_channels, rows, columns]``.

        Args:
            made_by: the identity of the tokenizer whose latents they are (``check``).

        Raises:
            TokenizerMismatchError: latents of another tokenizer.
            BadInputError: latents of another shape.
        """
        self.check(made_by)
        shape = (self.config.latent_channels, *self.config.grid)
        if tuple(latents.shape[1:]) != shape or not latents.is_floating_point():
            raise BadInputError(f"Latents are floats of shape [B, {', '.join(map(str, shape))}]; got "
                                f"{latents.dtype} {[*latents.shape]}.")  # fmt: skip
        found: torch.Tensor = self.decoder(latents.to(self.dtype) / self.config.latent_scale)
        return found.clamp(-1, 1)

    def forward(self, pixel_values: torch.Tensor, kl_weight: float = 1e-3, **kwargs: Any) -> torch.Tensor:
        """The loss ``[]`` of images: squared error, and the distance of latents from a normal distribution."""
        images = self._images(pixel_values)
        mean, spread = self.encoder(images).chunk(2, 1)
        spread = spread.clamp(-12, 6)
        seen = self.decoder(mean + torch.randn_like(mean) * (0.5 * spread).exp())
        distance = 0.5 * (mean.square() + spread.exp() - 1 - spread).mean()
        return F.mse_loss(seen, images) + kl_weight * distance


class VQImageTokenizer(ImageTokenizer):
    """An autoencoder whose latents are vectors of a codebook (van den Oord and others, arXiv 1711.00937)."""

    kind = "vq"

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__(config)
        self.codebook = nn.Embedding(config.codes, config.latent_channels)
        self.post_init()

    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """The nearest codes ``[B, rows, columns]`` of vectors ``[B, latent_channels, rows, columns]``."""
        table = self.codebook.weight
        flat = vectors.permute(0, 2, 3, 1)
        distance = table.square().sum(-1) - 2 * flat @ table.T
        return distance.argmin(-1)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Codes ``[B, rows, columns]`` of images, which are resized where need be.

        Raises:
            BadInputError: no images of this tokenizer's channels.
        """
        return self.nearest(self.encoder(self._images(images)))

    @torch.no_grad()
    def decode(self, codes: torch.Tensor, made_by: str | None = None) -> torch.Tensor:
        """Images ``[B, channels, side, side]`` of codes ``[B, rows, columns]``.

        Args:
            made_by: the identity of the tokenizer whose codes they are (``check``).

        Raises:
            TokenizerMismatchError: codes of another tokenizer.
            BadInputError: codes of another shape, or beyond the codebook.
        """
        self.check(made_by)
        grid, size = self.config.grid, self.config.codes
        if tuple(codes.shape[1:]) != grid or codes.is_floating_point():
            raise BadInputError(f"Codes are integers of shape [B, {grid[0]}, {grid[1]}]; got {[*codes.shape]}.")
        if codes.numel() and not bool(((codes >= 0) & (codes < size)).all()):
            raise BadInputError(f"Codes lie from 0 to {size - 1}; got {int(codes.min())} to {int(codes.max())}.")
        found: torch.Tensor = self.decoder(self.codebook(codes).permute(0, 3, 1, 2))
        return found.clamp(-1, 1)

    def forward(self, pixel_values: torch.Tensor, commitment: float = 0.25, **kwargs: Any) -> torch.Tensor:
        """The loss ``[]`` of images: squared error, and the distances of vectors from codes and of codes from them."""
        images = self._images(pixel_values)
        vectors = self.encoder(images)
        chosen = self.codebook(self.nearest(vectors.detach())).permute(0, 3, 1, 2)
        seen = self.decoder(vectors + (chosen - vectors).detach())
        apart = F.mse_loss(chosen, vectors.detach()) + commitment * F.mse_loss(vectors, chosen.detach())
        return F.mse_loss(seen, images) + apart

    @torch.no_grad()
    def revive(self, images: torch.Tensor, generator: torch.Generator | None = None) -> int:
        """Moves codes that no image ``[B, ...]`` uses to vectors that occur; returns how many there were."""
        vectors = self.encoder(self._images(images))
        used = torch.bincount(self.nearest(vectors).flatten(), minlength=self.config.codes) > 0
        flat = vectors.permute(0, 2, 3, 1).flatten(0, 2)
        idle = (~used).nonzero()[:, 0]
        rows = torch.randperm(len(flat), generator=generator)[: len(idle)]
        self.codebook.weight[idle[: len(rows)]] = flat[rows]
        return len(idle)


CLASSES: dict[str, type[ImageTokenizer]] = {"kl": KLImageTokenizer, "vq": VQImageTokenizer}


def load_image_tokenizer(name: str | Path) -> ImageTokenizer:
    """A tokenizer that ships, by its name, or one of a folder; in float32 and evaluation mode.

    Raises:
        UnknownNameError: neither a folder nor one that ships.
        BadInputError: a folder of something else.
    """
    path = Path(name).expanduser()
    folder = path if (path / "config.json").is_file() else weights_folder(str(name))
    config = PreTrainedConfig.get_config_dict(folder)[0]
    if config.get("model_type") != ImageTokenizerConfig.model_type or config.get("kind") not in CLASSES:
        raise BadInputError(f"{folder} holds no tokenizer of images.")
    check_no_pickle(folder)
    with quiet_transformers():
        network = CLASSES[config["kind"]]
        found: ImageTokenizer = network.from_pretrained(folder, dtype="float32", use_safetensors=True).eval()
    return found


def save_latents(path: Path, latents: torch.Tensor, labels: torch.Tensor, identity: str) -> None:
    """Writes latents or codes ``[N, ...]`` and labels ``[N]``, with the identity of their tokenizer."""
    from safetensors.torch import save_file

    tensors = {"latents": latents.contiguous(), "labels": labels.contiguous()}
    write_whole(path, lambda beside: save_file(tensors, beside, {"tokenizer": identity}))


def read_latents(path: Path, identity: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``save_latents`` wrote.

    Raises:
        BadInputError: no such file, or none with latents and labels.
        TokenizerMismatchError: latents of another tokenizer.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise BadInputError(f"There is no file of latents {path}.")
    try:
        with safe_open(path, "pt") as file:
            made_by = (file.metadata() or {}).get("tokenizer")
            found = file.get_tensor("latents"), file.get_tensor("labels")
    except (SafetensorError, OSError) as error:
        raise BadInputError(f"{path} holds no latents with labels: {error}", "Write it with save_latents.") from error
    if made_by != identity:
        raise TokenizerMismatchError(
            f"{path} holds latents of the image tokenizer {made_by}; {identity} is asked for.",
            "Encode the images anew with this tokenizer.",
        )
    return found

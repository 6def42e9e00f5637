"""TokenBridge's claims: bins lose nothing that shows, and channels must be spelt, in the right order.

All arms share one autoencoder, ``digits-kl``, with 16 tokens of 8 channels an image. At 8 bins a channel an image takes
as many bits (384) as with the codebook of ``digits-vq``. The generators differ in their heads only: the spatial
backbone, the data, the steps and the masks are the same. Nats are of held-out digits, each with the same masks.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    from ..core.results import Values

CONTINUOUS, VQ = "continuous", "VQ, 384 bits"
BINS = {"8 bins, 384 bits": 8, "16 bins": 16, "64 bins": 64}
SPELT, REVERSED, INDEPENDENT, FLOW = "64 bins, spelt", "64 bins, reversed", "64 bins, independent", "continuous, flow"
HEADS: dict[str, dict[str, Any]] = {
    SPELT: {},
    INDEPENDENT: {"head": "independent"},
    REVERSED: {"order": "reversed"},
    FLOW: {"head": "continuous"},
}
ERROR, NATS = "squared error of an image", "nats a token"
FRECHET, RIGHT = "Frechet distance of drawn digits", "right digits drawn"
REBUILT, KEPT = "Frechet distance of rebuilt digits", "right digits, rebuilt"
GUIDANCE = 3.0
WHY = "networks of 0.3M weights on 1,297 digits, 16 tokens of 8 channels; the paper has 486M and more on ImageNet"
WHY_ERROR = "digits of 16 x 16 pixels and an autoencoder of 0.1M weights; the paper compares rFID on ImageNet"


def run(context: Context) -> Arms:
    arms: Arms = context.part("reconstruction", rebuilt)
    names = (SPELT, INDEPENDENT) if context.quick else tuple(HEADS)
    for name in names:
        arms[name] = context.part(name, partial(drawn, context, name))
    return arms


def rebuilt() -> Arms:
    """Held-out digits through the autoencoder, through its latents in bins, and through a codebook."""
    import torch

    from ..architectures.images.data import digit_images, digit_split
    from ..architectures.images.metrics import image_scores
    from ..architectures.images.tokenizers import load_image_tokenizer
    from ..architectures.tokenbridge.quantizer import PostTrainingQuantizer

    kl, vq = load_image_tokenizer("digits-kl"), load_image_tokenizer("digits-vq")
    images, labels = digit_images(kl.config.image_size)
    known, held = digit_split()
    real, asked = images[held], labels[held]
    latents = kl.encode(real)
    scale = PostTrainingQuantizer().fit(kl.encode(images[known])).scale
    shown: dict[str, torch.Tensor] = {CONTINUOUS: kl.decode(latents), VQ: vq.decode(vq.encode(real))}
    for name, bins in BINS.items():
        quantizer = PostTrainingQuantizer(bins, scale=scale)
        shown[name] = kl.decode(quantizer.decode(quantizer.encode(latents)))
    found: Arms = {}
    for name, pictures in shown.items():
        errors = (pictures - real).square().mean((1, 2, 3))
        scores = image_scores(pictures, asked, draws=2)
        found[name] = {ERROR: errors.tolist(), KEPT: scores.right, REBUILT: scores.frechet}
    return found


def drawn(context: Context, name: str) -> dict[str, Values]:
    """A generator learned with one head: nats of held-out digits, and digits that it draws."""
    import torch

    from ..architectures.images.metrics import image_scores
    from ..architectures.tokenbridge.latents import digit_latents
    from ..architectures.tokenbridge.method import images_of
    from ..architectures.tokenbridge.training import TokenBridgeTraining, learn, nats_of

    settings: dict[str, Any] = {"seed": context.seed, "steps": 500, "head_layers": 1} | HEADS[name]
    if context.quick:
        settings |= {"steps": 60, "width": 32, "head_width": 32, "layers": 1, "decoder_layers": 1}
    data = digit_latents(moved=not context.quick)
    model, _ = learn(TokenBridgeTraining(**settings), data, None, context.report, name)
    context.artifacts[f"weights of {name}"] = sum(weight.numel() for weight in model.parameters())
    found: dict[str, Values] = {}
    if name != FLOW:
        found[NATS] = nats_of(model, data.held, data.held_labels).tolist()
    count = 30 if context.quick else 300
    labels = torch.arange(count) % 10
    context.report(f"{name}: drawing", 0, 0)
    sampled = model.generate(labels, guidance=GUIDANCE, seed=1_000_000 * context.seed)
    scores = image_scores(images_of(model.config, sampled.latents), labels)
    context.artifacts[f"Frechet distance of {name}"] = [scores.frechet, scores.low, scores.high, scores.floor]
    return found | {FRECHET: scores.frechet, RIGHT: scores.right}


REPRODUCTION = Reproduction(
    name="tokenbridge",
    summary="handwritten digits drawn from latents in bins, spelt channel by channel or not, and from continuous ones",
    run=run,
    claims=[
        Claim(NATS, SPELT, INDEPENDENT, "independent channels fail", "difference", False, why=WHY),
        Claim(NATS, SPELT, REVERSED, "spectral order helps", "difference", False, why=WHY),
        Claim(RIGHT, SPELT, INDEPENDENT, "independent channels fail", "difference", why=WHY),
        Claim(RIGHT, SPELT, FLOW, "on a par with continuous", "difference", True, -0.05, WHY),
        Claim(FRECHET, SPELT, FLOW, "FID 1.55 against 1.55", "ratio", False, 1.1, WHY),
        Claim(FRECHET, SPELT, INDEPENDENT, "independent channels fail", "ratio", False, why=WHY),
        Claim(KEPT, "64 bins", CONTINUOUS, "rFID as of the continuous one", "difference", True, -0.01, WHY_ERROR),
        Claim(ERROR, "64 bins", CONTINUOUS, "rFID as of the continuous one", "ratio", False, 1.05, WHY_ERROR),
        Claim(ERROR, "64 bins", "8 bins, 384 bits", "more bins, less loss", "ratio", False, why=WHY_ERROR),
        Claim(ERROR, "8 bins, 384 bits", VQ, "not stated", "ratio", False, why=WHY_ERROR),
    ],
    extra=("search", "sklearn"),
)

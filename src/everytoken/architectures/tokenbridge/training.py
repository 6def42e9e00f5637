"""``everytoken train tokenbridge``: a generator of pictures in the latents of an autoencoder, from scratch.

Without ``--data`` it learns the handwritten digits of scikit-learn. ``--data FILE`` takes latents with labels that
``everytoken.architectures.images.tokenizers.save_latents`` wrote; every tenth is held out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...core.errors import BadInputError, check_choices
from ...core.progress import Report, silent
from ...core.rng import derive_seed, seed_everything
from ...training.base import Training, TrainingContext, TrainingResult
from ...training.stepwise import Stage, fingerprint, fit
from ..training import write_training
from .configuration_tokenbridge import HEADS, TokenBridgeConfig
from .latents import TOKENIZER, LatentSet, digit_latents, file_latents
from .method import TokenBridge
from .modeling_tokenbridge import TokenBridgeModel, others, rows_at
from .quantizer import PostTrainingQuantizer, spectral_order

ORDERS = ("spectral", "raw", "reversed")


@dataclass(frozen=True)
class TokenBridgeTraining:
    """Settings of ``everytoken train tokenbridge``.

    Args:
        steps, batch, lr: of the training.
        bins: of the quantiser.
        head: ``channels``, ``independent`` or ``continuous``.
        order: in which channels are spelt: ``spectral`` (low frequencies first), ``raw`` (as they lie) or
            ``reversed`` (spectral, from its end).
        width, layers, decoder_layers: of encoder and decoder.
        head_width, head_layers: of the head.
        dropout: of encoder and decoder.
        tokenizer: an autoencoder that ships, or a folder of one.
        seed: of everything.
        save_every: a checkpoint after so many steps, from which the same command goes on.

    Raises:
        BadInputError: a value out of range.
    """

    steps: int = 700
    batch: int = 16
    lr: float = 2e-3
    bins: int = 64
    head: str = "channels"
    order: str = "spectral"
    width: int = 64
    layers: int = 3
    decoder_layers: int = 2
    head_width: int = 64
    head_layers: int = 2
    dropout: float = 0.1
    tokenizer: str = TOKENIZER
    seed: int = 0
    save_every: int = 200

    def __post_init__(self) -> None:
        check_choices(self, head=HEADS, order=ORDERS)
        if min(self.steps, self.batch, self.save_every, self.width, self.head_width) < 1:
            raise BadInputError("steps, batch, save_every and widths are 1 or more.")
        if self.width % 4 or self.head_width % 4:
            raise BadInputError("Widths are multiples of 4, the number of attention heads.")
        self.stage()
        PostTrainingQuantizer(self.bins)

    def stage(self, name: str = "tokenbridge") -> Stage:
        """Steps and rates."""
        return Stage(name, self.steps, self.lr, warmup=0.05, hold=0.4, weight_decay=0.02)

    def config(self, data: LatentSet) -> TokenBridgeConfig:
        """The network's configuration for some latents, whose scale and channel order it takes."""
        rows, columns = data.grid
        order = list(range(data.known.shape[2]))
        if self.order != "raw":
            order = spectral_order(data.known, data.grid)
        scale = PostTrainingQuantizer(self.bins).fit(data.known).scale
        return TokenBridgeConfig(
            rows=rows,
            columns=columns,
            channels=data.known.shape[2],
            bins=self.bins,
            latent_scale=scale,
            tokenizer=self.tokenizer,
            tokenizer_identity=data.tokenizer.identity,
            num_classes=data.classes,
            num_class_tokens=4,
            hidden_size=self.width,
            intermediate_size=2 * self.width,
            num_attention_heads=4,
            num_hidden_layers=self.layers,
            num_decoder_layers=self.decoder_layers,
            head=self.head,
            head_width=self.head_width,
            head_layers=self.head_layers,
            head_heads=4,
            channel_order=order[::-1] if self.order == "reversed" else order,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
        )


def learn(
    settings: TokenBridgeTraining,
    data: LatentSet,
    folder: Path | None = None,
    report: Report = silent,
    name: str = "tokenbridge",
) -> tuple[TokenBridgeModel, list[tuple[int, float]]]:
    """Makes a network after seeding and trains it, on a GPU where there is one; also its curve, ``(step, loss)``.

    Args:
        folder: where the checkpoint lies; None keeps none.
        name: for progress, and of the checkpoint.
    """
    seed_everything(derive_seed(settings.seed, "tokenbridge"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = TokenBridgeModel(settings.config(data)).to(device)  # type: ignore[arg-type]

    def loss(step: int) -> torch.Tensor:
        latents, labels = (item.to(device) for item in data.batch(settings.batch, settings.seed, step))
        torch.manual_seed(derive_seed(settings.seed, "masks", step))  # a run that goes on draws what it would have
        found: torch.Tensor = model(latents, class_labels=labels).loss
        return found

    identity = fingerprint(settings, data.batch(settings.batch, settings.seed, 0))
    every = settings.save_every
    curve = fit(model, loss, settings.stage(name), folder, report, save_every=every, identity=identity)
    return model.cpu(), curve  # type: ignore[call-arg]


@torch.no_grad()
def nats_of(
    model: TokenBridgeModel, latents: torch.Tensor, labels: torch.Tensor, shares: tuple[float, ...] = (1.0, 0.75, 0.5)
) -> torch.Tensor:
    """What a token costs in nats, all its channels: ``[B]``, the mean over positions that are masked.

    The masks are the same for every model: of every image as many positions as ``shares`` say, drawn once.

    Raises:
        BadInputError: a continuous head, which has no probabilities.
    """
    if model.config.head == "continuous":
        raise BadInputError("The continuous head has no probabilities.", "Compare samples.")
    generator = torch.Generator().manual_seed(0)
    found = []
    for share in shares:
        order = torch.rand(len(latents), model.config.positions, generator=generator).argsort(1)
        known = order[:, max(1, round(share * model.config.positions)) :].to(latents.device)
        output = model(latents, class_labels=labels, known=known)
        wanted = rows_at(model.quantizer.encode(latents), others(known, model.config.positions))
        logps = output.logits.float().log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
        found.append(-logps.sum(-1).mean(-1))
    return torch.stack(found).mean(0)


def run(config: TokenBridgeTraining, context: TrainingContext) -> TrainingResult:
    """Trains, measures on held-out latents, and writes model, record and report.

    Raises:
        BadInputError: a model to go on from, or a file without latents; before the network is made.
        TokenizerMismatchError: latents of another tokenizer.
    """
    if context.model is not None:
        raise BadInputError("TokenBridge begins from scratch here.", "Leave --model out.")
    context.report("reading latents", 0, 0)
    if context.data is None:
        data = digit_latents(config.tokenizer)
    else:
        data = file_latents(Path(context.data), config.tokenizer)
    model, curve = learn(config, data, context.out, context.report)
    quantizer = model.quantizer
    kept = quantizer.decode(quantizer.encode(data.held))
    figures = {
        "squared error of the bins": float((kept - data.held).square().mean()),
        "clipped share": quantizer.clipped(data.held),
    }
    if config.head != "continuous":
        figures["nats a token"] = float(nats_of(model, data.held, data.held_labels).mean())
    with torch.no_grad():
        seen = TokenBridge(label=min(7, data.classes - 1)).observe(model, None, "")
    return write_training(
        "tokenbridge",
        context,
        model,
        config,
        figures,
        {"loss": [(float(step), value) for step, value in curve]},
        title=context.data or "digits",
        traces=seen.traces,
        column=TokenBridge.trace_columns[0],
        pictures={"A picture as it grows": "".join(seen.pictures)},
        hint="everytoken try tokenbridge --model {folder} --set label=7",
    )


TRAINING = Training(
    name="tokenbridge",
    summary="a generator of pictures in the latents of an autoencoder, cut into bins",
    config=TokenBridgeTraining,
    run=run,
    extra=("search", "sklearn"),
)

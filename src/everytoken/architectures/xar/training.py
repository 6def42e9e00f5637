"""``everytoken train xar``: digits from scratch, as latents of a tokenizer or as pixels.

Without ``--data`` it learns the handwritten digits of scikit-learn. ``--data FILE.safetensors`` holds latents and
labels of the tokenizer that is named (``images.tokenizers.save_latents``); latents of another one are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...core.errors import BadInputError
from ...core.progress import Report, silent
from ...core.rng import derive_seed, numpy_generator, seed_everything
from ...training.base import Training, TrainingContext, TrainingResult
from ...training.stepwise import Stage, fingerprint, fit
from ..images.data import CLASSES, SIDE, check_labels, digit_images, digit_split
from ..images.metrics import image_scores
from ..images.pictures import image_html, slider, tiled
from ..images.tokenizers import KLImageTokenizer, load_image_tokenizer, read_latents
from ..training import write_training
from .configuration_xar import XARConfig
from .method import XAR, images_of
from .modeling_xar import XARModel

Data = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class XARTraining:
    """Settings of ``everytoken train xar``.

    Args:
        steps, batch, lr: of the training.
        entity, entity_size: what is drawn at a time (``XARConfig``).
        noisy_context: learn from a noisy context.
        clean_share: share of entities that are left clean.
        tokenizer: an image tokenizer with continuous latents (``digits-kl``), or none for pixels.
        side: pixels a side, where latents are pixels.
        width, layers, heads: of the network.
        label_dropout, dropout: see ``XARConfig``.
        samples: digits that are drawn and measured at the end; 0 leaves that out.
        draw_steps, guidance: of these.
        seed: of everything.
        save_every: a checkpoint after so many steps, from which the same command goes on.

    Raises:
        BadInputError: a value out of range.
    """

    steps: int = 1200
    batch: int = 48
    lr: float = 2e-3
    entity: str = "cell"
    entity_size: int = 2
    noisy_context: bool = True
    clean_share: float = 0.0
    tokenizer: str | None = "digits-kl"
    side: int = SIDE
    width: int = 64
    layers: int = 4
    heads: int = 4
    label_dropout: float = 0.1
    dropout: float = 0.0
    samples: int = 100
    draw_steps: int = 25
    guidance: float = 2.7
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.save_every, self.side) < 1 or self.samples < 0:
            raise BadInputError("steps, batch, side and save_every are 1 or more, and samples 0 or more.")
        self.stage()
        if self.tokenizer is None:
            self.config((self.side, self.side), 1)
        XAR(steps=self.draw_steps, guidance=self.guidance)

    def stage(self) -> Stage:
        """Steps and rates."""
        return Stage("xar", self.steps, self.lr, warmup=0.05, hold=0.5, weight_decay=0.02)

    def config(self, grid: tuple[int, int], channels: int, identity: str = "") -> XARConfig:
        """The network's configuration; raises for settings that contradict each other."""
        return XARConfig(
            entity=self.entity,
            entity_size=self.entity_size,
            grid=grid,
            channels=channels,
            num_classes=CLASSES,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            noisy_context=self.noisy_context,
            clean_share=self.clean_share,
            label_dropout=self.label_dropout,
            dropout=self.dropout,
            floored_times=False,
            frequencies=64,
            latent_tokenizer=self.tokenizer or "",
            tokenizer_identity=identity,
        )


def prepared(config: XARTraining, data: str | None = None) -> tuple[XARConfig, Data]:
    """The network's configuration, and the latents and labels to learn from.

    Raises:
        BadInputError: a tokenizer with codes, a file without latents, latents that the tokenizer would not make, or
            labels out of range.
        TokenizerMismatchError: latents of another tokenizer.
    """
    if config.tokenizer is None:
        if data is not None:
            raise BadInputError(
                "--data holds latents of a tokenizer, and none is named.", "Name it: --set tokenizer=digits-kl."
            )
        images, labels = digit_images(config.side)
        known = digit_split()[0]
        return config.config((config.side, config.side), 1), (images[known], labels[known])
    tokenizer = load_image_tokenizer(config.tokenizer)
    if not isinstance(tokenizer, KLImageTokenizer):
        raise BadInputError(f"{config.tokenizer} has codes; xAR draws continuous latents.", "Use digits-kl.")
    made = config.config(tokenizer.config.grid, tokenizer.config.latent_channels, tokenizer.identity)
    if data is None:
        images, labels = digit_images(tokenizer.config.image_size)
        known = digit_split()[0]
        return made, (tokenizer.encode(images[known]), labels[known])
    latents, labels = read_latents(Path(data).expanduser(), tokenizer.identity)
    check_labels(labels, CLASSES)
    if tuple(latents.shape[1:]) != (made.channels, *made.grid) or len(latents) != len(labels) or not len(latents):
        raise BadInputError(f"{data} holds {[*latents.shape]} latents and {len(labels)} labels.")
    return made, (latents.float(), labels)


def learn(
    config: XARTraining, made: XARConfig, data: Data, folder: Path | None = None, report: Report = silent
) -> tuple[XARModel, list[tuple[int, float]]]:
    """Trains a network on latents and labels; returns it with the curve of its loss."""
    seed_everything(derive_seed(config.seed, "network"))
    model = XARModel(made)
    latents, labels = data
    if torch.cuda.is_available():
        model, latents, labels = model.cuda(), latents.cuda(), labels.cuda()

    def loss(step: int) -> torch.Tensor:
        rows = numpy_generator(config.seed, "batch", step).integers(0, len(latents), config.batch)
        torch.manual_seed(derive_seed(config.seed, "noise", step))  # so that a run that was cut goes on the same
        chosen = torch.from_numpy(rows).to(latents.device)
        found: torch.Tensor = model(latents[chosen], labels[chosen]).loss
        return found

    identity = fingerprint(config, made.to_dict(), latents, labels)
    curve = fit(model, loss, config.stage(), folder, report, save_every=config.save_every, identity=identity)
    return model, curve


def drawn(
    model: XARModel, count: int, seed: int, steps: int = 25, guidance: float = 2.7, sampler: str = "sde"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of all classes in turn and their labels, in batches of 100."""
    labels = torch.arange(count) % model.config.num_classes
    parts = [
        images_of(model, model.generate(part, steps, guidance, sampler, derive_seed(seed, "drawn", number)).cpu())
        for number, part in enumerate(labels.split(100))
    ]
    return torch.cat(parts), labels


def run(config: XARTraining, context: TrainingContext) -> TrainingResult:
    """Trains, draws and measures digits, and writes model, record and report.

    Raises:
        BadInputError, TokenizerMismatchError: as ``prepared``, or a model to go on from; before the network is made.
    """
    if context.model is not None:
        raise BadInputError("xAR begins from scratch here.", "Leave --model out.")
    made, data = prepared(config, context.data)
    model, curve = learn(config, made, data, context.out, context.report)
    figures, pictures = {"loss": curve[-1][1]}, {}
    if config.samples >= 2:
        context.report("drawing digits", 0, 0)
        images, labels = drawn(model, config.samples, config.seed, config.draw_steps, config.guidance)
        scores = image_scores(images, labels)
        figures |= {"Frechet distance": scores.frechet, "floor": scores.floor, "right digits": scores.accuracy}
        pictures["Drawn digits, none picked"] = image_html(tiled(images[:50], 10), "Drawn digits 0 to 9, row by row", 4)
    method = XAR(steps=config.draw_steps, guidance=config.guidance, count=1)
    shown = method.draw(model, torch.tensor([method.label]), config.seed)
    pictures["How one grows"] = slider(shown.frames, shown.steps, f"xAR draws {method.label}")
    return write_training(
        "xar",
        context,
        model,
        config,
        figures,
        {"loss": [(float(step), value) for step, value in curve]},
        title=context.data or "digits",
        traces=[shown.trace],
        column=XAR.trace_columns[0],
        pictures=pictures,
        hint="everytoken try xar --model {folder} --set label=7",
    )


TRAINING = Training(
    name="xar",
    summary="digits drawn cell by cell by flow matching, from scratch",
    config=XARTraining,
    run=run,
)

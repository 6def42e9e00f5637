"""``everytoken train plainmamba``: a classifier of pictures, from scratch.

Without ``--data`` it learns the six shapes of scenes, drawn anew for every step. ``--data FOLDER`` holds one folder of
images for each class; every tenth image is held out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...core.errors import BadInputError
from ...core.rng import numpy_generator, seed_everything
from ...training.base import Training, TrainingContext, TrainingResult
from ...training.datasets.scenes import SHAPES
from ...training.stepwise import Stage, fingerprint, fit
from ..training import write_training
from .configuration_plainmamba import PlainMambaConfig
from .method import PlainMamba
from .modeling_plainmamba import PlainMambaForImageClassification
from .pictures import ENDINGS, read_picture, scan_picture, shape_batch

Draw = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
"""``(count, step) -> images, labels``; step -1 is what is held out."""


@dataclass(frozen=True)
class PlainMambaTraining:
    """Settings of ``everytoken train plainmamba``.

    Args:
        steps, batch, lr: of the training.
        size, patch: pixels a side of images and of tokens.
        width, layers, states: of the network.
        scan: ``snake`` or ``raster``.
        direction_aware: tell the scans their moves.
        drop_path: of the last layer.
        seed: of everything.
        save_every: a checkpoint after so many steps, from which the same command goes on.

    Raises:
        BadInputError: a value out of range.
    """

    steps: int = 300
    batch: int = 24
    lr: float = 2e-3
    size: int = 32
    patch: int = 4
    width: int = 48
    layers: int = 4
    states: int = 8
    scan: str = "snake"
    direction_aware: bool = True
    drop_path: float = 0.0
    seed: int = 0
    save_every: int = 200

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.save_every) < 1:
            raise BadInputError("steps, batch and save_every are 1 or more.")
        self.stage()
        self.config(SHAPES)

    def stage(self) -> Stage:
        """Steps and rates."""
        return Stage("plainmamba", self.steps, self.lr, warmup=0.05, hold=0.5)

    def config(self, classes: tuple[str, ...]) -> PlainMambaConfig:
        """The network's configuration for some classes; raises for settings that contradict each other."""
        return PlainMambaConfig(
            image_size=self.size,
            patch_size=self.patch,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            state_size=self.states,
            stem_channels=16,
            conv_kernel=3,
            dwconv_layers=[],
            scan=self.scan,
            direction_aware=self.direction_aware,
            drop_path_rate=self.drop_path,
            id2label=dict(enumerate(classes)),
            label2id={name: number for number, name in enumerate(classes)},
        )


def run(config: PlainMambaTraining, context: TrainingContext) -> TrainingResult:
    """Trains, measures on held-out pictures, and writes model, record and report.

    Raises:
        BadInputError: a model to go on from, or a folder without classes; before the network is made.
    """
    if context.model is not None:
        raise BadInputError("PlainMamba begins from scratch here.", "Leave --model out.")
    classes: tuple[str, ...] = SHAPES
    draw = shapes_of(config)
    if context.data is not None:
        classes, draw = folder_of(config, Path(context.data))
    seed_everything(config.seed)
    model = PlainMambaForImageClassification(config.config(classes))

    def loss(step: int) -> torch.Tensor:
        images, labels = draw(config.batch, step)
        found: torch.Tensor = model(images, labels=labels).loss
        return found

    identity = fingerprint(config, draw(config.batch, 0))
    every = config.save_every
    curve = fit(model, loss, config.stage(), context.out, context.report, save_every=every, identity=identity)
    figures = {"right answers": share_right(model, draw)}
    side = config.size // config.patch
    paths = scan_picture(model.base_model.scans((side, side)), (side, side), list(model.config.scans))
    with torch.no_grad():
        shown = [] if context.data is not None else PlainMamba().observe(model, None, PlainMamba.example).traces
    return write_training(
        "plainmamba",
        context,
        model,
        config,
        figures,
        {"loss": [(float(step), value) for step, value in curve]},
        title=context.data or "shapes",
        traces=shown,
        column=PlainMamba.trace_columns[0],
        pictures={"The scans": paths},
        hint="everytoken try plainmamba --model {folder} --prompt 'a red ring'",
    )


def shapes_of(config: PlainMambaTraining) -> Draw:
    """Shapes on a ground with strokes."""
    return lambda count, step: shape_batch(config.size, count, config.seed, "plainmamba", step)


def folder_of(config: PlainMambaTraining, folder: Path) -> tuple[tuple[str, ...], Draw]:
    """The classes of a folder, and batches of its images.

    Raises:
        BadInputError: fewer than two folders with ten images each, or a file that is no image.
    """
    if not folder.is_dir():
        raise BadInputError(f"{folder} is no folder.", "Give one that holds a folder of images for each class.")
    found = {
        place.name: sorted(item for item in place.iterdir() if item.suffix.lower() in ENDINGS)
        for place in sorted(folder.iterdir())
        if place.is_dir()
    }
    found = {name: files for name, files in found.items() if files}
    if len(found) < 2 or min(map(len, found.values())) < 10:
        raise BadInputError(f"{folder} holds {len(found)} classes.", "Two folders of ten images each are the least.")
    files = [(item, number) for number, items in enumerate(found.values()) for item in items]
    images = torch.cat([read_picture(item, config.size) for item, _ in files])
    labels = torch.tensor([number for _, number in files])
    held = torch.arange(len(files)) % 10 == 0

    def draw(count: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step < 0:
            return images[held], labels[held]
        rows = numpy_generator(config.seed, "images", step).choice(torch.where(~held)[0].numpy(), count)
        return images[rows], labels[rows]

    return tuple(found), draw


@torch.no_grad()
def share_right(model: PlainMambaForImageClassification, draw: Draw, count: int = 512) -> float:
    """Share of held-out pictures whose class is the likeliest."""
    images, labels = draw(count, -1)
    found = torch.cat([model(part).logits.argmax(-1) for part in images.split(128)])
    return float((found == labels).float().mean())


TRAINING = Training(
    name="plainmamba",
    summary="a classifier of pictures that are read by snakes, from scratch",
    config=PlainMambaTraining,
    run=run,
)

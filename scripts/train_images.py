"""Trains what the networks that draw images share, and puts it where it ships: two tokenizers and a classifier.

    python scripts/train_images.py digits-kl --out work/digits-kl            # two minutes on a thread
    python scripts/train_images.py digits-vq --out work/digits-vq --ship     # copies the weights into the package
    python scripts/train_images.py digits-classifier --out work/digits-classifier --ship

They learn from the digits of scikit-learn that ``architectures/images/data.py`` does not hold out. Weights are kept in
float16; ``training.json`` beside them says how they were trained and what they reach on held-out digits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from everytoken.architectures.images.data import digit_batch, digit_images, digit_split
from everytoken.architectures.images.metrics import ImageClassifier, ImageClassifierConfig
from everytoken.architectures.images.tokenizers import ImageTokenizerConfig, KLImageTokenizer, VQImageTokenizer
from everytoken.core.errors import EverytokenError
from everytoken.core.files import write_text_whole
from everytoken.core.quiet import quiet_transformers
from everytoken.core.rng import seed_everything
from everytoken.core.weights import WEIGHTS
from everytoken.training.stepwise import Stage, fit
from training_script import options, report, ship

SIDE = 16
STEPS = {"digits-kl": 700, "digits-vq": 600, "digits-classifier": 1000}
BATCH = 48


def make(name: str) -> Any:
    """The network before training."""
    if name == "digits-classifier":
        return ImageClassifier(ImageClassifierConfig(image_size=SIDE))
    if name == "digits-kl":
        return KLImageTokenizer(ImageTokenizerConfig(kind="kl", halvings=2))
    return VQImageTokenizer(ImageTokenizerConfig(kind="vq", halvings=1))


def shifted(images: torch.Tensor, step: int) -> torch.Tensor:
    """Images moved by up to one pixel a side, another way each step."""
    down, right = step % 3 - 1, step // 3 % 3 - 1
    moved = F.pad(images, (1, 1, 1, 1), value=-1.0)
    return moved[:, :, 1 + down : 1 + down + SIDE, 1 + right : 1 + right + SIDE]


def loss_of(name: str, model: Any, step: int) -> torch.Tensor:
    """The loss of a step."""
    images, labels = digit_batch(BATCH, 0, step, SIDE)
    if name == "digits-classifier":
        return F.cross_entropy(model(shifted(images, step)), labels)
    if name == "digits-vq" and step % 50 == 0 and step < 0.7 * STEPS[name]:
        model.revive(images, torch.Generator().manual_seed(step))
    found: torch.Tensor = model(images)
    return found


@torch.no_grad()
def measured(name: str, model: Any) -> dict[str, float]:
    """Figures on held-out digits."""
    images, labels = digit_images(SIDE)
    held = digit_split()[1]
    if name == "digits-classifier":
        return {"right answers": float((model(images[held]).argmax(-1) == labels[held]).float().mean())}
    tokens = model.encode(images[held])
    figures = {"squared error": float(F.mse_loss(model.decode(tokens), images[held]))}
    if name == "digits-vq":
        figures["codes used"] = float(len(tokens.unique()))
    return figures


def train(name: str, out: Path) -> None:
    """Trains one network and writes it, in float16, with its record."""
    seed_everything(0)
    model = make(name)
    stage = Stage(name, STEPS[name], 2e-3, warmup=0.05, hold=0.4)
    curve = fit(model, lambda step: loss_of(name, model, step), stage, out, report)
    if name == "digits-kl":
        images = digit_images(SIDE)[0][digit_split()[0]]
        model.config.latent_scale = round(1 / float(model.encode(images).std()), 4)
    model = model.half().float()  # what ships is measured
    figures = measured(name, model)
    print(name, figures, sum(weight.numel() for weight in model.parameters()), "weights")
    with quiet_transformers():
        model.half().save_pretrained(out / "model")
    record = {"figures": figures, "settings": {"steps": stage.steps, "batch": BATCH, "lr": stage.lr}, "curve": curve}
    write_text_whole(out / "model" / "training.json", json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("name", choices=list(STEPS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        train(args.name, args.out)
        if args.ship:
            place = WEIGHTS / args.name
            place.mkdir(exist_ok=True)
            ship((args.out / "model").iterdir(), place)
    except EverytokenError as error:
        sys.exit(f"{error.message} {error.hint or ''}")


if __name__ == "__main__":
    main()

"""What the scripts that train shipped weights share: their options, progress, and the copy into the package."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from everytoken.training.base import Training, TrainingContext, read_config


def options(doc: str | None) -> argparse.ArgumentParser:
    """``--out``, ``--set`` and ``--ship``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--ship", action="store_true", help="copy the weights into the package when they are trained")
    return parser


def report(stage: str, done: int, total: int) -> None:
    """A line for every tenth of a stage, and for its end."""
    if total and (done % max(total // 10, 1) == 0 or done == total):
        print(f"{time.strftime('%H:%M:%S')} {stage}: {done} of {total}", flush=True)


def ship(files: Iterable[Path], place: Path) -> None:
    """Copies files to where they ship."""
    for path in files:
        shutil.copyfile(path, place / path.name)
    print(f"Copied into {place}.")


def train(training: Training, settings: Sequence[str], out: Path) -> Any:
    """Trains by settings ``KEY=VALUE``, prints the figures, and returns the settings as read."""
    config = read_config(training, None, [*settings])
    for name, value in training.run(config, TrainingContext(None, None, out, report)).figures.items():
        print(f"{name:<40} {value:.4g}")
    return config


def ship_network(network: Any, args: argparse.Namespace, place: Path) -> None:
    """The trained network of ``--out`` in float16, its tokenizer and its record, to where they ship.

    Args:
        network: a class with ``from_pretrained``.
    """
    place.mkdir(exist_ok=True)
    half = args.out / "half"
    network.from_pretrained(args.out / "model", use_safetensors=True).half().save_pretrained(half)
    ship([args.out / "model" / name for name in ("tokenizer.json", "tokenizer_config.json")], place)
    ship([half / name for name in ("model.safetensors", "config.json")], place)
    ship([args.out / "training.json"], place)

"""Trains what the methods of the station ``reduction`` ship for the tiny model of scenes, with the code of
``everytoken train``: ``scenes-vlm-m3`` and ``scenes-vlm-tokenpacker``.

    python scripts/train_vision_methods.py m3 --out work/m3                # goes on where it was cut
    python scripts/train_vision_methods.py tokenpacker --out work/packer --ship

``--set key=value`` changes settings of the training.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch

from everytoken.catalog.cards import find_card
from everytoken.core.errors import EverytokenError
from everytoken.core.vision import EMBEDDED_VLM
from everytoken.core.weights import WEIGHTS
from everytoken.training.base import TrainingContext, read_config


def report(stage: str, done: int, total: int) -> None:
    """A line for every tenth of a stage."""
    if total and (done % max(total // 10, 1) == 0 or done == total):
        print(f"{time.strftime('%H:%M:%S')} {stage}: {done} of {total}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--ship", action="store_true", help="copy the weights into the package when they are trained")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the parts of a batch keep the cores busy
    try:
        training = find_card(args.method).load_training()
        result = training.run(read_config(training, None, args.settings), TrainingContext(None, None, args.out, report))
    except EverytokenError as error:
        sys.exit(f"{error.message} {error.hint or ''}")
    for name, value in result.figures.items():
        print(f"{name}: {value:.3f}")
    if args.ship:
        place = WEIGHTS / f"{EMBEDDED_VLM}-{args.method}"
        for path in result.files[0].iterdir():
            shutil.copyfile(path, place / path.name)
        print(f"Copied into {place}.")


if __name__ == "__main__":
    main()

"""Trains what the methods of the station ``reduction`` ship for the tiny model of scenes, with the code of
``everytoken train``: ``scenes-vlm-m3``, ``scenes-vlm-tokenpacker`` and ``scenes-vlm-token-reduction``.

    python scripts/train_vision_methods.py m3 --out work/m3                # goes on where it was cut
    python scripts/train_vision_methods.py tokenpacker --out work/packer --ship

``--set key=value`` changes settings of the training.
"""

from __future__ import annotations

import sys

import torch

from everytoken.catalog.cards import find_card
from everytoken.core.errors import EverytokenError
from everytoken.core.vision import EMBEDDED_VLM
from everytoken.core.weights import WEIGHTS
from everytoken.training.base import TrainingContext, read_config
from training_script import options, report, ship


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("method")
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
        ship(result.files[0].iterdir(), WEIGHTS / f"{EMBEDDED_VLM}-{args.method}")


if __name__ == "__main__":
    main()

"""Trains the small networks of any order anew, and puts them where they ship: ``sudoku-any-order`` and, with two
streams, ``sudoku-any-subset``.

python scripts/train_any_order.py --out work/sudoku          # four minutes on a thread; goes on where it was cut
python scripts/train_any_order.py --out work/sudoku --ship   # copies the network into the package, in float16
python scripts/train_any_order.py --out work/subset --set streams=2 --set steps=1000 --ship
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForMaskedLM

from everytoken.architectures.any_order.training import TRAINING
from everytoken.core.errors import EverytokenError
from everytoken.core.weights import WEIGHTS
from training_script import options, ship_network, train


def main() -> None:
    args = options(__doc__).parse_args()
    torch.set_num_threads(1)
    try:
        config = train(TRAINING, ["task=sudoku", *args.settings], args.out)
        if args.ship:
            place = WEIGHTS / ("sudoku-any-order" if config.streams == 1 else "sudoku-any-subset")
            ship_network(AutoModelForMaskedLM, args, place)
    except EverytokenError as error:
        sys.exit(f"{error.message} {error.hint or ''}")


if __name__ == "__main__":
    main()

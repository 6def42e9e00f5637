"""Trains the small insertion language model of star graphs anew, and puts it where it ships: ``star-graphs-ilm``.

python scripts/train_ilm.py --out work/stars          # three minutes on a thread; goes on where it was cut
python scripts/train_ilm.py --out work/stars --ship   # copies the network into the package, in float16
"""

from __future__ import annotations

import sys

import torch

from everytoken.architectures.ilm.method import ILM
from everytoken.architectures.ilm.modeling_ilm import InsertionLM
from everytoken.architectures.ilm.training import TRAINING
from everytoken.core.errors import EverytokenError
from everytoken.core.weights import WEIGHTS
from training_script import options, ship_network, train


def main() -> None:
    args = options(__doc__).parse_args()
    torch.set_num_threads(1)
    try:
        train(TRAINING, args.settings, args.out)
        if args.ship:
            ship_network(InsertionLM, args, WEIGHTS / ILM.weights)
    except EverytokenError as error:
        sys.exit(f"{error.message} {error.hint or ''}")


if __name__ == "__main__":
    main()

"""Trains the small networks of the station ``architectures`` anew, and puts them where they ship.

    python scripts/train_architectures.py mrt5 --out work/mrt5           # minutes on a thread; goes on where it was cut
    python scripts/train_architectures.py mrt5 --out work/mrt5 --ship    # copies the network into the package

Every method trains by its own recipe with its defaults; ``--set key=value`` changes them, and ``training.json``
beside the weights says what they were. The text is English prose that ships with Python
(``everytoken.training.datasets.plain_text``); pictures are drawn, or ship in packages. Weights are kept in float16.
What ships: ``mrt5-prose`` (task=vowels), ``hat-prose``, ``lexinvariant-prose``, ``openmoe-prose``, ``rmoe-prose``,
``duo-llm-prose``, ``mamba-dynamics-prose``, ``plainmamba-shapes``, ``xar-digits``,
``tokenbridge-digits`` and ``token-shuffle-digits``.
"""

from __future__ import annotations

import sys
import time

import torch

from everytoken.catalog.cards import find_card
from everytoken.core.errors import EverytokenError
from everytoken.core.weights import WEIGHTS
from everytoken.training.base import TrainingContext, read_config
from training_script import options, report, ship


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("method")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        card = find_card(args.method)
        training, method = card.load_training(), card.load()
        config = read_config(training, None, args.settings)
        began = time.time()
        result = training.run(config, TrainingContext(None, None, args.out, report))
        for name, value in result.figures.items():
            print(f"{name:<40} {value:.4g}")
        print(f"{time.time() - began:.0f} seconds")
        if args.ship:
            place = WEIGHTS / method.weights
            place.mkdir(exist_ok=True)
            with torch.no_grad():
                method.load(str(args.out / "model")).half().save_pretrained(args.out / "half")
            rest = [path for path in (args.out / "model").iterdir() if path.suffix != ".safetensors"]
            ship([path for path in rest if path.name != "config.json"], place)
            ship([*(args.out / "half").glob("*.safetensors"), args.out / "half" / "config.json"], place)
            ship([args.out / "training.json"], place)
    except EverytokenError as error:
        sys.exit(f"{error.message} {error.hint or ''}")


if __name__ == "__main__":
    main()

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
from everytoken.training.base import TrainingContext, read_config
from training_script import options, report, ship


def main() -> None:
    args = options(__doc__).parse_args()
    torch.set_num_threads(1)
    try:
        config = read_config(TRAINING, None, args.settings)
        for name, value in TRAINING.run(config, TrainingContext(None, None, args.out, report)).figures.items():
            print(f"{name:<40} {value:.4g}")
        if args.ship:
            place, half = WEIGHTS / ILM.weights, args.out / "half"
            place.mkdir(exist_ok=True)
            InsertionLM.from_pretrained(args.out / "model", use_safetensors=True).half().save_pretrained(half)
            ship([args.out / "model" / name for name in ("tokenizer.json", "tokenizer_config.json")], place)
            ship([half / name for name in ("model.safetensors", "config.json")], place)
            ship([args.out / "training.json"], place)
    except EverytokenError as error:
        sys.exit(f"{error.message} {error.hint or ''}")


if __name__ == "__main__":
    main()

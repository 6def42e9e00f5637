"""Trains the tiny vision-language model of scenes anew, and puts it where it ships (``scenes-vlm``).

    python scripts/train_vlm.py --out work/vlm               # minutes on two cores; goes on where it was cut
    python scripts/train_vlm.py --out work/vlm --ship        # copies the finished model into the package

``--set key=value`` changes the settings of ``VLMTraining`` (``everytoken.training.vision``).
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import torch

from everytoken.core.errors import EverytokenError
from everytoken.core.files import write_text_whole
from everytoken.core.settings import parse_settings
from everytoken.core.vision import EMBEDDED_VLM
from everytoken.core.weights import WEIGHTS
from everytoken.training.vision import VLMTraining, by_kind, held_out, right_answers, train_vlm
from everytoken.training.vlm_files import save_vlm
from training_script import options, report, ship


def main() -> None:
    parser = options(__doc__)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the parts of a batch keep the cores busy
    try:
        config = VLMTraining(**parse_settings("the tiny model", VLMTraining, args.settings))
        began = time.time()
        model, curves = train_vlm(config, args.out, report)
    except EverytokenError as error:
        sys.exit(f"{error.message} {error.hint or ''}")
    scenes, questions = held_out(1000, seed=1, maker=config.maker(3, config.most))
    right = right_answers(model, scenes, questions)
    figures = {"all": sum(right) / len(right), **by_kind(right, questions)}
    for name, value in figures.items():
        print(f"{name:<8} {value:.3f}")
    save_vlm(model, args.out / "model")
    record = {"settings": dataclasses.asdict(config), "seconds": round(time.time() - began), "right": figures}
    write_text_whole(args.out / "model" / "training.json", json.dumps({**record, "curves": curves}, indent=1) + "\n")
    if args.ship:
        ship((args.out / "model").iterdir(), WEIGHTS / EMBEDDED_VLM)


if __name__ == "__main__":
    main()

"""Trains the tiny vision-language model of scenes anew, and puts it where it ships (``scenes-vlm``).

    python scripts/train_vlm.py --out work/vlm               # minutes on two cores; goes on where it was cut
    python scripts/train_vlm.py --out work/vlm --ship        # copies the finished model into the package

``--set key=value`` changes the settings of ``VLMTraining`` (``everytoken.training.vision``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path

import torch

from everytoken.core.errors import EverytokenError
from everytoken.core.files import write_text_whole
from everytoken.core.settings import parse_settings
from everytoken.core.weights import WEIGHTS
from everytoken.training.datasets.scenes import KINDS
from everytoken.training.vision import VLMTraining, held_out, right_answers, train_vlm
from everytoken.training.vlm_files import save_vlm

SHIPPED = "scenes-vlm"


def report(stage: str, done: int, total: int) -> None:
    """A line for every tenth of a stage."""
    if done % max(total // 10, 1) == 0 or done == total:
        print(f"{time.strftime('%H:%M:%S')} {stage}: {done} of {total}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--ship", action="store_true", help="copy the model into the package when it is trained")
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
    figures = {"all": sum(right) / len(right)}
    for kind in KINDS:
        some = [value for value, asked in zip(right, questions, strict=True) if asked.kind == kind]
        figures[kind] = sum(some) / len(some)
    for name, value in figures.items():
        print(f"{name:<8} {value:.3f}")
    save_vlm(model, args.out / "model")
    record = {"settings": dataclasses.asdict(config), "seconds": round(time.time() - began), "right": figures}
    write_text_whole(args.out / "model" / "training.json", json.dumps({**record, "curves": curves}, indent=1) + "\n")
    if args.ship:
        for path in (args.out / "model").iterdir():
            shutil.copyfile(path, WEIGHTS / SHIPPED / path.name)
        print(f"Copied into {WEIGHTS / SHIPPED}.")


if __name__ == "__main__":
    main()

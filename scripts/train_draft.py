"""Trains the feature draft of the embedded model anew, with the code of ``everytoken train dyspec``, and puts it where
it ships (``dyspec-smollm2-135m``).

    python scripts/train_draft.py --out work/draft                      # hours on two cores; goes on where it was cut
    python scripts/train_draft.py --out work/draft --set steps=20000    # longer: goes on from the last checkpoint
    python scripts/train_draft.py --out work/draft --ship               # copy the best weights into the package

Settings are those of ``everytoken train dyspec`` (``--set key=value``). Texts, checkpoint and curve are in ``--out``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from everytoken.core.errors import EverytokenError
from everytoken.generation.draft_training import FILES, TRAINING
from everytoken.generation.speculative import draft_folder
from everytoken.training.base import TrainingContext, read_config


def report(stage: str, done: int, total: int) -> None:
    """A line for every tenth of a stage, and for its end."""
    if total and (done == total or done % max(total // 10, 1) == 0):
        print(f"{stage}: {done} of {total}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--ship", action="store_true", help="copy the draft into the package when it is trained")
    args = parser.parse_args()
    shipped = ["answers=6000", "steps=12000", "draft_vocab=16384", "install=false"]
    try:
        config = read_config(TRAINING, None, [*shipped, *args.settings])
        result = TRAINING.run(config, TrainingContext(None, None, args.out, report))
    except EverytokenError as error:
        sys.exit(f"{error.message} {error.hint or ''}")
    for name, value in result.figures.items():
        print(f"{name}: {value:.3f}")
    if args.ship:
        for name in FILES:
            shutil.copyfile(args.out / name, draft_folder() / name)
        print(f"Copied into {draft_folder()}.")


if __name__ == "__main__":
    main()

"""Trains the feature draft of the embedded model anew, with the code of ``everytoken train dyspec``, and puts it where
it ships (``dyspec-smollm2-135m``).

    python scripts/train_draft.py --out work/draft                      # hours on two cores; goes on where it was cut
    python scripts/train_draft.py --out work/draft --set steps=20000    # longer: goes on from the last checkpoint
    python scripts/train_draft.py --out work/draft --ship               # copy the best weights into the package

Settings are those of ``everytoken train dyspec`` (``--set key=value``). Texts, checkpoint and curve are in ``--out``.
"""

from __future__ import annotations

import sys

from everytoken.core.errors import EverytokenError
from everytoken.generation.draft_training import FILES, TRAINING
from everytoken.generation.speculative import draft_folder
from everytoken.training.base import TrainingContext, read_config
from training_script import options, report, ship


def main() -> None:
    parser = options(__doc__)
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
        ship((args.out / name for name in FILES), draft_folder())


if __name__ == "__main__":
    main()

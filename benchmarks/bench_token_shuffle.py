"""Token-Shuffle's drawing and learning, by windows: networks of one backbone, the same texts and images, in one run.

A window of 1 x 1 is the plain language model. Random weights: time does not depend on them. On one thread, in processor
time, so that other work on the machine does not count; the least of several runs, which take turns.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from common import report
from everytoken.architectures.token_shuffle.digits import (
    codes_of,
    image_codes,
    learned_rows,
    text_ids,
    text_tokenizer,
    words_for,
)
from everytoken.architectures.token_shuffle.modeling_token_shuffle import TokenShuffleForConditionalGeneration
from everytoken.architectures.token_shuffle.training import TokenShuffleTraining

WINDOWS = (1, 2, 4)


def network(window: int, layers: int, width: int) -> TokenShuffleForConditionalGeneration:
    torch.manual_seed(0)
    config = TokenShuffleTraining(window=window, layers=layers, width=width, heads=4)
    return config.begin(image_codes("levels")).eval()


def drawing(model: TokenShuffleForConditionalGeneration, images: int, guidance: float) -> float:
    """Processor milliseconds an image."""
    ids, mask = text_ids(text_tokenizer(), words_for(torch.arange(images) % 10))
    began = time.process_time()
    model.generate(ids, mask, seeds=range(images), guidance=guidance)
    return 1e3 * (time.process_time() - began) / images


def learning(model: TokenShuffleForConditionalGeneration, images: int) -> float:
    """Processor milliseconds an image: forward and backward."""
    rows = learned_rows(codes_of(model.config), images, 0, 0)
    began = time.process_time()
    model(**rows).loss.backward()
    return 1e3 * (time.process_time() - began) / images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = {window: network(window, args.layers, args.width) for window in WINDOWS}
    cases = {
        "drawing one image": lambda model: drawing(model, 1, 1.0),
        "drawing 64 images": lambda model: drawing(model, 64, 1.0),
        "drawing 64 images, guided": lambda model: drawing(model, 64, 2.0),
        "learning, 32 images": lambda model: learning(model, 32),
    }
    rows = []
    for what, run in cases.items():
        least = dict.fromkeys(WINDOWS, float("inf"))
        for number in range(args.repeats + 1):  # the first one warms up
            for window, model in models.items():
                found = run(model)
                least[window] = min(least[window], found) if number else least[window]
        row: dict[str, Any] = {"what": what}
        row |= {f"window {window}, ms an image": least[window] for window in WINDOWS}
        row |= {f"times faster, window {window}": least[1] / least[window] for window in WINDOWS[1:]}
        rows.append(row)
    report("token-shuffle", rows, f"{args.layers} layers of width {args.width}; 64 image tokens; processor time")


if __name__ == "__main__":
    main()

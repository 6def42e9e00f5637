"""The claims of lexinvariant models: no text under other names costs more, context makes up for what is not known, and
symbols are looked up in context better.

Two decoders of one shape learn the same letters for equally many steps: one with a table of its own (tied), one with a
table that is drawn for every sequence.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..core.results import Values

LEXINVARIANT, ORDINARY = "lexinvariant", "a table of its own"
LATE, EARLY = "lexinvariant, last quarter", "lexinvariant, first quarter"
WHY = "27 letters and a decoder of under 1M weights, on 0.4 MB of prose"


def costs(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Bits of every letter from the second on, ``[rows, L - 1]``."""
    import torch

    with torch.no_grad():
        logits = model(ids, table_seeds=torch.arange(len(ids))).logits[:, :-1].log_softmax(-1)
    return -logits.gather(-1, ids[:, 1:, None])[..., 0] / math.log(2)


def looked_up(model: PreTrainedModel, count: int, seed: int) -> list[float]:
    """Rows ``ab cd ef ab cd e?``: 1.0 where the letter that belongs to the last key is the likeliest of all letters."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    pairs = torch.rand(count, 26, generator=generator).argsort(1)[:, :12].reshape(count, 6, 2)
    spaced = torch.cat([pairs, torch.full((count, 6, 1), 26)], 2).reshape(count, -1)
    asked = torch.randint(0, 6, (count,), generator=generator)
    key, value = pairs[torch.arange(count), asked].unbind(-1)
    ids = torch.cat([spaced, spaced, key[:, None]], 1)
    with torch.no_grad():
        found = model(ids, table_seeds=torch.arange(count)).logits[:, -1].argmax(-1)
    return (found == value).float().tolist()


def run(context: Context) -> Arms:
    import torch

    from ..architectures.lexinvariant.method import LexinvariantTraining, letter_rows
    from ..architectures.lexinvariant.symbols import cipher
    from ..architectures.training import learn
    from ..core.rng import derive_seed, seed_everything
    from ..training.datasets.plain_text import TextWindows

    text = TextWindows.of(None, context.seed)
    size = {"steps": 40, "batch": 8, "width": 64, "layers": 2, "lr": 4e-3} if context.quick else {"steps": 4000}
    recipes = {
        name: LexinvariantTraining(**size, seed=context.seed, random_share=share)  # type: ignore[arg-type]
        for name, share in ((LEXINVARIANT, 1.0), (ORDINARY, 0.0))
    }
    held = letter_rows(text.held(16 if context.quick else 64, 256), recipes[ORDINARY].symbols)
    key = torch.randperm(27, generator=torch.Generator().manual_seed(context.seed))

    def arm(name: str) -> dict[str, list[float]]:
        recipe = recipes[name]
        seed_everything(derive_seed(context.seed, "weights"))
        model = recipe.begin(None)
        curves = learn(name, model, recipe, text, None, context.report)
        context.artifacts[f"curves of {name}"] = curves["bits per letter"]
        plain, renamed = costs(model, held), costs(model, cipher(held, key))
        quarter = plain.shape[1] // 4
        return {
            "bits per letter": plain.mean(1).tolist(),
            "bits per letter, enciphered": renamed.mean(1).tolist(),
            "first": plain[:, :quarter].mean(1).tolist(),
            "last": plain[:, -quarter:].mean(1).tolist(),
            "letters looked up": looked_up(model, 64 if context.quick else 500, context.seed),
        }

    found = {name: context.part(name, partial(arm, name)) for name in recipes}
    arms: Arms = {name: dict(values) for name, values in found.items()}
    for name, part in ((LATE, "last"), (EARLY, "first")):
        ours, theirs = found[LEXINVARIANT][part], found[ORDINARY][part]
        excess: Values = [a - b for a, b in zip(ours, theirs, strict=True)]
        arms[name] = {"bits per letter over the ordinary model": excess}
    return arms


REPRODUCTION = Reproduction(
    name="lexinvariant",
    summary="decoders with a table of their own and with tables that are drawn, on letters and on enciphered letters",
    run=run,
    claims=[
        Claim("bits per letter, enciphered", LEXINVARIANT, ORDINARY, "any renaming costs nothing", "difference",
              higher_is_better=False, why=WHY),
        Claim("bits per letter over the ordinary model", LATE, EARLY, "the gap closes with context", "difference",
              higher_is_better=False, why=WHY),
        Claim("letters looked up", LEXINVARIANT, ORDINARY, "4 times as often", "difference", why=WHY),
    ],
)  # fmt: skip

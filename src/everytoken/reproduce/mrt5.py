"""MrT5's claim on one of its diagnostic tasks: a network that deletes a third of its bytes answers as well as one that
deletes none, and random or fixed deletion of as many fails.

The task is vowel removal: the text without its vowels must be written, so about a third of the bytes is not needed. All
arms have one shape and learn for equally many steps; accuracy is measured with what is deleted taken out (hard).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    import torch

UNGATED, LEARNED, RANDOM, FIXED = "nothing deleted", "MrT5", "random deletion", "fixed deletion"
ARMS = (UNGATED, LEARNED, RANDOM, FIXED)
WHY = "windows of prose in place of random letters, and a network of 0.5M weights in place of 12M"
SHARE = 0.3


def gate_of(arm: str, ids: torch.Tensor, scale: float, seed: int) -> torch.Tensor | None:
    """The gate of an arm: None is the learned one. Fixed deletion takes the end of every stretch of ten bytes."""
    import torch

    if arm == LEARNED:
        return None
    lost = torch.zeros(ids.shape, dtype=torch.bool)
    if arm == RANDOM:
        lost = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < SHARE
    elif arm == FIXED:
        lost = (torch.arange(ids.shape[1]) % 10 >= 10 * (1 - SHARE)).expand(ids.shape)
    return torch.where(lost, scale, 0.0)


def run(context: Context) -> Arms:
    import torch

    from ..architectures.mrt5.deletion import DeletionController
    from ..architectures.mrt5.method import Controlled, MrT5Training, without_vowels
    from ..core.rng import derive_seed, seed_everything
    from ..training.datasets.plain_text import TextWindows
    from ..training.stepwise import fit

    size = {"steps": 30, "batch": 16, "length": 24, "width": 64, "ff_width": 128, "layers": 3, "gate_layer": 1}
    large = {"steps": 4000, "batch": 32, "length": 48, "layers": 4, "decoder_layers": 2}
    recipe = MrT5Training(
        **(size if context.quick else large),  # type: ignore[arg-type]
        task="vowels",
        target=SHARE,
        seed=context.seed,
        delete_from=10 if context.quick else 1500,
        k_p=0.1,
        k_i=1e-5,
    )
    text = TextWindows.of(None, context.seed)
    ids, labels = without_vowels(text.held(32 if context.quick else 256, recipe.length))

    def arm(name: str) -> dict[str, list[float]]:
        seed_everything(derive_seed(context.seed, "weights"))
        model = recipe.begin(None)
        learner = Controlled(model, DeletionController(recipe.target, recipe.k_p, recipe.k_i), recipe.delete_from)
        learner.begins = recipe.delete_from if name == LEARNED else recipe.steps

        def loss(step: int) -> torch.Tensor:
            inputs, wanted = without_vowels(text.batch(recipe.batch, recipe.length, step))
            gate = gate_of(name, inputs, recipe.scale, step)
            return learner.step(step, inputs, wanted, **({} if gate is None else {"delete_gate": gate}))[0]

        curve = fit(learner, loss, recipe.stage(name), None, context.report)
        context.artifacts[f"loss of {name}"] = curve
        gate = gate_of(name, ids, recipe.scale, -1 & 0xFFFF)
        with torch.no_grad():
            output = model(ids, labels=labels, delete_gate=gate)
        told = labels >= 0
        right = ((output.logits.argmax(-1) == labels) & told).sum(1) / told.sum(1)
        left = (output.kept_positions >= 0).sum(1) / ids.shape[1]
        return {"right bytes": right.tolist(), "deleted share": (1 - left).tolist()}

    return {name: context.part(name, partial(arm, name)) for name in ARMS}


REPRODUCTION = Reproduction(
    name="mrt5",
    summary="networks that delete nothing, what their gate says, random bytes and fixed bytes, on vowel removal",
    run=run,
    claims=[
        Claim("right bytes", LEARNED, UNGATED, "about equal", "difference", threshold=-0.01, why=WHY),
        Claim("deleted share", LEARNED, "", "0.3 was asked for", "value", threshold=0.25, why=WHY),
        Claim("right bytes", LEARNED, RANDOM, "higher", "difference", why=WHY),
        Claim("right bytes", LEARNED, FIXED, "higher", "difference", why=WHY),
    ],
)

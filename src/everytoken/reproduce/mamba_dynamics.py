"""Token dynamics of Mamba: the sign rule, constrained against free networks, and tokens in a learned order.

*Systems* of one dimension are followed over signs and starts and named by what they did. *Networks* on bytes, equal but
for the constraint, learn the same text for equally many steps at the better of two rates, which is chosen on text that
no figure is measured on. *Digits* are read by one scan a layer, in raster order, in a random order, or in one that the
network learns; the released code does not restore it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..core.results import Values

RULE = "agreement with the sign rule"
SYSTEMS = "one-dimensional systems"
BITS, RIGHT, LOSS = "bits per byte", "right answers", "loss on digits"
FREE, POSITIVE, MIXED, NEGATIVE = "free", "positive", "mixed", "negative"
RASTER, RANDOM, LEARNED, RELEASED = "raster order", "random order", "learned order", "learned order, not restored"
RATES = (1e-3, 3e-3)
WHY = "networks of 0.1M weights on the bytes of 0.6 MB of prose; the paper has 24 layers of 768 on WikiText-103"
WHY_DIGITS = "0.05M weights on digits of 8 x 8 pixels; the paper has MambaVision-T on ImageNet"


def run(context: Context) -> Arms:
    arms: Arms = {SYSTEMS: context.part(SYSTEMS, partial(systems, context))}
    for kind in (POSITIVE, NEGATIVE) if context.quick else (FREE, POSITIVE, MIXED, NEGATIVE):
        arms[kind] = context.part(kind, partial(language_model, context, kind))
    for name in () if context.quick else (RASTER, RANDOM, LEARNED, RELEASED):
        arms[name] = context.part(name, partial(digits_in, context, name))
    return arms


def systems(context: Context) -> dict[str, Values]:
    """One value a system: whether it did what the rule says."""
    from ..architectures.mamba_dynamics.theory import phase_diagram

    found = phase_diagram(8 if context.quick else 20, time=1e3 if context.quick else 1e5, seed=context.seed)
    if not context.quick:
        context.artifacts["phase diagram"] = {"mu and first token": found.mu.tolist(), "found": found.found.tolist()}
    return {RULE: (found.found == found.said).astype(float).reshape(-1).tolist()}


def language_model(context: Context, kind: str) -> dict[str, Values]:
    """Bits per byte of held-out windows."""
    from ..architectures.byte_text import bits_per_byte
    from ..architectures.mamba_dynamics.analysis import analyze_dynamics
    from ..architectures.mamba_dynamics.method import MambaDynamicsRecipe
    from ..architectures.training import learn
    from ..core.results import mean
    from ..training.datasets.plain_text import TextWindows, example_text

    text = TextWindows(example_text(), seed=context.seed)
    held = text.held(8 if context.quick else 64, 64)
    sizes: dict[str, Any] = {"layers": 2, "width": 64, "states": 8, "steps": 300, "batch": 8, "length": 64}
    if context.quick:
        sizes |= {"layers": 2, "width": 32, "states": 4, "steps": 30, "batch": 4}
    best: tuple[float, list[float], PreTrainedModel] | None = None
    for lr in RATES[-1:] if context.quick else RATES:
        recipe = MambaDynamicsRecipe(dynamics=kind, lr=lr, seed=context.seed, **sizes)
        model = seeded(context.seed, recipe)
        learn(f"{kind}, rate {lr:g}", model, recipe, text, None, context.report)
        bits = bits_per_byte(model, held)
        judged = mean(bits[0::2])
        if best is None or judged < best[0]:
            best = judged, bits[1::2], model
    assert best is not None
    layers = analyze_dynamics(best[2])
    context.artifacts[f"positive eigenvalues, {kind}"] = [item.positive for item in layers]
    return {BITS: best[1]}


def seeded(seed: int, recipe: Any) -> PreTrainedModel:
    """A fresh network; those of one seed begin alike where they have the same weights."""
    from ..core.rng import seed_everything

    seed_everything(seed)
    model: PreTrainedModel = recipe.begin(None)
    return model


def digits_in(context: Context, name: str) -> dict[str, Values]:
    """Right answers and losses on digits whose layers scan in one order."""
    from .beds.digits import learn_digits

    make = partial(scanner, context, name)
    _, found = learn_digits(make, context.seed, 250, report=context.report, name=name)
    return {RIGHT: found["right answers"], LOSS: found["loss"]}


def scanner(context: Context, name: str) -> PreTrainedModel:
    """PlainMamba with one scan by raster; the order of the first layer is the arm's."""
    import torch

    from ..architectures.mamba_dynamics.reorder import reorder_layers
    from ..core.rng import derive_seed
    from .plainmamba import network

    model = network(32, 2, scan="raster", scans=[0], direction_aware=False)
    if name in (LEARNED, RELEASED):
        reorder_layers(model, (0,), restore=name == LEARNED)
    elif name == RANDOM:
        generator = torch.Generator().manual_seed(derive_seed(context.seed, RANDOM))
        model.base_model.layers[0].mixer.ssm.reorder = fixed_order(torch.randperm(64, generator=generator))
    return model


def fixed_order(order: torch.Tensor) -> torch.nn.Module:
    """Always the same order, restored afterwards."""
    from types import SimpleNamespace

    import torch

    back = order.argsort()

    class Fixed(torch.nn.Module):
        def forward(self, hidden: torch.Tensor, _steps: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(hidden=hidden[:, order], restore=lambda output: output[:, back])

    return Fixed()


REPRODUCTION = Reproduction(
    name="mamba-dynamics",
    summary="systems against the sign rule, constrained and free networks on bytes, digits in a learned order",
    run=run,
    claims=[
        Claim(BITS, POSITIVE, NEGATIVE, "convergence hurts", "difference", False, why=WHY),
        Claim(RULE, SYSTEMS, "", "a theorem in one dimension", "value", threshold=0.9),
        Claim(BITS, POSITIVE, FREE, "excluding convergence helps", "difference", False, why=WHY),
        Claim(BITS, POSITIVE, MIXED, "mixed lies between", "difference", False, why=WHY),
        Claim(BITS, FREE, NEGATIVE, "convergence hurts", "difference", False, why=WHY),
        Claim(LOSS, LEARNED, RASTER, "reordering helps a little", "difference", False, why=WHY_DIGITS),
        Claim(LOSS, LEARNED, RANDOM, "not stated", "difference", False, why=WHY_DIGITS),
        Claim(LOSS, LEARNED, RELEASED, "not stated", "difference", False, why="the released code restores no order"),
    ],
    extra=("search", "sklearn"),
)

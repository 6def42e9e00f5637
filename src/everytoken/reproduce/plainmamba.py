"""PlainMamba's claims: snakes and directions against raster scans, and a cost that is linear in the tokens.

All networks learn the same handwritten digits for equally many steps. The vision transformer has about as many weights.
Its rate of learning is halved, which suits it better. Time is measured for forwards of the encoders alone, at four
tokens for each one before.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..core.results import Values

BOTH, SNAKE, RASTER_MOVES, RASTER = "snake and direction", "snake", "raster and direction", "raster"
RELEASED, VIT = "released code", "vision transformer"
ARMS: dict[str, dict[str, Any]] = {
    BOTH: {},
    SNAKE: {"direction_aware": False},
    RASTER_MOVES: {"scan": "raster"},
    RASTER: {"scan": "raster", "direction_aware": False},
    RELEASED: {"permute_parameters": False, "double_dt_bias": True},
}
FEW = "right answers, 200 digits learned"
ALL = "right answers"
GROWTH = "time for 4 times the tokens"
NAMED = "patches named right"
PLAIN, CLIP = "PlainMamba encoder", "CLIP encoder"
WHY = "networks of 0.1M weights, 64 tokens, handwritten digits of 8 x 8 pixels; the paper has 7 to 50M on ImageNet"
WHY_TIME = "a forward on a processor, from 1,024 to 4,096 tokens"
SIZES = (16, 32, 64)
"""Sides of the grids whose forwards are timed."""


def network(width: int, layers: int, **settings: Any) -> PreTrainedModel:
    from ..architectures.plainmamba.configuration_plainmamba import PlainMambaConfig
    from ..architectures.plainmamba.modeling_plainmamba import PlainMambaForImageClassification

    shape: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "state_size": 8, "dwconv_layers": []}
    shape |= {"image_size": 16, "patch_size": 2, "num_channels": 1, "conv_kernel": 3, "stem_channels": 8}
    shape |= {"drop_path_rate": 0.0, "num_labels": 10}
    return PlainMambaForImageClassification(PlainMambaConfig(**(shape | settings)))


def transformer(width: int, layers: int, side: int = 16) -> PreTrainedModel:
    """About as many weights as the scans have: its layers have 12 d^2, theirs 6 d^2 and what B, C and steps need."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=side,
            patch_size=2,
            num_channels=1,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_labels=10,
        )
    )


def run(context: Context) -> Arms:
    width, layers, steps = (16, 1, 25) if context.quick else (32, 4, 300)
    makers = {name: partial(network, width, layers, **settings) for name, settings in ARMS.items()}
    makers[VIT] = partial(transformer, width, layers)
    if context.quick:
        makers = {name: makers[name] for name in (BOTH, RASTER)}
    arms: Arms = {
        name: context.part(name, partial(classify, context, name, make, steps)) for name, make in makers.items()
    }
    arms[BOTH] |= context.part("time of scans", partial(timed, partial(network, 16, 2), context.quick))
    if not context.quick:
        arms[VIT] |= context.part("time of attention", partial(timed, partial(transformer, 16, 2), False))
        for name in (PLAIN, CLIP):
            arms[name] = context.part(name, partial(named, context, name == PLAIN))
    return arms


def classify(context: Context, name: str, make: Any, steps: int) -> dict[str, Values]:
    """Right answers after all digits, and after 200 of them."""
    from .beds.digits import learn_digits

    lr = 1e-3 if name == VIT else 2e-3
    model, found = learn_digits(make, context.seed, steps, lr=lr, report=context.report, name=name)
    context.artifacts[f"weights of {name}"] = sum(weight.numel() for weight in model.parameters())
    if context.quick:
        return {ALL: found["right answers"]}
    few = learn_digits(make, context.seed, steps // 2, lr=lr, learned=200, report=context.report, name=name)[1]
    return {ALL: found["right answers"], FEW: few["right answers"]}


def timed(make: Any, quick: bool) -> dict[str, Values]:
    """How many times longer a forward takes with four times the tokens, at the largest two sizes."""
    import torch

    seconds = []
    for side in SIZES[:2] if quick else SIZES:
        model = make(image_size=2 * side) if make.func is network else make(side=2 * side)
        images, least = torch.randn(1, 1, 2 * side, 2 * side), float("inf")
        with torch.no_grad():
            model.eval()(images)
            for _ in range(3 if quick else 7):
                began = time.perf_counter()
                model(images)
                least = min(least, time.perf_counter() - began)
        seconds.append(least)
    return {GROWTH: seconds[-1] / seconds[-2]}


def named(context: Context, plain: bool) -> dict[str, Values]:
    """Share of patches of objects whose colour and shape the features of the tiny model's encoder name, by scene."""
    import torch

    from ..architectures.plainmamba.encoder import encoder_config
    from ..training.datasets.scenes import COLOURS, IDS, SHAPES, pixel_values
    from ..training.datasets.scenes import patch_labels as labels_of
    from ..training.stepwise import Stage, fit
    from ..training.vision import VLMTraining, alignment_loss, held_out, image_features, new_vlm, vlm_config

    config = VLMTraining(align_steps=150, align_batch=24, batch=24, parts=1, seed=context.seed)
    model = new_vlm(encoder_config() if plain else vlm_config(), context.seed)
    learned = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    learned += [*model.get_input_embeddings().parameters()]
    stage = Stage("alignment", config.align_steps, config.lr)
    fit(model, alignment_loss(model, config), stage, None, context.report, learned)
    scenes, _ = held_out(200, context.seed + 1)
    with torch.no_grad():
        features = torch.cat(
            [image_features(model.eval(), pixel_values(scenes[at : at + 50])) for at in range(0, 200, 50)]
        )
        table = model.get_input_embeddings().weight
        colours, shapes, _ = (torch.from_numpy(item) for item in labels_of(scenes, config.patch))
        right = (features @ table[[IDS[word] for word in COLOURS]].T).argmax(-1) == colours
        right &= (features @ table[[IDS[word] for word in SHAPES]].T).argmax(-1) == shapes
        there = colours >= 0
        return {NAMED: ((right & there).sum(1) / there.sum(1).clamp(min=1)).tolist()}


REPRODUCTION = Reproduction(
    name="plainmamba",
    summary="handwritten digits read by snakes with and without directions, by raster scans, and by attention",
    run=run,
    claims=[
        Claim(ALL, BOTH, RASTER, "best among networks of one resolution", "difference", why=WHY),
        Claim(FEW, BOTH, RASTER, "the same, with little data", "difference", why=WHY),
        Claim(ALL, BOTH, SNAKE, "directions help", "difference", why=WHY),
        Claim(ALL, BOTH, RASTER_MOVES, "snakes help", "difference", why=WHY),
        Claim(ALL, BOTH, RELEASED, "not stated", "difference", why="the released code scans with parameters of others"),
        Claim(FEW, BOTH, VIT, "above transformers of its size", "difference", why=WHY),
        Claim(GROWTH, BOTH, "", "linear: 4", "value", False, 5.0, WHY_TIME),
        Claim(GROWTH, BOTH, VIT, "attention is quadratic", "ratio", False, why=WHY_TIME),
        Claim(NAMED, PLAIN, CLIP, "not stated", "difference", why="150 steps of alignment on scenes"),
    ],
    extra=("search", "sklearn"),
)

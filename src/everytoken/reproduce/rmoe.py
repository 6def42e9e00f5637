"""RMoE's claims on a small model of bytes: recurrent routers against linear ones at equal total parameters.

The plain mixture of experts is Mixtral, whose experts are widened by what the recurrent routers have more. All arms
read the same windows, and pay the same balance loss.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import TYPE_CHECKING, Any

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ..architectures.rmoe.method import RMoeRecipe
    from ..core.results import Values

RMOE, SMOE, CUT = "RMoE", "linear routers", "RMoE, gradient cut"
WHY = "a network of 1.5M weights on bytes, at which the paper's gap is close to what seeds differ by"
BITS, BETWEEN = "bits per byte", "nats between neighbouring routers"


def recipe_of(context: Context, **settings: Any) -> RMoeRecipe:
    from ..architectures.rmoe.method import RMoeRecipe

    if context.quick:
        settings |= {"steps": 8, "batch": 4, "length": 64, "width": 32, "intermediate": 32, "layers": 2, "heads": 2}
        settings |= {"router_size": 16}
    return RMoeRecipe(seed=context.seed, **settings)


def widened(recipe: RMoeRecipe) -> int:
    """The experts' width at which linear routers make a network of as many parameters, up to the next multiple of 4."""
    d, p, experts, layers = recipe.width, recipe.router_size, recipe.experts, recipe.layers
    extra = layers * (d * p + p * experts) + 6 * p * p + 6 * p - layers * d * experts
    return recipe.intermediate + 4 * math.ceil(extra / (layers * experts * 3 * d) / 4)


def plain(recipe: RMoeRecipe) -> PreTrainedModel:
    """Mixtral with the same number of parameters."""
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = recipe.shape() | {"intermediate_size": widened(recipe)}
    return MixtralForCausalLM(
        MixtralConfig(**shape, num_local_experts=recipe.experts, num_experts_per_tok=recipe.chosen)
    )


def plain_loss(learner: nn.Module, windows: Any, step: int, recipe: RMoeRecipe) -> tuple[Any, dict[str, Any]]:
    """The text's loss and the mean of the layers' balance losses, as RMoE's; Mixtral's own would pool the layers."""
    from torch.nn import functional as F

    from ..architectures.byte_text import as_ids
    from ..architectures.routing import balance_loss

    ids = as_ids(windows)
    output = learner(input_ids=ids, use_cache=False, output_router_logits=True)
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return loss + recipe.balance * balance_loss(output.router_logits, recipe.chosen), {}


def run(context: Context) -> Arms:
    from ..architectures.training import learn
    from ..training.datasets.plain_text import TextWindows, example_text

    text = TextWindows(example_text(), seed=context.seed)
    windows = 8 if context.quick else 64

    def arm(name: str, recipe: RMoeRecipe) -> dict[str, Values]:
        if name == SMOE:
            from ..architectures.rmoe.method import RMoeRecipe

            class Plain(RMoeRecipe):
                def loss(self, learner: nn.Module, windows: Any, step: int) -> tuple[Any, dict[str, Any]]:
                    return plain_loss(learner, windows, step, self)

            settings = {item.name: getattr(recipe, item.name) for item in dataclasses.fields(recipe)}
            model, recipe = plain(recipe), Plain(**settings)
        else:
            model = recipe.begin(None)
        learn(
            name, model, recipe, text, None, lambda stage, done, total: context.report(f"{name}: {stage}", done, total)
        )
        held = text.held(windows, recipe.length)
        analysis = recipe.analysis(model, held)
        context.artifacts[name] = {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "entropy of first choices": analysis.choice_entropy().tolist(),
            "balance losses": analysis.balance().tolist(),
        }
        return {BITS: recipe.bits(model, held), BETWEEN: float(analysis.layer_information().mean())}

    recipe, cut = recipe_of(context), recipe_of(context, detach_state=True)
    return {
        name: context.part(name, partial(arm, name, own)) for name, own in ((RMOE, recipe), (SMOE, recipe), (CUT, cut))
    }


REPRODUCTION = Reproduction(
    name="rmoe",
    summary="recurrent routers, with and without a gradient between layers, against linear ones of equal parameters",
    run=run,
    claims=[
        Claim(BITS, RMOE, SMOE, "lower perplexity", "ratio", higher_is_better=False, why=WHY),
        Claim(BETWEEN, RMOE, SMOE, "more information between layers", "difference", why=WHY),
        Claim(BETWEEN, RMOE, CUT, "the gradient between layers matters", "difference", why=WHY),
    ],
)

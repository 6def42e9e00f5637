"""TokenPacker's claim on the tiny model of scenes: at a quarter of the tokens, better answers than average pooling.

Both projectors start from random weights in the shipped model, whose encoder does not learn, and train equally: alone
first, then with the language model. The baseline averages the last level over the same regions before the stock MLP.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ..core.results import Values

PACKER, POOL, ALL, ONE = "TokenPacker", "average pool", "all tokens", "TokenPacker, one level"
METRIC = "right answers, 16 tokens"
WHY = "a model of 0.7M weights and answers of one word about coloured shapes; the paper's is the mean of six benchmarks"


def average_pool(model: PreTrainedModel, scale: int) -> nn.Module:
    """The last level's mean over regions, then a fresh MLP of LLaVA's form."""
    import torch
    from torch import nn

    from ..reduction.tokenpacker.modeling_tokenpacker import pooled_queries
    from ..reduction.tokenpacker.packing import new_projector

    class AveragePool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            levels = (model.config.vision_config.num_hidden_layers,)
            self.config = new_projector(model, scale, levels).config
            width, text = self.config.vision_hidden_size, self.config.text_hidden_size
            self.mlp = nn.Sequential(nn.Linear(width, text), nn.GELU(), nn.Linear(text, text))

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            side = self.config.grid
            pooled: torch.Tensor = self.mlp(pooled_queries(features, (side, side), scale, "mean"))
            return pooled

    return AveragePool()


def run(context: Context) -> Arms:
    import torch

    from ..core.vision import load_vlm
    from ..reduction.tokenpacker.packing import new_projector, packed
    from ..reduction.tokenpacker.training import TokenPackerTraining, train_projector
    from ..reduction.vision_training import SceneQuestions, scene_maker
    from ..training.vision import held_out, right_answers

    first, second, count = (30, 30, 128) if context.quick else (150, 300, 1000)
    config = TokenPackerTraining(align_steps=first, steps=second, batch=8 if context.quick else 32, seed=context.seed)

    def arm(name: str) -> dict[str, Values]:
        torch.manual_seed(context.seed)
        model = load_vlm(dtype="float32", device="cpu")
        maker = scene_maker(model)
        scenes, asked = held_out(count, context.seed, maker)
        if name == ALL:
            return {METRIC: right_answers(model, scenes, asked)}  # type: ignore[arg-type]
        depth = model.config.vision_config.num_hidden_layers
        projector = (
            average_pool(model, 2) if name == POOL else new_projector(model, 2, (depth,) if name == ONE else None)
        )
        with packed(model, projector):  # type: ignore[arg-type]
            questions = SceneQuestions(model.config.image_seq_length, maker, context.seed)
            train_projector(model, projector, questions, config, report=context.report)
            return {METRIC: right_answers(model, scenes, asked)}  # type: ignore[arg-type]

    return {name: context.part(name, partial(arm, name)) for name in (PACKER, POOL, ONE, ALL)}


REPRODUCTION = Reproduction(
    name="tokenpacker",
    summary="projectors of 16 tokens trained equally in one model, by right answers; and all 64 tokens",
    run=run,
    claims=[
        Claim(METRIC, PACKER, POOL, "62.8 against 60.9", "difference", why=WHY),
        Claim(METRIC, PACKER, ALL, "62.8 against 62.0", "difference", threshold=-0.02, why=WHY),
        Claim(METRIC, PACKER, ONE, "77.9 against 77.5 (VQAv2)", "difference", why=WHY),
    ],
    extra=("vision", "PIL"),
)

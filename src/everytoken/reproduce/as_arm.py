"""ASSD's claim on sudokus of four by four: fewer forwards than tokens, at the same quality.

A two-stream network of the size of the masked diffusion one fills ten open cells by drawing from its own joint
distribution: one after the other, and with drafts of several that it checks itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Arms, Claim, Context, Reproduction
from .beds.sudoku import HOLES, questions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..core.results import Values

PLAIN = "one by one"
DRAFTS = (2, 5, HOLES)
FORWARDS, SOLVED, NATS = "forwards a token", "sudokus solved", "nats a token under the model"
WHY = "a network of 124,000 weights; cells of a sudoku depend on each other more than words of a text do"


def arm(k: int) -> str:
    return f"ASSD, k={k}"


def start(context: Context) -> PreTrainedModel:
    """The network that ships for a quick run; else one that is trained with the run's seed."""
    import torch

    from ..architectures.any_order.modeling_any_order import AnyOrderLM
    from ..architectures.any_order.training import DiffusionTraining, learn, source_of
    from ..core.rng import derive_seed
    from ..decoding.canvas.loading import load_denoiser
    from ..generation.assd import AnySubsetSpeculative

    if context.quick:
        return load_denoiser(None, AnySubsetSpeculative.weights)
    config = DiffusionTraining(task="sudoku", streams=2, steps=1000, seed=derive_seed(context.seed, "start"))
    source = source_of(config, None)
    torch.manual_seed(config.seed)
    model = AnyOrderLM(source.config)
    learn(model, source, config, report=context.report)
    return model.eval()


def run(context: Context) -> Arms:
    def every() -> Arms:
        from ..generation.assd import AnySubsetSequential, AnySubsetSpeculative, forwards_by_row, subset_logps
        from ..training.datasets.sudoku import OPEN, solved

        model, ids = start(context), questions(context)
        open_ = ids == OPEN
        arms: Arms = {}
        for name, sampler in {
            PLAIN: AnySubsetSequential(),
            **{arm(k): AnySubsetSpeculative(k=k) for k in DRAFTS},
        }.items():
            context.report(name, 0, 0)
            found = sampler(model, ids, editable=open_, seeds=range(len(ids)))
            spent = forwards_by_row(found, sampler.k)
            logps = subset_logps(model, found.final_ids, ~open_, OPEN).sum(1)
            values: dict[str, Values] = {
                FORWARDS: [count / HOLES for count in spent],
                SOLVED: solved(found.final_ids),
                NATS: (-logps / HOLES).tolist(),
            }
            arms[name] = values
        return arms

    return context.part("arms", every)


REPRODUCTION = Reproduction(
    name="as-arm",
    summary="a two-stream network fills sudokus one by one, and by drafts that it checks itself",
    run=run,
    claims=[
        Claim(FORWARDS, arm(5), PLAIN, "10 to 50% fewer calls", higher_is_better=False, why=WHY),
        Claim(FORWARDS, arm(HOLES), PLAIN, "10 to 50% fewer calls", higher_is_better=False, why=WHY),
        Claim(SOLVED, arm(5), PLAIN, "the same quality", "difference", threshold=-0.05, why=WHY),
        Claim(NATS, arm(5), PLAIN, "the same quality", "difference", False, 0.05, why=WHY),
    ],
)

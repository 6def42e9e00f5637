"""ILM's claim on star graphs: insertions find paths that writing from left to right has to guess.

One network of one size learns three ways of writing on the same graphs in the same number of steps. A path leads from
the centre to the end of one of two arms, of two or three edges; from left to right the first edge is a guess.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from .base import Arms, Claim, Context, Reproduction
from .beds.star_graphs import (
    EDGES,
    FOUND,
    INSERTIONS,
    LEFT,
    MASKS,
    WAYS,
    StarGraphBed,
    answered,
    graded,
    settings,
    trained,
)

if TYPE_CHECKING:
    from ..core.results import Values

WHY = "a network of 130,000 weights, two arms of two or three edges; the paper's has 85M, and five arms of up to twelve"
BED = StarGraphBed()


def run(context: Context) -> Arms:
    graphs = BED.questions(context)
    config = settings(context, "networks")

    def measured(way: str) -> dict[str, Values]:
        return graded(graphs, answered(way, trained(context, way, config), graphs))

    return {way: context.part(way, partial(measured, way)) for way in WAYS}


REPRODUCTION = Reproduction(
    name="ilm",
    summary="star graphs from left to right, by masked diffusion and by insertions, with the same network",
    run=run,
    claims=[
        Claim(FOUND, INSERTIONS, LEFT, "near-perfect, where left to right fails", "difference", why=WHY),
        Claim(FOUND, INSERTIONS, MASKS, "above masked diffusion", "difference", why=WHY),
        Claim(FOUND, INSERTIONS, "", "near-perfect", "value", threshold=0.9, why=WHY),
        Claim(EDGES, INSERTIONS, LEFT, "near-perfect, where left to right fails", "difference", why=WHY),
    ],
    bed="star-graphs",
)

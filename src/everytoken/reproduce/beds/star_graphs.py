"""A test bed of paths: where does an arm of a star begin that ends at a given letter?

The same small network learns to answer in three ways: from left to right, by masked diffusion, and by insertions. From
left to right the first edge has to be guessed, because the goal says which it is only by way of all the others.

The positive control is more of what the start learnt from.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, ClassVar

from ...core.results import Values
from ...core.rng import derive_seed
from ..base import Context

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...architectures.ilm.training import InsertionTraining
    from ...training.datasets.star_graphs import Graphs, StarGraphs

LEFT, MASKS, INSERTIONS = "left to right", "masked diffusion", "ILM"
WAYS = (LEFT, MASKS, INSERTIONS)
FOUND, EDGES = "paths found", "edges of the path found"
STEPS = 2500
"""Of a training at the cpu scale."""


def settings(context: Context, name: str, steps: int = STEPS) -> InsertionTraining:
    """The settings of a training, the same for every way of writing."""
    from ...architectures.ilm.training import InsertionTraining

    steps = 30 if context.quick else steps
    return InsertionTraining(steps=steps, seed=derive_seed(context.seed, name))


def kind_of(config: InsertionTraining) -> StarGraphs:
    from ...training.datasets.star_graphs import KINDS

    return KINDS[config.graphs]


def causal(attention: torch.Tensor) -> torch.Tensor:
    """``[B, T, T]`` bool: each position sees those before it that are there, ``attention [B, T]``."""
    import torch

    length = attention.shape[1]
    return torch.ones(length, length, dtype=torch.bool).tril()[None] & attention[:, None].bool()


def trained(
    context: Context, way: str, config: InsertionTraining, model: PreTrainedModel | None = None
) -> PreTrainedModel:
    """A network that learns to write in one of the ``WAYS``, on the same graphs in the same order as the others.

    Args:
        model: to go on from, in place; None begins from scratch.
    """
    import torch

    from ...architectures.any_order.configuration_any_order import AnyOrderConfig
    from ...architectures.any_order.losses import mdlm_loss
    from ...architectures.any_order.modeling_any_order import AnyOrderLM
    from ...architectures.any_order.training import seeded
    from ...architectures.ilm.modeling_ilm import InsertionLM
    from ...architectures.ilm.training import learn, source_of
    from ...training.datasets.star_graphs import MASK, TOKENS
    from ...training.stepwise import fit

    torch.manual_seed(config.seed)
    if way == INSERTIONS:
        source = source_of(config, None)
        grown = InsertionLM(source.config) if model is None else model
        learn(grown, source, config, report=context.report, name=way)  # type: ignore[arg-type]
        return grown.eval()
    if model is None:
        model = AnyOrderLM(
            AnyOrderConfig(vocab_size=len(TOKENS), mask_token_id=MASK, shift_logits=way == LEFT, **config.shape())
        )
    kind = kind_of(config)

    def loss(step: int) -> torch.Tensor:
        ids, response, attention = kind.questions(config.batch, config.seed, "texts", step).whole(end=True)
        if way == MASKS:
            return mdlm_loss(model, ids, response, attention, generator=seeded(config, "loss", step))
        found: torch.Tensor = model(
            input_ids=ids, attention_mask=causal(attention), labels=ids.masked_fill(~response, -100)
        ).loss
        return found

    fit(model, loss, config.stage(way), report=context.report)
    return model.eval()


def answered(way: str, model: PreTrainedModel, graphs: Graphs) -> list[list[int]]:
    """The answers, the likeliest token each time; masked diffusion fills one position a step, the surest first."""
    import torch

    from ...architectures.ilm.sampling import InsertionSampler
    from ...architectures.ilm.training import answers
    from ...decoding.canvas.denoising import DenoisingSampler
    from ...training.datasets.star_graphs import PAD

    prompts = torch.from_numpy(graphs.prompts)
    length = graphs.answers.shape[1] + 1  # an end token
    if way == INSERTIONS:
        found = answers(model, graphs, InsertionSampler(gen_length=length, temperature=0.0, stop_threshold=0.5))
        return [found.new_ids(row) for row in range(len(graphs))]
    if way == MASKS:
        canvas = DenoisingSampler(gen_length=length)
        filled = canvas(model, prompts, attention_mask=prompts != PAD, seeds=range(len(graphs)))
        return [filled.new_ids(row) for row in range(len(graphs))]
    ids = prompts
    with torch.no_grad():
        for _ in range(length):
            logits = model(input_ids=ids, attention_mask=causal(ids != PAD)).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    rows: list[list[int]] = ids[:, prompts.shape[1] :].tolist()
    return rows


def graded(graphs: Graphs, given: list[list[int]]) -> dict[str, Values]:
    """One value a graph: whether the path is right, and which share of its edges the answer has."""
    return {FOUND: graphs.right(given), EDGES: graphs.shares(given)}


class StarGraphBed:
    """Paths by an insertion language model that finds some of them."""

    name: ClassVar[str] = "star-graphs"
    summary: ClassVar[str] = "a small network finds paths of star graphs"
    metric: ClassVar[str] = FOUND
    bounds: ClassVar[tuple[float, float]] = (0.05, 0.98)

    def __init__(self) -> None:
        self._starts: dict[tuple[int, str], PreTrainedModel] = {}

    def start(self, context: Context) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """An insertion model after a part of the training; the one that ships for a quick run."""
        from ...architectures.ilm.method import ILM
        from ...training.datasets.star_graphs import star_tokenizer

        key = context.seed, context.scale
        if key not in self._starts:
            config = settings(context, "start", STEPS // 2)
            self._starts[key] = ILM.load() if context.quick else trained(context, INSERTIONS, config)
        return copy.deepcopy(self._starts[key]), star_tokenizer()

    def rows(self, context: Context) -> list[list[int]]:
        """Whole texts to learn from, without padding."""
        count = 32 if context.quick else 256
        config = settings(context, "rows")
        ids, _, attention = kind_of(config).questions(count, config.seed, "rows").whole()
        return [text[there].tolist() for text, there in zip(ids, attention, strict=True)]

    def questions(self, context: Context) -> Graphs:
        """Held-out graphs of a seed."""
        config = settings(context, "test")
        return kind_of(config).questions(128 if context.quick else 512, config.seed, "held")

    def measure(self, context: Context, model: PreTrainedModel) -> dict[str, Values]:
        graphs = self.questions(context)
        return graded(graphs, answered(INSERTIONS, model, graphs))

    def positive_control(self, context: Context) -> PreTrainedModel:
        model, _ = self.start(context)
        return trained(context, INSERTIONS, settings(context, "positive control"), model)

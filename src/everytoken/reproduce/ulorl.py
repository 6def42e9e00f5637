"""UloRL's claim about time: with very long outputs a step of segments is done sooner than one that waits for all.

Nothing is learnt here. Responses have lengths drawn beforehand, and ``SegmentedRollouts`` itself decides who writes
when. What is counted are passes of the model one behind the other, which take about the same time whether many or few
responses are written at once (decoding is bound by reading the weights); a segment that goes on with responses costs
one pass more, which reads them again. Two mixtures of lengths: a heavy tail, nine in ten short and one at the limit,
and equal lengths, where nothing can be gained.

The GPU's version decodes as well: a model writes as many tokens for as many responses at once as are counted, and the
result file's artifacts hold the seconds for 1000 trained tokens.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..core.rng import derive_seed
from .base import Arms, Claim, Context, Reproduction
from .beds.rollouts import device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .files import Scale

LIMIT, GROUP, PROMPTS = 256, 8, 16
ARMS = {"whole responses": (1, 0.0), "2 segments": (2, 1.0), "4 segments": (4, 1.0), "8 segments": (8, 1.0)}
STEPS: dict[Scale, int] = {"quick": 12, "cpu": 60, "gpu": 12}
"""The GPU's are for three seeds in about ten minutes."""
WHY = (
    "The paper's figure is wall-clock time of a 30B model with 64k outputs. Passes are counted here, for lengths that "
    "are drawn, with twice a batch's prompts under way."
)


def lengths_of(tail: str, number: int, seed: int) -> list[int]:
    """Lengths of the responses to one prompt."""
    draw = random.Random(derive_seed(seed, tail, number))
    if tail == "equal lengths":
        return [LIMIT // 4] * GROUP
    if draw.random() < 0.1:  # a hard prompt: all its answers are long
        return [LIMIT] * GROUP
    return [min(LIMIT // 4, max(1, round(draw.lognormvariate(2.6, 0.5)))) for _ in range(GROUP)]


class Clock:
    """A writer of responses whose lengths are set; it counts passes.

    Args:
        model: one that decodes as much, and takes ``seconds``; None for none.
    """

    def __init__(self, tail: str, seed: int, model: PreTrainedModel | None = None):
        self.tail, self.seed, self.passes, self.model, self.seconds = tail, seed, 0, model, 0.0

    def writer(self, step: int) -> Any:
        from ..reinforcement.rollouts import Writer

        return Writer(
            tokenize=lambda rows: [[row["number"]] for row in rows],
            write=self.write,
            score=lambda prompts, completions: [],
            count=10**6,
            data=lambda index: {"number": 10**6 + index},
            limit=LIMIT,
            group=GROUP,
            ends=frozenset({-1}),
            step=step,
        )

    def write(self, texts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
        """Adds tokens -2 and at the end -1; who of a group a text is stands in how often its prompt came before."""
        seen: dict[int, int] = {}
        found = []
        for text in texts:
            # a text that was begun says its length itself: its first token is minus its length, less two
            if len(text) == 1:
                place = seen.get(text[0], 0)
                seen[text[0]] = place + 1
                length = lengths_of(self.tail, text[0], self.seed)[place]
            else:
                length = -text[1] - 2
            left = length - (len(text) - 1)
            new = [-length - 2] * min(left, size)
            if left <= size and length < LIMIT:
                new[-1] = -1
            found.append(new)
        self.passes += max(map(len, found)) + any(len(text) > 1 for text in texts)
        if self.model is not None:
            self.seconds += decoding(self.model, len(texts), max(map(len, texts)), max(map(len, found)))
        return found


def decoding(model: PreTrainedModel, rows: int, prompt: int, new: int) -> float:
    """Seconds in which a model reads ``rows`` texts of ``prompt`` tokens and writes ``new`` to each."""
    import torch

    ids = torch.ones(rows, prompt, dtype=torch.long, device=model.device)
    began = time.perf_counter()
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=new,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    written.tolist()  # waits for a GPU
    return time.perf_counter() - began


def run(context: Context) -> Arms:
    from ..reinforcement.ulorl import SegmentedRollouts

    steps, model = STEPS[context.scale], None
    if context.scale == "gpu":
        from ..core.loading import load_model

        model = load_model(context.model).to(device())
    arms: Arms = {}
    for arm, (segments, ahead) in ARMS.items():
        values: dict[str, float | Sequence[float]] = {}
        for tail in ("heavy tail", "equal lengths"):
            clock, piece = Clock(tail, context.seed, model), SegmentedRollouts(segments, ahead, seed=context.seed)
            tokens, begun, taken = 0, 0, 0.0
            for step in range(steps):
                context.report(f"{arm}, {tail}", step + 1, steps)
                before, earlier = clock.passes, clock.seconds
                rows = [{"number": step * PROMPTS + at // GROUP} for at in range(PROMPTS * GROUP)]
                written = piece(rows, clock.writer(step))
                if step >= steps // 4:  # the first steps fill what is under way
                    tokens += sum(map(len, written.completions))
                    begun, taken = begun + clock.passes - before, taken + clock.seconds - earlier
            if model is not None:
                context.artifacts[f"{arm}: seconds for 1000 trained tokens, {tail}"] = 1000 * taken / tokens
            values[f"passes for 1000 trained tokens, {tail}"] = 1000 * begun / tokens
        arms[arm] = values
    return arms


REPRODUCTION = Reproduction(
    name="ulorl",
    summary="passes of a model for a trained token, by segments and by whole responses, on drawn lengths",
    run=run,
    claims=[
        Claim(
            "passes for 1000 trained tokens, heavy tail",
            "4 segments",
            "whole responses",
            "2.06x faster steps",
            higher_is_better=False,
            why=WHY,
        ),
        Claim(
            "passes for 1000 trained tokens, heavy tail",
            "2 segments",
            "whole responses",
            "1.6x faster steps",
            higher_is_better=False,
            why=WHY,
        ),
        Claim(
            "passes for 1000 trained tokens, equal lengths",
            "4 segments",
            "whole responses",
            "(negative control: not in the paper)",
            higher_is_better=False,
            why="Nobody waits for anybody here.",
        ),
    ],
    seeds=8,
    scales=("quick", "cpu", "gpu"),
)

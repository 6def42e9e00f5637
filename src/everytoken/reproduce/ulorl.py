"""UloRL's claims: very long outputs take less time in segments, and a thermostat keeps entropy from collapse.

Nothing is learnt in the first part. Responses have lengths drawn beforehand, and ``SegmentedRollouts`` itself decides
who writes when. Two mixtures of lengths: a heavy tail, nine in ten short and one at the limit, and equal lengths, where
nothing can be gained. Two things are measured for a trained token:

- passes of the model one behind the other, which take about the same time whether many or few responses are written at
  once where decoding is bound by reading the weights; a segment that goes on with responses costs one pass more, which
  reads them again;
- the time of a model that writes as many tokens for as many responses at once. On a GPU it is the embedded model, by
  the clock; elsewhere a tiny one, by the seconds of the process, since other programs lengthen these little.

The second part trains. A small model learns to sort six digits until three tenths of its samples are right, and goes
on by equal rollouts: without a mask, with mastered tokens masked always, and with them masked only while a response's
entropy is below the target, half of the start's. Every arm takes the better of two learning rates, chosen by the
accuracy of samples on questions of their own. Outputs are short, so that a segment is a whole response.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..core.results import Values, mean
from ..core.rng import derive_seed
from .base import Arms, Claim, Context, Reproduction
from .beds.rollouts import Learner, Size, device
from .beds.sorting import Sample, Sorting, tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .files import Scale

LIMIT, GROUP, PROMPTS = 256, 8, 16
ARMS = {"whole responses": (1, 0.0), "2 segments": (2, 1.0), "4 segments": (4, 1.0), "8 segments": (8, 1.0)}
STEPS: dict[Scale, tuple[int, int]] = {"quick": (12, 1), "cpu": (24, 3), "gpu": (12, 9)}
"""Steps, and how many of them a model decodes, after the first quarter."""
TAILS = ("heavy tail", "equal lengths")
PASSES, SECONDS = "passes for 1000 trained tokens", "seconds for 1000 trained tokens"
WHY = (
    "The paper's figure is wall-clock time of a 30B model with 64k outputs. Passes are counted here, for lengths that "
    "are drawn, with twice a batch's prompts under way."
)
WHY_SECONDS = (
    "The paper's figure is of a 30B model with 64k outputs; here (scale cpu) a model of 0.03M weights decodes on one "
    "thread, with twice a batch's prompts under way, and keeps computing rows that have ended, as transformers does."
)
TASK, GOAL = Sorting(), 0.3
SIZES: dict[Scale, Size] = {
    "quick": Size(hidden=48, layers=2, warmup=200, updates=6, batch=64, test=48, rates=(6e-4,)),
    "cpu": Size(hidden=48, layers=2, warmup=600, updates=80, batch=64, test=256, rates=(3e-4, 6e-4)),
    "gpu": Size(
        hidden=256, layers=6, warmup=1500, updates=300, batch=1024, test=4096, rates=(3e-4, 1e-3), warmup_batch=256
    ),
}
FREE, THERMOSTAT, ALWAYS = "no mask", "thermostat", "mask always"
MASKED: dict[str, float] = {FREE: 0.0, THERMOSTAT: 0.5, ALWAYS: math.inf}
"""arm -> target, as a multiple of the start's mean entropy of a token."""
ENTROPY, ACCURACY = "entropy of a token after training, nats", "accuracy of samples after training"
WHY_MASK = (
    "The paper trains a 30B model on mathematics, with a target of 0.2 nats; here (scale cpu) a model of 0.06M weights "
    "sorts six digits, with 80 updates and half of its first entropy as the target."
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


def writing(context: Context) -> Arms:
    """What a trained token costs, by segments."""
    from ..reinforcement.ulorl import SegmentedRollouts

    steps, decoded = STEPS[context.scale]
    model = decoder(context)
    arms: Arms = {}
    for arm, (segments, ahead) in ARMS.items():
        values: dict[str, Values] = {}
        for tail in TAILS:
            clock, piece = Clock(tail, context.seed), SegmentedRollouts(segments, ahead, seed=context.seed)
            tokens: list[int] = []
            begun, filled = 0, steps // 4  # the first steps fill what is under way
            for step in range(steps):
                context.report(f"{arm}, {tail}", step + 1, steps)
                before = clock.passes
                clock.model = model if filled <= step < filled + decoded else None
                rows = [{"number": step * PROMPTS + at // GROUP} for at in range(PROMPTS * GROUP)]
                written = piece(rows, clock.writer(step))
                if step >= filled:
                    tokens.append(sum(map(len, written.completions)))
                    begun += clock.passes - before
            values[f"{PASSES}, {tail}"] = 1000 * begun / sum(tokens)
            values[f"{SECONDS}, {tail}"] = 1000 * clock.seconds / sum(tokens[:decoded])
        arms[arm] = values
    return arms


def decoder(context: Context) -> PreTrainedModel:
    """What writes tokens to be timed."""
    import torch

    from ..core.loading import load_model
    from .beds.small_models import small_model

    if context.scale == "gpu":
        return load_model(context.model).to(device())
    torch.manual_seed(derive_seed(context.seed, "decoder"))
    model = small_model(64, hidden=32, layers=1, end=0).eval()
    decoding(model, 2, 2, 2)  # the first call is slower
    return model


def graded(context: Context, model: PreTrainedModel, codes: Any, questions: list[str]) -> dict[str, Values]:
    """Of eight samples to every question: the share that is right, and the mean entropy of their tokens."""
    import torch

    torch.manual_seed(derive_seed(context.seed, "graded"))
    asked = TASK.sampled(model, codes, questions, GROUP)

    def tokens(sample: Sample) -> int:
        return min(len(sample.text.rstrip("\n")) + 1, TASK.length)

    return {
        ACCURACY: [mean([sample.right for sample in samples]) for samples in asked],
        ENTROPY: [
            sum(sample.surprise for sample in samples) / sum(tokens(sample) for sample in samples) for samples in asked
        ],
    }


def by_training(context: Context) -> Arms:
    """The start, and every mask after equal rollouts."""
    from ..reinforcement.ulorl import UloRL

    size, codes = SIZES[context.scale], tokenizer()
    start = TASK.start(context, size, codes, GOAL)
    test = TASK.questions(context.seed, "test", size.test)
    found: dict[str, Values] = context.part("start, measured", lambda: graded(context, start, codes, test))
    arms: Arms = {"start": found}
    first = mean(found[ENTROPY])

    def learner(arm: str) -> Learner:
        method = UloRL(segments=1, entropy_target=MASKED[arm] * first)
        return Learner(method.recipe(), TASK.reward, method.arguments())

    def kept(arm: str, policy: PreTrainedModel, logs: dict[str, list[float]]) -> dict[str, Values]:
        return graded(context, policy, codes, test)

    arms |= TASK.learnt(context, size, start, codes, MASKED, learner, kept)
    context.artifacts["target of the thermostat, nats"] = MASKED[THERMOSTAT] * first
    return arms


def run(context: Context) -> Arms:
    return by_training(context) | context.part("writing", lambda: writing(context))


REPRODUCTION = Reproduction(
    name="ulorl",
    summary="what a trained token costs by segments and whole responses, and entropy with masks of mastered tokens",
    run=run,
    claims=[
        Claim(
            f"{PASSES}, heavy tail",
            "4 segments",
            "whole responses",
            "2.06x faster steps",
            higher_is_better=False,
            why=WHY,
        ),
        Claim(
            f"{PASSES}, heavy tail",
            "2 segments",
            "whole responses",
            "1.6x faster steps",
            higher_is_better=False,
            why=WHY,
        ),
        Claim(
            f"{PASSES}, equal lengths",
            "4 segments",
            "whole responses",
            "(negative control: not in the paper)",
            higher_is_better=False,
            why="Nobody waits for anybody here.",
        ),
        *[
            Claim(
                f"{SECONDS}, heavy tail",
                arm,
                "whole responses",
                f"{paper} faster steps",
                higher_is_better=False,
                why=WHY_SECONDS,
            )
            for arm, paper in (("4 segments", "2.06x"), ("2 segments", "1.6x"))
        ],
        Claim(
            f"{SECONDS}, equal lengths",
            "4 segments",
            "whole responses",
            "(negative control: not in the paper)",
            higher_is_better=False,
            why="Nobody waits for anybody here.",
        ),
        Claim(ENTROPY, THERMOSTAT, FREE, "entropy does not collapse", kind="difference", why=WHY_MASK),
        Claim(ENTROPY, ALWAYS, FREE, "(always masked it grows without end)", kind="difference", why=WHY_MASK),
        Claim(
            ACCURACY,
            THERMOSTAT,
            FREE,
            "82.8 against 78.6 (AIME2025)",
            kind="difference",
            why=WHY_MASK,
        ),
        Claim(ACCURACY, FREE, "start", "(positive control: it learns here)", kind="difference", why="Of the bed."),
        Claim(
            ENTROPY,
            FREE,
            "start",
            "(bed: entropy falls here)",
            kind="difference",
            higher_is_better=False,
            why="Of the bed.",
        ),
    ],
    extra=("train", "trl"),
    scales=("quick", "cpu", "gpu"),
)

"""RMT: reinforcement mid-training (arXiv 2509.24375).

On unlabelled text a policy thinks before it predicts a token, and is rewarded if the text goes on with that token.
Three things keep it from thinking too much, from beginning with what is hardest, and from wasting the other tokens::

    budget      B_t = max(B_min, floor(B_0 gamma^(t / T))), in the prompt and in a triangle of the thinking's length
    curriculum  targets drawn by class of entropy, p_t = p_1, then (1 - u) p_1 + u p_2, then p_2
    loss        L = L_RL + lambda L_NTP: every token that is no target of the batch is learnt by plain prediction

The reward is ``(1 - w) match + w length``. Published are the budget, lambda and the transition steps; p_1, p_2, w and
the bounds of the classes are not, and the defaults here are ours. Both losses are means over tokens, so that lambda
does not depend on the size of a batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.utils.data import Sampler

from ..core.errors import BadInputError
from ..core.rng import derive_seed
from ..training.datasets.messages import completion_text
from ..training.scored_forward import add_scored_forward
from .base import Recipe
from .budgets import BudgetPrompt, length_reward, thinking_and_rest
from .corpus import CLASSES, next_token_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ThinkingBudget:
    """``max(least, floor(start gamma^(step / steps)))``.

    Raises:
        BadInputError: a value out of range.
    """

    start: int = 800
    gamma: float = 0.2
    least: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.gamma <= 1 and 1 <= self.least <= self.start):
            raise BadInputError("A budget falls (0 < gamma <= 1) and stays at 1 token or more.")

    def __call__(self, step: int, steps: int) -> int:
        share = min(1.0, step / max(1, steps))
        return max(self.least, math.floor(self.start * self.gamma**share + 1e-9))


@dataclass(frozen=True)
class ClassCurriculum:
    """``p_t`` over classes of difficulty.

    Args:
        early, late: p_1 and p_2.
        begin, end: progress at which p_t leaves p_1 and reaches p_2.

    Raises:
        BadInputError: no distributions, or a transition that does not lie inside the training.
    """

    early: tuple[float, ...] = (0.6, 0.3, 0.1)
    late: tuple[float, ...] = (0.1, 0.3, 0.6)
    begin: float = 0.3
    end: float = 0.7

    def __post_init__(self) -> None:
        for name, values in (("early", self.early), ("late", self.late)):
            if len(values) != CLASSES or min(values) < 0 or not math.isclose(sum(values), 1, abs_tol=1e-6):
                raise BadInputError(f"{name} holds {CLASSES} shares that sum to 1; got {values}.")
        if not 0 <= self.begin < self.end <= 1:
            raise BadInputError(f"The transition lies inside the training; got {self.begin} to {self.end}.")

    def __call__(self, progress: float) -> torch.Tensor:
        """``[3]``, easy, medium, hard."""
        share = min(1.0, max(0.0, (progress - self.begin) / (self.end - self.begin)))
        return (1 - share) * torch.tensor(self.early).double() + share * torch.tensor(self.late).double()


class EntropyCurriculum(Sampler[int]):
    """Numbers of rows: a class by the curriculum, then a row of that class, each as likely as the others.

    Every draw depends on the seed and the number of its batch only, so all processes draw alike and a resumed training
    goes on as it would have.

    Args:
        classes: of every row.
        repeats: as TRL's RepeatSampler has them.
        batches: of rollouts in the whole training, which is one pass.
    """

    def __init__(self, classes: Sequence[int], curriculum: ClassCurriculum, repeats: dict[str, Any], batches: int):
        self.curriculum, self.repeats, self.batches = curriculum, repeats, batches
        held = torch.as_tensor(classes)
        self.pools = [(held == number).nonzero()[:, 0] for number in range(CLASSES)]
        self.filled = torch.tensor([len(pool) > 0 for pool in self.pools])
        if not self.filled.all():
            missing = ", ".join(str(number) for number in range(CLASSES) if not self.filled[number])
            warnings.warn(f"No position is of class {missing}; its share goes to the others.", stacklevel=2)

    def drawn(self, batch: int) -> list[int]:
        """The rows of one batch of rollouts."""
        draw = torch.Generator().manual_seed(derive_seed(self.repeats["seed"], "curriculum", batch))
        shares = self.curriculum(batch / max(1, self.batches)) * self.filled
        if shares.sum() == 0:
            shares = self.filled.double()
        picked = torch.multinomial(shares, self.repeats["batch_size"], replacement=True, generator=draw)
        places = torch.rand(len(picked), generator=draw, dtype=torch.double)
        return [
            int(self.pools[kind][int(place * len(self.pools[kind]))])
            for kind, place in zip(picked, places, strict=True)
        ]

    def __iter__(self) -> Iterator[int]:
        for batch in range(self.batches):
            rows = self.drawn(batch)
            for _ in range(self.repeats["repeat_count"]):
                for row in rows:
                    yield from [row] * self.repeats["mini_repeat_count"]

    def __len__(self) -> int:
        return self.batches * math.prod(self.repeats[n] for n in ("batch_size", "repeat_count", "mini_repeat_count"))


@dataclass
class CurriculumOrder:
    """The curriculum as a piece; the data have a column ``difficulty`` (0, 1 or 2)."""

    kind: ClassVar[str] = "sampler"
    curriculum: ClassCurriculum = field(default_factory=ClassCurriculum)

    def __call__(self, dataset: Dataset, repeats: dict[str, Any], batches: int) -> EntropyCurriculum:
        if "difficulty" not in dataset.column_names:
            raise BadInputError("The data have no column 'difficulty'.", "Make them with next_token_rows.")
        return EntropyCurriculum(dataset["difficulty"][:], self.curriculum, repeats, batches)


def prediction(text: str) -> str | None:
    """What a response predicts: everything behind its thinking; None where the tags are not as they should be."""
    found = thinking_and_rest(text)
    return None if found is None else found[1]


def matches(text: str, target: str, spaces: bool = False) -> bool:
    """Whether a response predicts the target.

    A tokenizer that loses nothing reads the prefix and the prediction as the text's own tokens exactly where the
    prediction is the target's text (``next_token_rows`` keeps such positions only), so texts are compared.

    Args:
        spaces: leave out one space in front of either, and spaces behind the prediction.
    """
    found = prediction(text)
    if found is None:
        return False
    return found.removeprefix(" ").rstrip() == target.removeprefix(" ").rstrip() if spaces else found == target


@dataclass
class MatchReward:
    """1 for the text's own next token, else 0."""

    kind: ClassVar[str] = "reward"
    __name__: ClassVar[str] = "match"
    weight: float = 0.8
    spaces: bool = False

    def __call__(self, completions: Sequence[Any], target_text: Sequence[str], **_: Any) -> list[float]:
        texts = map(completion_text, completions)
        return [float(matches(text, target, self.spaces)) for text, target in zip(texts, target_text, strict=True)]


@dataclass
class ThinkingLengthReward:
    """The triangle at the budget of the step, for wrong predictions too.

    Without well-formed tags every token of the response counts as thinking.

    Args:
        only_correct: 0 for wrong predictions (not in the paper).
        spaces: as for ``matches``.
    """

    kind: ClassVar[str] = "reward"
    __name__: ClassVar[str] = "length"
    budget: Any
    weight: float = 0.2
    only_correct: bool = False
    spaces: bool = False
    tokenizer: Any = field(default=None, init=False, repr=False)

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(
        self,
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]],
        trainer_state: Any,
        target_text: Sequence[str],
        **_: Any,
    ) -> list[float]:
        budget = self.budget(trainer_state.global_step, max(1, trainer_state.max_steps))
        rewards = []
        for completion, ids, target in zip(completions, completion_ids, target_text, strict=True):
            text = completion_text(completion)
            paid = not self.only_correct or matches(text, target, self.spaces)
            rewards.append(length_reward(self.length(text, ids), budget) if paid else 0.0)
        return rewards

    def length(self, text: str, ids: list[int]) -> int:
        """Tokens of the thinking."""
        found = thinking_and_rest(text)
        if found is None:
            return len(ids) - bool(ids and ids[-1] == self.tokenizer.eos_token_id)
        return len(self.tokenizer(found[0], add_special_tokens=False)["input_ids"])


@dataclass
class NextTokenLoss:
    """``coef`` times the mean of ``-log pi`` over the batch's texts, without the positions that are targets.

    Every text counts once, however many rollouts and targets of the batch are its own. Its tokens are learnt with the
    first of its rows; the sum is divided by a micro-batch's share of all such tokens, so that the losses of the
    micro-batches and processes average to the mean.
    """

    kind: ClassVar[str] = "auxiliary"
    coef: float = 0.1

    def check_model(self, model: PreTrainedModel) -> None:
        """Lets the model's forward score tokens, at temperature 1; refuses one that it cannot score."""
        add_scored_forward(model)

    def carry(self, rows: Sequence[dict[str, Any]], own: slice) -> dict[str, torch.Tensor]:
        """Of this process's rows ``[b]``: ``text_ids`` ``[b, L]``, -1 in rows that carry no text; ``text_learnt``
        ``[b, L]`` bool; ``text_share`` ``[b]``, how many learnt tokens there are for a row.

        Args:
            rows: of all processes.
            own: which of them are of this process.
        """
        targets: dict[int, set[int]] = {}
        first: dict[int, int] = {}
        for number, row in enumerate(rows):
            targets.setdefault(row["text"], set()).add(row["position"])
            first.setdefault(row["text"], number)
        total = sum(len(rows[number]["sequence"]) - 1 - len(targets[text]) for text, number in first.items())
        mine = [(number, rows[number]) for number in range(*own.indices(len(rows)))]
        width = max([len(row["sequence"]) for number, row in mine if first[row["text"]] == number], default=2)
        ids = torch.full((len(mine), width), -1)
        learnt = torch.zeros(len(mine), width, dtype=torch.bool)
        for line, (number, row) in enumerate(mine):
            if first[row["text"]] == number:
                ids[line, : len(row["sequence"])] = torch.tensor(row["sequence"])
                learnt[line, 1 : len(row["sequence"])] = True
                learnt[line, list(targets[row["text"]])] = False
        share = torch.full((len(mine),), total / len(rows))
        return {"text_ids": ids, "text_learnt": learnt, "text_share": share}

    def __call__(self, model: Any, inputs: dict[str, Any], step: int, steps: int) -> torch.Tensor:
        ids, learnt = inputs["text_ids"], inputs["text_learnt"]
        rows = (ids[:, 0] >= 0).nonzero()[:, 0]
        rows = rows if len(rows) else torch.zeros(1, dtype=torch.long, device=ids.device)  # all processes go forward
        ids, learnt = ids[rows], learnt[rows]
        attention = (ids >= 0).long()
        attention[:, 0] = 1
        labels = ids[:, 1:][learnt[:, 1:]]
        stats = model(
            input_ids=ids.clamp(min=0),
            attention_mask=attention,
            score={"mask": learnt[:, 1:], "labels": labels, "needs": ()},
        )
        loss: torch.Tensor = -self.coef * stats.logps.sum() / inputs["text_share"].sum().clamp(min=1e-6)
        return loss


def _shares(text: str, name: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError as error:
        raise BadInputError(f"{name} holds {CLASSES} shares; got {text!r}.", "For example: 0.6 0.3 0.1") from error


@dataclass
class RMT:
    """RMT's settings. The data are texts: lines of a file, or JSONL objects with a ``text``.

    Args:
        budget_start, budget_min: tokens of thinking at the start, and at least.
        budget_gamma: the budget's share that is left at the end.
        classes_early, classes_late: shares of easy, medium and hard targets at the start and at the end.
        transition_begin, transition_end: shares of the training between which one becomes the other.
        weight_length: w, of the length; the match has the rest.
        length_only_if_correct: reward the length of right predictions only (not in the paper).
        match_spaces: compare predictions without a space in front.
        ntp_coef: lambda; 0 leaves the next-token loss out.
        answer_tokens: of a response beside its thinking, tags and prediction.
        context: tokens of a prefix.
        positions: targets that are drawn from a text.
        thresholds: two entropies in nats between the classes; empty for thirds of all positions.
        thinking_prompt: ``{prompt}`` and ``{budget}`` are filled in.

    Raises:
        BadInputError: a value out of range.
    """

    budget_start: int = 800
    budget_min: int = 1
    budget_gamma: float = 0.2
    classes_early: str = "0.6 0.3 0.1"
    classes_late: str = "0.1 0.3 0.6"
    transition_begin: float = 0.3
    transition_end: float = 0.7
    weight_length: float = 0.2
    length_only_if_correct: bool = False
    match_spaces: bool = False
    ntp_coef: float = 0.1
    answer_tokens: int = 16
    context: int = 256
    positions: int = 32
    thresholds: str = ""
    thinking_prompt: str = (
        "{prompt}\n(Think inside <think></think> with exactly {budget} tokens, then give the text's next token.)\n"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.weight_length <= 1:
            raise BadInputError(f"weight_length lies in [0, 1]; got {self.weight_length}.")
        if self.ntp_coef < 0 or not math.isfinite(self.ntp_coef):
            raise BadInputError(f"ntp_coef must not be negative; got {self.ntp_coef}.")
        if min(self.answer_tokens, self.context, self.positions) < 1:
            raise BadInputError("answer_tokens, context and positions must be at least 1.")
        if "{prompt}" not in self.thinking_prompt or "{budget}" not in self.thinking_prompt:
            raise BadInputError("thinking_prompt needs {prompt} and {budget}.")
        bounds = self.bounds()
        if bounds is not None and (len(bounds) != CLASSES - 1 or sorted(bounds) != list(bounds)):
            raise BadInputError(f"thresholds holds {CLASSES - 1} rising entropies; got {self.thresholds!r}.")
        self.recipe()

    def bounds(self) -> tuple[float, ...] | None:
        return _shares(self.thresholds, "thresholds") if self.thresholds.strip() else None

    def rows(
        self, texts: Sequence[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> list[dict[str, Any]]:
        """Targets with their prefixes, by a model as it is before training."""
        return next_token_rows(
            texts, model, tokenizer, context=self.context, positions=self.positions, thresholds=self.bounds(), seed=seed
        )

    def recipe(self) -> Recipe:
        """Prompt, order, rewards and the second loss."""
        budget = ThinkingBudget(self.budget_start, self.budget_gamma, self.budget_min)
        early = _shares(self.classes_early, "classes_early")
        late = _shares(self.classes_late, "classes_late")
        pieces: list[Any] = [
            BudgetPrompt(budget, self.thinking_prompt, self.answer_tokens, inside=False),
            CurriculumOrder(ClassCurriculum(early, late, self.transition_begin, self.transition_end)),
        ]
        w = self.weight_length
        if w < 1:
            pieces.append(MatchReward(1 - w, self.match_spaces))
        if w:
            pieces.append(ThinkingLengthReward(budget, w, self.length_only_if_correct, self.match_spaces))
        if self.ntp_coef:
            pieces.append(NextTokenLoss(self.ntp_coef))
        return Recipe(*pieces)

    def arguments(self) -> dict[str, Any]:
        """Settings of GRPOConfig: a mean over tokens, no KL."""
        return {"loss_type": "dapo", "beta": 0.0}

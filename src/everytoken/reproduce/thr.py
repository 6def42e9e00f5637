"""THR's claims: few tokens carry the effect of a step, and the sign of p steers towards exploitation or exploration.

The first part is of first order, on a real model's answers. SmolLM2-135M-Instruct answers sums eight times each;
questions with right and wrong answers are groups. Hidden states are held fixed, and one step of the output matrix is
taken, as THR supposes. What the step does to the likelihood of the right answers and to the entropy is measured from
new logits, not predicted. All arms take steps of one size: that at which plain GRPO would raise the likelihood of a
group's right answers by ``MOVE`` nats a token.

The second part trains. A small model learns to sort eight digits until a tenth of its samples is right, and goes on by
equal rollouts: GRPO, and THR with p above and below 0. A greedy answer says how well a policy exploits, sixteen samples
of which one is right (pass@16) what it still explores. Every arm takes the better of two learning rates, chosen by the
accuracy of samples on questions of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.errors import BadInputError
from ..core.results import Values, mean
from ..core.rng import derive_seed
from .base import Arms, Claim, Context, Reproduction
from .beds.rollouts import Learner, Size, device
from .beds.sorting import Sorting, tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .files import Scale

ROLLOUTS, NEW, MOVE, SMALL, SHARE = 8, 16, 0.1, 0.01, 0.2
QUESTIONS: dict[Scale, int] = {"quick": 3, "cpu": 6, "gpu": 400}
STEPS = {"GRPO": None, "p = +0.2": 0.2, "p = 0": 0.0, "p = -0.2": -0.2}
"""arm -> p; None weighs all tokens alike."""
CARRIED, OVERLAP = "share of |THR| in a fifth of the tokens", "overlap with the fifth of highest entropy"
PREDICTED = "agreement of measured and predicted change"
LIKELIER, ENTROPY = "right answers' log-probability after a step", "entropy after a step, nats"
WHY = (
    "The paper trains models of 1.5B and 7B weights for 40 steps and reports accuracy; here one step of the output "
    "matrix of a model of 135M is taken for each question, at a size that all arms share."
)
TASK, GOAL, SAMPLES = Sorting(given=8, written=8), 0.1, 16
SIZES: dict[Scale, Size] = {
    "quick": Size(hidden=48, layers=2, warmup=200, updates=6, batch=64, test=48, rates=(4e-4,)),
    "cpu": Size(hidden=48, layers=2, warmup=600, updates=80, batch=64, test=256, rates=(2e-4, 4e-4)),
    "gpu": Size(
        hidden=256, layers=6, warmup=1500, updates=160, batch=512, test=4096, rates=(1e-4, 3e-4), warmup_batch=256
    ),
}
TRAINED = {arm: p for arm, p in STEPS.items() if p != 0}
GREEDY, PASSED, REMAINING = "greedy accuracy", f"pass@{SAMPLES}", "entropy of a response after training, nats"
WHY_TRAINED = (
    "The paper trains models of 1.5B and 7B weights on mathematics with p of 0.1 on either side; here (scale cpu) a "
    "model of 0.06M weights sorts eight digits, with 80 updates and p of 0.2, so that a difference can show."
)


@dataclass
class Group:
    """Answers to one question.

    Attributes:
        hidden, logits, ids, mask: ``[8, T, D]``, ``[8, T, V]`` and twice ``[8, T]``.
        correct: ``[8]`` bool.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    correct: torch.Tensor

    def likelihood(self, logits: torch.Tensor) -> float:
        """Mean over the right answers of the mean log-probability of their tokens."""
        from ..core.logprobs import logps_from_logits, masked_mean

        return float(masked_mean(logps_from_logits(logits, self.ids), self.mask)[self.correct].mean())

    def entropies(self, logits: torch.Tensor) -> torch.Tensor:
        """``[8, T]``."""
        from ..core.logprobs import entropy_from_logits

        return entropy_from_logits(logits)

    def stepped(self, weights: torch.Tensor, size: float) -> torch.Tensor:
        """Logits after a step of the output matrix along ``sum of weight x error x hidden state``."""
        import torch

        errors = -self.logits.softmax(-1)
        errors.scatter_add_(-1, self.ids[..., None], torch.ones_like(errors[..., :1]))
        own = weights[self.mask][:, None] * errors[self.mask]
        alike = self.hidden.flatten(0, 1) @ self.hidden[self.mask].T
        return self.logits + size * (alike @ own).view_as(self.logits)


def groups(context: Context, count: int) -> list[Group]:
    """Questions of which some answers are right and some wrong."""
    import torch

    from ..core.loading import load_model, load_tokenizer
    from ..core.scoring import base_model, output_head
    from ..training.datasets.arithmetic import is_correct, make_task, prompt_of

    model, tokenizer = load_model(context.model).to(device()), load_tokenizer(context.model)
    task = make_task("chain_sum", count, derive_seed(context.seed, "questions"))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    found = []
    for number in range(count):
        context.report("questions", number + 1, count)
        item = task[number]
        prompt = prompt_of(tokenizer, item["question"])
        torch.manual_seed(derive_seed(context.seed, "answers", number))
        with torch.no_grad():
            whole = model.generate(
                torch.tensor([prompt] * ROLLOUTS, device=model.device),
                attention_mask=torch.ones(ROLLOUTS, len(prompt), dtype=torch.long, device=model.device),
                max_new_tokens=NEW,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                pad_token_id=pad,
            )
        ids = whole[:, len(prompt) :]
        ended = (ids == tokenizer.eos_token_id).cumsum(1)
        mask = (ended == 0) | ((ended == 1) & (ids == tokenizer.eos_token_id))
        texts = tokenizer.batch_decode([row[own] for row, own in zip(ids, mask, strict=True)], skip_special_tokens=True)
        correct = torch.tensor([is_correct(task, item, text) for text in texts], device=model.device)
        if not correct.any() or correct.all():
            continue
        with torch.no_grad():
            hidden = base_model(model).base_model(input_ids=whole, use_cache=False).last_hidden_state
            hidden = hidden[:, len(prompt) - 1 : -1].float()
            logits = output_head(base_model(model)).detached().logits(hidden.flatten(0, 1)).view(*ids.shape, -1)
        found.append(Group(hidden, logits.float(), ids, mask, correct))
    return found


def top(values: torch.Tensor) -> set[int]:
    """The places of the largest fifth."""
    return set(values.topk(max(1, round(SHARE * len(values)))).indices.tolist())


def measured(group: Group) -> dict[str, dict[str, float]]:
    """A group's figures, by arm; ``THR`` holds those of the scores themselves."""
    import torch

    from ..reinforcement.thr import thr_scores, threshold

    scores = thr_scores(group.hidden, group.logits, group.ids, group.mask, group.correct, "full")
    sizes = scores[group.mask].abs()
    fifth = top(sizes)
    found: dict[str, dict[str, float]] = {"THR": {}}
    found["THR"][CARRIED] = float(sizes[list(fifth)].sum() / sizes.sum())
    found["THR"][OVERLAP] = len(fifth & top(group.entropies(group.logits)[group.mask])) / len(fifth)
    # unit steps along all tokens: THR predicts the change of the sum of the right answers' means
    signs = torch.where(group.correct, 1.0, -1.0)[:, None].expand_as(scores)
    right, total = int(group.correct.sum()), float(scores.sum())
    size = SMALL * right / abs(total)
    change = group.likelihood(group.stepped(signs, size)) - group.likelihood(group.stepped(signs, -size))
    found["THR"][PREDICTED] = 1 - abs(change * right / (2 * size * total) - 1)
    rewards = group.correct.float()
    advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[:, None].expand_as(scores)
    tau = threshold(scores, group.mask, group.correct)
    # |A| times THR is what a token's step adds to first order
    size = MOVE / float((advantages.abs() * scores).sum() / right)
    if size <= 0:
        return {}
    for arm, p in STEPS.items():
        weights = advantages if p is None else advantages * (scores.abs() > tau) * (1 + p * scores.sign())
        logits = group.stepped(weights, size)
        found[arm] = {
            LIKELIER: group.likelihood(logits),
            ENTROPY: float(group.entropies(logits)[group.mask].mean()),
        }
    return found


def first_order(context: Context) -> Arms:
    """Figures of every question, by arm."""
    found = [measured(group) for group in groups(context, QUESTIONS[context.scale])]
    kept = [figures for figures in found if figures]
    context.artifacts["questions with right and wrong answers"] = len(found)
    context.artifacts["of them, with a step of GRPO that helps to first order"] = len(kept)
    if not kept:
        raise BadInputError("No question has both right and wrong answers.", "Use another model or another seed.")
    return {arm: {metric: [figures[arm][metric] for figures in kept] for metric in kept[0][arm]} for arm in kept[0]}


def graded(
    context: Context, model: PreTrainedModel, codes: PreTrainedTokenizerBase, questions: list[str]
) -> dict[str, Values]:
    """Of every question: whether its greedy answer is right, whether any of ``SAMPLES`` is, and their entropy."""
    import torch

    torch.manual_seed(derive_seed(context.seed, "graded"))
    asked = TASK.sampled(model, codes, questions, SAMPLES)
    return {
        GREEDY: TASK.answered(model, codes, questions, sample=False),
        PASSED: [max(sample.right for sample in samples) for samples in asked],
        REMAINING: [mean([sample.surprise for sample in samples]) for samples in asked],
    }


def by_training(context: Context) -> Arms:
    """The start, and GRPO and THR after equal rollouts."""
    from ..reinforcement.base import Recipe
    from ..reinforcement.thr import THR

    size, codes = SIZES[context.scale], tokenizer()
    start = TASK.start(context, size, codes, GOAL)
    test = TASK.questions(context.seed, "test", size.test)
    arms: Arms = {"start": context.part("start, measured", lambda: graded(context, start, codes, test))}

    def learner(arm: str) -> Learner:
        p = TRAINED[arm]
        return Learner(Recipe() if p is None else THR(p=p).recipe(), TASK.reward, THR().arguments())

    def kept(arm: str, policy: PreTrainedModel, logs: dict[str, list[float]]) -> dict[str, Values]:
        return graded(context, policy, codes, test)

    return arms | TASK.learnt(context, size, start, codes, TRAINED, learner, kept)


def run(context: Context) -> Arms:
    arms = by_training(context)
    for arm, figures in context.part("first order", lambda: first_order(context)).items():
        arms[arm] = arms.get(arm, {}) | figures
    return arms


REPRODUCTION = Reproduction(
    name="thr",
    summary="Token Hidden Rewards of a model's answers to sums with one step for each weight, and training on sorting",
    run=run,
    claims=[
        Claim(LIKELIER, "p = +0.2", "p = -0.2", "p > 0 exploits", kind="difference", why=WHY),
        Claim(ENTROPY, "p = -0.2", "p = +0.2", "p < 0 explores", kind="difference", why=WHY),
        Claim(
            CARRIED,
            "THR",
            "",
            "a few tokens carry almost all",
            kind="value",
            threshold=0.5,
            why="The paper gives no figure; a fifth would carry a fifth if all tokens counted alike.",
        ),
        Claim(
            OVERLAP,
            "THR",
            "",
            "up to about 90%",
            kind="value",
            threshold=SHARE,
            why="The bar is chance; the paper's figure is for long answers of models of 1.5B and 7B weights.",
        ),
        Claim(
            PREDICTED,
            "THR",
            "",
            "(exact to first order)",
            kind="value",
            threshold=0.95,
            why="A positive control: without it the other figures would say nothing.",
        ),
        Claim(GREEDY, "p = +0.2", "GRPO", "46.8 against 42.7 (7B)", kind="difference", why=WHY_TRAINED),
        Claim(GREEDY, "p = +0.2", "p = -0.2", "36.3 against 36.4 (1.5B)", kind="difference", why=WHY_TRAINED),
        Claim(PASSED, "p = -0.2", "GRPO", "69.7 against 67.3 (pass@128)", kind="difference", why=WHY_TRAINED),
        Claim(PASSED, "p = -0.2", "p = +0.2", "(p < 0 explores)", kind="difference", why=WHY_TRAINED),
        Claim(REMAINING, "p = -0.2", "p = +0.2", "p < 0 explores", kind="difference", why=WHY_TRAINED),
        Claim(GREEDY, "GRPO", "start", "(positive control: GRPO learns here)", kind="difference", why="Of the bed."),
        Claim(
            PASSED,
            "GRPO",
            "",
            "(bed: below the ceiling)",
            "value",
            higher_is_better=False,
            threshold=0.95,
            why="Of the bed: where sixteen samples find every answer, nothing is left to explore.",
        ),
    ],
    extra=("train", "reasoning_gym"),
    scales=("quick", "cpu", "gpu"),
)

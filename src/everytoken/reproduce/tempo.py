"""TEMPO's claims: advantages nearer to the true ones than GRPO's, and from them a policy that learns in fewer updates.

The first is measured on trees that can be enumerated. A policy is a table: probabilities of three tokens at every node
of a tree of five levels. A leaf is right (1) or wrong (0), by scores of the tokens on its path. So the value of every
prefix is known, and with it by how much each token is better than the policy's average there: the true token advantage.
Both arms see the same rollouts. GRPO has a signal here, which is right in sign for whole responses, and cannot tell the
tokens of a response apart.

Learning begins on trees whose leaves are right with a chance each, few of them with a large one: a policy that takes
too large steps settles on a leaf that was lucky.

In a second family every response begins with a token of its own that means nothing. There prefixes never meet, and
TEMPO cannot gain.

Learning is measured with a network too. A small model learns to sort eight digits until a tenth of its samples is
right, and goes on by equal rollouts, with the better of two learning rates for each arm. Prefixes of a group meet often
there: most tokens are nearly certain, and a wrong one decides the answer. What counts is how many updates it takes
until rollouts are right as often as GRPO's are in the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.results import mean
from ..core.rng import derive_seed
from .base import Arms, Claim, Context, Reproduction
from .beds.rollouts import Learner, Size
from .beds.sorting import Sorting, tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .files import Scale

CHOICES, LEVELS, GROUP = 3, 5, 8
NODES = (CHOICES**LEVELS - 1) // (CHOICES - 1)
ARMS = {"GRPO": 0.0, "TEMPO": 1.0}
"""arm -> td_coef."""
SHARED, APART = "correlation with the true token advantage", "the same, beginnings that never meet"
UPDATES = "updates to six tenths of the best leaf"
RATES = (0.5, 1.0, 2.0, 4.0)
TREES: dict[Scale, tuple[int, int, int]] = {"quick": (8, 8, 80), "cpu": (48, 32, 200), "gpu": (512, 64, 400)}
"""Trees, groups of each, and updates at most. Tables of three tokens gain nothing from a GPU: its version is larger."""
WHY = (
    "The paper's figure is convergence of models of 1.7B and 4B weights on MATH (second-hand); here tables of three "
    "tokens and five levels, so that true advantages are known. Every arm has its own step size, chosen on other trees."
)

TASK, GOAL = Sorting(given=8, written=8), 0.1
SIZES: dict[Scale, Size] = {
    "quick": Size(hidden=48, layers=2, warmup=200, updates=6, batch=64, test=48, rates=(4e-4,)),
    "cpu": Size(hidden=48, layers=2, warmup=600, updates=80, batch=64, test=512, rates=(2e-4, 4e-4)),
    "gpu": Size(
        hidden=256, layers=6, warmup=1500, updates=300, batch=1024, test=8192, rates=(1e-4, 3e-4), warmup_batch=256
    ),
}
REACHED, OVERALL = "updates to GRPO's final reward", "mean reward over training"
ACCURACY, SMOOTH = "accuracy of samples after training", 10
WHY_NETWORK = (
    "The paper's figure is convergence of models of 1.7B and 4B weights on MATH (second-hand); here (scale cpu) a "
    "model of 0.06M weights sorts eight digits, with 80 updates of 64 rollouts."
)


class Trees:
    """Trees with a policy each.

    Args:
        lucky: leaves are right with a chance each, instead of always or never.

    Attributes:
        logits: ``[K, N, 3]`` of the tokens at every inner node; node n leads to 3 n + 1 and the two behind it.
        rewards: ``[K, 3^5]``, the chance of each leaf to be right.
    """

    def __init__(self, count: int, seed: int, lucky: bool = False):
        import torch

        draw = torch.Generator().manual_seed(seed)
        self.logits = 1.0 * torch.randn(count, NODES, CHOICES, generator=draw)
        scores = torch.randn(count, NODES, CHOICES, generator=draw)
        leaves = torch.zeros(count, 1)
        for level in range(LEVELS):
            leaves = (leaves[..., None] + scores[:, self.level(level)]).flatten(1)
        chances = self.leaf_chances()
        order = leaves.argsort(1, descending=True)
        # the best leaves are right, as many as the policy reaches in 30% of its rollouts
        right = chances.gather(1, order).cumsum(1) <= 0.3
        right[:, 0] = True
        self.rewards = torch.zeros_like(leaves).scatter(1, order, right.float())
        if lucky:
            self.rewards = torch.sigmoid(leaves - leaves.topk(2 * CHOICES, 1).values[:, -1:])

    @staticmethod
    def level(number: int) -> slice:
        """The nodes of a level."""
        first = (CHOICES**number - 1) // (CHOICES - 1)
        return slice(first, first + CHOICES**number)

    def leaf_chances(self) -> torch.Tensor:
        import torch

        chances = torch.ones(len(self.logits), 1)
        for number in range(LEVELS):
            chances = (chances[..., None] * self.logits[:, self.level(number)].softmax(-1)).flatten(1)
        return chances

    def expected(self) -> torch.Tensor:
        """``[K]``, the expected reward."""
        return (self.leaf_chances() * self.rewards).sum(1)

    def advantages(self) -> torch.Tensor:
        """``[K, N, 3]``: how much better each token is than the policy's average at its node."""
        import torch

        found = torch.empty_like(self.logits)
        values = self.rewards
        for number in reversed(range(LEVELS)):
            after = values.unflatten(1, (-1, CHOICES))
            chances = self.logits[:, self.level(number)].softmax(-1)
            values = (chances * after).sum(-1)
            found[:, self.level(number)] = after - values[..., None]
        return found

    def rollouts(self, count: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Nodes and tokens ``[K, count, 5]`` and rewards ``[K, count]``."""
        import torch

        tree = torch.arange(len(self.logits))[:, None]
        node = torch.zeros(len(self.logits), count, dtype=torch.long)
        nodes, tokens = [], []
        for _ in range(LEVELS):
            chances = self.logits[tree, node].softmax(-1)
            token = torch.multinomial(chances.flatten(0, 1), 1, generator=draw).view_as(node)
            nodes.append(node)
            tokens.append(token)
            node = CHOICES * node + 1 + token
        chances = self.rewards.gather(1, node - NODES)
        return torch.stack(nodes, -1), torch.stack(tokens, -1), torch.bernoulli(chances, generator=draw)


def estimated(tokens: torch.Tensor, rewards: torch.Tensor, td_coef: float) -> torch.Tensor:
    """Advantages of groups ``[K, G, T]`` by the method itself."""
    import torch

    from ..reinforcement.tempo import tempo_advantages

    ids = tokens.flatten(0, 1)
    groups = torch.arange(len(tokens)).repeat_interleave(tokens.shape[1])
    mask = torch.ones_like(ids, dtype=torch.bool)
    return tempo_advantages(ids, mask, rewards.flatten(), groups, td_coef=td_coef).view(tokens.shape)


def correlations(context: Context, trees: Trees, groups: int, apart: bool) -> dict[str, list[float]]:
    """Of every tree, over the tokens of its groups that teach something; for each arm."""
    import torch

    draw = torch.Generator().manual_seed(derive_seed(context.seed, "groups"))
    true = trees.advantages()
    found: dict[str, list[torch.Tensor]] = {arm: [] for arm in ARMS}
    truths = []
    for number in range(groups):
        context.report("groups of rollouts", number + 1, groups)
        nodes, tokens, rewards = trees.rollouts(GROUP, draw)
        truth = true[torch.arange(len(nodes))[:, None, None], nodes, tokens]
        if apart:
            own = torch.arange(GROUP).expand(len(tokens), -1)[..., None] + CHOICES
            tokens, truth = torch.cat([own, tokens], -1), torch.nn.functional.pad(truth, (1, 0))
        truths.append(truth)
        for arm, coef in ARMS.items():
            found[arm].append(estimated(tokens, rewards, coef))

    def correlation(arm: str, tree: int) -> float:
        said = torch.stack([part[tree] for part in found[arm]])
        told = torch.stack([part[tree] for part in truths])
        teaching = said.abs().sum((1, 2)) > 0
        pair = torch.stack([said[teaching].flatten(), told[teaching].flatten()])
        return float(torch.corrcoef(pair)[0, 1])

    return {arm: [correlation(arm, tree) for tree in range(len(trees.logits))] for arm in ARMS}


def updates(context: Context, name: str, arm: str, rate: float, count: int, limit: int) -> list[float]:
    """Updates until a policy's expected reward is six tenths of the best leaf's chance, ``limit`` where it never is;
    one number a tree of a named set.
    """
    import torch

    trees = Trees(count, derive_seed(context.seed, name), lucky=True)
    goal = 0.6 * trees.rewards.amax(1)
    draw = torch.Generator().manual_seed(derive_seed(context.seed, name, "rollouts"))
    reached = torch.full((count,), float(limit))
    tree = torch.arange(count)[:, None, None]
    for update in range(limit):
        reached = torch.where(trees.expected() >= goal, reached.clamp(max=float(update)), reached)
        if (reached < limit).all():
            break
        context.report(f"{arm}, step size {rate}", update + 1, limit)
        nodes, tokens, rewards = trees.rollouts(GROUP, draw)
        advantages = estimated(tokens, rewards, ARMS[arm])
        chosen = torch.nn.functional.one_hot(tokens, CHOICES)
        gradient = advantages[..., None] * (chosen - trees.logits[tree, nodes].softmax(-1))
        step = rate * gradient / GROUP
        trees.logits.index_put_((tree.expand_as(nodes), nodes), step, accumulate=True)
    return reached.tolist()


def on_trees(context: Context) -> Arms:
    """Correlations and updates of both arms, by trees."""
    many, groups, limit = TREES[context.scale]
    trees = Trees(many, derive_seed(context.seed, "trees"))
    shared, apart = (correlations(context, trees, groups, flag) for flag in (False, True))
    arms: Arms = {}
    for arm in ARMS:
        rates = {rate: sum(updates(context, "tuning", arm, rate, many // 4, limit)) for rate in RATES}
        best = min(rates, key=rates.__getitem__)
        context.artifacts[f"{arm}: updates on the tuning trees by step size"] = {
            str(rate): total / (many // 4) for rate, total in rates.items()
        }
        arms[arm] = {
            SHARED: shared[arm],
            APART: apart[arm],
            UPDATES: updates(context, "learning", arm, best, many, limit),
        }
    return arms


def updates_to(rewards: list[float], goal: float) -> float:
    """Updates until the mean of ``SMOOTH`` rewards one behind the other first reaches a goal; one more than all where
    it never does.
    """
    span = min(SMOOTH, len(rewards))
    means = [mean(rewards[last - span : last]) for last in range(span, len(rewards) + 1)]
    return float(next((span + at for at, value in enumerate(means) if value >= goal), len(rewards) + 1))


def on_a_network(context: Context) -> Arms:
    """The start, and both arms after equal rollouts."""
    from ..reinforcement.tempo import TEMPO

    size, codes = SIZES[context.scale], tokenizer()
    start = TASK.start(context, size, codes, GOAL)
    test = TASK.questions(context.seed, "test", size.test)

    def graded(model: PreTrainedModel) -> list[float]:
        return TASK.answered(model, codes, test, sample=True)

    arms: Arms = {"start": {ACCURACY: context.part("start, measured", lambda: graded(start))}}

    def learner(arm: str) -> Learner:
        method = TEMPO(td_coef=ARMS[arm])
        return Learner(method.recipe(), TASK.reward, method.arguments())

    def kept(arm: str, policy: PreTrainedModel, logs: dict[str, list[float]]) -> dict[str, Any]:
        return {"curve": logs["reward"], OVERALL: mean(logs["reward"]), ACCURACY: graded(policy)}

    found = TASK.learnt(context, size, start, codes, ARMS, learner, kept)
    curves = {arm: figures.pop("curve") for arm, figures in found.items()}
    goal = mean(curves["GRPO"][-SMOOTH:])
    for arm, curve in curves.items():
        context.artifacts[f"{arm}: mean reward by update"] = [round(value, 4) for value in curve]
        found[arm][REACHED] = updates_to(curve, goal)
    return arms | found


def run(context: Context) -> Arms:
    arms = on_a_network(context)
    for arm, figures in context.part("trees", lambda: on_trees(context)).items():
        arms[arm] |= figures
    return arms


REPRODUCTION = Reproduction(
    name="tempo",
    summary="advantages of GRPO and TEMPO on trees where the true ones are known, and a network that learns by either",
    run=run,
    claims=[
        Claim(SHARED, "TEMPO", "GRPO", "(not measured in the paper)", kind="difference", why=WHY),
        Claim(UPDATES, "TEMPO", "GRPO", "up to 1.6x faster convergence", higher_is_better=False, why=WHY),
        Claim(
            APART,
            "TEMPO",
            "GRPO",
            "(negative control: not in the paper)",
            kind="difference",
            why="Prefixes never meet here: all that TEMPO adds is that the first token counts twice.",
        ),
        Claim(REACHED, "TEMPO", "GRPO", "up to 1.6x faster convergence", higher_is_better=False, why=WHY_NETWORK),
        Claim(OVERALL, "TEMPO", "GRPO", "(the whole curve: faster convergence)", kind="difference", why=WHY_NETWORK),
        Claim(ACCURACY, "TEMPO", "GRPO", "higher validation accuracy", kind="difference", why=WHY_NETWORK),
        Claim(ACCURACY, "GRPO", "start", "(positive control: GRPO learns here)", kind="difference", why="Of the bed."),
    ],
    extra=("train", "trl"),
    scales=("quick", "cpu", "gpu"),
)

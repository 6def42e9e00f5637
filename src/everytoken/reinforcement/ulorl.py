"""UloRL: reinforcement learning with ultra-long outputs (arXiv 2507.19766).

A batch of long outputs waits for its longest. Here every step writes a segment of ``S = L / K`` tokens: responses that
end are trained on at once, the others go on in the next step under the newer policy. The ratio of a response that
several policies wrote:

- ``"pois"`` (pseudo on-policy, the paper's choice) takes the policy as it is before the update for all of them;
- ``"sais"`` (segment aware) divides every token by the policy that wrote it.

Entropy collapses because updates go on reinforcing tokens of correct responses that are mastered already. They are left
out only while entropy is low, which holds it near a target, as a thermostat does::

    I_{i,t} = 1[H_i < sigma and A_i > 0 and pi(o_t) >= tau]
    J = 1 / sum_i |o_i|  sum_{i,t} (1 - I_{i,t}) min(rho A, clip(rho, 1 - eps, 1 + eps) A)

With rewards 0 and 1 ``A_i > 0`` says that the response is correct. The divisor counts the masked tokens too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..core.errors import BadInputError, check_choices
from ..core.logprobs import masked_mean
from ..core.rng import derive_seed
from .base import Recipe, RolloutBatch, UpdateBatch
from .rollouts import Row, Writer, Written


def mastered_tokens(
    logps: torch.Tensor,
    entropies: torch.Tensor,
    mask: torch.Tensor,
    positive: torch.Tensor,
    threshold: float = 0.99,
    target: float = 0.2,
    scope: str = "response",
) -> torch.Tensor:
    """``I``, bool ``[B, T]``.

    Args:
        logps, entropies: ``[B, T]``, nats, at the temperature of the loss.
        mask: ``[B, T]``.
        positive: ``[B, T]`` or ``[B, 1]`` bool, the tokens of correct responses.
        threshold: tau, a probability; above 1 nothing is mastered.
        target: sigma, in nats; at 0 nothing is left out.
        scope: the mean entropy is that of the ``"response"``, or of all tokens (``"batch"``).
    """
    if scope == "response":
        mean = masked_mean(entropies, mask)[:, None]
    else:
        mean = masked_mean(entropies, mask, dim=None)
    sure = logps.exp() >= threshold if threshold > 0 else torch.ones_like(mask, dtype=torch.bool)
    return mask.bool() & (mean < target) & positive & sure


@dataclass
class MasteredTokenMask:
    """``1 - I`` as a weight of every update, by the policy of that update.

    With ``scope="batch"`` the mean entropy is that of a micro-batch.
    """

    kind: ClassVar[str] = "ratio_weight"
    threshold: float = 0.99
    target: float = 0.2
    scope: str = "response"
    metrics: dict[str, float] = field(default_factory=dict, init=False)

    def __call__(self, update: UpdateBatch, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        positive = update.advantages > 0
        found = mastered_tokens(
            update.logps, update.entropies, update.mask, positive, self.threshold, self.target, self.scope
        )
        self.metrics = {"tokens_mastered": (found.sum() / update.mask.sum().clamp(min=1)).item()}
        return (~found).to(update.logps.dtype)


@dataclass
class TruncatedIsWrong:
    """GRPO's advantage with reward 0 for responses that reached the limit without an end."""

    kind: ClassVar[str] = "group_advantage"
    eps: float = 1e-4

    def __call__(self, batch: RolloutBatch) -> torch.Tensor:
        if batch.truncated is None:
            raise BadInputError("TruncatedIsWrong needs to know which responses were cut.", "Train with RecipeTrainer.")
        rewards = torch.where(batch.truncated & ~batch.rewards.isnan(), 0.0, batch.rewards)
        found = torch.zeros_like(rewards)
        for rows in batch.group_rows():
            scored = rows[~rewards[rows].isnan()]
            values = rewards[scored].double()
            if len(scored) > 1 and values.max() > values.min():
                found[scored] = ((values - values.mean()) / (values.std() + self.eps)).to(found.dtype)
        return found


@dataclass
class InformativeGroups:
    """Leaves out groups in which nobody has an advantage, from the divisor of the loss too."""

    kind: ClassVar[str] = "rollouts"
    divisor: ClassVar[str] = "kept"

    def __call__(self, batch: RolloutBatch, advantages: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros(len(batch.groups), dtype=torch.bool, device=advantages.device)
        for rows in batch.group_rows():
            kept[rows] = bool((advantages[rows] * batch.mask[rows]).any())
        return kept


@dataclass
class SegmentedRollouts:
    """Writes one segment a step, and hands out groups whose responses have all ended.

    More prompts are under way than a batch trains on, or nothing could end while others go on: ``ahead`` times as many,
    drawn from the data before the first step. A step takes up the batch's own prompts, writes a segment of every
    unfinished response, and gives the oldest whole groups; where these are too few, it writes another segment. So every
    response consists of ``segments`` segments at most, and of as many policies. Nothing of a cache is kept: a segment
    reads what is there again, which costs one forward over it.

    Args:
        segments: K.
        ahead: prompts under way beyond those of a batch, as a multiple of them; 0 waits for all.
        ratio: ``"pois"`` or ``"sais"``.
        seed: draws the prompts that are ahead.
    """

    kind: ClassVar[str] = "rollout"
    segments: int = 8
    ahead: float = 1.0
    ratio: str = "pois"
    seed: int = 0
    pool: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)
    started: bool = field(default=False, init=False, repr=False)
    metrics: dict[str, float] = field(default_factory=dict, init=False)

    def __call__(self, rows: Sequence[Row], writer: Writer) -> Written:
        firsts = list(rows[:: writer.group])
        if not self.started:
            draw = torch.Generator().manual_seed(derive_seed(self.seed, "ahead"))
            more = torch.randint(writer.count, (round(self.ahead * len(firsts)),), generator=draw)
            firsts += [writer.data(index) for index in more.tolist()]
            self.started = True
        for row, prompt in zip(firsts, writer.tokenize(firsts), strict=True):
            new = [{"ids": [], "logps": [], "steps": [], "ended": False} for _ in range(writer.group)]
            self.pool.append({"row": row, "prompt": prompt, "members": new})
        wanted, written = len(rows) // writer.group, 0
        whole: list[dict[str, Any]] = []
        while not written or len(whole) < wanted:
            written += 1
            self._write(writer)
            whole = [group for group in self.pool if all(member["ended"] for member in group["members"])]
        given = whole[:wanted]
        self.pool = [group for group in self.pool if not any(group is other for other in given)]
        members: list[dict[str, Any]] = [member for group in given for member in group["members"]]
        self.metrics = {
            "segments_written": float(written),
            "groups_under_way": float(len(self.pool)),
            "segments_a_response": sum(len(member["steps"]) for member in members) / len(members),
        }
        return Written(
            [dict(group["row"]) for group in given for _ in group["members"]],
            [member["ids"] for member in members],
            [member["logps"] for member in members] if self.ratio == "sais" else None,
        )

    def _write(self, writer: Writer) -> None:
        """One segment of every unfinished response."""
        size = math.ceil(writer.limit / self.segments)
        going = [(group, m) for group in self.pool for m in group["members"] if not m["ended"]]
        if not going:
            return
        news = writer.write([[*group["prompt"], *member["ids"]] for group, member in going], size)
        for (_, member), new in zip(going, news, strict=True):
            new = new[: writer.limit - len(member["ids"])]
            member["ids"] += new
            member["steps"].append([len(new), writer.step])
            member["ended"] = member["ids"][-1] in writer.ends or len(member["ids"]) == writer.limit
        if self.ratio == "sais":
            scores = writer.score([group["prompt"] for group, _ in going], [member["ids"] for _, member in going])
            for (_, member), values in zip(going, scores, strict=True):
                member["logps"] += values[len(member["logps"]) :]

    def state_dict(self) -> dict[str, Any]:
        return {"pool": self.pool, "started": self.started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pool, self.started = state["pool"], state["started"]


@dataclass
class UloRL:
    """UloRL's settings. The paper samples at temperature 0.85.

    Args:
        segments: K; 1 writes whole responses.
        prompts_ahead: prompts under way beyond those of a batch, as a multiple of them.
        ratio: ``"pois"`` or ``"sais"``.
        mastered: tau, the probability from which a token of a correct response is mastered; above 1 masks nothing.
        entropy_target: sigma, in nats; ``inf`` always masks.
        entropy_scope: ``"response"``, or ``"batch"``, the mean over a micro-batch's tokens.
        drop_equal_groups: leave groups without an advantage out of the divisor.

    Raises:
        BadInputError: a value out of range.
    """

    segments: int = 8
    prompts_ahead: float = 1.0
    ratio: str = "pois"
    mastered: float = 0.99
    entropy_target: float = 0.2
    entropy_scope: str = "response"
    drop_equal_groups: bool = True

    def __post_init__(self) -> None:
        check_choices(self, ratio=("pois", "sais"), entropy_scope=("response", "batch"))
        if self.segments < 1:
            raise BadInputError(f"segments must be at least 1; got {self.segments}.")
        if not 0 <= self.prompts_ahead < math.inf:
            raise BadInputError(f"prompts_ahead must not be negative; got {self.prompts_ahead}.")
        if not (self.mastered > 0 and self.entropy_target >= 0):
            raise BadInputError("mastered must be above 0, and entropy_target not negative.")

    def recipe(self) -> Recipe:
        """Rollouts, advantage, selection and mask; a single segment needs no rollouts of its own."""
        pieces: list[Any] = [
            TruncatedIsWrong(),
            MasteredTokenMask(self.mastered, self.entropy_target, self.entropy_scope),
        ]
        if self.segments > 1:
            pieces.append(SegmentedRollouts(self.segments, self.prompts_ahead, self.ratio))
        if self.drop_equal_groups:
            pieces.append(InformativeGroups())
        return Recipe(*pieces)

    def arguments(self) -> dict[str, Any]:
        """Settings of GRPOConfig: a mean over tokens, symmetric bounds, no KL."""
        return {"loss_type": "dapo", "epsilon": 0.2, "beta": 0.0}

"""TEMPO: credit from the prefix tree of a group's responses (arXiv 2509.18314).

Responses to one prompt share prefixes. The mean reward of those that pass a node of their tree is a Monte-Carlo value
``V`` of that prefix, for free. GRPO's advantage gets the change of value that a token makes::

    A_{i,t} = [r_i - mean + td_coef (V(prefix with y_t) - V(prefix before y_t))] / (std + 1e-6)

Where nobody branches the change is 0, and TEMPO is GRPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..core.errors import BadInputError, check_choices
from ..core.tree_html import tree_html
from .base import Recipe, RolloutBatch

EPSILON = 1e-6


def prefix_values(
    ids: torch.Tensor, mask: torch.Tensor, rewards: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The prefix tree of one group: values ``[G, T + 1]`` of every row's prefixes of 0 to T tokens, how many scored
    rows share each ``[G, T + 1]``, and after how many tokens a row is alone ``[G]`` (T where it never is).

    Rows in order of their tokens share least with what stands far from them: only neighbours are compared, and two rows
    share the least that any two neighbours between them do. A prefix longer than its response has no meaning.

    Args:
        ids: ``[G, T]``; padding may be anything.
        mask: ``[G, T]``; a row's tokens come first.
        rewards: ``[G]``; rows with NaN count nowhere.
    """
    rows, length = ids.shape
    ended = torch.where(mask, ids, -1)  # a response that has ended shares no token with one that goes on
    scored = ~rewards.isnan()
    shared = shared_tokens(ended)
    counts = torch.zeros(rows, length + 1, dtype=torch.double, device=ids.device)
    sums = torch.zeros_like(counts)
    counts.scatter_add_(1, shared, scored.double().expand(rows, rows))
    sums.scatter_add_(1, shared, rewards.nan_to_num(0.0).double().expand(rows, rows))
    counts, sums = (table.flip(1).cumsum(1).flip(1) for table in (counts, sums))  # a shared prefix shares all before
    alone = shared.fill_diagonal_(-1).amax(1) + 1
    return sums / counts.clamp(min=1), counts, alone.clamp(max=length)


def shared_tokens(ids: torch.Tensor) -> torch.Tensor:
    """How many first tokens every two rows of ``ids`` ``[G, T]`` have in common, ``[G, G]``; T for equal rows."""
    rows, length = ids.shape
    if not length:
        return torch.zeros(rows, rows, dtype=torch.long, device=ids.device)
    ordered, place = ids.unique(dim=0, return_inverse=True)
    differ = ordered[1:] != ordered[:-1]
    neighbours = differ.to(torch.uint8).argmax(1)  # of rows in order no two are equal
    count = len(ordered)
    after = torch.ones(count, count, dtype=torch.bool, device=ids.device).triu(1)
    table = torch.where(after, torch.nn.functional.pad(neighbours, (1, 0)), length).cummin(1).values
    return torch.minimum(table, table.T)[place][:, place]


def tempo_advantages(
    ids: torch.Tensor,
    mask: torch.Tensor,
    rewards: torch.Tensor,
    groups: torch.Tensor,
    scale: str = "group",
    td_coef: float = 1.0,
    changes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Advantages ``[B, T]``, 0 outside ``mask``, in groups without two scored or two different rewards, and in rows
    whose reward is NaN.

    Args:
        ids, mask: ``[B, T]``.
        rewards, groups: ``[B]``.
        scale: ``"group"`` divides by the sample standard deviation of the group's rewards; ``"none"`` does not.
        td_coef: of the change of value; 0 is GRPO.
        changes: ``[B, T]``, by how much each token changes the value of its prefix; None computes them.
    """
    if changes is None and td_coef:
        changes = torch.zeros(mask.shape, dtype=torch.double, device=mask.device)
        for group in groups.unique():
            rows = (groups == group).nonzero()[:, 0]
            changes[rows] = prefix_values(ids[rows], mask[rows], rewards[rows])[0].diff(dim=1)
    advantages = torch.zeros(mask.shape, dtype=torch.double, device=mask.device)
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        r = rewards[rows].double()
        scored = ~r.isnan()
        count = scored.sum()
        mean = r.nansum() / count.clamp(min=1)
        gaps = (r - mean).nan_to_num(0.0)
        varied = gaps.abs().max() > 1e-9
        spread = (gaps.square().sum() / (count - 1).clamp(min=1)).sqrt() + EPSILON if scale == "group" else 1.0
        found = gaps[:, None].expand(-1, mask.shape[1])
        if changes is not None:
            found = found + td_coef * changes[rows]
        advantages[rows] = found / spread * (scored & varied & (count > 1))[:, None] * mask[rows]
    return advantages.to(rewards.dtype)


@dataclass
class PrefixTreeAdvantage:
    """``tempo_advantages`` as a piece; it logs the share of tokens whose value changes, and after how many tokens a
    response is alone.
    """

    kind: ClassVar[str] = "group_advantage"
    needs: ClassVar[frozenset[str]] = frozenset({"ids"})
    scale: str = "group"
    td_coef: float = 1.0
    metrics: dict[str, float] = field(default_factory=dict, init=False)

    def __call__(self, batch: RolloutBatch) -> torch.Tensor:
        changes, depths = torch.zeros(batch.mask.shape, dtype=torch.double, device=batch.mask.device), []
        for rows in batch.group_rows():
            values, _, alone = prefix_values(batch.ids[rows], batch.mask[rows], batch.rewards[rows])
            changes[rows] = values.diff(dim=1)
            depths.append(alone.double().mean())
        changed = int(((changes.abs() > 1e-9) & batch.mask).sum())
        self.metrics = {
            "tokens_with_td": changed / max(1, int(batch.mask.sum())),
            "depth_alone": torch.stack(depths).mean().item(),
        }
        return tempo_advantages(batch.ids, batch.mask, batch.rewards, batch.groups, self.scale, self.td_coef, changes)

    def picture(self, batch: RolloutBatch, texts: Sequence[Sequence[str]]) -> dict[str, str]:
        """The prefix tree of the first group."""
        rows = next(batch.group_rows())
        ids, mask, rewards = batch.ids[rows], batch.mask[rows], batch.rewards[rows]
        values, counts, _ = prefix_values(ids, mask, rewards)
        values = values.masked_fill(counts == 0, torch.nan)
        drawn = tree_html(
            [line[own].tolist() for line, own in zip(ids, mask, strict=True)],
            [texts[row] for row in rows.tolist()],
            values.tolist(),
            [f"reward {reward:.4g}" for reward in rewards.tolist()],
            "mean reward of the rollouts that go through a stretch",
        )
        return {"The prefix tree of these rollouts": drawn}


@dataclass
class TEMPO:
    """TEMPO's settings.

    Args:
        scale: divide by the ``"group"``'s standard deviation, or by ``"none"``.
        td_coef: strength of the change of value; 0 is GRPO.

    Raises:
        BadInputError: an unknown scale, or a negative coefficient.
    """

    scale: str = "group"
    td_coef: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self, scale=("group", "none"))
        if self.td_coef < 0:
            raise BadInputError(f"td_coef must not be negative; got {self.td_coef}.")

    def recipe(self) -> Recipe:
        """The advantage."""
        return Recipe(PrefixTreeAdvantage(self.scale, self.td_coef))

    def arguments(self) -> dict[str, Any]:
        """Settings of GRPOConfig: DAPO's clip bounds, no KL."""
        return {"epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.0}

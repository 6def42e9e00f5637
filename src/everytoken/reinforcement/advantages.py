"""Advantages of token rewards: GAE with a critic, a group's returns to go without one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..core.credit import discounted_sums


def last_token(mask: torch.Tensor) -> torch.Tensor:
    """1 at every row's last masked position, ``[B, T]`` float."""
    mask = mask.bool()
    after = mask.flip(-1).long().cumsum(-1).flip(-1)  # masked tokens from here on
    return (mask & (after == 1)).float()


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438): ``(advantages, returns)``, ``[B, T]``, 0 outside ``mask``.

    The masked tokens of a row are contiguous; the state behind the last has value 0.
    """
    kept = mask.to(values.dtype)
    values = values * kept
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    errors = (rewards + gamma * following - values) * kept
    advantages = discounted_sums(errors, gamma * lam) * kept
    return advantages, (advantages + values) * kept


def whiten(
    values: torch.Tensor, mask: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda moments: moments
) -> torch.Tensor:
    """Mean 0 and standard deviation 1 over the masked entries, 0 elsewhere.

    Args:
        reduce: sums the moments over processes.
    """
    kept = mask.to(values.dtype)
    moments = torch.stack([kept.sum(), (values * kept).sum(), (values.square() * kept).sum()])
    count, total, squares = reduce(moments)
    mean = total / count.clamp(min=1)
    variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
    return torch.where(mask.bool(), (values - mean) * torch.rsqrt(variance + 1e-8), 0.0)


def group_advantages(
    shaping: torch.Tensor,
    sequence_reward: torch.Tensor,
    mask: torch.Tensor,
    num_generations: int,
    gamma: float = 1.0,
    scale: str | bool = "group",
) -> torch.Tensor:
    """Advantages without a critic, ``[B, T]``: the sequence reward less its group's mean, as in GRPO, plus each token's
    return to go less the group's mean return to go at that token (an answer that has ended has none left).

    Args:
        shaping: ``[B, T]`` token rewards without the sequence reward, 0 outside ``mask``.
        sequence_reward: ``[B]``, as it would stand on the last token.
        num_generations: G; rows are groups of G in order.
        scale: divide by the standard deviation of whole returns (plus 1e-4, as GRPO) within the ``"group"`` (or True),
            or over the whole ``"batch"``; ``"none"`` (or False) divides by nothing.
    """
    kept = mask.to(shaping.dtype)

    def centred(values: torch.Tensor) -> torch.Tensor:
        groups = values.unflatten(0, (-1, num_generations))
        return (groups - groups.mean(1, keepdim=True)).flatten(0, 1)

    to_go = discounted_sums(shaping, gamma) * kept
    advantages = centred(sequence_reward)[:, None] + centred(to_go)
    whole = (sequence_reward + shaping.sum(-1)).view(-1, num_generations)
    if scale in ("group", True) and num_generations > 1:
        advantages = advantages / (whole.std(1) + 1e-4).repeat_interleave(num_generations)[:, None]
    elif scale == "batch" and whole.numel() > 1:
        advantages = advantages / (whole.std() + 1e-4)
    return advantages * kept

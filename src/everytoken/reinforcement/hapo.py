"""HAPO: heterogeneous adaptive policy optimisation (arXiv 2509.16591).

A token's entropy H becomes one signal in [-1, 1], which is 0 at a quantile of the batch::

    z = log H - quantile(log H),   h = z / max z where z > 0,  z / |min z| elsewhere

It sets four things, each a piece of its own (A to D in the paper):

- A, the sampling temperature: ``T (1 + tau h)``, with statistics of the batch before;
- B, the advantage: rewards compared with the mean over the group's *tokens*, ``(r_i - mu_tok) / (sigma_tok + 1e-6)``;
- C, its size: times ``1 + beta h`` where an uncertain token's ratio has left the neutral zone
  ``(1 - eps_low / 2, 1 + eps_high / 2)``, or a certain one's has not;
- D, the clip bounds: ``eps_high (1 + alpha h)`` for uncertain tokens, ``eps_low (1 - alpha h)`` for certain ones.

The authors' code gives certain tokens a positive signal, the opposite of the paper; ``released_sign`` does so too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from transformers import LogitsProcessor

from ..core.errors import BadInputError, check_choices
from .base import Recipe, RolloutBatch, UpdateBatch

FLOOR = 1e-8
FALLBACK = 5.0
"""A group in which a token-level advantage is as large as this gets ordinary advantages."""


class EntropyStatistics(NamedTuple):
    """Of ``log H`` over a batch's tokens.

    Attributes:
        pivot: its quantile.
        top, bottom: the largest and smallest distance to it, above and below; 0 where there is none.
        spread: root of the mean square distance.
    """

    pivot: float | torch.Tensor
    top: float | torch.Tensor
    bottom: float | torch.Tensor
    spread: float | torch.Tensor


def entropy_statistics(entropies: torch.Tensor, mask: torch.Tensor, pivot: float = 0.8) -> EntropyStatistics | None:
    """Statistics over the masked tokens; None where there are none.

    Args:
        pivot: the quantile; the nearest value is taken.
    """
    logs = entropies[mask].float().clamp(min=FLOOR).log()
    if not logs.numel():
        return None
    middle = logs.sort().values[round(pivot * (logs.numel() - 1))]
    gaps = logs - middle
    return EntropyStatistics(middle, gaps.max().clamp(min=0), gaps.min().clamp(max=0), gaps.square().mean().sqrt())


def entropy_signal(
    entropies: torch.Tensor, statistics: EntropyStatistics | None, released_sign: bool = False
) -> torch.Tensor:
    """h, of the shape of ``entropies``, in [-1, 1] for tokens that the statistics were made of.

    Args:
        released_sign: give tokens below the pivot ``|h|``, as the authors' code does.
    """
    if statistics is None:
        return torch.zeros_like(entropies)
    gaps = entropies.float().clamp(min=FLOOR).log() - statistics.pivot
    above, below = (torch.as_tensor(value, device=gaps.device) for value in (statistics.top, statistics.bottom))
    low = gaps / (-below).clamp(min=FLOOR)
    return torch.where(gaps > 0, gaps / above.clamp(min=FLOOR), low.abs() if released_sign else low)


def token_level_advantages(
    rewards: torch.Tensor, mask: torch.Tensor, groups: torch.Tensor, fallback: float = FALLBACK
) -> torch.Tensor:
    """B: ``[B]``. A group of which an advantage reaches ``fallback`` gets ``(r - mean) / (sample std + 1e-6)``."""
    found = torch.zeros_like(rewards, dtype=torch.double)
    for group in groups.unique():
        rows = ((groups == group) & ~rewards.isnan()).nonzero()[:, 0]
        r, lengths = rewards[rows].double(), mask[rows].sum(1).double()
        tokens = lengths.sum()
        if not len(rows) or not tokens or r.max() == r.min():
            continue
        mean = (r * lengths).sum() / tokens
        values = (r - mean) / ((lengths * (r - mean).square()).sum().div(tokens).sqrt() + 1e-6)
        if values[lengths > 0].abs().max() >= fallback:
            values = (r - r.mean()) / (r.std() + 1e-6)
        found[rows] = values
    return found.to(rewards.dtype)


class _Scaled(LogitsProcessor):
    """Divides logits by ``1 + tau h`` of their own entropy; the base temperature follows."""

    def __init__(self, statistics: EntropyStatistics, tau: float, scaled: bool, released_sign: bool):
        self.statistics, self.tau, self.scaled, self.released_sign = statistics, tau, scaled, released_sign

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        logps = torch.log_softmax(scores.float(), -1)
        entropies = -(logps.exp() * logps.masked_fill(logps == -torch.inf, 0)).sum(-1)
        if self.scaled:
            signal = entropy_signal(entropies, self.statistics, self.released_sign).clamp(-1, 1)
        else:
            gaps = entropies.clamp(min=FLOOR).log() - self.statistics.pivot
            signal = gaps / max(float(self.statistics.spread), FLOOR)
        factor = (1 + self.tau * signal).clamp(min=0.05)
        return (scores / factor[:, None].to(scores.dtype)).to(scores.dtype)  # type: ignore[return-value]


class _Same(LogitsProcessor):
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores


@dataclass
class EntropyTemperature:
    """A. The first batch is sampled at the base temperature."""

    kind: ClassVar[str] = "temperature"
    needs: ClassVar[frozenset[str]] = frozenset({"entropies"})
    tau: float = 0.05
    pivot: float = 0.8
    scaled: bool = True
    released_sign: bool = False
    statistics: EntropyStatistics | None = field(default=None, init=False)

    def processor(self) -> LogitsProcessor:
        if self.statistics is None or self.tau == 0:
            return _Same()
        return _Scaled(self.statistics, self.tau, self.scaled, self.released_sign)

    def observe(self, batch: RolloutBatch) -> None:
        assert batch.entropies is not None
        found = entropy_statistics(batch.entropies, batch.mask, self.pivot)
        if found is not None:
            self.statistics = EntropyStatistics(*(float(value) for value in found))

    def state_dict(self) -> dict[str, Any]:
        return {"statistics": None if self.statistics is None else list(self.statistics)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.statistics = None if state["statistics"] is None else EntropyStatistics(*state["statistics"])


@dataclass
class TokenLevelAverage:
    """B."""

    kind: ClassVar[str] = "group_advantage"

    def __call__(self, batch: RolloutBatch) -> torch.Tensor:
        return token_level_advantages(batch.rewards, batch.mask, batch.groups)


@dataclass
class _OfUpdates:
    """What C and D share.

    Args:
        strength: beta or alpha.
        stats: statistics of the ``"micro"``-batch, as in the authors' code, or of the whole ``"batch"`` of rollouts
            (by the policy that wrote them), which are steadier where a micro-batch is a few short responses.
    """

    strength: float = 1.0
    pivot: float = 0.8
    released_sign: bool = False
    stats: str = "micro"
    statistics: EntropyStatistics | None = field(default=None, init=False, repr=False)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"entropies"} if self.stats == "batch" else ())

    def observe(self, batch: RolloutBatch) -> None:
        if batch.entropies is not None:
            self.statistics = entropy_statistics(batch.entropies, batch.mask, self.pivot)

    def signal(self, update: UpdateBatch) -> torch.Tensor:
        """h of an update's tokens; a token beyond the bounds of the batch has that bound."""
        statistics = self.statistics
        if self.stats == "micro":
            statistics = entropy_statistics(update.entropies, update.mask, self.pivot)
        found = entropy_signal(update.entropies, statistics, self.released_sign).clamp(-1, 1)
        return torch.where(update.mask, found, 0.0)


@dataclass
class EntropyRedistribution(_OfUpdates):
    """C."""

    kind: ClassVar[str] = "ratio_weight"

    def __call__(self, update: UpdateBatch, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        signal = self.signal(update)
        still = (update.ratio > 1 - low / 2) & (update.ratio < 1 + high / 2)
        return torch.where((signal > 0) ^ still, 1 + self.strength * signal, 1.0)


@dataclass
class EntropyClip(_OfUpdates):
    """D."""

    kind: ClassVar[str] = "clip"

    def __call__(self, update: UpdateBatch, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        signal = self.signal(update)
        return low * (1 - self.strength * signal.clamp(max=0)), high * (1 + self.strength * signal.clamp(min=0))


@dataclass
class HAPO:
    """HAPO's settings; 0 (or False) leaves a part out.

    Args:
        entropy_pivot: the quantile at which the signal is 0.
        temperature_tau: A; the paper's text has 0.1, its code 0.05.
        token_average: B.
        adv_beta: C, in [0, 1].
        clip_alpha: D, in [0, 1].
        clip_ratio_c: bound of the ratio of tokens with a negative advantage (the dual clip); None for none.
        temperature_scaled: A scales the signal to [-1, 1], as the code does; False takes the plain z-score.
        released_sign: the authors' code's sign for certain tokens, which is the opposite of the paper's.
        stats: statistics of C and D: of the ``"micro"``-batch, as in the authors' code, or of the ``"batch"`` of
            rollouts.

    Raises:
        BadInputError: a value out of range, or unknown stats.
    """

    entropy_pivot: float = 0.8
    temperature_tau: float = 0.05
    token_average: bool = True
    adv_beta: float = 1.0
    clip_alpha: float = 1.0
    clip_ratio_c: float | None = 10.0
    temperature_scaled: bool = True
    released_sign: bool = False
    stats: str = "micro"

    def __post_init__(self) -> None:
        check_choices(self, stats=("micro", "batch"))
        for name in ("entropy_pivot", "temperature_tau", "adv_beta", "clip_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInputError(f"{name} lies in [0, 1]; got {getattr(self, name)}.")
        if self.clip_ratio_c is not None and self.clip_ratio_c <= 1.28:
            raise BadInputError(f"clip_ratio_c must lie above the clip bound of 1.28; got {self.clip_ratio_c}.")

    def recipe(self) -> Recipe:
        """A to D, those that are asked for."""
        pivot, sign = self.entropy_pivot, self.released_sign
        pieces: list[Any] = []
        if self.temperature_tau:
            pieces.append(EntropyTemperature(self.temperature_tau, pivot, self.temperature_scaled, sign))
        if self.token_average:
            pieces.append(TokenLevelAverage())
        if self.adv_beta:
            pieces.append(EntropyRedistribution(self.adv_beta, pivot, sign, self.stats))
        if self.clip_alpha:
            pieces.append(EntropyClip(self.clip_alpha, pivot, sign, self.stats))
        return Recipe(*pieces)

    def arguments(self) -> dict[str, Any]:
        """Settings of GRPOConfig: DAPO's bounds, the dual clip, the mean over a micro-batch's tokens, no KL."""
        return {
            "epsilon": 0.2,
            "epsilon_high": 0.28,
            "delta": self.clip_ratio_c,
            "loss_type": "bnpo",
            "beta": 0.0,
        }

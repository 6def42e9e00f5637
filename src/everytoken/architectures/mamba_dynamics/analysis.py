"""Which layers of a Mamba model let tokens converge, and a parametrisation that rules it out (arXiv 2410.03292).

With the rows of a mixer's ``x_proj`` that make B and C as ``S_B`` and ``S_C`` ``[N, E]``, tokens diverge in a layer if
the symmetric part of ``S_C^T S_B`` has a positive eigenvalue, and converge if it has none. For several dimensions that
is a conjecture of the paper, with simulations. The constraint writes, with P upper triangular with a unit diagonal::

    S_C = P,   S_B = diag(w) P,   w = softplus(v) + 0.7      ("positive")
                                  w = -softplus(v) - 0.7     ("negative", for experiments)
                                  w = +-softplus(v), the second half negative   ("mixed")

so that ``S_C^T S_B = P^T diag(w) P`` has N eigenvalues other than zero, of the signs of w.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ...core.errors import BadInputError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = ("positive", "mixed", "negative")
OFFSET = 0.7


@dataclass(frozen=True)
class LayerDynamics:
    """One layer.

    Attributes:
        name: of its mixer in the model.
        eigenvalues: those of the symmetric part of ``S_C^T S_B`` that can differ from zero, ``[2 N]`` or fewer,
            ascending, in float64.
        regime: ``"divergent"`` or ``"convergent"``.
        positive: the share of positive ones among those that are not zero.
    """

    name: str
    eigenvalues: torch.Tensor
    regime: str
    positive: float


def mixers_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The selective mixers of a model with their names (Mamba, FalconMamba, Jamba, PlainMamba ...).

    Raises:
        UnsupportedModelError: there is none.
    """
    wanted = ("x_proj", "dt_proj", "A_log", "time_step_rank", "ssm_state_size")
    found = [(name, item) for name, item in model.named_modules() if all(hasattr(item, word) for word in wanted)]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no selective state-space layers with an x_proj.",
            "Mamba, FalconMamba and Jamba have; Mamba2 projects otherwise.",
        )
    return iter(found)


def symmetric_eigenvalues(s_b: torch.Tensor, s_c: torch.Tensor) -> torch.Tensor:
    """The eigenvalues of ``(S_C^T S_B + S_B^T S_C) / 2`` that can differ from zero: ``[min(2 N, d)]``, ascending.

    The matrix is ``[d, d]`` of rank ``2 N`` at most, so that one of that size does.

    Args:
        s_b, s_c: ``[N, d]``.
    """
    both = torch.cat([s_c, s_b]).double()
    triangle = torch.linalg.qr(both.T)[1]  # [min(2 N, d), 2 N]
    half = len(s_b)
    c, b = triangle[:, :half], triangle[:, half:]
    found: torch.Tensor = torch.linalg.eigvalsh((c @ b.T + b @ c.T) / 2)
    return found


@torch.no_grad()
def analyze_dynamics(model: PreTrainedModel) -> list[LayerDynamics]:
    """Every layer's eigenvalues and regime, in order.

    FalconMamba and Jamba scale B and C of every token to one length; the signs stay.

    Raises:
        UnsupportedModelError: no selective layers; see ``mixers_of``.
    """
    found = []
    for name, mixer in mixers_of(model):
        weight, rank, n = mixer.x_proj.weight, int(mixer.time_step_rank), int(mixer.ssm_state_size)
        values = symmetric_eigenvalues(weight[rank : rank + n], weight[rank + n : rank + 2 * n])
        small = 1e-6 * float(values.abs().max())  # float32 weights round
        up, down = int((values > small).sum()), int((values < -small).sum())
        regime = "divergent" if up else "convergent"
        found.append(LayerDynamics(name, values, regime, up / max(1, up + down)))
    return found


def constrained_rows(basis: torch.Tensor, rate: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``S_B`` and ``S_C`` of the constraint.

    Args:
        basis: ``[N, E]``; only its part above the diagonal counts.
        rate: v, ``[N]``.
        kind: of ``KINDS``.

    Raises:
        BadInputError: an unknown kind.
    """
    check_kind(kind)
    upper = torch.triu(basis, 1) + torch.eye(*basis.shape, dtype=basis.dtype, device=basis.device)
    w = F.softplus(rate)
    if kind == "mixed":
        half = torch.arange(len(rate), device=rate.device) < (len(rate) + 1) // 2
        w = torch.where(half, w, -w)
    else:
        w = (w + OFFSET) * (1 if kind == "positive" else -1)
    return w[:, None] * upper, upper


def check_kind(kind: str, known: tuple[str, ...] = KINDS) -> None:
    """Raises BadInputError for a constraint that does not exist."""
    if kind not in known:
        raise BadInputError(f"The dynamics are one of {', '.join(known)}; got {kind!r}.")


class ConstrainedRows(nn.Module):
    """The constraint on a whole ``x_proj.weight [R + 2 N, E]``, for ``torch.nn.utils.parametrize``.

    P is read from the rows of B, v from the first column of those of C; the rest of those rows is not used.

    Args:
        kind: of ``KINDS``.
        rank, states: R and N.
    """

    def __init__(self, kind: str, rank: int, states: int):
        super().__init__()
        check_kind(kind)
        self.kind, self.rank, self.states = kind, rank, states

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        basis, rate = weight[self.rank : self.rank + self.states], weight[self.rank + self.states :, 0]
        return torch.cat([weight[: self.rank], *constrained_rows(basis, rate, self.kind)])


def constrain_x_proj(model: PreTrainedModel, kind: str = "positive") -> PreTrainedModel:
    """Constrains every layer of a transformers model in place, to be trained; returns the model.

    The function of the model changes: P has a unit diagonal, and w is larger than usual weights, so warm up the
    learning rate. While the constraint stands, the names of the weights have ``parametrizations`` in them: call
    ``release_x_proj`` before ``save_pretrained``, or train a ``MambaDynamicsForCausalLM``, which keeps its constraint.

    Args:
        kind: of ``KINDS``.

    Raises:
        BadInputError: an unknown kind, more states than channels, or a constraint that stands already.
        UnsupportedModelError: see ``mixers_of``.
    """
    check_kind(kind)
    layers = list(mixers_of(model))
    for name, mixer in layers:
        if parametrize.is_parametrized(mixer.x_proj, "weight"):
            raise BadInputError(f"{name}.x_proj is constrained already.", "Call release_x_proj(model) first.")
        check_states(int(mixer.ssm_state_size), mixer.x_proj.in_features)
    for _, mixer in layers:
        rows = ConstrainedRows(kind, int(mixer.time_step_rank), int(mixer.ssm_state_size))
        parametrize.register_parametrization(mixer.x_proj, "weight", rows)
    return model


def release_x_proj(model: PreTrainedModel) -> PreTrainedModel:
    """Takes the constraint off in place and keeps the weights that it made; the model computes what it did before.

    Raises:
        BadInputError: no layer is constrained.
    """
    found = [mixer for _, mixer in mixers_of(model) if parametrize.is_parametrized(mixer.x_proj, "weight")]
    if not found:
        raise BadInputError("No layer of this model is constrained.")
    for mixer in found:
        parametrize.remove_parametrizations(mixer.x_proj, "weight")
    return model


def check_states(states: int, channels: int) -> None:
    """Raises BadInputError unless P ``[states, channels]`` can have a unit diagonal."""
    if states > channels:
        raise BadInputError(f"The constraint needs as many channels as states; got {channels} and {states}.")

"""Tokens of a deep Mamba as points that move with depth (arXiv 2410.03292).

One layer without convolution, gate and skip term, on tokens x_l::

    y_l = sum_(j<=l) (C_l . B_j) D_j exp(-a sum_(k=j+1..l) D_k) x_j,     B = S_B x, C = S_C x, D = softplus(S_D x)

In the limit of many layers, each adding ``y / T``, the tokens follow ``dx_l/dt = y_l``. In one dimension, with
``mu = S_C S_B`` and ``s = S_D``, that is ``d ln|x_l| / dt = mu h_l`` with ``h_l >= 0``::

    h_l = sum_(j<=l) x_j^2 softplus(s x_j) exp(-a sum_(k=j+1..l) softplus(s x_k))

So the sign of mu decides alone: all tokens shrink, or all grow. Where they grow, they do so slowly (like a power of
ln t) if ``s x_1 < 0``, and without bound in finite time if ``s x_1 > 0``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ...core.errors import BadInputError

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
REGIMES = ("convergent", "constant", "slow divergence", "fast divergence")
# Dormand and Prince's steps: where the slope is taken, and how the slopes are weighted
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_AT = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def softplus(x: Array) -> Array:
    """``ln(1 + exp x)``, without overflow."""
    return np.logaddexp(0.0, x)


def layer(x: Array, s_b: Array, s_c: Array, s_d: Array, a: float) -> Array:
    """One layer in closed form.

    Args:
        x: tokens ``[L, d]``.
        s_b, s_c: ``[N, d]``.
        s_d: ``[d, d]`` (a step for every channel).
        a: the decay, positive.

    Returns:
        ``y [L, d]``.
    """
    steps = softplus(x @ s_d.T)
    after = np.cumsum(steps, 0)
    seen = np.tril(np.ones((len(x), len(x))))
    faded = np.exp(-a * np.where(seen[:, :, None] > 0, after[:, None] - after[None], np.inf))  # [l, j, d]
    alike = (x @ s_c.T) @ (x @ s_b.T).T
    return np.einsum("lj,ljd,jd->ld", alike, faded, steps * x)


def growth(x: Array, s: float | Array, a: float | Array) -> Array:
    """``h`` of one-dimensional systems ``x [..., L]``; mu h is the rate at which ln|x| changes."""
    s, a = (np.asarray(item, float)[..., None] for item in (s, a))
    steps = softplus(s * x)
    after = np.cumsum(steps, -1)
    apart = after[..., :, None] - after[..., None, :]
    seen = np.tril(np.ones(apart.shape[-2:], bool))
    faded = np.exp(-np.where(seen, a[..., None] * apart, np.inf))
    return np.einsum("...lj,...j->...l", faded, x**2 * steps)


def regime(mu: float, s: float, first: float) -> str:
    """What the sign rule says, of ``REGIMES``.

    Args:
        mu: ``S_C S_B``.
        s: ``S_D``.
        first: the first token, not zero.
    """
    if mu == 0:
        return "constant"
    if mu < 0:
        return "convergent"
    return "fast divergence" if s * first > 0 else "slow divergence"


def blow_up_time(mu: float, s: float, first: float, points: int = 400) -> float:
    """When the first token alone becomes infinite; ``inf`` where it does not in finite time.

    Another token may do so before it.

    Args:
        mu, s, first: as for ``regime``.
        points: of the quadrature.

    Raises:
        BadInputError: a first token of zero, which never moves.
    """
    if first == 0:
        raise BadInputError("A token of zero never moves.", "Give another first token.")
    if regime(mu, s, first) != "fast divergence":
        return float("inf")
    x, slope = abs(first), abs(s)
    nodes, weights = np.polynomial.legendre.leggauss(points)
    v = (nodes + 1) / 2  # the token is x / v
    return float(np.sum(weights / 2 * v / (mu * x**2 * softplus(slope * x / v))))


def convergence_constants(mu: float, a: float) -> tuple[float, float]:
    """Where ``sqrt(t) |x_l|`` tends to for mu < 0: of the first token, and of every later one.

    Near zero every step is ln 2, so that the first token obeys ``dx/dt = mu ln2 x^3``. In the limit
    ``|mu| h_l t = 1/2`` for every token, and h of two tokens in a row differ by the factor 2^-a and the token itself.

    Raises:
        BadInputError: mu is not negative, or a not positive.
    """
    if mu >= 0 or a <= 0:
        raise BadInputError(f"Tokens converge for mu below 0 and a above 0; got {mu} and {a}.")
    first = float((2 * -mu * np.log(2)) ** -0.5)
    return first, first * float(np.sqrt(1 - 2.0**-a))


@dataclass(frozen=True)
class Trajectory:
    """Where tokens went.

    Attributes:
        tokens: ``[S, L]`` at the last time of each system.
        time: ``[S]``, the time asked for, or that at which a token passed the limit.
        passed: ``[S]``, which token passed the limit first (from 0); -1 for none.
    """

    tokens: Array
    time: Array
    passed: np.ndarray[Any, np.dtype[np.int64]]


def simulate(
    start: Array,
    mu: float | Array,
    s: float | Array,
    a: float | Array,
    time: float,
    limit: float = 1e3,
    tolerance: float = 1e-9,
    most: int = 100_000,
) -> Trajectory:
    """Follows one-dimensional systems, all at once, each with steps of its own.

    The equation is solved for ln|x| over ``ln(1 + t)``: both regimes are smooth there.

    Args:
        start: tokens ``[S, L]`` or ``[L]``, none zero.
        mu, s, a: of every system, or one for all.
        time: where to stop.
        limit: a system stops where a token's size passes it.
        tolerance: error of ln|x| a step.
        most: steps that may be tried.

    Raises:
        BadInputError: a token of zero or beyond the limit, or a time, limit or decay that is not positive.
    """
    x = np.atleast_2d(np.asarray(start, float))
    if not np.isfinite(x).all() or (x == 0).any() or (np.abs(x) >= limit).any():
        raise BadInputError(f"Tokens are not zero and smaller than the limit of {limit:g}.")
    count = len(x)

    def of_each(item: float | Array) -> Array:
        return np.broadcast_to(np.asarray(item, float), (count,))

    rate, bend, fade = of_each(mu), of_each(s), of_each(a)
    if time <= 0 or limit <= 0 or (fade <= 0).any():
        raise BadInputError("time, limit and a are positive.")
    sign, y, end = np.sign(x), np.log(np.abs(x)), float(np.log1p(time))

    def slope(at: Array, y: Array, rows: Any) -> Array:
        size = np.exp(np.minimum(y, np.log(limit) + 1))  # a stage may look far beyond the limit
        h = growth(sign[rows] * size, bend[rows], fade[rows])
        moved: Array = (np.exp(at) * rate[rows])[:, None] * h
        return moved

    at, step = np.zeros(count), np.full(count, 1e-3)
    stopped, passed = np.zeros(count, bool), np.full(count, -1)
    for _ in range(most):
        rows = np.flatnonzero(~stopped)
        if not len(rows):
            break
        now, here, size = at[rows], y[rows], np.minimum(step[rows], end - at[rows])
        slopes: list[Array] = []
        for part, weights in zip(_AT, _STAGES, strict=True):
            moved = here + size[:, None] * sum((w * k for w, k in zip(weights, slopes, strict=True)), np.zeros(()))
            slopes.append(slope(now + part * size, moved, rows))
        error = np.abs(size[:, None] * sum(w * k for w, k in zip(_ERROR, slopes, strict=True))).max(1)
        good = error <= tolerance
        beyond = moved.max(1) > np.log(limit)
        last = good & beyond
        if last.any():  # the moment of passing, on the cubic through both ends of the step
            share, token = _passing(here[last], moved[last], slopes[0][last], slopes[-1][last], size[last], limit)
            at[rows[last]], passed[rows[last]] = now[last] + share * size[last], token
            y[rows[last]] = np.minimum(moved[last], np.log(limit))
        go = good & ~beyond
        at[rows[go]], y[rows[go]] = now[go] + size[go], moved[go]
        stopped[rows] = last | (go & (at[rows] >= end - 1e-12))
        step[rows] = size * np.clip(0.9 * (tolerance / np.maximum(error, 1e-300)) ** 0.2, 0.2, 5.0)
    return Trajectory(sign * np.exp(y), np.expm1(at), passed)


def _passing(
    before: Array, after: Array, slope: Array, slope_after: Array, size: Array, limit: float
) -> tuple[Array, Any]:
    """The share of a step ``[S]`` at which the first token passes the limit, and which token it is."""
    low, high, h = np.zeros(len(before)), np.ones(len(before)), size[:, None]

    def place(part: Array) -> Array:
        p = part[:, None]
        q = 1 - p
        ends = q**2 * (1 + 2 * p) * before + p**2 * (3 - 2 * p) * after
        return ends + h * p * q * (q * slope - p * slope_after)

    for _ in range(50):
        middle = (low + high) / 2
        beyond = place(middle).max(1) > np.log(limit)
        low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
    return high, place(high).argmax(1)


@dataclass(frozen=True)
class PhaseDiagram:
    """What systems of four tokens did over a grid of mu and the first token.

    Attributes:
        mu, first: the axes.
        found: ``[mu, first]``, of ``REGIMES``.
        said: the sign rule's word, of the same shape.
    """

    mu: Array
    first: Array
    found: np.ndarray[Any, np.dtype[np.str_]]
    said: np.ndarray[Any, np.dtype[np.str_]]

    @property
    def agreement(self) -> float:
        """Share of the systems for which the rule is right."""
        return float((self.found == self.said).mean())


def phase_diagram(points: int = 12, s: float = 1.0, a: float = 0.5, time: float = 1e4, seed: int = 0) -> PhaseDiagram:
    """Follows random systems over mu and s x_1 from -2 to 2, and names what they did.

    The later tokens have the first one's sign. A system converged if all its tokens shrank; it diverged fast if a token
    passed 1000 before ``time``, and slowly if all grew without that.

    Args:
        points: a side of the diagram, even, so that no axis is met.
        s, a: as in ``simulate``.
        time: how long; slow systems grow like powers of its logarithm.
        seed: of the later tokens.
    """
    if points < 2 or points % 2:
        raise BadInputError(f"points is an even number of 2 or more; got {points}.")
    axis = (np.arange(points) + 0.5) / points * 4 - 2
    mu, first = (item.reshape(-1) for item in np.meshgrid(axis, axis, indexing="ij"))
    later = np.random.default_rng(seed).uniform(0.2, 1.0, (len(mu), 2)) * np.sign(first)[:, None]
    start = np.concatenate([first[:, None], later], 1)
    end = simulate(start, mu, s, a, time)
    shrank, grew = (np.abs(end.tokens) < np.abs(start)).all(1), (np.abs(end.tokens) > np.abs(start)).any(1)
    # what shrinks fast is found by its size, and what grows fast by the moment at which it passes the limit
    words = np.where(shrank, "convergent", np.where(grew, "slow divergence", "constant"))
    soon = (end.passed >= 0) & (end.time < 0.9 * time)
    words = np.where(soon, "fast divergence", words)
    said = np.array([regime(m, s, x) for m, x in zip(mu, first, strict=True)])
    shape = (points, points)
    return PhaseDiagram(axis, axis, words.reshape(shape), said.reshape(shape))

"""Conformance checks for preference losses, ours and yours: that a loss keeps the contract of
``everytoken.preference.base``.

Use them from a test of your own::

    import pytest

    from everytoken.testing.preference_loss import CHECKS

    from mymethods.margin_dpo import MarginDPOLoss


    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    @pytest.mark.parametrize("loss", [MarginDPOLoss(), MarginDPOLoss(margin=0.0)], ids=str)
    def test_margin_dpo_keeps_the_contract(check, loss):
        check(loss)

or all at once with ``check_preference_loss(loss)``. Every check raises AssertionError with a sentence on what is wrong.
Scores come from random logits over a small vocabulary, and data columns from ``data_column_value``, between 0 and 1.

A loss whose value at the start is not log 2 (where policy and reference agree, any loss of the form
``-log sigmoid(beta z)`` has that value) says so by a class attribute or property ``loss_at_start``: another number, or
None for a value that depends on the data.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..core.logprobs import STATISTICS
from ..core.settings import parse_settings, settable
from ..preference.base import PairScores, PreferenceLoss, PreferenceOutput, declared, trace_columns
from ..training.column_makers import ColumnMaker
from ..training.config import TrainConfig, derive_config

PAIRS, LENGTH, VOCABULARY = 4, 7, 5
SIDES = ("chosen", "rejected")


@dataclass
class PairProblem:
    """Random pairs.

    Attributes:
        policy, reference: logits ``[2, B, T, V]``, chosen and then rejected; the policy's with gradient.
        labels: ``[2, B, T]``.
        mask: ``[2, B, T]`` bool, True on response tokens; every response has one at least.
        columns: data columns by name, ``[2, B, T]``, 0 outside the mask.
    """

    policy: torch.Tensor
    reference: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    columns: dict[str, torch.Tensor]


def data_column_value(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Values for a data column, uniform in [0, 1)."""
    return torch.rand(shape, generator=generator)


def pair_problem(loss: PreferenceLoss, seed: int = 0, same: bool = False) -> PairProblem:
    """A problem with the loss's data columns; ``same`` makes the policy the reference."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, PAIRS, LENGTH)
    policy = torch.randn(*shape, VOCABULARY, generator=generator)
    reference = policy.clone() if same else torch.randn(policy.shape, generator=generator)
    labels = torch.randint(0, VOCABULARY, shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[..., 1] = True
    columns = {name: data_column_value(shape, generator) * mask for name in sorted(declared(loss).data_columns)}
    return PairProblem(policy.requires_grad_(True), reference, labels, mask, columns)


def statistics(problem: PairProblem) -> dict[str, torch.Tensor]:
    """The log-probabilities and every statistic by the plain formulas over the vocabulary, each ``[2, B, T]``, not
    masked.
    """
    logp, ref = (torch.log_softmax(logits, -1) for logits in (problem.policy, problem.reference))
    pick = problem.labels[..., None]
    return {
        "logps": logp.gather(-1, pick)[..., 0],
        "ref_logps": ref.gather(-1, pick)[..., 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "forward_kl": (ref.exp() * (ref - logp)).sum(-1),
        "reverse_kl": (logp.exp() * (logp - ref)).sum(-1),
    }


def scores(loss: PreferenceLoss, problem: PairProblem, outside: float = 0.0) -> tuple[PairScores, PairScores]:
    """What the trainer would hand to the loss: ``(policy, reference)``; ``outside`` stands on the places that no
    response has.
    """
    inputs, found, mask = declared(loss), statistics(problem), problem.mask

    def sides(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, rejected = torch.where(mask, values, outside)
        return chosen, rejected

    values = {name: found[name] for name in inputs.needs} | problem.columns
    extra = {name: sides(value) for name, value in values.items()}
    chosen, rejected = ({name: pair[side] for name, pair in extra.items()} for side in range(2))
    policy = PairScores(*sides(found["logps"]), mask[0], mask[1], chosen, rejected)
    return policy, PairScores(*sides(found["ref_logps"]), mask[0], mask[1])


def evaluate(loss: PreferenceLoss, problem: PairProblem, outside: float = 0.0) -> tuple[PreferenceOutput, torch.Tensor]:
    """The output, and the gradient of the mean loss in the policy's logits."""
    output = loss(*scores(loss, problem, outside))
    (gradient,) = torch.autograd.grad(output.losses.mean(), problem.policy)
    return output, gradient


def _close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance)


# -- checks
# --------------------------------------------------------------------------------------------------------------
def check_value_and_gradient(loss: PreferenceLoss) -> None:
    """One finite loss and two finite rewards a pair, and a finite gradient that is not zero."""
    for seed in range(3):
        output, gradient = evaluate(loss, pair_problem(loss, seed))
        for name in ("losses", "chosen_rewards", "rejected_rewards"):
            values = getattr(output, name)
            assert values.shape == (PAIRS,), f"{name} has the shape {tuple(values.shape)}; one value a pair is wanted."
            assert values.isfinite().all(), f"{name} holds a value that is not finite."
        assert gradient.isfinite().all(), "The gradient holds a value that is not finite."
        assert gradient.abs().max() > 0, "No gradient reaches the policy."


def check_empty_response(loss: PreferenceLoss) -> None:
    """A response without tokens (cut by ``max_length``) gives a finite loss and gradient."""
    problem = pair_problem(loss)
    problem.mask[1, 0] = False
    problem.columns = {name: values * problem.mask for name, values in problem.columns.items()}
    output, gradient = evaluate(loss, problem)
    assert output.losses.isfinite().all(), "The loss of a pair with an empty response is not finite."
    assert gradient.isfinite().all(), "An empty response makes the gradient not finite."


def check_masked_positions(loss: PreferenceLoss) -> None:
    """What stands outside the responses has no influence, neither on values nor on the gradient."""
    problem = pair_problem(loss)
    (plain, gradient), (filled, other) = evaluate(loss, problem), evaluate(loss, problem, outside=31.0)
    assert _close(plain.losses, filled.losses), "Places outside the masks change the loss."
    for name in ("chosen_rewards", "rejected_rewards"):
        assert _close(getattr(plain, name), getattr(filled, name)), f"Places outside the masks change {name}."
    for name, value in plain.metrics.items():
        assert _close(value, filled.metrics[name]), f"Places outside the masks change the metric {name}."
    assert _close(gradient, other), "Places outside the masks change the gradient."
    assert not gradient[~problem.mask].any(), "A gradient reaches places outside the masks."


def check_padding(loss: PreferenceLoss) -> None:
    """Longer padding changes nothing."""
    problem = pair_problem(loss)
    more, pad = torch.ones(2, PAIRS, 3, VOCABULARY), torch.nn.functional.pad
    longer = PairProblem(
        torch.cat([problem.policy.detach(), more], 2).requires_grad_(True),
        torch.cat([problem.reference, more], 2),
        pad(problem.labels, (0, 3)),
        pad(problem.mask, (0, 3)),
        {name: pad(values, (0, 3)) for name, values in problem.columns.items()},
    )
    (one, gradient), (other, padded) = evaluate(loss, problem), evaluate(loss, longer)
    assert _close(one.losses, other.losses), "Padding changes the loss."
    assert _close(gradient, padded[:, :, :LENGTH]), "Padding changes the gradient."


def check_batch_size(loss: PreferenceLoss) -> None:
    """A pair's loss and rewards do not depend on the other pairs of its batch."""
    problem = pair_problem(loss)
    whole = loss(*scores(loss, problem))
    for index in range(PAIRS):
        rows = slice(index, index + 1)
        alone = PairProblem(
            problem.policy[:, rows], problem.reference[:, rows], problem.labels[:, rows], problem.mask[:, rows],
            {name: values[:, rows] for name, values in problem.columns.items()},
        )  # fmt: skip
        one = loss(*scores(loss, alone))
        for name in ("losses", "chosen_rewards", "rejected_rewards"):
            same = _close(getattr(one, name), getattr(whole, name)[rows])
            assert same, f"{name} of a pair depend on the pairs beside it."


def check_conventions(loss: PreferenceLoss) -> None:
    """The policy comes first: a likelier chosen response lowers the loss, a likelier rejected one raises it; the
    reference pulls the other way, or not at all. Statistics and columns are held fixed.
    """
    for seed in range(3):
        policy, reference = scores(loss, pair_problem(loss, seed))
        leaves = [
            values.detach().requires_grad_(True)
            for model in (policy, reference)
            for values in (model.chosen_logps, model.rejected_logps)
        ]
        policy = dataclasses.replace(policy, chosen_logps=leaves[0], rejected_logps=leaves[1])
        reference = dataclasses.replace(reference, chosen_logps=leaves[2], rejected_logps=leaves[3])
        total = loss(policy, reference).losses.sum()
        found = torch.autograd.grad(total, leaves, allow_unused=True)
        pulls = [0.0 if gradient is None else gradient.sum().item() for gradient in found]
        assert pulls[0] < 0 < pulls[1], "A likelier chosen (or less likely rejected) response must lower the loss."
        assert pulls[2] >= 0 >= pulls[3], "The reference pulls in the policy's direction: are the two swapped?"


def check_detached(loss: PreferenceLoss) -> None:
    """Rewards and metrics carry no gradient, and data columns get none: they are constants."""
    problem = pair_problem(loss)
    problem.columns = {name: values.clone().requires_grad_(True) for name, values in problem.columns.items()}
    output = loss(*scores(loss, problem))
    logged = {"chosen_rewards": output.chosen_rewards, "rejected_rewards": output.rejected_rewards} | output.metrics
    for name, value in logged.items():
        assert not value.requires_grad, f"{name} carries a gradient: detach it."
    for name, value in output.metrics.items():
        assert value.numel() == 1, f"The metric {name} is no single number."
    for name, values in problem.columns.items():
        (gradient,) = torch.autograd.grad(output.losses.sum(), values, allow_unused=True, retain_graph=True)
        assert gradient is None or not gradient.any(), f"A gradient reaches the data column {name}: detach it."


def check_start(loss: PreferenceLoss) -> None:
    """Where policy and reference agree the loss is log 2, or what ``loss_at_start`` says."""
    expected = getattr(loss, "loss_at_start", math.log(2))
    if expected is None:
        return
    losses = loss(*scores(loss, pair_problem(loss, same=True))).losses
    assert _close(losses, torch.full_like(losses, expected)), (
        f"Policy and reference agree, and the losses are {losses.tolist()}, not {expected:.4f}. "
        "A loss of another family says so: loss_at_start."
    )


def check_dtypes(loss: PreferenceLoss) -> None:
    """Scores in half precision are summed in float32 at least."""
    policy, reference = scores(loss, pair_problem(loss))
    expected = loss(policy, reference).losses

    def cast(model: PairScores, dtype: torch.dtype) -> PairScores:
        logps = (model.chosen_logps.to(dtype), model.rejected_logps.to(dtype))
        extra = [{name: values.to(dtype) for name, values in side.items()} for side in (model.chosen, model.rejected)]
        return PairScores(*logps, model.chosen_mask, model.rejected_mask, *extra)

    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-5)):
        losses = loss(cast(policy, dtype), cast(reference, dtype)).losses
        assert losses.dtype in (torch.float32, torch.float64), f"Scores in {dtype} give losses in {losses.dtype}."
        assert _close(losses, expected, tolerance), f"Scores in {dtype} give other losses: {losses.tolist()}."


class _Watched(dict[str, torch.Tensor]):
    """A dictionary that remembers which names were read."""

    def __init__(self, values: dict[str, torch.Tensor], read: set[str]):
        super().__init__(values)
        self.read = read

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


def check_declared_inputs(loss: PreferenceLoss) -> None:
    """The loss reads the statistics and data columns that it declares, all of them and no others, and takes them from
    the policy.
    """
    problem, inputs = pair_problem(loss), declared(loss)
    offered = statistics(problem) | {name: problem.columns[name] for name in problem.columns}
    read: set[str] = set()
    sides = [
        _Watched({name: values[side] * problem.mask[side] for name, values in offered.items()}, read)
        for side in range(2)
    ]
    policy, reference = scores(loss, problem)
    asked: set[str] = set()
    nothing = [_Watched({}, asked) for _ in SIDES]
    try:
        loss(
            dataclasses.replace(policy, chosen=sides[0], rejected=sides[1]),
            dataclasses.replace(reference, chosen=nothing[0], rejected=nothing[1]),
        )
    except KeyError as error:
        raise AssertionError(f"The loss reads {error}, which nobody computes for it: declare it.") from error
    assert not asked, f"The loss reads {sorted(asked)} from the reference's scores; they stand in the policy's."
    wanted = inputs.needs | set(inputs.data_columns)
    assert read >= wanted, f"The loss declares {sorted(wanted - read)} and does not read it."
    unsaid = sorted(read - wanted)
    kind = "needs" if set(unsaid) <= set(STATISTICS) else "data_columns"
    assert not unsaid, f"The loss reads {unsaid} and does not declare it: add it to {kind}."


def check_trace_columns(loss: PreferenceLoss) -> None:
    """What traces show is a constant, finite value for every response token, of both sides."""
    problem = pair_problem(loss)
    for name, both in trace_columns(loss, *scores(loss, problem)).items():
        assert len(both) == 2, f"trace_columns: {name} must be a pair (chosen, rejected)."
        for side, values in enumerate(both):
            shape = tuple(values.shape)
            assert shape == (PAIRS, LENGTH), f"trace_columns: {name} of the {SIDES[side]} side has the shape {shape}."
            assert values[problem.mask[side]].isfinite().all(), f"trace_columns: {name} is not finite everywhere."
            assert not values.requires_grad, f"trace_columns: {name} carries a gradient; detach it."


def check_settings(loss: PreferenceLoss) -> None:
    """The loss is a dataclass; its settings survive being written as ``key=value``, and a training can take them over,
    with its makers'.
    """
    kind = type(loss)
    assert dataclasses.is_dataclass(kind), "A loss is a dataclass of its settings."
    names = settable(kind)
    pairs = [f"{name}={getattr(loss, name)}" for name in names]
    again = kind(**parse_settings(kind.__name__, kind, pairs))
    for name in names:
        before, after = getattr(loss, name), getattr(again, name)
        assert before == after, f"The setting {name} is {before!r}, and {after!r} after being written and read."
    makers = [maker for maker in declared(loss).data_columns.values() if maker is not None]
    for maker in makers:
        assert inspect.isclass(maker), f"data_columns names the class of a maker, not {maker!r}."
        assert dataclasses.is_dataclass(maker), f"{maker.__name__} is no dataclass, so its settings are unknown."
        assert isinstance(maker(), ColumnMaker), f"{maker.__name__} cannot be called with ColumnSources."
    config = derive_config(f"{kind.__name__}Training", TrainConfig, kind, *dict.fromkeys(makers))
    carried = config(**{name: getattr(loss, name) for name in names}).part(kind)
    assert all(getattr(carried, name) == getattr(loss, name) for name in names), "A training loses settings."


CHECKS: tuple[Callable[[PreferenceLoss], None], ...] = (
    check_value_and_gradient,
    check_empty_response,
    check_masked_positions,
    check_padding,
    check_batch_size,
    check_conventions,
    check_detached,
    check_start,
    check_dtypes,
    check_declared_inputs,
    check_trace_columns,
    check_settings,
)


def check_preference_loss(loss: PreferenceLoss) -> None:
    """All of ``CHECKS``.

    Raises:
        AssertionError: the first that fails; it says what is wrong.
    """
    for check in CHECKS:
        check(loss)

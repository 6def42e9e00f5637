"""The laws of a ``Reducer`` (``everytoken.reduction.base``).

Inherit the battery and give reducers::

    class TestMyReducer(ReducerConformance):
        def reducers(self):
            return {"half": MyReducer(keep=0.5)}

What a reducer needs besides the features is random and comes from ``context``; override it for other sizes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ..core.errors import BadInputError
from ..reduction.base import Declaration, Reducer, Reduction, ReductionContext

ROWS, COLUMNS, WIDTH = 8, 8, 8


class ReducerConformance:
    """What every reducer of features promises."""

    def reducers(self) -> dict[str, Reducer]:
        """Reducers by name."""
        raise NotImplementedError("Say which reducers to test.")

    def features(self, count: int = ROWS * COLUMNS, seed: int = 0) -> torch.Tensor:
        """``[count, d]`` random features."""
        return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))

    def context(self, count: int = ROWS * COLUMNS, seed: int = 1) -> ReductionContext:
        """All that a context can hold, for ``count`` features."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        return ReductionContext(
            grid=(ROWS, COLUMNS) if count == ROWS * COLUMNS else (1, count),
            levels=(draw(count, WIDTH), draw(count, WIDTH)),
            text=draw(5, WIDTH),
            cls_queries=(draw(2, 4), draw(2, 4)),
            keys=(draw(2, count, 4), draw(2, count, 4)),
            attention=draw(count).softmax(0),
            generator=generator,
        )

    def results(self) -> Iterator[tuple[str, Reducer, torch.Tensor, Reduction]]:
        """``(name, reducer, features, reduction)`` of every reducer."""
        for name, reducer in self.reducers().items():
            features = self.features()
            yield name, reducer, features, reducer.reduce(features, self.context())

    def test_it_says_what_it_is(self) -> None:
        for name, reducer in self.reducers().items():
            assert isinstance(reducer.declares, Declaration), name
            assert reducer.declares.where and reducer.declares.criterion and reducer.declares.budget, name

    def test_what_comes_out_is_fewer_and_in_order(self) -> None:
        for name, _, features, reduction in self.results():
            count = len(reduction.features)
            assert 1 <= count <= len(features) == reduction.total, name
            anchors = reduction.anchors
            assert anchors.dtype == torch.long and len(anchors) == count, name
            assert bool((anchors[1:] > anchors[:-1]).all()), f"{name}: anchors are ascending and distinct"
            assert 0 <= int(anchors.min()) <= int(anchors.max()) < len(features), name

    def test_features_are_what_kept_or_assignment_says(self) -> None:
        for name, _, features, reduction in self.results():
            assert (reduction.kept is None) != (reduction.assignment is None), f"{name}: one of both"
            if reduction.kept is not None:
                assert torch.equal(reduction.features, features[reduction.kept]), name
                assert bool((reduction.sizes == 1).all()), name
            else:
                assert reduction.assignment is not None
                assert reduction.assignment.shape == (len(reduction.features), len(features)), name
                torch.testing.assert_close(reduction.assignment.sum(-1), torch.ones(len(reduction.features)))
                assert bool((reduction.assignment >= 0).all()), name
                torch.testing.assert_close(reduction.features, reduction.assignment @ features)
            assert len(reduction.sizes) == len(reduction.features), name
            assert reduction.scores is None or reduction.scores.shape == (len(features),), name

    def test_groups_agree_with_what_is_kept(self) -> None:
        for name, _, features, reduction in self.results():
            groups = reduction.groups()
            assert groups.shape == (len(features),), name
            assert set(groups[groups >= 0].tolist()) == set(range(len(reduction.features))), name

    def test_it_is_a_function_of_its_input(self) -> None:
        for name, reducer in self.reducers().items():
            features, context = self.features(), self.context()
            before = features.clone()
            once = reducer.reduce(features, context)
            again = reducer.reduce(self.features(), self.context())
            assert torch.equal(features, before), f"{name} changes its input"
            assert torch.equal(once.features, again.features), f"{name} is not repeatable"

    def test_precision_stays(self) -> None:
        for name, reducer in self.reducers().items():
            half = self.features().bfloat16()
            assert reducer.reduce(half, self.context()).features.dtype == torch.bfloat16, name

    def test_one_token_comes_back(self) -> None:
        for name, reducer in self.reducers().items():
            if "grid" in reducer.declares.needs:  # it may need more than one cell
                continue
            features = self.features(1)
            assert torch.equal(reducer.reduce(features, self.context(1)).features, features), name

    def test_gradients_reach_what_is_left(self) -> None:
        for name, reducer in self.reducers().items():
            features = self.features().requires_grad_()
            reduction = reducer.reduce(features, self.context())
            (gradient,) = torch.autograd.grad(reduction.features.sum(), features)
            touched = gradient.abs().sum(-1) > 0
            assert torch.equal(touched, reduction.groups() >= 0) or reduction.assignment is not None, name
            assert bool(touched.any()), name

    def test_bad_features_are_refused(self) -> None:
        for name, reducer in self.reducers().items():
            broken = self.features()
            broken[2, 3] = torch.nan
            for bad in (broken, torch.zeros(0, WIDTH), torch.ones(WIDTH), torch.ones(3, WIDTH, dtype=torch.long)):
                with pytest.raises(BadInputError):
                    reducer.reduce(bad, self.context(max(1, len(bad))))
                    raise AssertionError(f"{name} takes {tuple(bad.shape)}, {bad.dtype}")

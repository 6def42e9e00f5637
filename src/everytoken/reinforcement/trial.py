"""Trials of methods that learn from rewards: each brings its own, beside its own baseline."""

from __future__ import annotations

from ..core.errors import BadInputError, require
from ..decoding.trial import TrialRequest, TrialResult


def trial(request: TrialRequest) -> TrialResult:
    """What a few batches of rollouts do.

    Raises:
        BadInputError: methods without a common baseline, or without a trial.
        MissingExtraError: TRL is not installed.
    """
    require("trl", "train", "Trying a method that learns from rewards")
    from ..training.trial import own_trial

    own = own_trial(request)
    if own is None:
        raise BadInputError(f"{request.trials[0].name} cannot be tried in a few steps.", "Train it: everytoken train.")
    return own(request)

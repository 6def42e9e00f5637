"""What ``try`` and ``compare`` run for this station: a method's own trial, or the trial of the contract that it keeps.

A method that needs more than its contract's trial names one in a class attribute ``own_trial``, as ``"module:function"``. Every other
method is run by what it is: each contract of ``base`` has one module in ``trials``.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..core.errors import BadInputError
from ..decoding.trial import TrialRequest, TrialResult
from .base import ByteMethod, Retokenizer, Transplanter

CONTRACTS: dict[type, str] = {
    ByteMethod: "everytoken.tokenization.trials.byte_model:trial",
    Transplanter: "everytoken.tokenization.trials.transplant:trial",
    Retokenizer: "everytoken.tokenization.trials.retokenizer:trial",
}
"""The trial of each contract; a class that keeps several is run by the first."""


def trial_of(factory: Any) -> str:
    """The trial of a method's class, as ``"module:function"``.

    Raises:
        BadInputError: the class names no trial and keeps no contract of this station.
    """
    own = getattr(factory, "own_trial", None)
    if own is not None:
        return str(own)
    for contract, path in CONTRACTS.items():
        if isinstance(factory, type) and issubclass(factory, contract):
            return path
    raise BadInputError(
        f"{getattr(factory, '__name__', factory)} keeps no contract of the tokenization station.",
        "Give it the methods of a protocol in everytoken.tokenization.base, or an own_trial.",
    )


def trial(request: TrialRequest) -> TrialResult:
    """Runs methods of one kind; see ``decoding.trial``.

    Raises:
        BadInputError: methods of two kinds at once, or one of no kind.
    """
    kinds = {trial_of(item.factory) for item in request.trials}
    if len(kinds) > 1:
        raise BadInputError(
            "These methods do different work and cannot be compared: some split tokens, others merge them, put a model over "
            "bytes or change the tokenizer.",
            "Run them apart.",
        )
    module, _, function = kinds.pop().partition(":")
    result: TrialResult = getattr(importlib.import_module(module), function)(request)
    return result

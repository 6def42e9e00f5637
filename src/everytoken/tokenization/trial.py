"""What ``try`` and ``compare`` run for this station: the trial of the contract that a method keeps.

Each contract of ``base`` has one module in ``trials``. A method that needs another trial names it on its card.
"""

from __future__ import annotations

import importlib

from ..core.errors import BadInputError
from ..decoding.trial import TrialRequest, TrialResult
from .base import ByteMethod, Retokenizer, Transplanter

CONTRACTS: dict[type, str] = {
    ByteMethod: "everytoken.tokenization.trials.byte_model",
    Transplanter: "everytoken.tokenization.trials.transplant",
    Retokenizer: "everytoken.tokenization.trials.retokenizer",
}
"""The module with the trial of each contract; a class that keeps several is run by the first."""


def trial_of(factory: type) -> str:
    """The module that runs a method's class.

    Raises:
        BadInputError: the class keeps no contract of this station.
    """
    for contract, module in CONTRACTS.items():
        if isinstance(factory, type) and issubclass(factory, contract):
            return module
    raise BadInputError(
        f"{getattr(factory, '__name__', factory)} keeps no contract of tokenization that has a trial.",
        "Give it the methods of a protocol in everytoken.tokenization.base, or name a trial on its card.",
    )


def trial(request: TrialRequest) -> TrialResult:
    """Runs methods of one kind; see ``decoding.trial``.

    Raises:
        BadInputError: methods of two kinds at once, or one of no kind.
    """
    modules = {trial_of(item.factory) for item in request.trials}
    if len(modules) > 1:
        raise BadInputError(
            "These methods do different work and cannot be compared: some split tokens, others put a model over bytes "
            "or change the tokenizer.",
            "Run them apart.",
        )
    result: TrialResult = importlib.import_module(modules.pop()).trial(request)
    return result

"""What trials of trained methods share: each trains copies of one model for a few steps, on the same rows, beside a
baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.errors import require
from ..decoding.trial import Trial, TrialRequest
from .datasets.pairs import load_pairs

EXAMPLE = [
    {"prompt": "The hotel was", "chosen": " lovely, quiet and very clean.", "rejected": " awful, loud and very dirty."},
    {
        "prompt": "Our waiter",
        "chosen": " was kind and made us feel welcome.",
        "rejected": " was rude and ruined the evening.",
    },
    {
        "prompt": "The film is",
        "chosen": " a joy from the first scene on.",
        "rejected": " a bore from the first scene on.",
    },
    {"prompt": "In the end, the trip", "chosen": " was the best of my life.", "rejected": " was a waste of my money."},
]


class TrialWork:
    """What all arms share: model, rows, steps.

    Attributes:
        pairs: preference rows: the user's, or the package's four.
        load: loads the model anew for each arm (not a copy: trainers patch their models).
        reference: the model itself.
        steps, lr, batch_size, seed: of every arm.
    """

    def __init__(self, request: TrialRequest):
        from ..core.loading import load_model, load_tokenizer

        require("trl", "train", "Trying a method that trains")
        self.request, self.report = request, request.report
        self.pairs: list[dict[str, Any]] = (
            EXAMPLE if request.data is None else load_pairs(request.data).to_list()
        )  # before the model is loaded: bad rows are named at once
        self.steps, self.seed = int(request.options.get("steps", 6)), int(request.options.get("seed", 0))
        self.lr, self.batch_size = float(request.options.get("lr", 1e-5)), min(4, len(self.pairs))
        self.report("loading the model", 0, 0)
        self.tokenizer = load_tokenizer(request.model)
        self.load: Callable[[], Any] = lambda: load_model(request.model, dtype="float32")
        self.reference = self.load()

    def arms(self, baseline: str, factory: Any, settings: dict[str, Any]) -> dict[str, Any]:
        """Methods by name, the baseline first; settings are checked before any training."""
        items = [Trial(baseline, factory, settings), *self.request.trials]
        return {item.name: item.factory(**item.settings) for item in items}

"""What a kind of data declares, so that ``everytoken data NAME`` makes it: a module of this package with a
``DATA_KIND``.

Importing such a module loads no torch: the command line lists all kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...core.progress import Report

Rows = list[dict[str, Any]]


@dataclass
class MadeRows:
    """What came out.

    Attributes:
        rows: of training (most kinds: ``prompt``, ``chosen``, ``rejected``); at least one.
        figures: counts and shares worth saying.
        others: further rows by the name of their file, without its ending.
    """

    rows: Rows
    figures: dict[str, float]
    others: dict[str, Rows] = field(default_factory=dict)


@dataclass(frozen=True)
class DataKind:
    """A kind of data.

    Attributes:
        name: on the command line, and of the default folder.
        settings: a dataclass of settings with a docstring that says what the data are; it checks its values.
        make: ``(settings, model, report) -> MadeRows``, deterministic in its settings; ``model`` as for ``load_model``.
        reads: what the settings' files hold, as JSON has it: data made from another text are other data. Called before
            a model is loaded.
        title: of the card, behind the kind's name; settings and ``{model}`` are filled in.
        origin: a sentence of the card about where the texts come from.
        tags: of the card.
    """

    name: str
    settings: type
    make: Callable[[Any, str | None, Report], MadeRows]
    reads: Callable[[Any], list[str] | None] = lambda _settings: None
    title: str = "pairs of {model}"
    origin: str = "All texts were written by the model itself and judged by a program; no person looked at them."
    tags: str = "preference, trl, everytoken"

    @property
    def summary(self) -> str:
        """The first paragraph of the settings' docstring."""
        return " ".join((self.settings.__doc__ or "").split("Args:")[0].split())


def load_seeded(model: str | None, seed: int) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer, with every random generator seeded."""
    from ...core.loading import load_model, load_tokenizer
    from ...core.rng import seed_everything

    tokenizer, loaded = load_tokenizer(model), load_model(model, dtype="float32", packed=True)
    seed_everything(seed)
    return loaded, tokenizer

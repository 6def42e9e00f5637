"""What ``everytoken train`` asks of a method: a typed configuration and a function that trains.

A card names its ``training`` as ``module:TRAINING``, a ``Training``. The configuration is a dataclass with simple
fields, each documented; values come from a YAML file, then from ``--set key=value``, and are checked before anything is
loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import BadInputError, UnknownNameError
from ..core.progress import Report, silent
from ..core.settings import parse_settings, read_text, settable


@dataclass
class TrainingContext:
    """What a training function gets besides its configuration.

    Attributes:
        model: as for ``load_model``.
        data: the user's file, or None for the method's own example.
        out: the folder to write to.
        report: called with ``(stage, done, total)``; total 0 where it is not known.
    """

    model: str | None
    data: str | None
    out: Path
    report: Report = silent


@dataclass
class TrainingResult:
    """What came out: figures by name, files written, and sentences worth saying."""

    figures: dict[str, float]
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Training:
    """How a method is trained.

    Attributes:
        name: the card's slug.
        summary: one line: what is trained on what.
        config: the dataclass of settings.
        run: ``(config, context) -> TrainingResult``.
        extra: the extra that it needs and a library of it, or None.
    """

    name: str
    summary: str
    config: type
    run: Callable[[Any, TrainingContext], TrainingResult]
    extra: tuple[str, str] | None = None


def at_hand(file: Path) -> Path:
    """The file, or the one of this name that ships: ``configs/train/tdpo.yaml`` is there wherever the package is."""
    package = Path(__file__).resolve().parents[1]
    shipped = [folder / file for folder in (package, package.parents[1])] if file.parts[:1] == ("configs",) else []
    return next((path for path in [file, *shipped] if path.is_file()), file)


def read_config(training: Training, file: Path | None, pairs: list[str]) -> Any:
    """The configuration from a YAML file and ``key=value`` pairs, the latter winning.

    Args:
        file: YAML; one of ``configs/`` is found from any folder.

    Raises:
        BadInputError: no such file, not YAML, not a mapping, or a value of the wrong type or out of range.
        UnknownNameError: an unknown setting; suggests the nearest.
    """
    values: dict[str, Any] = {}
    if file is not None:
        import yaml

        try:
            loaded = yaml.safe_load(read_text(at_hand(file))) or {}
        except yaml.YAMLError as error:
            raise BadInputError(f"{file} is not YAML: {error}", "Settings are one `key: value` a line.") from error
        if not isinstance(loaded, dict):
            raise BadInputError(f"{file} holds no settings.", "It must be YAML: one `key: value` a line.")
        known = settable(training.config)
        for key, value in loaded.items():
            if key not in known:
                raise UnknownNameError(f"setting of {training.name}", str(key), known)
            text = "none" if value is None else str(value)
            values |= parse_settings(training.name, training.config, [f"{key}={text}"])
    values |= parse_settings(training.name, training.config, pairs)
    missing = [
        item.name
        for item in dataclasses.fields(training.config)
        if item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
        and item.name not in values
    ]
    if missing:
        raise BadInputError(f"Training {training.name} needs {missing[0]}.", f"Give it: --set {missing[0]}=...")
    return training.config(**values)

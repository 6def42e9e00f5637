"""``everytoken data``: data made offline, preferences that a model makes of itself and tasks; deterministic by seed,
kept in the cache, with a card.

Kinds of data are the modules of this package that declare a ``DATA_KIND``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import pkgutil
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import UnknownNameError
from ...core.progress import Report, silent
from .base import DataKind, Rows

if TYPE_CHECKING:
    from datasets import Dataset

    from ..base import TrainingContext

EXAMPLE_KIND, EXAMPLE_COUNT = "sentiment", 64
"""What a training reads where the user brings no data."""


@lru_cache(maxsize=1)
def data_kinds() -> dict[str, DataKind]:
    """All kinds of data by name."""
    package = importlib.import_module(__package__ or "")
    modules = sorted(item.name for item in pkgutil.iter_modules(package.__path__))
    found = [
        getattr(importlib.import_module(f"{package.__name__}.{name}"), "DATA_KIND", None)
        for name in modules
        if f"{package.__name__}.{name}" != __name__
    ]
    return {kind.name: kind for kind in found if kind is not None}


@dataclass
class MadeDataset:
    """The folder (``train.jsonl``, ``README.md``, further files of the kind), figures, and whether it was kept from
    before.
    """

    folder: Path
    figures: dict[str, float]
    kept: bool
    files: list[Path] = field(default_factory=list)


def make_dataset(
    kind: str,
    settings: Any,
    model: str | None = None,
    report: Report = silent,
    out: Path | None = None,
) -> MadeDataset:
    """Makes the data, or finds it in the cache; copies it to ``out`` if given.

    Args:
        kind: one of ``data_kinds()``.
        settings: of the kind's class.
        model: as for ``load_model``.

    Raises:
        UnknownNameError: another kind.
        BadInputError: settings that give no pair.
    """
    from ...core.converted import cache_dir, check_writable

    if kind not in data_kinds():
        raise UnknownNameError("kind of data", kind, data_kinds())
    chosen = data_kinds()[kind]
    key = json.dumps([kind, dataclasses.asdict(settings), chosen.reads(settings), _identity(model)], sort_keys=True)
    kept = cache_dir() / "data" / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    found = (kept / "figures.json").is_file()
    if not found:
        kept.parent.mkdir(parents=True, exist_ok=True)
        check_writable(kept.parent)
        with tempfile.TemporaryDirectory(dir=kept.parent) as temporary:
            folder = Path(temporary) / "data"
            folder.mkdir()
            made = chosen.make(settings, model, report)
            _write(folder / "train.jsonl", made.rows)
            for name, rows in made.others.items():
                _write(folder / f"{name}.jsonl", rows)
            (folder / "README.md").write_text(card(chosen, settings, model, made.figures, made.rows), encoding="utf-8")
            (folder / "figures.json").write_text(json.dumps(made.figures), encoding="utf-8")
            if not kept.exists():
                os.replace(folder, kept)
    figures = json.loads((kept / "figures.json").read_text(encoding="utf-8"))
    folder = kept
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for path in sorted(kept.iterdir()):
            if path.name != "figures.json":
                shutil.copyfile(path, out / path.name)
        folder = out
    files = [path for path in sorted(folder.iterdir()) if path.name != "figures.json"]
    return MadeDataset(folder, figures, found, files)


def pairs_or_example(context: TrainingContext, identical: bool = False) -> Dataset:
    """The user's preference rows, or a few of the model's own where there are none; one process makes or reads them
    first.

    Args:
        identical: let pairs of identical responses pass.

    Raises:
        BadInputError: bad rows; it names the first.
    """
    from ..distributed import process_state
    from .pairs import load_pairs

    with process_state().main_process_first():  # what it makes or reads, the others find in the cache
        if context.data is not None:
            return load_pairs(context.data, identical=identical)
        settings = data_kinds()[EXAMPLE_KIND].settings(count=EXAMPLE_COUNT)
        made = make_dataset(EXAMPLE_KIND, settings, context.model, context.report)
        return load_pairs(made.folder / "train.jsonl")


def _identity(model: str | None) -> str:
    """A local folder counts by its files' times: a model trained on in place is another model."""
    path = Path(model) if model is not None else None
    if path is None or not path.exists():
        return model or "embedded"
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return " ".join(
        [str(path.resolve()), *(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)]
    )


def _write(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def card(kind: DataKind, settings: Any, model: str | None, figures: dict[str, float], rows: Rows) -> str:
    """A dataset card, with the front matter that the hub reads."""
    given = dataclasses.asdict(settings)
    values = "\n".join(f"- {name}: {value}" for name, value in given.items())
    numbers = "\n".join(f"- {name}: {value:.4g}" for name, value in figures.items())
    example = json.dumps(rows[0], ensure_ascii=False, indent=1)
    again = " ".join(f"--set {name}={value}" for name, value in given.items() if value is not None)
    source = f" --model {model}" if model is not None else ""
    return f"""---
tags: [{kind.tags}]
configs:
- config_name: default
  data_files:
  - {{split: train, path: train.jsonl}}
---
# {kind.name.capitalize()}: {kind.title.format(**given, model=model or "SmolLM2-135M-Instruct")}

{kind.summary} {kind.origin}

## Settings

{values}

## Figures

{numbers}

## A row

```json
{example}
```

## Make it again

```bash
everytoken data {kind.name}{source} {again}
```
"""

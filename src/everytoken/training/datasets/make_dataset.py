"""``everytoken data``: preference data that a model makes of itself, offline, deterministic by seed, kept in the cache, with a card."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import BadInputError, UnknownNameError, require

Report = Callable[[str, int, int], None]


@dataclass
class SentimentData:
    """Continuations of openings, the better of two by VADER's lexicon preferred.

    Args:
        count: pairs.
        seed: of sampling.
        margin: least difference of the two scores (of -1 to 1).
        max_new_tokens: of a continuation.
        prompts: a text file of openings, one a line; None for the package's own (84 for training).
    """

    count: int = 256
    seed: int = 0
    margin: float = 0.3
    max_new_tokens: int = 20
    prompts: str | None = None


@dataclass
class ArithmeticData:
    """A model's own correct and incorrect answers to tasks that can be checked.

    Args:
        task: of reasoning_gym (``chain_sum``, ``gcd``, ``letter_counting``, ...).
        count: questions; pairs come from those with both correct and incorrect answers.
        seed: of the tasks and of sampling.
        samples: answers a question.
        temperature: of sampling.
        max_new_tokens: of an answer.
        per_question: pairs a question at most.
    """

    task: str = "chain_sum"
    count: int = 64
    seed: int = 0
    samples: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 48
    per_question: int = 2


KINDS: dict[str, type] = {"sentiment": SentimentData, "arithmetic": ArithmeticData}


@dataclass
class Built:
    """The folder (``train.jsonl``, ``README.md``, for arithmetic ``traces.jsonl``), figures, and whether it was kept from before."""

    folder: Path
    figures: dict[str, float]
    kept: bool
    files: list[Path] = field(default_factory=list)


def build(
    kind: str,
    settings: Any,
    model: str | None = None,
    report: Report = lambda _stage, _done, _total: None,
    out: Path | None = None,
) -> Built:
    """Makes the data, or finds it in the cache; copies it to ``out`` if given.

    Raises:
        UnknownNameError: another kind.
        BadInputError: settings that give no pair.
    """
    from ...core.loading import cache_dir, check_writable

    if kind not in KINDS:
        raise UnknownNameError("kind of data", kind, KINDS)
    for name in ("count", "samples", "max_new_tokens"):
        if getattr(settings, name, 1) < 1:
            raise BadInputError(f"{name} must be at least 1; got {getattr(settings, name)}.")
    own = None
    if getattr(settings, "prompts", None) is not None:
        from ...core.settings import read_text

        own = [line.strip() for line in read_text(Path(settings.prompts)).splitlines() if line.strip()]
        if not own:
            raise BadInputError(f"{settings.prompts} holds no prompts.", "One a line.")
    key = json.dumps([kind, dataclasses.asdict(settings), own, _identity(model)], sort_keys=True)
    kept = cache_dir() / "data" / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    found = (kept / "figures.json").is_file()
    if not found:
        kept.parent.mkdir(parents=True, exist_ok=True)
        check_writable(kept.parent)
        with tempfile.TemporaryDirectory(dir=kept.parent) as temporary:
            folder = Path(temporary) / "data"
            folder.mkdir()
            rows, traces, figures = (_sentiment if kind == "sentiment" else _arithmetic)(settings, model, own, report)
            _write(folder / "train.jsonl", rows)
            if traces:
                _write(folder / "traces.jsonl", traces)
            (folder / "README.md").write_text(card(kind, settings, model, figures, rows), encoding="utf-8")
            (folder / "figures.json").write_text(json.dumps(figures))
            if not kept.exists():
                os.replace(folder, kept)
    figures = json.loads((kept / "figures.json").read_text())
    folder = kept
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for path in sorted(kept.iterdir()):
            if path.name != "figures.json":
                shutil.copyfile(path, out / path.name)
        folder = out
    return Built(folder, figures, found, [path for path in sorted(folder.iterdir()) if path.name != "figures.json"])


def _identity(model: str | None) -> str:
    """A local folder counts by its files' times: a model trained on in place is another model."""
    path = Path(model) if model is not None else None
    if path is None or not path.exists():
        return model or "embedded"
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return " ".join(
        [str(path.resolve()), *(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)]
    )


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _loaded(model: str | None, seed: int) -> tuple[Any, Any]:
    from ...core.loading import load_model, load_tokenizer
    from ...core.rng import seed_everything

    tokenizer, loaded = load_tokenizer(model), load_model(model, dtype="float32", packed=True)
    seed_everything(seed)
    return loaded, tokenizer


def _sentiment(
    settings: SentimentData, model: str | None, own: list[str] | None, report: Report
) -> tuple[list, list, dict]:
    require("vaderSentiment", "train", "Ranking by sentiment")
    from .sentiment import positivity, sentiment_pairs

    loaded, tokenizer = _loaded(model, settings.seed)
    rows = sentiment_pairs(
        loaded, tokenizer, settings.count, settings.margin, settings.max_new_tokens, prompts=own,
        report=lambda done, total: report("sampling continuations", done, total),
    )  # fmt: skip
    scores = {side: positivity([row["prompt"] + row[side] for row in rows]) for side in ("chosen", "rejected")}
    figures = {"pairs": float(len(rows))} | {f"mean score, {side}": sum(x) / len(x) for side, x in scores.items()}
    return rows, [], figures


def _arithmetic(settings: ArithmeticData, model: str | None, _own: Any, report: Report) -> tuple[list, list, dict]:
    from .arithmetic import make_task, pairs_of, sample_traces

    dataset = make_task(settings.task, settings.count, settings.seed)
    loaded, tokenizer = _loaded(model, settings.seed)
    groups = sample_traces(
        loaded, tokenizer, dataset, settings.samples, settings.max_new_tokens, settings.temperature, report
    )
    rows = pairs_of(groups, bool(tokenizer.chat_template), settings.per_question)
    every = [trace for group in groups for trace in group]
    share = sum(trace.correct for trace in every) / len(every)
    if not rows:
        raise BadInputError(
            f"No question of {settings.task} got both a correct and an incorrect answer ({share:.0%} of {len(every)} are correct).",
            "Use more questions or samples, an easier or harder task, or another model.",
        )
    traces = [dataclasses.asdict(trace) for trace in every]
    return rows, traces, {"pairs": float(len(rows)), "traces": float(len(every)), "correct": share}


def card(kind: str, settings: Any, model: str | None, figures: dict[str, float], rows: list[dict[str, Any]]) -> str:
    """A dataset card, with the front matter that the hub reads."""
    what = " ".join((KINDS[kind].__doc__ or "").split("Args:")[0].split())
    values = "\n".join(f"- {name}: {value}" for name, value in dataclasses.asdict(settings).items())
    numbers = "\n".join(f"- {name}: {value:.4g}" for name, value in figures.items())
    example = json.dumps(rows[0], ensure_ascii=False, indent=1)
    again = " ".join(
        f"--set {name}={value}" for name, value in dataclasses.asdict(settings).items() if value is not None
    )
    source = f" --model {model}" if model is not None else ""
    return f"""---
tags: [preference, trl, everytoken]
configs:
- config_name: default
  data_files:
  - {{split: train, path: train.jsonl}}
---
# {kind.capitalize()} pairs of {model or "SmolLM2-135M-Instruct"}

{what} All texts were written by the model itself and judged by a program; no person looked at them.

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
everytoken data {kind}{source} {again}
```
"""

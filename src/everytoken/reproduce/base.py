"""The harness: baseline and method in one process on the same work, several seeds, one result file.

An experiment is a ``Reproduction``: what is claimed, and a function that runs one seed and returns measurements by arm. The
harness runs the seeds, aggregates, prints a table with the paper's figure and the reason for any difference, and writes
``results/NAME.json``; ``scoreboard`` renders ``docs/scoreboard.md`` from those files. A seed that has finished is kept at once
in the user's cache, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import BadInputError

if TYPE_CHECKING:
    from rich.console import Console

Arms = dict[str, dict[str, float]]
"""One seed's measurements: arm -> metric -> value."""

VERSIONED = ("everytoken", "torch", "transformers", "tokenizers", "trl", "numpy", "numba")


@dataclass
class Context:
    """What an experiment's function gets.

    Attributes:
        seed: this run's seed.
        quick: a smaller version that shows the same thing in a minute or two.
        model: as for ``load_model``; None is the embedded default.
        progress: call it with a line of text to report.
        artifacts: fill with anything worth keeping in the result file (curves, samples).
    """

    seed: int
    quick: bool = False
    model: str | None = None
    progress: Callable[[str], None] = lambda _line: None
    artifacts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Claim:
    """One claimed comparison.

    Attributes:
        metric: the metric's name in the arms.
        method, baseline: arm names.
        paper: the paper's figure, as it states it.
        kind: ``"ratio"`` (method / baseline) or ``"difference"`` (method - baseline).
        higher_is_better: direction of the metric.
        why: why our figure differs from the paper's (scale, hardware, data).
    """

    metric: str
    method: str
    baseline: str
    paper: str
    kind: str = "ratio"
    higher_is_better: bool = True
    why: str = ""


@dataclass
class Reproduction:
    """An experiment for one paper.

    Attributes:
        name: the card's slug.
        summary: one line: what is run on what.
        run: ``Context -> Arms``; must run every arm on the same work.
        claims: the comparisons to report; the first is the headline.
        seeds, quick_seeds: how many.
        extra: the extra that it needs (``"train"``), and a library of it, checked before anything else.
    """

    name: str
    summary: str
    run: Callable[[Context], Arms]
    claims: Sequence[Claim]
    seeds: int = 3
    quick_seeds: int = 1
    extra: tuple[str, str] | None = None


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Installed versions of the libraries that matter."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def execute(
    experiment: Reproduction,
    quick: bool = False,
    model: str | None = None,
    seeds: int | None = None,
    console: Console | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Runs an experiment and returns its result (see ``write`` for the file).

    Args:
        seeds: how many; default the experiment's own.
        fresh: ignore seeds finished by an earlier, interrupted run.

    Raises:
        BadInputError: fewer than one seed.
        MissingExtraError: the experiment needs a library that is not installed.
    """
    from rich.console import Console

    from ..core.errors import require
    from ..core.rng import seed_everything

    console = console or Console(stderr=True)
    count = seeds if seeds is not None else (experiment.quick_seeds if quick else experiment.seeds)
    if count < 1:
        raise BadInputError(f"An experiment needs at least one seed; got {count}.")
    if experiment.extra is not None:
        require(experiment.extra[1], experiment.extra[0], f"Reproducing {experiment.name}")
    console.print(f"[bold]{experiment.name}[/]: {experiment.summary}", highlight=False)
    began, runs, artifacts = time.time(), [], {}
    for seed in range(count):
        kept = _partial(experiment, seed, quick, model)
        if kept.is_file() and not fresh:
            saved = json.loads(kept.read_text())
            runs.append(saved["arms"])
            artifacts[str(seed)] = saved["artifacts"]
            console.print(f"  seed {seed}: taken from an earlier run", style="dim")
            continue
        with console.status(f"seed {seed} of {count} ...") as status:
            context = Context(seed, quick, model)
            context.progress = lambda line, seed=seed: status.update(f"seed {seed}: {line}")  # type: ignore[misc]
            seed_everything(seed)
            arms = experiment.run(context)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"arms": arms, "artifacts": context.artifacts}))
        runs.append(arms)
        artifacts[str(seed)] = context.artifacts
        console.print(f"  seed {seed}: done after {time.time() - began:.0f} s", style="dim")
    for seed in range(count):
        _partial(experiment, seed, quick, model).unlink(missing_ok=True)
    return {
        "name": experiment.name,
        "summary": experiment.summary,
        "quick": quick,
        "model": model or "embedded",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join(["everytoken", *sys.argv[1:]]) if sys.argv[1:2] == ["reproduce"] else "",
        "seconds": round(time.time() - began, 1),
        "seeds": list(range(count)),
        "versions": versions(),
        "machine": machine(),
        # a quick run may leave out what takes long
        "claims": [
            _measure(claim, runs)
            for claim in experiment.claims
            if not quick or claim.metric in runs[0].get(claim.method, {})
        ],
        "runs": runs,
        "artifacts": artifacts,
    }


def _partial(experiment: Reproduction, seed: int, quick: bool, model: str | None) -> Path:
    from ..core.loading import cache_dir

    key = hashlib.sha256(
        json.dumps([experiment.name, experiment.summary, quick, model, versions()]).encode()
    ).hexdigest()
    return cache_dir() / "reproduce" / f"{experiment.name}-{key[:10]}-{seed}.json"


def _measure(claim: Claim, runs: list[Arms]) -> dict[str, Any]:
    """A claim over all seeds: medians of both arms and of their comparison."""
    method = [run[claim.method][claim.metric] for run in runs]
    baseline = [run[claim.baseline][claim.metric] for run in runs]
    if claim.kind == "ratio":
        compared = [a / b if b else float("nan") for a, b in zip(method, baseline, strict=True)]
        neutral = 1.0
    else:
        compared = [a - b for a, b in zip(method, baseline, strict=True)]
        neutral = 0.0
    value = statistics.median(compared)
    return {
        "metric": claim.metric,
        "method": claim.method,
        "baseline": claim.baseline,
        "kind": claim.kind,
        "method_value": statistics.median(method),
        "baseline_value": statistics.median(baseline),
        "value": value,
        "by_seed": compared,
        "paper": claim.paper,
        "why": claim.why,
        "holds": (value > neutral) if claim.higher_is_better else (value < neutral),
        "every_seed": all((x > neutral) if claim.higher_is_better else (x < neutral) for x in compared),
    }


def write(result: dict[str, Any], folder: Path) -> Path:
    """``results/NAME.json`` (``NAME.quick.json`` for a quick run), written atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['name']}{'.quick' if result['quick'] else ''}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)
    return path


def formatted(claim: dict[str, Any]) -> str:
    """A claim's measured value as text: ``1.83x``, ``1/1,200x`` or ``+0.12``."""
    value = claim["value"]
    if claim["kind"] != "ratio":
        return f"{value:+.3g}"
    return f"{value:.2f}x" if value >= 0.1 or value <= 0 else f"1/{1 / value:,.0f}x"


def table(result: dict[str, Any]) -> Any:
    """The result as a rich table."""
    from rich.table import Table

    note = " (quick)" if result["quick"] else ""
    grid = Table(
        title=f"{result['name']}{note}: {len(result['seeds'])} seed(s), {result['machine']['processor']}",
        title_justify="left",
    )
    for head in ("metric", "baseline", "method", "measured", "paper", "holds"):
        grid.add_column(head, justify="right" if head in ("measured",) else "left")
    for claim in result["claims"]:
        verdict = "every seed" if claim["every_seed"] else "in the median" if claim["holds"] else "no"
        grid.add_row(
            claim["metric"],
            f"{claim['baseline']} {claim['baseline_value']:.4g}",
            f"{claim['method']} {claim['method_value']:.4g}",
            f"[bold]{formatted(claim)}[/]",
            claim["paper"],
            f"[green]{verdict}[/]" if claim["holds"] else f"[red]{verdict}[/]",
        )
    return grid


def load_results(folder: Path) -> list[dict[str, Any]]:
    """All full results of a folder, by name.

    Raises:
        BadInputError: a file that is not a result.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".quick.json"):
            continue
        try:
            result = json.loads(path.read_text())
            assert result["claims"] is not None
            results.append(result)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise BadInputError(
                f"{path} is not a result file: {error}", "Delete it, or run the experiment again."
            ) from error
    return results


def scoreboard(results: Sequence[dict[str, Any]]) -> str:
    """``docs/scoreboard.md`` from result files."""
    lines = [
        "# Scoreboard",
        "",
        "Every figure was measured in one run, baseline and method on the same work, by `everytoken reproduce NAME`; medians",
        "over seeds. *Holds* says whether the measured direction is the claimed one in every seed, in the median, or not.",
        "This page is written from `results/*.json` by `everytoken scoreboard`.",
        "",
        "| method | metric | baseline | method | measured | paper | holds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        for claim in result["claims"]:
            verdict = "every seed" if claim["every_seed"] else "median" if claim["holds"] else "**no**"
            lines.append(
                f"| [{result['name']}](methods/{result['name']}.md) | {claim['metric']} | "
                f"{claim['baseline']}: {claim['baseline_value']:.4g} | {claim['method']}: {claim['method_value']:.4g} | "
                f"**{formatted(claim)}** | {claim['paper']} | {verdict} |"
            )
    lines += ["", "## Why they differ, and how they were run", ""]
    for result in results:
        lines += [f"### {result['name']}", "", result["summary"], ""]
        lines += [
            f"- *{claim['metric']}* ({claim['method']} against {claim['baseline']}): {claim['why']}"
            for claim in result["claims"]
            if claim["why"]
        ]
        host = result["machine"]
        shown = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        lines += [
            f"- {len(result['seeds'])} seed(s), {result['seconds']:.0f} s, model: {result['model']}, {result['date']}.",
            f"- {host['processor']}, {host['cores']} cores, {host['gpu'] or 'no GPU'}, Python {host['python']}; {shown}.",
            "",
        ]
    return "\n".join(lines)


def mean_ranks(values: Any) -> Any:
    """Ranks from 1 of a numpy array; equal values share the mean of their ranks."""
    import numpy as np

    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

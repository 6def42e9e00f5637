"""The harness: baseline and method in one process on the same work, several seeds, one result file.

An experiment is a ``Reproduction``: what is claimed, and a function that runs one seed and returns measurements by arm.
The harness runs the seeds, gives every claim an interval and a verdict (``core.results``), prints a table with the
paper's figure and the reason for any difference, and writes ``results/NAME.json``.

A seed that has finished is kept at once in the user's cache, and so is every ``Context.part`` within it. An interrupted
run goes on where it stopped, and ends with what an unbroken one would have measured.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..core.errors import BadInputError
from ..core.files import write_text_whole
from ..core.loading import WEIGHTS
from ..core.machine import processor
from ..core.progress import Report, silent
from ..core.results import (
    Arms,
    Claim,
    MeasuredClaim,
    Values,
    formatted,
    formatted_interval,
    mean,
    measure,
)
from .files import (
    Machine,
    Result,
    Scale,
    public_command,
    public_model,
)

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from rich.status import Status
    from rich.table import Table
    from transformers import PreTrainedModel

__all__ = [
    "Arms",
    "Claim",
    "Context",
    "Reproduction",
    "Values",
    "execute",
    "formatted",
    "mean",
    "table",
]

VERSIONED = ("everytoken", "torch", "transformers", "tokenizers", "trl", "numpy", "numba")
T = TypeVar("T")


@dataclass
class Context:
    """What an experiment's function gets.

    Attributes:
        seed: this run's seed.
        scale: ``"quick"`` (a smaller version, in a minute or two), ``"cpu"`` (at most 40 minutes a part and four
            hours a claim on two cores) or ``"gpu"``.
        model: as for ``load_model``; None is the embedded default.
        report: ``report(stage, done, total)``, as ``core.progress`` has it.
        artifacts: fill with anything worth keeping in the result file (curves, samples).
        folder: where finished parts are kept until the experiment ends; None keeps none.
        weights: how the linear layers run (``core.choosing``); None is the experiment's own way.
        calibrate: whether the fastest way may be measured.
    """

    seed: int
    scale: Scale = "cpu"
    model: str | None = None
    report: Report = silent
    artifacts: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    weights: str | None = None
    calibrate: bool = True
    _parts: set[str] = field(default_factory=set, repr=False)

    @property
    def quick(self) -> bool:
        """Whether the small version was asked for."""
        return self.scale == "quick"

    def load_model(self, own: str = "packed", compiled: bool = False) -> PreTrainedModel:
        """The model with its weights run as asked for; the result file names the way.

        Args:
            own: the experiment's own way, or ``"auto"``.
            compiled: whether what runs gains from a compiled forward.
        """
        from ..core.choosing import load_fastest

        weights = self.weights or own
        measure = self.calibrate and compiled  # others take no curve
        model, choice = load_fastest(self.model, weights, compiled=compiled, measure=measure, report=self.report)
        self.artifacts["weights"] = choice.way
        return model

    def part(self, name: str, function: Callable[[], T]) -> T:
        """What ``function`` returns, from an earlier, interrupted run where it had finished there.

        The random numbers inside depend on the seed and the name only, and those after it do not depend on whether it
        ran. What it adds to ``artifacts`` is kept too. Any other state that it changes (a ``random.Random`` of the
        experiment's own) is not: make such generators inside.

        Args:
            name: the part's name, once a seed.
            function: returns something that JSON can hold; tuples come back as lists.

        Raises:
            BadInputError: the name was used before in this seed, or JSON cannot hold what the function returned.
        """
        from ..core.rng import derive_seed, seed_everything

        if name in self._parts:
            raise BadInputError(f"This seed has two parts called {name!r}.", "Name every part once.")
        self._parts.add(name)
        path = None if self.folder is None else self.folder / f"{_file_name(name)}.json"
        if path is not None and path.is_file():
            text = path.read_text(encoding="utf-8")
        else:
            before = {key: json.dumps(value) for key, value in self.artifacts.items()}
            seed_everything(derive_seed(self.seed, "part", name))
            value = function()
            try:
                added = {k: v for k, v in self.artifacts.items() if before.get(k) != json.dumps(v)}
                text = json.dumps({"value": value, "artifacts": added})
            except TypeError as error:
                raise BadInputError(
                    f"The part {name!r} cannot be kept: {error}.", "Return numbers, text, lists."
                ) from error
            if path is not None:
                write_text_whole(path, text)
        kept = json.loads(text)
        self.artifacts.update(kept["artifacts"])
        seed_everything(derive_seed(self.seed, "after", name))
        return kept["value"]

    def model_part(self, name: str, function: Callable[[], tuple[PreTrainedModel, T]]) -> tuple[PreTrainedModel, T]:
        """As ``part``, for a function that also returns a causal language model, whose weights are kept too."""
        from transformers import AutoModelForCausalLM

        from ..core.quiet import quiet_transformers

        place = None if self.folder is None else self.folder / _file_name(name)
        made: list[PreTrainedModel] = []

        def train() -> T:
            model, value = function()
            made.append(model)
            if place is not None:
                with quiet_transformers():
                    model.save_pretrained(place)
            return value

        value = self.part(name, train)
        if not made and place is None:
            raise AssertionError("a part without a folder always runs")
        model = (
            made[0] if made else AutoModelForCausalLM.from_pretrained(place, dtype="auto", use_safetensors=True).eval()
        )
        return model, value


@dataclass
class Reproduction:
    """An experiment for one paper.

    Attributes:
        name: the card's slug.
        summary: one line: what is run on what.
        run: ``Context -> Arms``; must run every arm on the same work. A metric's value is a number, or one number a
            question (the same questions in the same order for all arms), which makes for narrower intervals.
        claims: the comparisons to report; the first is the headline.
        seeds, quick_seeds: how many.
        extra: the extra that it needs (``"train"``), and a library of it, checked before anything else.
        bed: the test bed that it stands on (``reproduce.beds.BEDS``); empty without one.
        scales: what ``--scale`` may ask for.
        takes_weights: whether it runs its model by ``Context.load_model``, so that ``--weights`` means something.
    """

    name: str
    summary: str
    run: Callable[[Context], Arms]
    claims: Sequence[Claim]
    seeds: int = 3
    quick_seeds: int = 1
    extra: tuple[str, str] | None = None
    bed: str = ""
    scales: tuple[Scale, ...] = ("quick", "cpu")
    takes_weights: bool = False


def machine() -> Machine:
    """What the figures were measured on."""
    import torch

    return {
        "processor": processor(),
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
    scale: Scale = "cpu",
    *,
    model: str | None = None,
    seeds: int | None = None,
    console: Console | None = None,
    fresh: bool = False,
    weights: str | None = None,
    calibrate: bool = True,
) -> Result:
    """Runs an experiment and returns its result (see ``write`` for the file).

    Args:
        scale: how large a version; see ``Context``.
        seeds: how many; default the experiment's own.
        fresh: run every seed and part anew; by default an interrupted run goes on.
        weights, calibrate: see ``Context``.

    Raises:
        BadInputError: fewer than one seed, a scale that the experiment has not, weights where the experiment has a way
            of its own, or arms without what a claim names.
        MissingExtraError: the experiment needs a library that is not installed.
    """
    from rich.console import Console

    from ..core.errors import require
    from ..core.rng import seed_everything

    console = console or Console(stderr=True)
    if scale not in experiment.scales:
        raise BadInputError(
            f"{experiment.name} has no version for the scale {scale!r}.", f"It has: {', '.join(experiment.scales)}."
        )
    if weights is not None and not experiment.takes_weights:
        raise BadInputError(f"{experiment.name} runs its models in a way of its own.", "Leave --weights out.")
    if weights is not None and weights not in ("auto", *WEIGHTS):
        raise BadInputError(f"Unknown weights {weights!r}.", f"Use one of: auto, {', '.join(WEIGHTS)}.")
    quick = scale == "quick"
    count = seeds if seeds is not None else (experiment.quick_seeds if quick else experiment.seeds)
    if count < 1:
        raise BadInputError(f"An experiment needs at least one seed; got {count}.")
    if experiment.extra is not None:
        require(experiment.extra[1], experiment.extra[0], f"Reproducing {experiment.name}")
    console.print(f"[bold]{experiment.name}[/]: {experiment.summary}", highlight=False)
    began, runs, artifacts = time.time(), [], {}
    place = _kept(experiment, scale, model, weights)
    if fresh:
        shutil.rmtree(place, ignore_errors=True)
    for seed in range(count):
        kept = place / f"seed-{seed}.json"
        if kept.is_file():
            saved = json.loads(kept.read_text(encoding="utf-8"))
            runs.append(saved["arms"])
            artifacts[str(seed)] = saved["artifacts"]
            console.print(f"  seed {seed}: taken from an earlier run", style="dim")
            continue
        with console.status(f"seed {seed} of {count} ...") as status:

            def show(stage: str, done: int, total: int, seed: int = seed, status: Status = status) -> None:
                status.update(f"seed {seed}: {stage}" + (f", {done} of {total}" if total else ""))

            parts = place / f"parts-{seed}"
            context = Context(seed, scale, model, show, folder=parts, weights=weights, calibrate=calibrate)
            seed_everything(seed)
            arms = experiment.run(context)
        write_text_whole(kept, json.dumps({"arms": arms, "artifacts": context.artifacts}))
        runs.append(arms)
        artifacts[str(seed)] = context.artifacts
        console.print(f"  seed {seed}: done after {time.time() - began:.0f} s", style="dim")
    claims = measured_claims(experiment, runs, quick)
    shutil.rmtree(place, ignore_errors=True)
    return {
        "name": experiment.name,
        "summary": experiment.summary,
        "quick": quick,
        "scale": scale,
        "model": public_model(model),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": public_command(sys.argv),
        "seconds": round(time.time() - began, 1),
        "seeds": list(range(count)),
        "versions": versions(),
        "machine": machine(),
        "claims": claims,
        "runs": runs,
        "artifacts": artifacts,
    }


def measured_claims(experiment: Reproduction, runs: Sequence[Arms], quick: bool = False) -> list[MeasuredClaim]:
    """The experiment's claims over runs.

    A quick run may leave out what takes long, and where its interval decides nothing it claims only that it *ran*.

    Raises:
        BadInputError: an arm lacks a claim's metric.
    """
    claims = []
    for claim in experiment.claims:
        arms = [claim.method, *([claim.baseline] if claim.kind != "value" else [])]
        lacking = [arm for arm in arms if any(claim.metric not in run.get(arm, {}) for run in runs)]
        if lacking and quick:
            continue
        if lacking:
            raise BadInputError(f"{experiment.name} claims {claim.metric!r}, but {lacking[0]!r} did not measure it.")
        found = measure(claim, runs)
        if quick and found["verdict"] == "undecided":
            found["verdict"] = "ran"
        claims.append(found)
    return claims


def _kept(experiment: Reproduction, scale: Scale, model: str | None, weights: str | None = None) -> Path:
    """Where finished seeds and parts are kept: another place for another version, model or source text."""
    from ..core.converted import cache_dir

    try:
        source = Path(inspect.getfile(experiment.run)).read_text(encoding="utf-8")
    except (OSError, TypeError):
        source = ""
    key = json.dumps([experiment.name, experiment.summary, scale, model, weights, versions(), source])
    return cache_dir() / "reproduce" / f"{experiment.name}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"


def _file_name(name: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


STYLES = {"holds": "green", "contradicted": "red", "undecided": "yellow", "ran": "dim"}


def table(result: Result) -> Table:
    """The result as a rich table."""
    from rich.table import Table

    note = "" if result["scale"] == "cpu" else f" ({result['scale']})"
    seeds = "one seed" if len(result["seeds"]) == 1 else f"{len(result['seeds'])} seeds"
    grid = Table(
        title=f"{result['name']}{note}: {seeds}, {result['machine']['processor']}",
        title_justify="left",
    )
    for head in ("metric", "baseline", "method", "measured", "95% interval", "paper", "verdict"):
        grid.add_column(head, justify="right" if head in ("measured", "95% interval") else "left")
    for claim in result["claims"]:
        verdict = claim["verdict"]
        grid.add_row(
            claim["metric"],
            baseline_text(claim),
            f"{claim['method']} {claim['method_value']:.4g}",
            f"[bold]{formatted(claim)}[/]",
            formatted_interval(claim) or f"[dim]{claim['note']}[/]",
            claim["paper"],
            f"[{STYLES[verdict]}]{verdict}[/]",
        )
    return grid


def baseline_text(claim: MeasuredClaim, separator: str = " ") -> str:
    """A claim's baseline with its value, or the bar that stands in its place."""
    if claim["kind"] == "value":
        return f"bar{separator}{claim['threshold']:.4g}"
    return f"{claim['baseline']}{separator}{claim['baseline_value']:.4g}"


def mean_ranks(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Ranks from 1 of an array; equal values share the mean of their ranks."""
    import numpy as np

    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

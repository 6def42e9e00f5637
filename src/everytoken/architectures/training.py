"""``everytoken train`` for networks that learn from text: one way to train, with a recipe for each method.

A method names its ``recipe``: a dataclass of settings that inherits ``Recipe`` and says how a network is begun, what
its loss is and what the report shows. A training writes ``model/`` (a folder of transformers), ``training.json`` and
``report.html``. Run it again with the same folder and it goes on from the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..core.errors import BadInputError
from ..core.files import write_text_whole
from ..core.quiet import quiet_transformers
from ..core.rng import seed_everything
from ..training.base import Training, TrainingContext, TrainingResult
from ..training.datasets.plain_text import TextWindows
from ..training.report import training_report
from ..training.stepwise import Stage, fingerprint, fit
from .base import Architecture, is_architecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..core.trace import TokenTrace

StepFigures = dict[str, float | torch.Tensor]
"""Figures of one step. Tensors ``[]`` stay on their device until a curve gets a point: no step waits for them."""
Curves = dict[str, list[tuple[float, float]]]
"""Metric -> points ``(step, value)``."""


@dataclass(frozen=True)
class Recipe:
    """How a network of this station learns from text; subclasses add settings and say the rest.

    Args:
        steps: optimiser steps.
        batch: windows of text a step.
        length: bytes of a window.
        lr: the level of the learning rate.
        warmup: share of the steps that rise to it.
        hold: share of the steps after which it falls.
        seed: of everything.
        save_every: a checkpoint after so many steps, from which the same command goes on.

    Raises:
        BadInputError: a value out of range.
    """

    steps: int = 600
    batch: int = 16
    length: int = 128
    lr: float = 2e-3
    warmup: float = 0.05
    hold: float = 0.5
    seed: int = 0
    save_every: int = 200
    summary: ClassVar[str] = "a network on text"

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.length, self.save_every) < 1:
            raise BadInputError("steps, batch, length and save_every are 1 or more.")
        self.stage("check")

    def stage(self, name: str) -> Stage:
        """Steps and rates of the training."""
        return Stage(name, self.steps, self.lr, warmup=self.warmup, hold=self.hold)

    # -- what a method implements --------------------------------------------------------------------------------------
    def begin(self, model: str | None) -> PreTrainedModel:
        """The network before training, in float32.

        Args:
            model: a folder or hub id to go on from, where the method can; None begins from scratch.

        Raises:
            BadInputError: a model that it cannot go on from, or settings that contradict each other.
        """
        raise NotImplementedError(f"{type(self).__name__} begins with nothing.")

    def loss(self, learner: nn.Module, windows: torch.Tensor, step: int) -> tuple[torch.Tensor, StepFigures]:
        """The loss of a step, and figures for the report's curves.

        Args:
            learner: what ``learner`` returned.
            windows: ``[batch, length]`` bytes 0 to 255.
            step: from 0; random choices follow from it and ``seed`` alone.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss.")

    def measure(self, model: PreTrainedModel, windows: torch.Tensor) -> dict[str, float]:
        """Figures of the trained network on held-out windows ``[N, length]``."""
        raise NotImplementedError(f"{type(self).__name__} measures nothing.")

    # -- what a method may change --------------------------------------------------------------------------------------
    def learner(self, model: PreTrainedModel) -> nn.Module:
        """What checkpoints keep: the network, or a module around it with further state (a controller)."""
        return model

    def check(self, text: TextWindows) -> None:
        """Refuses a text that this recipe cannot learn from; by default one that is too short for its windows."""
        text.check(self.length)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that is saved beside the network; None where it has none."""
        return None

    def pictures(self, model: PreTrainedModel, curves: Curves, windows: torch.Tensor) -> dict[str, str]:
        """The method's own pictures for the report: title -> HTML."""
        return {}


def training_for(slug: str, factory: object) -> Training | None:
    """How ``everytoken train`` trains a card of this station that names no ``training``; None where its method has no
    recipe.
    """
    recipe = getattr(factory, "recipe", None)
    if not is_architecture(factory) or recipe is None:
        return None

    def run(config: Recipe, context: TrainingContext) -> TrainingResult:
        return train_from_text(slug, factory, config, context)  # type: ignore[arg-type]

    return Training(name=slug, summary=recipe.summary, config=recipe, run=run)


def train_from_text(slug: str, factory: type[Architecture], recipe: Recipe, context: TrainingContext) -> TrainingResult:
    """Trains, measures on held-out text, and writes model, record and report.

    Args:
        context: its ``data`` is a text in UTF-8; None takes the example (``training.datasets.plain_text``).

    Raises:
        BadInputError: a text that cannot be read or is too short; before the network is made.
    """
    text = TextWindows.of(context.data, recipe.seed)
    recipe.check(text)
    seed_everything(recipe.seed)
    context.report("making the network", 0, 0)
    model = recipe.begin(context.model)
    curves = learn(slug, model, recipe, text, context.out, context.report)
    held = text.held(32, recipe.length)
    return write_training(
        slug,
        context,
        model,
        recipe,
        recipe.measure(model, held),
        curves,
        tokenizer=recipe.tokenizer(),
        title=context.data or "the example text",
        traces=traces_of(factory, model, recipe, held),
        column=factory.trace_columns[0],
        pictures=recipe.pictures(model, curves, held),
        hint=f"everytoken try {slug} --model {{folder}} --prompt 'Some words of yours.'",
    )


def write_training(
    slug: str,
    context: TrainingContext,
    model: PreTrainedModel,
    config: Any,
    figures: dict[str, float],
    curves: Curves,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    title: str,
    traces: Sequence[TokenTrace] = (),
    column: str | None = None,
    pictures: dict[str, str] | None = None,
    hint: str,
) -> TrainingResult:
    """What every training of a network leaves in its folder: ``model/``, ``training.json`` and ``report.html``.

    Args:
        config: the dataclass of settings.
        title: what it learned from, for the report.
        traces, column, pictures: for the report.
        hint: a command that tries the network; ``{folder}`` stands for where it lies.
    """
    folder = context.out / "model"
    save_network(model, folder, tokenizer)
    settings = dataclasses.asdict(config)
    record = {"method": slug, "figures": figures, "settings": settings, "curves": curves}
    write_text_whole(context.out / "training.json", json.dumps(record, indent=1) + "\n")
    report = training_report(
        context.out / "report.html",
        f"{slug}: {title}",
        figures,
        curves,
        traces=traces,
        column=column,
        settings=settings,
        pictures=pictures or {},
    )
    notes = [f"Look at {report}.", f"Try it: {hint.format(folder=folder)}"]
    return TrainingResult(figures, [folder, context.out / "training.json", report], notes)


def learn(
    name: str, model: PreTrainedModel, recipe: Recipe, text: TextWindows, folder: Path | None, report: object = None
) -> Curves:
    """The steps alone: trains the network in place and returns its curves.

    Args:
        name: of the stage and its checkpoint.
        folder: where the checkpoint lies; None keeps none.
        report: as for ``training.stepwise.fit``.
    """
    seen: dict[str, list[torch.Tensor]] = {}
    curves: Curves = {}
    every = max(1, recipe.steps // 50)
    learner = recipe.learner(model)

    def loss(step: int) -> torch.Tensor:
        value, figures = recipe.loss(learner, text.batch(recipe.batch, recipe.length, name, step), step)
        for key, figure in figures.items():
            seen.setdefault(key, []).append(torch.as_tensor(figure).detach())
        if (step + 1) % every == 0:
            for key, figures_since in seen.items():
                if figures_since:
                    curves.setdefault(key, []).append((step + 1, float(torch.stack(figures_since).float().mean())))
                figures_since.clear()
        return value

    arguments = {} if report is None else {"report": report}
    identity = fingerprint(recipe, text.batch(recipe.batch, recipe.length, name, 0))
    stage, every_steps = recipe.stage(name), recipe.save_every
    found = fit(learner, loss, stage, folder, save_every=every_steps, identity=identity, **arguments)  # type: ignore[arg-type]
    model.eval()
    return {"loss": [(float(step), value) for step, value in found], **curves}


def save_network(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """A folder that transformers reads."""
    with quiet_transformers():
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


@torch.no_grad()
def traces_of(
    factory: type[Architecture], model: PreTrainedModel, recipe: Recipe, windows: torch.Tensor, count: int = 2
) -> list[TokenTrace]:
    """Traces of a few held-out windows, by the method with its default settings."""
    texts = [bytes(row.tolist()).decode("utf-8", "ignore") for row in windows[:count]]
    method = factory()
    return [trace for text in texts for trace in method.observe(model, recipe.tokenizer(), text).traces]

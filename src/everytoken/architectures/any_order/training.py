"""``everytoken train diffusion-lm``: a masked diffusion model from scratch, and a Trainer for data of your own.

The command learns from the bytes of a text, from rows of a JSONL file with ``prompt`` and ``completion`` (only the
completion is masked), or from sudokus of four by four (``task=sudoku``). It writes ``model/``, ``training.json`` and
``report.html``, and goes on where it was cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import Trainer

from ...core.errors import BadInputError, check_choices
from ...core.progress import Report, silent
from ...core.rng import derive_seed, numpy_generator, seed_everything
from ...decoding.canvas.denoising import DenoisingSampler
from ...decoding.canvas.replay import replay_html
from ...training.base import Training, TrainingContext, TrainingResult
from ...training.datasets import sudoku
from ...training.datasets.pairs import read_rows
from ...training.datasets.plain_text import TextWindows
from ...training.stepwise import Stage, fingerprint, fit
from ..byte_text import VOCABULARY, as_ids, byte_tokenizer
from ..training import write_training
from .configuration_any_order import AnyOrderConfig
from .losses import any_subset_loss, draw_known, mdlm_loss
from .modeling_any_order import AnyOrderLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASK = "<mask>"


class Batch(NamedTuple):
    """Whole texts: ids, what is the response, and where there are tokens; ``[B, T]`` each."""

    ids: torch.Tensor
    response: torch.Tensor
    attention: torch.Tensor


@dataclass(frozen=True)
class AnyOrderTraining:
    """What trainings of a network of any order share; subclasses name their tasks and are checked by them.

    Args:
        steps, batch, lr: of the optimiser.
        length: bytes of a window, or of a row at most.
        layers, width, heads: of the network; its feed-forward blocks are twice as wide.
        warmup: share of the steps that rise to the level; hold: share after which it falls.
        seed: of everything.
        save_every: a checkpoint after so many steps.

    Raises:
        BadInputError: a value out of range.
    """

    steps: int = 1500
    batch: int = 64
    lr: float = 3e-3
    length: int = 64
    layers: int = 3
    width: int = 64
    heads: int = 4
    warmup: float = 0.03
    hold: float = 0.5
    seed: int = 0
    save_every: int = 200

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.length, self.layers, self.heads, self.save_every) < 1:
            raise BadInputError("steps, batch, length, layers, heads and save_every are 1 or more.")
        self.stage("check")

    def stage(self, name: str) -> Stage:
        """Steps and rates."""
        return Stage(name, self.steps, self.lr, warmup=self.warmup, hold=self.hold)

    def shape(self) -> dict[str, int]:
        """What the network's configuration takes from these settings."""
        return {
            "hidden_size": self.width,
            "intermediate_size": 2 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": max(64, 4 * self.length),
        }


@dataclass(frozen=True)
class DiffusionTraining(AnyOrderTraining):
    """A masked diffusion model from scratch; further settings are those of ``AnyOrderTraining``.

    Args:
        task: ``text`` for the bytes of a text or for rows with prompt and completion, ``sudoku`` for 4x4 sudokus.
        streams: 1 learns masked diffusion; 2 learns all subsets with a query stream, and drafts in every second step.

    Raises:
        BadInputError: a value out of range.
    """

    task: str = "text"
    streams: int = 1

    def __post_init__(self) -> None:
        check_choices(self, task=("text", "sudoku"))
        super().__post_init__()
        self.config(8, 1)

    def config(self, vocab: int, mask: int, end: int | None = None) -> AnyOrderConfig:
        """The network's configuration."""
        return AnyOrderConfig(
            vocab_size=vocab, mask_token_id=mask, eos_token_id=end, streams=self.streams, **self.shape()
        )


@dataclass
class Source:
    """What a network learns from.

    Attributes:
        tokenizer: of the texts.
        batch: ``(count, step) -> Batch``; a step of -1 gives held-out texts.
        config: of the network.
    """

    tokenizer: PreTrainedTokenizerBase
    batch: Callable[[int, int], Batch]
    config: AnyOrderConfig


def source_of(config: DiffusionTraining, data: str | None) -> Source:
    """The texts of a training.

    Raises:
        BadInputError: data with a task that makes its own, a text that is too short, or rows without a completion.
    """
    if config.task == "sudoku":
        if data is not None:
            raise BadInputError("task=sudoku makes its own grids.", "Leave --data out, or task.")

        def grids(count: int, step: int) -> Batch:
            base = torch.from_numpy(sudoku.grids(held=step < 0)) + sudoku.FIRST
            rows = numpy_generator(config.seed, "grids", step).integers(len(base), size=count)
            return _whole(base[rows])

        shape = config.config(len(sudoku.TOKENS), sudoku.OPEN)
        return Source(sudoku.sudoku_tokenizer(), grids, shape)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": MASK})
    shape = config.config(VOCABULARY + 1, VOCABULARY, 1)
    if data is not None and data.endswith(".jsonl"):
        return Source(tokenizer, _rows(config, data, tokenizer), shape)
    text = TextWindows.of(data, config.seed)
    text.check(config.length)

    def windows(count: int, step: int) -> Batch:
        found = text.held(count, config.length) if step < 0 else text.batch(count, config.length, "diffusion", step)
        return _whole(as_ids(found))

    return Source(tokenizer, windows, shape)


def _whole(ids: torch.Tensor) -> Batch:
    every = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids, every, every)


def _rows(config: DiffusionTraining, data: str, tokenizer: Any) -> Callable[[int, int], Batch]:
    """Batches of rows with a prompt and a completion, each padded with end tokens that are learned too."""
    encoded = read_pairs(data, tokenizer, config.length)
    space = config.length - max(len(first) for first, _ in encoded)
    ids = torch.full((len(encoded), config.length), tokenizer.pad_token_id)
    response, attention = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for number, (first, second) in enumerate(encoded):  # prompts end at one place, as when they are padded on the left
        begin = config.length - space
        text = second[:space] + [tokenizer.eos_token_id] * (space - len(second))
        ids[number, begin - len(first) :] = torch.tensor(first + text)
        attention[number, begin - len(first) :] = True
        response[number, begin:] = True
    return drawn_rows(Batch(ids, response, attention), config.seed)


def read_pairs(data: str, tokenizer: Any, length: int) -> list[tuple[list[int], list[int]]]:
    """Ids of prompts and completions from a JSONL file.

    Raises:
        BadInputError: fewer than ten rows, one without a completion, or one that is not shorter than ``length``.
    """
    encoded = []
    for number, row in enumerate(read_rows(data)):
        prompt, completion = row.get("prompt"), row.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
            raise BadInputError(f"{data}, row {number}: needs texts 'prompt' and 'completion'.")
        first, second = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, completion))
        if len(first) + len(second) >= length:
            raise BadInputError(
                f"{data}, row {number}: {len(first) + len(second)} bytes do not fit a length of {length}.",
                "Raise length.",
            )
        encoded.append((first, second))
    if len(encoded) < 10:
        raise BadInputError(f"{data} has {len(encoded)} rows; ten are the least.")
    return encoded


def drawn_rows(every: Batch, seed: int) -> Callable[[int, int], Batch]:
    """``(count, step) -> Batch`` of a data set: every tenth row is held out, for step -1."""
    held = torch.arange(len(every.ids)) % 10 == 0

    def batch(count: int, step: int) -> Batch:
        chosen = torch.where(held if step < 0 else ~held)[0]
        rows = chosen[numpy_generator(seed, "rows", step).integers(len(chosen), size=count)]
        return Batch(*(part[rows] for part in every))

    return batch


def seeded(config: AnyOrderTraining, *names: object) -> torch.Generator:
    """The generator of one named part of a training."""
    return torch.Generator().manual_seed(derive_seed(config.seed, *names))


def loss_of(
    model: Any, batch: Batch, config: DiffusionTraining, *names: object, parallel: bool = False
) -> torch.Tensor:
    """The loss of one batch, its choices drawn by a name of the training."""
    generator = seeded(config, *names)
    if config.streams == 1:
        return mdlm_loss(model, *batch, generator=generator)
    # one position at least stays known: the first token needs a context
    known = draw_known(batch.response, 0.15, 0.95, generator) | ~batch.attention
    return any_subset_loss(model, batch.ids, known, batch.attention, parallel=parallel)


def learn(
    model: Any,
    source: Source,
    config: DiffusionTraining,
    folder: Path | None = None,
    report: Report = silent,
    name: str = "diffusion-lm",
) -> list[tuple[int, float]]:
    """The steps alone: trains the network in place and returns its curve.

    Args:
        folder: where the checkpoint lies; None keeps none.
        name: of the stage, in what is reported.
    """

    def loss(step: int) -> torch.Tensor:
        return loss_of(model, source.batch(config.batch, step), config, "loss", step, parallel=step % 2 == 1)

    identity = fingerprint(config, source.batch(config.batch, 0))
    return fit(model, loss, config.stage(name), folder, report, save_every=config.save_every, identity=identity)


@torch.no_grad()
def bound(model: Any, batch: Batch, config: DiffusionTraining, masks: int = 8) -> float:
    """Nats a response token that held-out texts cost at most: the mean of the loss over many masks."""
    losses = [loss_of(model, batch, config, "held", number) for number in range(masks)]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def measure(model: Any, source: Source, config: DiffusionTraining) -> dict[str, float]:
    """Figures of a trained network on held-out texts."""
    found = {"nats per token, at most": bound(model, source.batch(64, -1), config)}
    if config.task == "sudoku" and config.streams == 1:
        for name, steps in (("one cell a step", None), ("four steps", 4)):
            found[f"sudokus solved, {name}"] = share_solved(model, DenoisingSampler(steps=steps), 256, config.seed)
    return found


def share_solved(model: Any, sampler: DenoisingSampler, count: int = 256, seed: int = 0) -> float:
    """Share of held-out sudokus of 6 to 10 open cells that a sampler solves."""
    ids = sudoku.puzzles(count, seed)
    found = sampler(model, ids, editable=ids == sudoku.OPEN, seeds=range(count))
    return sum(sudoku.solved(found.final_ids)) / count


def run(config: DiffusionTraining, context: TrainingContext) -> TrainingResult:
    """Trains, measures on held-out texts, and writes model, record and report.

    Raises:
        BadInputError: a model to go on from, or data that cannot be read; before the network is made.
    """
    if context.model is not None:
        raise BadInputError("diffusion-lm begins from scratch here.", "Leave --model out; AnyOrderTrainer goes on.")
    source = source_of(config, context.data)
    seed_everything(config.seed)
    model = AnyOrderLM(source.config)
    curve = learn(model, source, config, context.out, context.report)
    figures = measure(model, source, config)
    traces, pictures = [], {}
    if config.streams == 1:  # the content stream of two learns no predictions
        held = source.batch(1, -1)
        sampler = DenoisingSampler(trace_enabled=True)
        open_ = held.response & (torch.arange(held.ids.shape[1]) % 2 == 0)
        found = sampler(model, held.ids, attention_mask=held.attention, editable=open_, seeds=[config.seed])
        traces = [trace.with_text(source.tokenizer) for trace in sampler.trace]
        pictures["A held-out text, half of it open"] = replay_html(found, 0, source.tokenizer)
    name = "rcr" if config.streams == 1 else "as-arm"
    return write_training(
        "diffusion-lm",
        context,
        model,
        config,
        figures,
        {"loss": [(float(step), value) for step, value in curve]},
        tokenizer=source.tokenizer,
        title=context.data or config.task,
        traces=traces,
        column="step",
        pictures=pictures,
        hint=f"everytoken try {name} --model {{folder}} --prompt 'Some words{MASK}'",
    )


TRAINING = Training("diffusion-lm", "a masked diffusion model, from scratch", DiffusionTraining, run)


class AnyOrderTrainer(Trainer):
    """transformers' Trainer with a loss of any order.

    Rows hold ``input_ids``, and may hold ``attention_mask`` and ``labels``, whose -100 mark what is no response (the
    prompt); without labels all of a text is response.

    Args:
        loss: ``"mdlm"``, or ``"any_subset"`` for a network of two streams.
        mask_rates: least and greatest share of the response that is open, for ``any_subset``.
        kwargs: as for ``transformers.Trainer``.

    Raises:
        BadInputError: an unknown loss, rates out of range, or one stream where two are needed.
    """

    def __init__(self, *args: Any, loss: str = "mdlm", mask_rates: tuple[float, float] = (0.15, 0.95), **kwargs: Any):
        if loss not in ("mdlm", "any_subset"):
            raise BadInputError(f"loss is mdlm or any_subset; got {loss!r}.")
        if not 0 < mask_rates[0] <= mask_rates[1] <= 1:
            raise BadInputError(f"mask_rates are shares from 0 to 1; got {mask_rates}.")
        super().__init__(*args, **kwargs)
        streams = getattr(self.model.config, "streams", 2)
        if loss == "any_subset" and streams != 2:
            raise BadInputError("any_subset needs a query stream.", "Make the network with streams=2.")
        self.order_loss, self.mask_rates = loss, mask_rates
        self.model_accepts_loss_kwargs = False  # the loss is a mean: parts of a batch are averaged

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        ids = inputs["input_ids"]
        attention = inputs.get("attention_mask")
        there = torch.ones_like(ids, dtype=torch.bool) if attention is None else attention.bool()
        labels = inputs.get("labels")
        response = there if labels is None else (labels != -100) & there
        if self.order_loss == "mdlm":
            bare = self.accelerator.unwrap_model(model)
            loss = mdlm_loss(model, ids, response, attention, mask_id=bare.config.mask_token_id)
        else:
            loss = any_subset_loss(model, ids, draw_known(response, *self.mask_rates), attention)
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

"""``everytoken train ilm``: an insertion language model from scratch, and a collator for transformers' Trainer.

The command learns star graphs (``training.datasets.star_graphs``), the bytes of a text, or rows of a JSONL file with
``prompt`` and ``completion``, of which only the completion grows. It goes on where it was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...core.errors import BadInputError, check_choices
from ...core.progress import Report, silent
from ...core.rng import seed_everything
from ...decoding.canvas.replay import replay_html
from ...decoding.canvas.trajectory import GrownText
from ...training.base import Training, TrainingContext, TrainingResult
from ...training.datasets.plain_text import TextWindows
from ...training.datasets.star_graphs import BOS, CLS, KINDS, MASK, PAD, TOKENS, Graphs, StarGraphs, star_tokenizer
from ...training.stepwise import fingerprint, fit
from ..any_order.losses import draw_missing, drop_tokens, insertion_loss
from ..any_order.training import AnyOrderTraining, Batch, drawn_rows, read_pairs, seeded
from ..byte_text import VOCABULARY, as_ids, byte_tokenizer
from ..training import write_training
from .configuration_ilm import InsertionLMConfig
from .likelihood import insertion_bound
from .modeling_ilm import InsertionLM
from .sampling import InsertionSampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class InsertionTraining(AnyOrderTraining):
    """An insertion language model from scratch; further settings are those of ``AnyOrderTraining``.

    Args:
        task: ``star-graphs``, or ``text`` for the bytes of a text or for rows with prompt and completion.
        graphs: kind of the star graphs, ``easy`` or ``medium``.
        prefix_gaps: learn to insert nothing into prompts, in place of closing their gaps.

    Raises:
        BadInputError: a value out of range.
    """

    steps: int = 2500
    lr: float = 6e-3
    hold: float = 0.7
    task: str = "star-graphs"
    graphs: str = "medium"
    prefix_gaps: bool = False

    def __post_init__(self) -> None:
        check_choices(self, task=("star-graphs", "text"), graphs=tuple(KINDS))
        super().__post_init__()
        self.config(8, 1, 2, 3)

    def config(self, vocab: int, mask: int, cls: int, bos: int, end: int | None = None) -> InsertionLMConfig:
        """The network's configuration."""
        return InsertionLMConfig(
            vocab_size=vocab,
            mask_token_id=mask,
            cls_token_id=cls,
            bos_token_id=bos,
            eos_token_id=end,
            prefix_gaps=self.prefix_gaps,
            **self.shape(),
        )


@dataclass
class Source:
    """What a network learns from.

    Attributes:
        tokenizer: of the texts; it puts CLS and BOS around a prompt.
        batch: ``(count, step) -> Batch`` of whole texts; a step of -1 gives held-out ones.
        config: of the network.
        graphs: their kind, where texts are star graphs.
    """

    tokenizer: PreTrainedTokenizerBase
    batch: Callable[[int, int], Batch]
    config: InsertionLMConfig
    graphs: StarGraphs | None = None


def insertion_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of bytes with CLS, BOS and mask tokens; a prompt is put between CLS and BOS."""
    from tokenizers import processors

    tokenizer: Any = byte_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "<cls>", "bos_token": "<bos>", "mask_token": "<mask>"})
    marks = [("<cls>", tokenizer.cls_token_id), ("<bos>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <bos>", special_tokens=marks
    )
    found: PreTrainedTokenizerBase = tokenizer
    return found


def source_of(config: InsertionTraining, data: str | None) -> Source:
    """The texts of a training.

    Raises:
        BadInputError: data with a task that makes its own, a text that is too short, or rows without a completion.
    """
    if config.task == "star-graphs":
        if data is not None:
            raise BadInputError("task=star-graphs makes its own graphs.", "Leave --data out, or set task=text.")
        graphs = KINDS[config.graphs]

        def drawn(count: int, step: int) -> Batch:
            ids, response, attention = graphs.questions(count, config.seed, "texts", step).whole()
            return Batch(ids, response, attention)

        return Source(star_tokenizer(), drawn, config.config(len(TOKENS), MASK, CLS, BOS), graphs)
    tokenizer = insertion_tokenizer()
    cls, bos, mask = tokenizer.cls_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id
    shape = config.config(VOCABULARY + 3, mask, cls, bos, 1)
    if data is not None and data.endswith(".jsonl"):
        return Source(tokenizer, _rows(config, data, tokenizer), shape)
    text = TextWindows.of(data, config.seed)
    text.check(config.length)

    def windows(count: int, step: int) -> Batch:
        found = text.held(count, config.length) if step < 0 else text.batch(count, config.length, "ilm", step)
        start = torch.tensor([cls, bos]).expand(count, -1)
        ids = torch.cat([start, as_ids(found)], 1)
        every = torch.ones_like(ids, dtype=torch.bool)
        return Batch(ids, every & (torch.arange(ids.shape[1]) > 1), every)

    return Source(tokenizer, windows, shape)


def _rows(config: InsertionTraining, data: str, tokenizer: Any) -> Callable[[int, int], Batch]:
    """Batches of rows, each CLS, prompt, BOS and completion, padded on the right."""
    pairs = read_pairs(data, tokenizer, config.length)
    longest = max(len(first) + len(second) for first, second in pairs) + 2
    ids = torch.full((len(pairs), longest), tokenizer.pad_token_id)
    response, attention = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for number, (first, second) in enumerate(pairs):
        text = [tokenizer.cls_token_id, *first, tokenizer.bos_token_id, *second]
        ids[number, : len(text)] = torch.tensor(text)
        attention[number, : len(text)] = True
        response[number, len(text) - len(second) : len(text)] = True
    return drawn_rows(Batch(ids, response, attention), config.seed)


def loss_of(model: InsertionLM, batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """The loss of whole texts that lose tokens; what is lost is taken out of the tensor, so that nothing is computed
    for it.
    """
    lost = drop_tokens(batch.ids, batch.attention, draw_missing(batch.response, generator), PAD)
    return insertion_loss(model, lost, closed_gaps=~model.open_gaps(lost.ids, lost.attention))


def learn(
    model: InsertionLM,
    source: Source,
    config: InsertionTraining,
    folder: Path | None = None,
    report: Report = silent,
    name: str = "ilm",
) -> list[tuple[int, float]]:
    """The steps alone: trains the network in place and returns its curve.

    Args:
        folder: where the checkpoint lies; None keeps none.
        name: of the stage, in what is reported.
    """

    def loss(step: int) -> torch.Tensor:
        return loss_of(model, source.batch(config.batch, step), seeded(config, "loss", step))

    identity = fingerprint(config, source.batch(config.batch, 0))
    return fit(model, loss, config.stage(name), folder, report, save_every=config.save_every, identity=identity)


def answers(model: Any, graphs: Graphs, sampler: InsertionSampler, seed: int = 0) -> GrownText:
    """What a sampler writes behind the questions of star graphs."""
    prompts = torch.from_numpy(graphs.prompts)
    rows = range(seed, seed + len(graphs))
    found: GrownText = sampler(model, prompts, attention_mask=(prompts != PAD).long(), seeds=rows)
    return found


def share_right(model: Any, kind: StarGraphs, count: int = 256, seed: int = 0) -> float:
    """Share of held-out star graphs whose whole path is found, the likeliest insertion each time."""
    graphs = kind.questions(count, seed, "held")
    sampler = InsertionSampler(gen_length=2 * kind.answer_length, temperature=0.0, stop_threshold=0.5)
    found = answers(model, graphs, sampler)
    return sum(graphs.right([found.new_ids(row) for row in range(count)])) / count


@torch.no_grad()
def measure(model: InsertionLM, source: Source, config: InsertionTraining) -> dict[str, float]:
    """Figures of a trained network on held-out texts."""
    held = source.batch(64, -1)
    found = {"loss": float(torch.stack([loss_of(model, held, seeded(config, "held", n)) for n in range(8)]).mean())}
    bounds = []
    for row in range(8):
        ids, response = (part[row][held.attention[row]] for part in (held.ids, held.response))
        nats = -insertion_bound(model, ids, response, count=2, seed=config.seed, rows=64).mean()
        bounds.append(float(nats) / int(response.sum()))
    found["nats per token, at most"] = sum(bounds) / len(bounds)
    if source.graphs is not None:
        found["paths found"] = share_right(model, source.graphs, seed=config.seed)
    return found


def run(config: InsertionTraining, context: TrainingContext) -> TrainingResult:
    """Trains, measures on held-out texts, and writes model, record and report.

    Raises:
        BadInputError: a model to go on from, or data that cannot be read; before the network is made.
    """
    if context.model is not None:
        raise BadInputError("ilm begins from scratch here.", "Leave --model out; transformers' Trainer goes on.")
    source = source_of(config, context.data)
    seed_everything(config.seed)
    model = InsertionLM(source.config)
    curve = learn(model, source, config, context.out, context.report)
    figures = measure(model, source, config)
    held = source.batch(1, -1)
    prompt = held.attention & ~held.response
    sampler = InsertionSampler(gen_length=32, temperature=0.0, trace_enabled=True)
    found = sampler(model, held.ids[prompt][None], seeds=[config.seed])
    shown = "'DE CA FG AD CF  CE'" if source.graphs is not None else "'Some words'"
    return write_training(
        "ilm",
        context,
        model,
        config,
        figures,
        {"loss": [(float(step), value) for step, value in curve]},
        tokenizer=source.tokenizer,
        title=context.data or (config.task if source.graphs is not None else "the example text"),
        traces=[trace.with_text(source.tokenizer) for trace in sampler.trace if len(trace)],
        column="step",
        pictures={"A held-out text grows": replay_html(found, 0, source.tokenizer)},
        hint=f"everytoken try ilm --model {{folder}} --prompt {shown}",
    )


TRAINING = Training("ilm", "an insertion language model, from scratch", InsertionTraining, run)


class InsertionCollator:
    """Batches for ``InsertionLM`` from whole texts, for transformers' Trainer.

    Rows hold ``input_ids`` and may hold ``labels``, whose -100 mark what is no answer; without labels everything behind
    the first two tokens (CLS and BOS) is one. Of each row any number of answer tokens becomes missing.

    Args:
        pad_token_id: padding, on the right.
        generator: of what is lost; None takes torch's own.
    """

    def __init__(self, pad_token_id: int = 0, generator: torch.Generator | None = None):
        self.pad_token_id, self.generator = pad_token_id, generator

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = [torch.as_tensor(row["input_ids"]) for row in rows]
        marks = [
            torch.arange(len(text)) > 1 if row.get("labels") is None else torch.as_tensor(row["labels"]) != -100
            for row, text in zip(rows, texts, strict=True)
        ]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(texts, batch_first=True, padding_value=self.pad_token_id)
        response = pad(marks, batch_first=True, padding_value=False)
        there = pad([torch.ones(len(text), dtype=torch.long) for text in texts], batch_first=True)
        missing = draw_missing(response, self.generator)
        return {"input_ids": ids, "attention_mask": there, "labels": ids.masked_fill(~missing, -100)}

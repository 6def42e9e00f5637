"""A test bed for preference optimisation on a CPU: a small language model continues openings, judged by a lexicon.

Hundreds of optimiser steps, thousands of rollouts and several seeds are out of reach of the embedded 135M model on two
cores. So it writes some thousand continuations once, and a Llama of about 3M weights learns them: the start of every
arm (the "SFT model"), and the reference. Its vocabulary holds the frequent tokens of those texts only, a part of the
embedded model's, so that the large model can still say something about every token. Rewards are VADER scores; openings
of training and test share no subject.

The positive control is DPO on the bed's pairs, which raises the reward of controlled sentiment in its own paper (arXiv
2305.18290).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypedDict

import torch

from ...core.converted import cache_dir
from ...core.files import write_text_whole
from ...core.implicit_reward import ImplicitReward
from ...core.loading import load_model, load_tokenizer
from ...core.progress import Report, silent
from ...core.results import Values
from ...core.rng import derive_seed, seed_everything
from ...core.scoring import PromptResponse, pad_rows
from ...training.column_makers import Example
from ...training.datasets.sentiment import continuation_ids, continuations, openings, positivity
from ..base import Context
from .small_models import fit, pruned_tokenizer, small_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...training.column_makers import TokenAnnotator

NEW_TOKENS = 20


class Pair(TypedDict):
    """A tokenized preference row."""

    prompt: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class Sizes(NamedTuple):
    """How much is done: optimiser steps, pairs a step, pairs, held-out samples, steps between measurements."""

    steps: int
    batch: int
    pairs: int
    samples: int
    every: int


def sizes(context: Context) -> Sizes:
    """The sizes of a run."""
    return Sizes(12, 4, 48, 72, 6) if context.quick else Sizes(120, 16, 1280, 720, 20)


@dataclass
class SmallWriter:
    """The small model's folder, its tokenizer, and the embedded model's id of each of its tokens."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    teacher_ids: list[int]

    def model(self) -> PreTrainedModel:
        """A fresh copy of the start."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, use_safetensors=True).eval()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def sample(self, model: PreTrainedModel, prompts: list[str]) -> list[list[int]]:
        """One continuation of ``NEW_TOKENS`` tokens each, temperature 1, up to its end token (included)."""
        return [self.until_end(row) for row in continuation_ids(model, self.tokenizer, prompts, NEW_TOKENS, 256)]

    def until_end(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids[: ids.index(end) + 1] if end in ids else ids

    def pairs(self, model: PreTrainedModel, count: int, margin: float = 0.3) -> list[Pair]:
        """``count`` tokenized preference rows from the model's own continuations, ranked by VADER."""
        rows: list[Pair] = []
        pool, at_once = openings("train"), min(256, 2 * count)
        while len(rows) < count:
            prompts = [pool[index] for index in torch.randint(len(pool), (at_once,)).tolist()]
            sides = [self.sample(model, prompts) for _ in range(2)]
            scores = [positivity([p + t for p, t in zip(prompts, self.decode(side), strict=True)]) for side in sides]
            for index, prompt in enumerate(prompts):
                best = int(scores[1][index] > scores[0][index])
                if scores[best][index] - scores[1 - best][index] >= margin:
                    rows.append(
                        {
                            "prompt": prompt,
                            "prompt_ids": self.encode(prompt),
                            "chosen_ids": sides[best][index],
                            "rejected_ids": sides[1 - best][index],
                        }
                    )
        return rows[:count]

    def rewards_and_kl(
        self, model: PreTrainedModel, reference: PreTrainedModel, prompts: list[str]
    ) -> tuple[list[float], list[float]]:
        """One sampled continuation a prompt: its VADER score, and its KL(policy || reference) in nats."""
        rows = self.sample(model, prompts)
        rewards = positivity([p + t for p, t in zip(prompts, self.decode(rows), strict=True)])
        divergences: list[float] = []
        for first in range(0, len(rows), 64):
            part = [
                PromptResponse(self.encode(p), r)
                for p, r in zip(prompts[first : first + 64], rows[first : first + 64], strict=True)
            ]
            padded = pad_rows(part, self.tokenizer.pad_token_id)
            ids, attention, mask = (side.to(model.device) for side in padded)
            found = ImplicitReward(model, reference.to(model.device)).statistics(ids, mask, attention, reverse_kl=True)[
                "reverse_kl"
            ]
            divergences += found.sum(-1).tolist()
        return rewards, divergences


class SentimentBed:
    """Openings that a small model continues, as positively as it can learn to."""

    name: ClassVar[str] = "sentiment"
    summary: ClassVar[str] = "a language model of 3M weights continues openings, judged by a sentiment lexicon"
    metric: ClassVar[str] = "reward"
    bounds: ClassVar[tuple[float, float]] = (-0.9, 0.9)  # of VADER scores, which lie between -1 and 1

    def start(self, context: Context) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        writer = small_writer(context)
        return writer.model(), writer.tokenizer

    def rows(self, context: Context) -> list[Pair]:
        writer, count = small_writer(context), sizes(context).pairs
        torch.manual_seed(derive_seed(context.seed, "pairs"))
        context.report(f"{count} pairs of the small model's own continuations", 0, 0)
        return writer.pairs(writer.model(), count)

    def measure(self, context: Context, model: PreTrainedModel) -> dict[str, Values]:
        writer = small_writer(context)
        torch.manual_seed(derive_seed(context.seed, "measure"))  # the same random numbers for every arm
        rewards, kl = writer.rewards_and_kl(model, writer.model(), held_out(context))
        return {"reward": rewards, "KL": kl}

    def positive_control(self, context: Context) -> PreTrainedModel:
        from ...preference.dpo import DPOLoss
        from ...preference.short_training import train_quietly

        writer, size = small_writer(context), sizes(context)
        context.report("DPO", 0, size.steps)
        return train_quietly(
            writer.model(),
            writer.model(),
            DPOLoss(beta=0.1),
            writer.tokenizer,
            self.rows(context),
            per_device_train_batch_size=size.batch,
            max_steps=size.steps,
            learning_rate=3e-4,
            warmup_steps=5,
            lr_scheduler_type="constant_with_warmup",
            seed=context.seed,
            data_seed=context.seed,
        ).model


def held_out(context: Context) -> list[str]:
    """Openings that no pair begins with, as many as a measurement samples."""
    samples = sizes(context).samples
    return (openings("test") * (samples // 36 + 1))[:samples]


def small_writer(context: Context) -> SmallWriter:
    """The small model, made once and kept in the user's cache (about ten minutes on two cores; a quick one in one)."""
    from transformers import AutoTokenizer

    count, steps = (120, 40) if context.quick else (6000, 1200)
    name = "embedded" if context.model is None else str(derive_seed(0, context.model))
    folder = cache_dir() / "reproduce" / f"sentiment-bed-{name}-{count}"
    if not (folder / "teacher_ids.json").is_file():
        seed_everything(0)  # one bed for all seeds
        tokenizer = load_tokenizer(context.model)
        prompts = ((openings("train") + openings("test")) * (count // 120 + 1))[:count]
        texts = written(context, prompts, folder.with_suffix(".json"))
        whole = [p + t for p, t in zip(prompts, texts, strict=True)]
        small, teacher_ids = pruned_tokenizer(tokenizer, whole, min_count=4)
        end = small.eos_token_id
        rows = []
        for prompt, text in zip(prompts, whole, strict=True):
            head, ids = small(prompt)["input_ids"], small(text)["input_ids"]
            ids = [*ids, end] if len(ids) < len(head) + NEW_TOKENS else ids  # the large model ended there
            rows.append(PromptResponse(head, ids[len(head) :]))
        model = small_model(len(small), hidden=192, layers=4, heads=6, end=end, context=128)
        model.generation_config.pad_token_id = small.pad_token_id

        def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            while True:
                picked = [rows[index] for index in torch.randint(len(rows), (32,)).tolist() if rows[index][1]]
                ids, attention, _mask = pad_rows(picked, small.pad_token_id)
                yield ids, torch.where(attention.bool(), ids, -100)

        fit(model, batches(), steps, 2e-3, context.report, "test bed")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / "bed"
            model.save_pretrained(made)
            small.save_pretrained(made)
            (made / "teacher_ids.json").write_text(json.dumps(teacher_ids), encoding="utf-8")
            if not folder.exists():
                made.rename(folder)
        seed_everything(context.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return SmallWriter(folder, tokenizer, json.loads((folder / "teacher_ids.json").read_text(encoding="utf-8")))


def written(context: Context, prompts: list[str], path: Path) -> list[str]:
    """The embedded model's continuations, kept as they come: an interrupted run goes on."""
    texts: list[str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if len(texts) < len(prompts):
        teacher, tokenizer = load_model(context.model, dtype="float32", packed=True), load_tokenizer(context.model)
        while len(texts) < len(prompts):
            texts += continuations(teacher, tokenizer, prompts[len(texts) : len(texts) + 240], NEW_TOKENS, batch=240)
            write_text_whole(path, json.dumps(texts))
            context.report("test bed: continuations", len(texts), len(prompts))
    return texts


@dataclass
class TeacherRewards:
    """An annotator of the large model's vocabulary for the small model's tokens: ids are translated, values are the
    same tokens'.
    """

    annotator: TokenAnnotator
    writer: SmallWriter

    def __post_init__(self) -> None:
        self.column = self.annotator.column

    def annotate(self, examples: Sequence[Example], report: Report = silent) -> list[torch.Tensor]:
        ids = self.writer.teacher_ids
        return self.annotator.annotate(
            [Example(e.prompt, [ids[t] for t in e.prompt_ids], [ids[t] for t in e.response_ids]) for e in examples],
            report,
        )

    def fingerprint(self) -> str:
        return f"teacher {self.annotator.fingerprint()} {self.writer.folder.name}"

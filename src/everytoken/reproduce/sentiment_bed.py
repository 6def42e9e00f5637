"""A test bed for preference optimisation on a CPU: a small language model of openings and what the embedded model makes of them.

Hundreds of optimiser steps, thousands of rollouts and several seeds are out of reach of the embedded 135M model on two cores. So it
writes some thousand continuations once, and a Llama of about 3M weights learns them: the start of every arm (the "SFT model"), and the
reference. Its vocabulary holds the frequent tokens of those texts only, a part of the embedded model's, so that the large model
can still say something about every token. Rewards are VADER scores; openings of training and test share no subject.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.implicit_reward import ImplicitReward
from ..core.loading import cache_dir, load_model, load_tokenizer
from ..core.progress import Report, silent
from ..core.rng import derive_seed, seed_everything
from ..core.scoring import PromptResponse, pad_rows
from ..training.column_makers import Example
from ..training.datasets.sentiment import continuation_ids, continuations, openings, positivity
from .base import Context
from .small import fit, pruned_tokenizer, small_model

NEW_TOKENS = 20


@dataclass
class Bed:
    """The small model's folder, its tokenizer, and the embedded model's id of each of its tokens."""

    folder: Path
    tokenizer: Any
    teacher_ids: list[int]

    def model(self) -> Any:
        """A fresh copy of the start."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, use_safetensors=True).eval()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: Any) -> list[str]:
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def sample(self, model: Any, prompts: list[str]) -> list[list[int]]:
        """One continuation of ``NEW_TOKENS`` tokens each, temperature 1, up to its end token (included)."""
        return [self.until_end(row) for row in continuation_ids(model, self.tokenizer, prompts, NEW_TOKENS, 256)]

    def until_end(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids[: ids.index(end) + 1] if end in ids else ids

    def pairs(self, model: Any, count: int, margin: float = 0.3) -> list[dict[str, Any]]:
        """``count`` tokenized preference rows from the model's own continuations, ranked by VADER."""
        rows: list[dict[str, Any]] = []
        pool = openings("train")
        while len(rows) < count:
            prompts = [pool[index] for index in torch.randint(len(pool), (256,)).tolist()]
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

    def reward_and_kl(self, model: Any, reference: Any, prompts: list[str]) -> tuple[float, float]:
        """Mean VADER score of sampled continuations, and their mean KL(policy || reference) in nats a response."""
        rows = self.sample(model, prompts)
        texts = [p + t for p, t in zip(prompts, self.decode(rows), strict=True)]
        reward = sum(positivity(texts)) / len(texts)
        total = 0.0
        for first in range(0, len(rows), 64):
            part = [
                PromptResponse(self.encode(p), r)
                for p, r in zip(prompts[first : first + 64], rows[first : first + 64], strict=True)
            ]
            ids, attention, mask = pad_rows(part, self.tokenizer.pad_token_id)
            total += (
                ImplicitReward(model, reference)
                .statistics(ids, mask, attention, reverse_kl=True)["reverse_kl"]
                .sum()
                .item()
            )
        return reward, total / len(rows)


def bed(context: Context) -> Bed:
    """The test bed, made once and kept in the user's cache (about ten minutes on two cores; a quick one in one)."""
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

        def batches() -> Any:
            while True:
                picked = [rows[index] for index in torch.randint(len(rows), (32,)).tolist() if rows[index][1]]
                ids, attention, _mask = pad_rows(picked, small.pad_token_id)
                yield ids, torch.where(attention.bool(), ids, -100)

        fit(model, batches(), steps, 2e-3, context.progress, "test bed")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / "bed"
            model.save_pretrained(made)
            small.save_pretrained(made)
            (made / "teacher_ids.json").write_text(json.dumps(teacher_ids))
            if not folder.exists():
                made.rename(folder)
        seed_everything(context.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Bed(folder, tokenizer, json.loads((folder / "teacher_ids.json").read_text()))


def written(context: Context, prompts: list[str], path: Path) -> list[str]:
    """The embedded model's continuations, kept as they come: an interrupted run goes on."""
    texts: list[str] = json.loads(path.read_text()) if path.is_file() else []
    if len(texts) < len(prompts):
        teacher, tokenizer = load_model(context.model, dtype="float32", packed=True), load_tokenizer(context.model)
        path.parent.mkdir(parents=True, exist_ok=True)
        while len(texts) < len(prompts):
            texts += continuations(teacher, tokenizer, prompts[len(texts) : len(texts) + 240], NEW_TOKENS, batch=240)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(texts))
            temporary.replace(path)
            context.progress(f"test bed: {len(texts)} of {len(prompts)} continuations written")
    return texts


@dataclass
class TeacherRewards:
    """An annotator of the large model's vocabulary for the small model's tokens: ids are translated, values are the same tokens'."""

    annotator: Any
    bed: Bed

    def __post_init__(self) -> None:
        self.column = self.annotator.column

    def annotate(self, examples: Sequence[Example], report: Report = silent) -> list[torch.Tensor]:
        ids = self.bed.teacher_ids
        return self.annotator.annotate(
            [Example(e.prompt, [ids[t] for t in e.prompt_ids], [ids[t] for t in e.response_ids]) for e in examples],
            report,
        )

    def fingerprint(self) -> str:
        return f"teacher {self.annotator.fingerprint()} {self.bed.folder.name}"

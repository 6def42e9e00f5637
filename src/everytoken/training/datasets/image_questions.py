"""Questions about images from a user's file, as batches that a vision-language model learns from.

A file is JSONL: ``{"image": "photos/1.png", "prompt": "What is it?", "answer": "A boat."}``. Paths of images are
relative to the file. A prompt without the processor's image token gets it in front; write prompts as your
model's chat template has them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import BadInputError
from ...core.rng import derive_seed
from ...core.settings import read_text
from ...core.vision import with_image_token

if TYPE_CHECKING:
    import torch

FIELDS = ("image", "prompt", "answer")


def read_image_questions(file: str) -> list[dict[str, Any]]:
    """The rows of a file, with images as paths.

    Raises:
        BadInputError: no such file, a line without ``image``, ``prompt`` and ``answer``, an image that is not there, or
            no row.
    """
    path, rows = Path(file), []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts = {name: row[name] for name in FIELDS}
        except (ValueError, KeyError, TypeError) as error:
            raise BadInputError(
                f"{file}, line {number}: no object with {', '.join(FIELDS)}.", 'One a line: {"image": "1.png", ...}'
            ) from error
        if not all(isinstance(value, str) and value.strip() for value in texts.values()):
            raise BadInputError(f"{file}, line {number}: {', '.join(FIELDS)} are texts that are not empty.")
        image = path.parent / texts["image"]
        if not image.is_file():
            raise BadInputError(f"{file}, line {number}: there is no image {image}.")
        rows.append({**texts, "image": image})
    if not rows:
        raise BadInputError(f"{file} holds no question.", 'One a line: {"image": ..., "prompt": ..., "answer": ...}')
    return rows


class ImageQuestions:
    """Batches of a file's questions, drawn anew for every step.

    Args:
        processor: of the model.
        rows: from ``read_image_questions``.
        seed: of the draws.

    Raises:
        BadInputError: a processor without an image token or an end token.
    """

    def __init__(self, processor: Any, rows: list[dict[str, Any]], seed: int = 0):
        self.processor, self.rows, self.seed = processor, rows, seed
        if getattr(processor, "image_token", None) is None or processor.tokenizer.eos_token_id is None:
            raise BadInputError(f"{type(processor).__name__} names no image token, or no end token.")

    def batch(self, size: int, *names: object) -> dict[str, torch.Tensor]:
        """A batch of one named part of a run, padded on the right; labels are -100 but at answers and end tokens.

        Args:
            size: rows.
            names: as for ``core.rng.derive_seed``.
        """
        rng = random.Random(derive_seed(self.seed, "image questions", *names))
        return self.collate([rng.choice(self.rows) for _ in range(size)])

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """These rows as a batch."""
        import torch
        from PIL import Image

        tokenizer, texts, pixels = self.processor.tokenizer, [], []
        for row in rows:
            prompt = with_image_token(self.processor, row["prompt"])
            with Image.open(row["image"]) as image:
                made = self.processor(images=image.convert("RGB"), text=prompt, return_tensors="pt")
            answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            texts.append((made["input_ids"][0].tolist(), answer))
            pixels.append(made["pixel_values"])
        width = max(len(prompt) + len(answer) for prompt, answer in texts)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        ids, labels = torch.full((len(rows), width), pad), torch.full((len(rows), width), -100)
        mask = torch.zeros_like(ids)
        for index, (prompt, answer) in enumerate(texts):
            whole = torch.tensor(prompt + answer)
            ids[index, : len(whole)], mask[index, : len(whole)] = whole, 1
            labels[index, len(prompt) : len(whole)] = whole[len(prompt) :]
        return {"pixel_values": torch.cat(pixels), "input_ids": ids, "attention_mask": mask, "labels": labels}

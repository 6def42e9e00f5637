"""The trial of this station: a vision-language model with all visual tokens, with as many random ones, and with each
method's, on scenes with questions or on an image of the user's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import BadInputError, EverytokenError
from ..core.settings import check_file
from ..core.trace import TokenTrace
from ..core.vision import chat_prompt, load_processor, load_vlm, resolve_vlm
from ..decoding.trial import TrialRequest, TrialResult
from ..training.datasets.scenes import IDS, IMAGE, SceneMaker, pixel_values
from ..training.vision import held_out
from .baselines import RandomTokens
from .families import family_of
from .inputs import ReducedInputs, placeholders
from .measure import cache_bytes, prefill_flops
from .pictures import image_of, reduction_html
from .seam import reduce_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

READS_IMAGES = True
"""``--image`` may be given."""
QUESTIONS, BATCH = 200, 50
BASELINE, RANDOM = "all tokens", "random"
PROMPT = "Describe the image."


@dataclass
class _Work:
    """Prompts with images, and the answers where they are known."""

    inputs: dict[str, torch.Tensor]
    answers: list[int] = field(default_factory=list)


def trace_columns(_trial: object) -> tuple[str, ...]:
    """The columns of the traces."""
    return ("kept", "group", "score")


def trial(request: TrialRequest) -> TrialResult:
    """Accuracy (scenes) or text (an image of the user's), tokens and time of each method; see ``decoding.trial``.

    Raises:
        BadInputError: a prompt or an image that cannot be read; scenes with a model that was not trained on them.
        UnsupportedModelError: a model whose tokens a method cannot reduce, said before anything runs.
    """
    image = request.options.get("image")
    if image is None and resolve_vlm(request.model) != resolve_vlm():
        raise BadInputError("Scenes are for the model that ships.", "Give an image: --image photo.jpg")
    if image is None and request.prompt is not None:
        raise BadInputError("Scenes come with questions of their own.", "Give an image too: --image photo.jpg")
    if request.data is not None:
        raise BadInputError("Reducers read an image, not a data file.", "Give it as --image photo.jpg")
    request.report("loading the model", 0, 0)
    processor, model = load_processor(request.model), load_vlm(request.model)
    seed = int(request.options.get("seed", 0))
    works = _scenes(seed, model) if image is None else [_photo(processor, Path(image), request.prompt or PROMPT)]
    works = [replace(work, inputs={k: v.to(model.device) for k, v in work.inputs.items()}) for work in works]
    result = TrialResult({}, "accuracy" if image is None else "visual tokens", column="kept")
    new_tokens = 1 if image is None else int(request.options.get("max_new_tokens", 128))
    run = _Run(request, model, processor, works, new_tokens, result)
    run.arm(BASELINE, None)
    for item in request.trials:
        if "segments" in item.factory.declares.needs:
            result.notes.append(f"{item.name}: these prompts hold one image, so that it has no demonstrations to rank.")
        reducer = item.factory(**fitted(item.factory, item.settings, model, result))
        share = run.arm(item.name, reducer)
        if len(request.trials) == 1 and reducer.declares.positions == "packed" and not family_of(model).axes:
            run.arm(f"{item.name}, original positions", reducer, positions="original", shown=False)
        if share < 1:
            name = RANDOM if len(request.trials) == 1 else f"{RANDOM} for {item.name}"
            run.arm(name, RandomTokens(share), shown=False)
    return result


def fitted(factory: Any, settings: dict[str, Any], model: PreTrainedModel, result: TrialResult) -> dict[str, Any]:
    """Settings with what a method that cuts inside the decoder changes for one of few layers; changes are noted."""
    depth = model.config.get_text_config().num_hidden_layers
    changes = factory.for_depth(depth) if hasattr(factory, "for_depth") else {}
    if "layer" in settings or not changes:
        return settings
    changes = {name: value for name, value in changes.items() if name not in settings}
    said = ", ".join(f"{name}={value}" for name, value in changes.items())
    result.notes.append(f"The model has {depth} decoder layers: {factory.__name__} ran with {said}.")
    return settings | changes


def _scenes(seed: int, model: PreTrainedModel) -> list[_Work]:
    """Questions about scenes that no training sees, one of each."""
    scenes, asked = held_out(QUESTIONS, seed + 1000, SceneMaker())
    works = []
    for start in range(0, QUESTIONS, BATCH):
        chosen = asked[start : start + BATCH]
        rows = [[IDS[IMAGE]] * model.config.image_seq_length + question.ids[:2] for question in chosen]
        ids = torch.tensor(rows)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["pixel_values"] = pixel_values(scenes[start : start + BATCH])
        works.append(_Work(inputs, [question.ids[2] for question in chosen]))
    return works


def _photo(processor: ProcessorMixin, path: Path, prompt: str) -> _Work:
    """One image of the user's with a prompt."""
    from PIL import Image, UnidentifiedImageError

    check_file(path)
    try:
        image = Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise BadInputError(f"{path} is no image that can be read: {error}.") from error
    text = chat_prompt(processor, prompt)
    return _Work(dict(processor(images=image, text=text, return_tensors="pt")))


@dataclass
class _Run:
    """Runs every arm on the same work."""

    request: TrialRequest
    model: PreTrainedModel
    processor: ProcessorMixin
    works: list[_Work]
    new_tokens: int
    result: TrialResult

    def arm(self, name: str, reducer: Any, positions: str | None = None, shown: bool = True) -> float:
        """One row; returns the share of visual tokens that was left at the end.

        Args:
            shown: add the trace and the pictures.
        """
        self.request.report(f"running {name}", 0, 0)
        generator = torch.Generator().manual_seed(int(self.request.options.get("seed", 0)))
        arguments = {"max_new_tokens": self.new_tokens, "do_sample": False}
        before = after = right = total = 0
        seconds = 0.0
        batch: ReducedInputs | None = None
        lengths = [int(self.works[0].inputs["attention_mask"][0].sum())]
        for work in self.works:
            began = time.perf_counter()
            if reducer is None:
                output = self.model.generate(**work.inputs, **arguments)
                seconds += time.perf_counter() - began
                here = int(placeholders(self.model, work.inputs).sum())
                before, after = before + here, after + here
            else:
                with reduce_tokens(self.model, reducer, positions, generator) as run:
                    output = self.model.generate(**work.inputs, **arguments)
                seconds += time.perf_counter() - began
                batch = run.last
                assert batch is not None
                before += batch.tokens_before
                text = int((batch.index >= 0).sum()) - batch.tokens_after
                last = max(run.lengths, default=-1)
                after += batch.tokens_after if last < 0 else sum(run.lengths[last]) - text
                lengths = [int((batch.index[0] >= 0).sum())] if last < 0 else [run.lengths[k][0] for k in run.lengths]
            new = output[:, work.inputs["input_ids"].shape[1] :]
            right += sum(int(row[0]) == answer for row, answer in zip(new.tolist(), work.answers, strict=False))
            total += len(new)
            self.result.texts.setdefault(name, self.processor.decode(new[0], skip_special_tokens=True))
        if not self.works[0].answers:
            self.result.notes.append(f"{name}: {self.result.texts[name]!r}")
        row = {"accuracy": right / total} if self.works[0].answers else {}
        config = self.model.config
        self.result.rows[name] = row | {
            "visual tokens": after / total,
            "decoder MFLOPs, first prompt": prefill_flops(config, lengths) / 1e6,
            "cache kB, first prompt": cache_bytes(config, lengths, self.model.dtype.itemsize) / 1e3,
            "ms a prompt": 1e3 * seconds / total,
        }
        if shown and batch is not None and batch.reductions:
            self.show(name, batch)
        return after / before

    def show(self, name: str, batch: ReducedInputs) -> None:
        """The first image's trace and pictures."""
        reduction, grid = batch.reductions[0], batch.grids[0]
        token = int(self.model.config.image_token_id)
        trace = TokenTrace([token] * reduction.total, title=f"{name}: the first image's tokens", station="reduction")
        groups = reduction.groups().tolist()
        columns = grid[1] if grid is not None else reduction.total
        ends = ["\n" if place % columns == columns - 1 else " " for place in range(len(trace))]
        trace.texts = [f"{place // columns},{place % columns}{end}" for place, end in enumerate(ends)]
        trace.add("kept", ["kept" if group >= 0 else "dropped" for group in groups])
        trace.add("group", [None if group < 0 else group for group in groups])
        if reduction.scores is not None:
            trace.add("score", reduction.scores.float())
        self.result.traces.append(trace)
        pixels = self.works[-1].inputs["pixel_values"]
        if grid is None or pixels.dim() < 4 or pixels.shape[-3] != 3:
            return
        first = pixels.reshape(-1, *pixels.shape[-3:])[0]
        try:
            self.result.pictures.append(reduction_html(image_of(first), grid, name, reduction))
        except EverytokenError as error:  # no pillow: the trace alone
            self.result.notes.append(error.message)

"""Any reducer in the tasks of lmms-eval: ``--model everytoken_reduced``.

::

    python -m lmms_eval --model everytoken_reduced --tasks mme \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,reducer=divprune,keep=0.1

lmms-eval finds the model by its entry point once both packages are installed. ``reducer`` is a method's name
(``everytoken papers reduction``), the name of a baseline (``FastV``, ``ToMe``, ``RandomTokens``), or ``none`` for all
tokens; other arguments are its settings. Answers come with the tokens that the language model really read. Prompts
without images run without the reducer, which has nothing to do there; videos are refused.

A likelihood is asked for with the answer in the prompt. A reducer must not see it: the answer belongs to no image's
text. Reducers inside the decoder rank by the prompt's last token, so that there is no likelihood with them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from ..catalog.cards import load_catalog
from ..catalog.house import load_house
from ..core.errors import BadInputError, UnknownNameError, UnsupportedModelError, require
from ..core.settings import parse_settings
from ..core.vision import chat_prompt, load_processor, load_vlm
from ..reduction.inputs import ReducedInputs, check_reducer, default_segments, placeholders
from ..reduction.inside import DecoderReducer
from ..reduction.seam import reduce_tokens

if TYPE_CHECKING or find_spec("lmms_eval") is not None:
    from lmms_eval.api.model import lmms
else:  # the module can be read without it; a model cannot be made

    class lmms:
        """Stands for lmms-eval's base class where that is not installed."""

        def __init__(self) -> None:
            self.task_dict: dict[str, Any] = {}


STATION, NONE = "reduction", "none"
DEFAULTS = {"max_new_tokens": 128, "temperature": 0.0, "num_beams": 1}
PASSED = ("max_new_tokens", "num_beams", "top_p", "top_k", "repetition_penalty")


def manifest() -> Any:
    """What the entry point ``lmms_eval.models`` hands over."""
    from lmms_eval.models.registry_v2 import ModelManifest

    path = f"{__name__}.{ReducedModel.__name__}"
    return ModelManifest(model_id="everytoken_reduced", simple_class_path=path)


def reducer_classes() -> dict[str, Any]:
    """Everything that reduces tokens, by the names of cards and of exported classes, in small letters."""
    paths = {card.slug: card.implementation for card in load_catalog().values() if card.station == STATION}
    paths |= {path.partition(":")[2].lower(): path for path in load_house()[STATION].exports}
    found = {}
    for name, path in paths.items():
        if path:
            module, _, attribute = path.partition(":")
            item = getattr(importlib.import_module(module), attribute)
            if hasattr(item, "declares") and "projector" not in item.declares.where:
                found[name] = item
    return found


def make_reducer(name: str, settings: dict[str, Any]) -> Any:
    """A reducer from what stands in ``--model_args``; None for ``none``.

    Raises:
        UnknownNameError: no such reducer, or no such setting of it; suggests the nearest.
        BadInputError: a value out of range.
    """
    if name.lower() == NONE:
        if settings:
            raise UnknownNameError("argument", next(iter(settings)), ARGUMENTS)
        return None
    known = reducer_classes()
    if name.lower() not in known:
        raise UnknownNameError("reducer", name, [*known, NONE])
    factory = known[name.lower()]
    return factory(**parse_settings(name, factory, [f"{key}={value}" for key, value in settings.items()]))


class ReducedModel(lmms):
    """A vision-language model of transformers with a reducer, as lmms-eval's models are.

    Args:
        pretrained: a hub id, a folder, or ``scenes-vlm`` for the tiny model that ships.
        reducer: see the module.
        positions: ``packed`` or ``original``; None takes what the reducer declares.
        dtype, device, trust_remote_code: as for ``load_vlm``.
        batch_size: prompts at once; 1 for models whose processor does not pad.
        generator_seed: of random choices.
        max_batch_size: lmms-eval passes it; not used.
        settings: of the reducer.

    Raises:
        MissingExtraError: lmms-eval is not installed.
        UnknownNameError, BadInputError, UnsupportedModelError: a reducer or a setting that does not exist, or a model
            that the reducer cannot work with; before any task begins.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "scenes-vlm",
        reducer: str = "divprune",
        positions: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
        generator_seed: int = 0,
        max_batch_size: int | None = None,
        **settings: Any,
    ):
        require("lmms_eval", None, "Evaluating with lmms-eval")
        super().__init__()
        self.reducer = make_reducer(reducer, settings)
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise BadInputError(f"batch_size is a number of 1 or more; got {batch_size!r}.")
        self.batch_size = int(batch_size)
        self.positions, self.generator_seed = positions, generator_seed
        self.model = load_vlm(pretrained, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        if self.reducer is not None:
            check_reducer(self.model, self.reducer, positions)
        self.processor = load_processor(pretrained, trust_remote_code=trust_remote_code)
        self.processor.tokenizer.padding_side = "left"
        self.tokens_before = self.tokens_after = 0

    # -- what lmms-eval calls -----------------------------------------------------------------------------------------
    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """An answer to every request, in order, with its numbers of tokens.

        Raises:
            BadInputError: a visual input that is no image.
        """
        from lmms_eval.api.instance import GenerationResult, TokenCounts

        results: list[Any] = []
        for batch in self._batches(requests):
            prompts, settings, visuals = batch
            inputs = self._inputs(prompts, visuals)
            with self._reduced(bool(visuals[0])) as run:
                output = self.model.generate(**inputs, **generation(settings))
            read = inputs["attention_mask"].sum(-1).tolist()
            if run is not None:
                read = self._counted(run.last)
            new = output[:, inputs["input_ids"].shape[1] :]
            for row, (prompt, ids) in enumerate(zip(prompts, new, strict=True)):
                text = cut_at(self.processor.decode(ids, skip_special_tokens=True), settings.get("until"))
                pad = self.processor.tokenizer.pad_token_id
                counts = TokenCounts(input_tokens=read[row], output_tokens=int((ids != pad).sum()))
                results.append(GenerationResult(text, counts))
                self.cache_hook.add_partial("generate_until", (prompt, settings), text)
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """The log-probability of every request's answer, and whether it is what greedy decoding would say.

        Raises:
            UnsupportedModelError: a reducer inside the decoder.
            BadInputError: a visual input that is no image, or an empty answer.
        """
        if isinstance(self.reducer, DecoderReducer):
            raise UnsupportedModelError(
                f"{type(self.reducer).__name__} ranks image tokens by the prompt's last token, and in a likelihood "
                "that is the answer's.",
                "Use tasks that generate.",
            )
        found = []
        for request in requests:
            context, target, to_visual, number, task, split = request.args
            document = self.task_dict[task][split][number]
            answer = target if isinstance(target, str) else target(document)
            visuals = self._images(to_visual, document)
            inputs = self._inputs([context], [visuals])
            ids = self.processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
            if not ids.shape[1]:
                raise BadInputError(f"The answer {answer!r} has no tokens.")
            found.append(self._likelihood(inputs, ids.to(self.model.device), bool(visuals)))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Refused: rounds continue from a cache, and a reduced prompt's cache is shorter than the prompt."""
        raise UnsupportedModelError("everytoken_reduced answers single rounds.", "Choose a task of one round.")

    # -- inside -------------------------------------------------------------------------------------------------------
    def _images(self, to_visual: Any, document: Any) -> list[Any]:
        images = [item for item in (to_visual(document) or []) if item is not None]
        for item in images:
            if not hasattr(item, "convert"):
                raise BadInputError(f"everytoken_reduced reads images; this task gives {type(item).__name__}.")
        return [item.convert("RGB") for item in images]

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[list[str], dict[str, Any], list[list[Any]]]]:
        """Neighbours with the same settings, all with images or all without, up to ``batch_size``."""
        rows = []
        for request in requests:
            context, settings, to_visual, number, task, split = request.args
            images = self._images(to_visual, self.task_dict[task][split][number])
            rows.append((context, dict(settings), images))
        for _, same in groupby(rows, lambda row: (repr(sorted(row[1].items())), bool(row[2]))):
            group = list(same)
            for first in range(0, len(group), self.batch_size):
                some = group[first : first + self.batch_size]
                yield [row[0] for row in some], some[0][1], [row[2] for row in some]

    def _inputs(self, contexts: Sequence[str], images: Sequence[list[Any]]) -> dict[str, torch.Tensor]:
        texts = [chat_prompt(self.processor, text, len(own)) for text, own in zip(contexts, images, strict=True)]
        arguments = {"images": list(images)} if images[0] else {}
        made = self.processor(text=texts, return_tensors="pt", padding=len(texts) > 1, **arguments)
        dtype = self.model.dtype
        return {
            name: value.to(self.model.device, dtype if value.is_floating_point() else None)
            for name, value in made.items()
        }

    def _reduced(self, visual: bool) -> AbstractContextManager[Any]:
        if self.reducer is None or not visual:
            return nullcontext()
        generator = torch.Generator().manual_seed(self.generator_seed)
        return reduce_tokens(self.model, self.reducer, self.positions, generator)

    def _counted(self, batch: ReducedInputs) -> list[int]:
        """Tokens of each prompt that the language model read; and the sums over all prompts so far."""
        self.tokens_before += batch.tokens_before
        self.tokens_after += batch.tokens_after
        return [int(count) for count in (batch.index >= 0).sum(-1).tolist()]

    @torch.no_grad()
    def _likelihood(self, inputs: dict[str, torch.Tensor], answer: torch.Tensor, visual: bool) -> tuple[float, bool]:
        length = answer.shape[1]
        whole = dict(inputs)
        for name, tail in (("input_ids", answer), ("attention_mask", torch.ones_like(answer))):
            whole[name] = torch.cat([inputs[name], tail.to(inputs[name].dtype)], -1)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                whole[name] = torch.cat([inputs[name], torch.zeros_like(answer).to(inputs[name].dtype)], -1)
        extra = {}
        if self.reducer is not None and visual:
            segments = default_segments(placeholders(self.model, whole).long() - 1)
            segments[:, -length:] = -1  # the answer is no image's text
            extra["segments"] = segments
        with self._reduced(visual) as run:
            logits = self.model(**whole, **extra).logits[:, -length - 1 : -1].float()
        if run is not None:
            self._counted(run.last)
        chosen = logits.log_softmax(-1).gather(-1, answer[..., None])
        return float(chosen.sum()), bool((logits.argmax(-1) == answer).all())


ARGUMENTS = (
    "pretrained",
    "reducer",
    "positions",
    "dtype",
    "device",
    "trust_remote_code",
    "batch_size",
    "generator_seed",
)
"""Of ``ReducedModel``, for suggestions."""


def generation(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's settings as arguments of ``generate``; greedy unless a temperature is given."""
    given = DEFAULTS | {name: value for name, value in settings.items() if value is not None}
    arguments = {name: given[name] for name in PASSED if name in given}
    warm = float(given["temperature"]) > 0 and given.get("do_sample") is not False
    if not warm:
        arguments.pop("top_p", None)
        arguments.pop("top_k", None)
        return arguments | {"do_sample": False}
    return arguments | {"do_sample": True, "temperature": float(given["temperature"])}


def cut_at(text: str, until: str | Sequence[str] | None) -> str:
    """A text up to the first of some words, without white space around it."""
    for word in [until] if isinstance(until, str) else until or []:
        if word:
            text = text.split(word)[0]
    return text.strip()

"""Labels for R2R's router: which tokens of the large model's answers would the small one have changed, and does it
matter?

1. The large model answers the prompts, greedily.
2. The small model reads each answer in one forward. Where its arg-max is the large model's token, the token is
    *identical*.
3. At every mismatch the large model goes on from the text so far with the small model's token, and with its own, to the
   end of the sentence.
4. A verifier is given the common context and both continuations: *divergent* if they differ in meaning or conclusion,
   else *neutral*.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import BadInputError
from ...core.scoring import end_tokens, turn_ids
from ...decoding.checks import check_same_vocabulary
from ...decoding.row import known_tokens
from ..speculative.modeling_feature_draft import FeatureDraftForCausalLM, FeatureTap
from .modeling_token_router import top_logits
from .verifiers import Verifier

IDENTICAL, NEUTRAL, DIVERGENT = 0, 1, 2
SENTENCE_ENDS = (".", "!", "?", "\n", "。", "！", "？")
Report = Callable[[str, int, int], None]
"""``(stage, done, total)``."""


@dataclass
class Labels:
    """Every position of the large model's answers, in order.

    Attributes:
        hidden, embedding, logits: the router's inputs ``[N, D]``, ``[N, E]``, ``[N, K]``.
        kinds: ``[N]`` IDENTICAL, NEUTRAL or DIVERGENT.
        prompts: ``[N]`` which prompt a position belongs to.
        small, large: ``[N]`` the small model's arg-max and the large model's token.
    """

    hidden: torch.Tensor
    embedding: torch.Tensor
    logits: torch.Tensor
    kinds: torch.Tensor
    prompts: torch.Tensor
    small: torch.Tensor
    large: torch.Tensor

    def where(self, keep: torch.Tensor) -> Labels:
        return Labels(**{name: value[keep] for name, value in vars(self).items()})


class Diary:
    """Answers and verdicts as they come, one JSON object a line, so that an interrupted run goes on where it stopped.

    Args:
        path: the file; None keeps nothing.
        key: what the labels depend on; a file with another key is begun anew.
    """

    def __init__(self, path: Path | None = None, key: str = ""):
        self.path = path
        self.answers: list[tuple[list[int], list[int]]] = []
        self.verdicts: dict[tuple[int, int], bool] = {}
        if path is None:
            return
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        lines = text.splitlines()
        if lines[:1] != [json.dumps({"key": key})]:
            path.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")
            return
        for line in lines[1:]:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the line that an interruption cut off
            if "answer" in entry:
                self.answers.append(tuple(entry["answer"]))
            else:
                index, place, divergent = entry["verdict"]
                self.verdicts[index, place] = divergent
        if not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def write(self, entries: list[dict[str, Any]]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)

    def add_answers(self, pairs: list[tuple[list[int], list[int]]]) -> None:
        self.answers += pairs
        self.write([{"answer": pair} for pair in pairs])

    def add_verdicts(self, places: list[tuple[int, int]], divergent: list[bool]) -> None:
        self.verdicts |= dict(zip(places, divergent, strict=True))
        self.write([{"verdict": [*place, verdict]} for place, verdict in zip(places, divergent, strict=True)])


def answer(
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch: int,
    report: Report,
    diary: Diary,
) -> None:
    """The large model's greedy answers: ``(prompt ids, answer ids)`` each, into the diary."""
    for first in range(len(diary.answers), len(prompts), batch):
        report("the large model answers", first, len(prompts))
        encoded = [turn_ids(tokenizer, prompt) for prompt in prompts[first : first + batch]]
        new = _continue(large, tokenizer, encoded, max_new_tokens, None)
        diary.add_answers(list(zip(encoded, new, strict=True)))


@torch.inference_mode()
def _continue(
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[list[int]],
    max_new_tokens: int,
    stops: Sequence[str] | None,
) -> list[list[int]]:
    """Greedy continuations of a ragged batch, each up to its end token, or to the first of ``stops``."""
    from transformers import StoppingCriteriaList, StopStringCriteria

    width = max(map(len, texts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (width - len(text)) + text for text in texts], device=large.device)
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts], device=large.device)
    criteria = StoppingCriteriaList()
    if stops is not None:
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=list(stops)))
    output = large.generate(
        ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, stopping_criteria=criteria
    )
    ends, rows = end_tokens(large), []
    for row in output[:, width:].tolist():  # a row that is done is filled up, or goes on, until all are
        pieces = tokenizer.batch_decode([[token] for token in row]) if stops is not None else []
        done = [
            place
            for place, token in enumerate(row)
            if token in ends or (stops is not None and any(stop in pieces[place] for stop in stops))
        ]
        rows.append(row[: done[0] + 1] if done else row)
    return rows


@torch.inference_mode()
def read_answer(
    small: PreTrainedModel, large: PreTrainedModel, ids: list[int], new: list[int], vocab: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The small model over one answer, in one forward: states ``[T, D]`` that the head reads, and logits ``[T, V]``."""
    text = torch.tensor([ids + new], device=large.device)
    if isinstance(small, FeatureDraftForCausalLM):
        tap = FeatureTap(large, small.config.feature_layers)
        try:
            large(text, logits_to_keep=1)
        finally:
            tap.remove()
        features = torch.cat([torch.zeros_like(tap.last[:, :1]), tap.last[:, :-1]], 1)
        output = small(text, features=features, logits_to_keep=len(new) + 1)
        states = output.hidden_states[0][0]
    else:
        seen: list[torch.Tensor] = []
        hook = small.get_output_embeddings().register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        try:
            known = torch.tensor([known_tokens(ids + new, small)], device=text.device)
            output = small(known, logits_to_keep=len(new) + 1)
        finally:
            hook.remove()
        states = seen[0][0]
    part = slice(-len(new) - 1, -1)
    return states[part].float(), output.logits[0, part, :vocab].float()


def label(
    small: PreTrainedModel,
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    verifier: Verifier,
    max_new_tokens: int = 256,
    max_sentence: int = 48,
    batch: int = 16,
    count: int = 100,
    report: Report = lambda _stage, _done, _total: None,
    diary: Diary | None = None,
) -> Labels:
    """Steps 1 to 4: a label for every token of the large model's answers.

    Args:
        max_new_tokens: of an answer. ``max_sentence``: of a continuation (unless the verifier wants the whole answer).
        batch: texts continued at a time. ``count``: largest logits kept for the router.
        diary: what an interrupted call has found already.

    Raises:
        TokenizerMismatchError: the models have different vocabularies.
        BadInputError: no prompts, or nothing was answered.
    """
    vocab = check_same_vocabulary(large, small)
    if not prompts:
        raise BadInputError("There are no prompts to learn from.", "Give one a line.")
    diary = diary or Diary()
    answer(large, tokenizer, prompts, max_new_tokens, batch, report, diary)
    pairs = diary.answers
    if not any(new for _, new in pairs):
        raise BadInputError("The large model answered none of the prompts.", "Give others.")
    # a feature draft reads its target's embeddings
    embed = (large if isinstance(small, FeatureDraftForCausalLM) else small).get_input_embeddings()
    parts: list[dict[str, torch.Tensor]] = []
    mismatches: list[tuple[int, int]] = []
    for index, (ids, new) in enumerate(pairs):
        report("the small model reads", index, len(pairs))
        if not new:
            continue
        hidden, logits = read_answer(small, large, ids, new, vocab)
        chosen = logits.argmax(-1)
        truth = torch.tensor(new, device=chosen.device)
        with torch.inference_mode():
            embedding = embed(chosen).float()
        parts.append(
            {
                "hidden": hidden.cpu(),
                "embedding": embedding.cpu(),
                "logits": top_logits(logits, count).cpu(),
                "kinds": torch.where(chosen == truth, IDENTICAL, NEUTRAL).cpu(),
                "prompts": torch.full((len(new),), index),
                "small": chosen.cpu(),
                "large": truth.cpu(),
            }
        )
        mismatches += [(index, place) for place in (chosen != truth).nonzero()[:, 0].tolist()]
    known = {int(part["prompts"][0]): part for part in parts}
    left = [place for place in mismatches if place not in diary.verdicts]
    for first in range(0, len(left), batch):
        report("both ways go on", len(mismatches) - len(left) + first, len(mismatches))
        some = left[first : first + batch]
        diary.add_verdicts(some, _verify(large, tokenizer, pairs, known, some, verifier, max_new_tokens, max_sentence))
    for index, place in mismatches:
        if diary.verdicts[index, place]:
            known[index]["kinds"][place] = DIVERGENT
    return Labels(**{name: torch.cat([part[name] for part in parts]).clone() for name in parts[0]})


def _verify(
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[list[int], list[int]]],
    parts: dict[int, dict[str, torch.Tensor]],
    places: list[tuple[int, int]],
    verifier: Verifier,
    max_new_tokens: int,
    max_sentence: int,
) -> list[bool]:
    """Continues both ways at some mismatches and asks the verifier."""
    prefixes = [pairs[index][0] + pairs[index][1][:place] for index, place in places]
    sides = []
    stops = None if verifier.to_the_end else SENTENCE_ENDS
    room = max_new_tokens if verifier.to_the_end else max_sentence
    ends = end_tokens(large)
    for name in ("small", "large"):
        starts = [int(parts[index][name][place]) for index, place in places]
        texts = [[*prefix, token] for prefix, token in zip(prefixes, starts, strict=True)]
        longer = [row for row, token in enumerate(starts) if token not in ends]
        tails: list[list[int]] = [[] for _ in texts]
        if longer:
            for row, tail in zip(
                longer, _continue(large, tokenizer, [texts[row] for row in longer], room, stops), strict=True
            ):
                tails[row] = tail
        sides.append([tokenizer.decode([token, *tail]) for token, tail in zip(starts, tails, strict=True)])
    return verifier([tokenizer.decode(prefix) for prefix in prefixes], *sides)

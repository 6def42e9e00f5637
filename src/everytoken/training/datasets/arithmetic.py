"""Reasoning pairs: a model's own correct and incorrect traces of verifiable tasks (reasoning_gym), as cDPO asks for.

Tasks are made, not stored: an item is a function of ``(seed, index)``, so training and test never meet if their seeds
differ. A trace is correct only if the task's own scorer gives exactly 1 (its partial credit would call any text that
contains the answer half right).
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.errors import BadInputError, require
from ...core.progress import Report, silent
from ...core.scoring import prompt_ids
from .base import DataKind, MadeRows, load_seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 30},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "letter_counting": {"min_words": 2, "max_words": 4},
    "spell_backward": {"min_word_len": 3, "max_word_len": 4},
}
"""Tasks that a small model gets right now and then, with their sizes."""


@dataclass
class Trace:
    """One sampled answer."""

    question: str
    answer: str
    response: str
    correct: bool


def make_task(name: str, count: int, seed: int) -> Any:
    """A reasoning_gym dataset.

    Raises:
        MissingExtraError: reasoning_gym is not installed.
        BadInputError: it has no such task.
    """
    require("reasoning_gym", "train", "Making arithmetic tasks")
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=count, **TASKS.get(name, {}))
    except ValueError as error:
        raise BadInputError(
            f"reasoning_gym has no task {name!r}: {error}", f"For example: {', '.join(TASKS)}."
        ) from error


def final_answer(text: str) -> str:
    """What a response claims: the text in ``<answer>`` tags, else its last number, else its last word."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if tagged:
        return tagged[-1].strip()
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if numbers:
        return numbers[-1].replace(",", "").removesuffix(".")
    words = re.findall(r"\w+", text)
    return words[-1] if words else ""


def is_correct(dataset: Any, item: dict[str, Any], response: str) -> bool:
    """Whether the task's scorer gives exactly 1; scorers that fail on odd texts count as wrong."""
    try:
        return float(dataset.score_answer(final_answer(response), item)) == 1.0
    except Exception:  # some scorers raise whatever they like on garbage
        return False


def sample_traces(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    samples: int,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    report: Report = silent,
    batch: int = 32,
) -> list[list[Trace]]:
    """``samples`` answers to every question; uses torch's global generator: seed it first."""
    import torch

    items = [dataset[index] for index in range(len(dataset))]
    prompts = [prompt_of(tokenizer, item["question"]) for item in items]
    found: list[list[Trace]] = [[] for _ in items]
    order = [index for index in range(len(items)) for _ in range(samples)]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for first in range(0, len(order), batch):
        picked = order[first : first + batch]
        width = max(len(prompts[index]) for index in picked)
        ids = torch.tensor([[pad] * (width - len(prompts[index])) + prompts[index] for index in picked])
        mask = torch.tensor([[0] * (width - len(prompts[index])) + [1] * len(prompts[index]) for index in picked])
        with torch.no_grad():
            output = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=temperature,
                pad_token_id=pad,
            )
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        for index, text in zip(picked, texts, strict=True):
            item = items[index]
            found[index].append(Trace(item["question"], str(item["answer"]), text, is_correct(dataset, item, text)))
        report("answering", min(first + batch, len(order)), len(order))
    return found


def messages_of(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def prompt_of(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Ids of a question, by the chat template where there is one."""
    return prompt_ids(tokenizer, messages_of(question) if tokenizer.chat_template else question + "\n")


def pairs_of(
    traces: list[list[Trace]], chat: bool, per_question: int = 2, top_wrong: float = 0.5
) -> list[dict[str, Any]]:
    """Preference rows: a correct trace against wrong traces of the most frequent wrong answers.

    Args:
        chat: rows of messages, else of text.
        per_question: wrong traces a question at most.
        top_wrong: wrong answers are taken, by frequency, until they cover this share of the wrong traces.
    """
    rows: list[dict[str, Any]] = []
    for group in traces:
        right = [trace for trace in group if trace.correct]
        wrong = [trace for trace in group if not trace.correct and trace.response.strip()]
        if not right or not wrong:
            continue
        by_answer: dict[str, list[Trace]] = {}
        for trace in wrong:
            by_answer.setdefault(final_answer(trace.response), []).append(trace)
        kept: list[Trace] = []
        for answers in sorted(by_answer.values(), key=len, reverse=True):
            if len(kept) >= top_wrong * len(wrong):
                break
            kept += answers
        texts = list(dict.fromkeys(trace.response for trace in kept))[:per_question]
        for text in texts:
            if text == right[0].response:
                continue
            if chat:
                sides = [[{"role": "assistant", "content": side}] for side in (right[0].response, text)]
                rows.append({"prompt": messages_of(right[0].question), "chosen": sides[0], "rejected": sides[1]})
            else:
                rows.append({"prompt": right[0].question + "\n", "chosen": right[0].response, "rejected": text})
    return rows


@dataclass
class ArithmeticData:
    """A model's own correct and incorrect answers to tasks that can be checked.

    Args:
        task: of reasoning_gym (``chain_sum``, ``gcd``, ``letter_counting``, ...).
        count: questions; pairs come from those with both correct and incorrect answers.
        seed: of the tasks and of sampling.
        samples: answers a question.
        temperature: of sampling.
        max_new_tokens: of an answer.
        per_question: pairs a question at most.

    Raises:
        BadInputError: a count below 1.
    """

    task: str = "chain_sum"
    count: int = 64
    seed: int = 0
    samples: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 48
    per_question: int = 2

    def __post_init__(self) -> None:
        for name in ("count", "samples", "max_new_tokens", "per_question"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} must be at least 1; got {getattr(self, name)}.")


def make_rows(settings: ArithmeticData, model: str | None, report: Report) -> MadeRows:
    """Asks, checks and pairs; the traces go into a file of their own."""
    dataset = make_task(settings.task, settings.count, settings.seed)
    loaded, tokenizer = load_seeded(model, settings.seed)
    groups = sample_traces(
        loaded, tokenizer, dataset, settings.samples, settings.max_new_tokens, settings.temperature, report
    )
    rows = pairs_of(groups, bool(tokenizer.chat_template), settings.per_question)
    every = [trace for group in groups for trace in group]
    share = sum(trace.correct for trace in every) / len(every)
    if not rows:
        raise BadInputError(
            f"No question of {settings.task} got both a correct and an incorrect answer "
            f"({share:.0%} of {len(every)} are correct).",
            "Use more questions or samples, an easier or harder task, or another model.",
        )
    figures = {"pairs": float(len(rows)), "traces": float(len(every)), "correct": share}
    return MadeRows(rows, figures, {"traces": [dataclasses.asdict(trace) for trace in every]})


DATA_KIND = DataKind("arithmetic", ArithmeticData, make_rows)

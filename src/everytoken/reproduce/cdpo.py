"""cDPO's claims: contrastive estimation finds the tokens that doom a line of reasoning, and weighting DPO by it reasons
better.

Worked sums by a small model from scratch: it writes ``32+54=86;86+...#...``, one token a character, and is right about
half of the time. Its own correct and incorrect traces tune p+ and p-; rollouts from every prefix of wrong traces say
which tokens were critical.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..core.errors import BadInputError
from ..core.logprobs import entropy_from_logits
from ..core.progress import Report
from ..core.rng import derive_seed
from ..core.scoring import PromptResponse, output_head, response_hidden, response_logps, score_rows
from .base import Arms, Claim, Context, Reproduction, Values, mean, mean_ranks
from .beds.small_models import answer_batches, fit
from .beds.sums import SumsBed, answers, correct, digits_of, graded, questions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..preference.cdpo import ContrastiveEstimator

    FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
    BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
    Scorer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

WHY = (
    "The paper tunes 7 B to 13 B models on GSM8K and MATH500; here a model of under a million weights adds numbers, so "
    "that 64 rollouts from every prefix can be had."
)


class Sizes(NamedTuple):
    """Questions, samples of each, wrong traces to judge, rollouts from a prefix, steps of every training."""

    questions: int
    samples: int
    traces: int
    rollouts: int
    steps: int


class Traces(NamedTuple):
    """The base model's own answers: questions with right and wrong ones, a right one of each, all wrong ones."""

    both: list[str]
    right: dict[str, str]
    wrong: dict[str, list[str]]


def area_under_curve(scores: FloatArray, labels: BoolArray) -> float:
    """The chance that a positive scores above a negative, ties counting half."""
    ranks = mean_ranks(scores)
    positives, negatives = labels.sum(), (~labels).sum()
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / max(positives * negatives, 1))


def tuned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: list[tuple[str, str]],
    steps: int,
    lr: float,
    report: Report,
    label: str,
) -> PreTrainedModel:
    """A copy of ``model`` tuned on traces."""
    model = copy.deepcopy(model)
    rng = random.Random(0)
    fit(model, answer_batches(rng, lambda r: r.choice(traces), tokenizer, 32), steps, lr, report, label)
    return model


def own_traces(context: Context, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> Traces:
    """Samples of the base model, graded.

    Raises:
        BadInputError: no question had both a right and a wrong answer.
    """
    prompts = questions(context.seed, "train", sizes.questions, digits_of(context))
    texts = answers(model, tokenizer, prompts * sizes.samples, sample=True)
    marked = [(p, t, correct(p, t)) for p, t in zip(prompts * sizes.samples, texts, strict=True)]
    right = {p: t for p, t, good in marked if good}
    wrong: dict[str, list[str]] = {}
    for p, t, good in marked:
        if not good and t not in wrong.setdefault(p, []):
            wrong[p].append(t)
    context.report("traces that are right", sum(good for *_, good in marked), len(marked))
    both = [p for p in dict.fromkeys(prompts) if p in right and wrong.get(p)]
    if not both:
        raise BadInputError(
            "No question had both a right and a wrong trace.", "The base model learnt too little: train it longer."
        )
    return Traces(both, right, wrong)


def critical(
    context: Context,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sizes: Sizes,
    estimator: ContrastiveEstimator,
) -> Arms:
    """How well three scores find the tokens of wrong traces that rollouts call critical."""
    from ..preference.cdpo import RolloutOracle, critical_tokens

    held = questions(context.seed, "held", 8 * sizes.traces, digits_of(context))
    texts = answers(model, tokenizer, held, sample=True)
    failed = [(p, t) for p, t in zip(held, texts, strict=True) if not correct(p, t)][: sizes.traces]
    oracle = RolloutOracle(model, tokenizer, correct, rollouts=sizes.rollouts, max_new_tokens=56, batch_size=512)
    rows, labels = [], []
    for index, (prompt, text) in enumerate(failed):
        context.report("rollouts from every prefix of wrong traces", index + 1, len(failed))
        row = PromptResponse(tokenizer(prompt)["input_ids"], tokenizer(text + "\n")["input_ids"])
        found = critical_tokens(oracle.score(*row))
        if found:
            rows.append(row)
            labels.append([t in found for t in range(len(row[1]))])
    context.artifacts["wrong traces"] = {"scored": len(failed), "with a critical token": len(rows)}

    def entropy(ids: torch.Tensor, mask: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        logits = output_head(model).logits(response_hidden(model, ids, mask, attention))
        return torch.zeros(ids.shape).masked_scatter(mask, entropy_from_logits(logits))

    def improbable(ids: torch.Tensor, mask: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        return -response_logps(model, ids, mask, attention)

    scorers: dict[str, Scorer] = {
        "contrast": lambda *batch: 1 - estimator.score(*batch),
        "entropy": entropy,
        "base log-prob": improbable,
    }
    arms: Arms = {}
    for name, scorer in scorers.items():
        with torch.no_grad():
            values = score_rows(rows, scorer) if rows else []
        area = area_under_curve(torch.cat(values).numpy(), np.concatenate(labels)) if rows else float("nan")
        guesses = [float(label[int(value.argmax())]) for label, value in zip(labels, values, strict=True)]
        arms[name] = {"AUC for critical tokens": area, "first guess is critical": guesses or float("nan")}
    return arms


def run(context: Context) -> Arms:
    from ..preference.cdpo import CDPOLoss, ContrastiveEstimator
    from ..preference.dpo import DPOLoss
    from ..preference.short_training import train_quietly

    sizes = Sizes(96, 8, 16, 8, 30) if context.quick else Sizes(256, 16, 48, 64, 120)
    model, tokenizer = SumsBed().start(context)
    torch.manual_seed(derive_seed(context.seed, "traces"))
    both, right, wrong = own_traces(context, model, tokenizer, sizes)
    positives = [(p, right[p] + "\n") for p in both]
    negatives = [(p, t + "\n") for p in both for t in wrong[p]]
    positive = tuned(model, tokenizer, positives, sizes.steps, 3e-4, context.report, "p+")
    negative = tuned(model, tokenizer, negatives, sizes.steps, 3e-4, context.report, "p-")
    estimator = ContrastiveEstimator(positive, negative)
    arms = context.part("critical tokens", lambda: critical(context, model, tokenizer, sizes, estimator))

    pairs = [
        {
            "prompt": p,
            "prompt_ids": tokenizer(p)["input_ids"],
            "chosen_ids": tokenizer(right[p] + "\n")["input_ids"],
            "rejected_ids": tokenizer(t)["input_ids"],
        }
        for p, t in negatives
    ]
    context.artifacts["pairs"] = len(pairs)
    valid = questions(context.seed, "valid", 64 if context.quick else 256, digits_of(context))
    test = questions(context.seed, "test", 64 if context.quick else 512, digits_of(context))
    rates = (1e-5,) if context.quick else (3e-6, 1e-5)

    def score(policy: PreTrainedModel) -> dict[str, Values]:
        greedy = graded(policy, tokenizer, test, sample=False)
        torch.manual_seed(context.seed)
        return {"accuracy": greedy, "accuracy of samples": graded(policy, tokenizer, test, sample=True)}

    def trained(name: str) -> dict[str, Values]:
        loss, annotators = (DPOLoss(0.1), []) if name == "DPO" else (CDPOLoss(0.1), [estimator])
        best, policy = -1.0, model
        for lr in rates:  # each loss gets the learning rate that suits it, by other questions than the test's
            context.report(f"{name} on {len(pairs)} pairs, learning rate {lr}", 0, sizes.steps)
            trainer = train_quietly(
                copy.deepcopy(model),
                copy.deepcopy(model),
                loss,
                tokenizer,
                pairs,
                annotators,
                per_device_train_batch_size=16,
                max_steps=sizes.steps,
                learning_rate=lr,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=5,
                seed=context.seed,
                data_seed=context.seed,
            )
            accuracy = mean(graded(trainer.model, tokenizer, valid, sample=False))
            context.artifacts.setdefault("validation", {})[f"{name} {lr}"] = accuracy
            if accuracy > best:
                best, policy = accuracy, trainer.model
        return score(policy)

    arms["start"] = context.part("start", lambda: score(model))
    for name in ("DPO", "cDPO"):
        arms[name] = context.part(name, lambda name=name: trained(name))  # type: ignore[misc]
    return arms


REPRODUCTION = Reproduction(
    name="cdpo",
    summary=(
        "worked sums: contrastive estimation against 64 rollouts from every prefix of wrong traces; then cDPO and DPO "
        "at equal steps"
    ),
    run=run,
    claims=[
        Claim("AUC for critical tokens", "contrast", "entropy", "finds critical tokens", kind="difference", why=WHY),
        Claim(
            "AUC for critical tokens", "contrast", "base log-prob", "finds critical tokens", kind="difference", why=WHY
        ),
        Claim(
            "first guess is critical", "contrast", "base log-prob", "finds critical tokens", kind="difference", why=WHY
        ),
        Claim("accuracy", "cDPO", "DPO", "one or two points above", kind="difference", why=WHY),
        Claim("accuracy of samples", "cDPO", "DPO", "one or two points above", kind="difference", why=WHY),
    ],
    extra=("train", "trl"),
    bed="sums",
)

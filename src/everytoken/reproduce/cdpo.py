"""cDPO's claims: contrastive estimation finds the tokens that doom a line of reasoning, and weighting DPO by it reasons better.

Worked sums by a small model from scratch: it writes ``32+54=86;86+...#...``, one token a character, and is right about half of the time.
Its own correct and incorrect traces tune p+ and p-; rollouts from every prefix of wrong traces say which tokens were critical.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch

from ..core.errors import BadInputError
from ..core.logprobs import entropy_from_logits
from ..core.rng import derive_seed
from ..core.scoring import PromptResponse, response_hidden, response_logps, score_rows
from ..training.datasets.sentiment import continuations
from .base import Arms, Claim, Context, Reproduction, mean_ranks
from .small import answer_batches, character_tokenizer, fit, small_model, worked_sum

WHY = (
    "The paper tunes 7 B to 13 B models on GSM8K and MATH500; here a model of under a million weights adds numbers, so that 64 rollouts from "
    "every prefix can be had."
)
CHARACTERS = "0123456789+=;#"


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a positive scores above a negative, ties counting half."""
    ranks = mean_ranks(scores)
    positives, negatives = labels.sum(), (~labels).sum()
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / max(positives * negatives, 1))


def correct(prompt: str, response: str) -> bool:
    """Whether a worked sum ends in the right total (numbers are written from their last digit)."""
    total = sum(int(number[::-1]) for number in prompt.strip("=").split("+"))
    _, mark, final = response.strip().rpartition("#")
    return bool(mark) and final == str(total)[::-1]


def answers(model: Any, tokenizer: Any, prompts: list[str], sample: bool) -> list[str]:
    """One answer a prompt."""
    return continuations(model, tokenizer, prompts, 56, 512, sample)


def tuned(
    model: Any, tokenizer: Any, traces: list[tuple[str, str]], steps: int, lr: float, report: Any, label: str
) -> Any:
    """A copy of ``model`` tuned on traces."""
    model = copy.deepcopy(model)
    rng = random.Random(0)
    fit(model, answer_batches(rng, lambda r: r.choice(traces), tokenizer, 32), steps, lr, report, label)
    return model


def run(context: Context) -> Arms:
    from ..preference.cdpo import CDPOLoss, ContrastiveEstimator, RolloutOracle, critical_tokens
    from ..preference.dpo import DPOLoss
    from ..preference.short_training import train_quietly

    tokenizer = character_tokenizer(CHARACTERS)
    model = small_model(len(tokenizer), end=tokenizer.eos_token_id)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    rng = random.Random(context.seed)
    questions, samples, traces, rollouts, steps = (24, 4, 4, 8, 4) if context.quick else (256, 16, 48, 64, 120)

    def example(r: Any) -> tuple[str, str]:
        return worked_sum(r, terms=3)

    test = [
        example(random.Random(derive_seed(context.seed, "test", index)))[0]
        for index in range(64 if context.quick else 512)
    ]
    valid = [example(random.Random(derive_seed(context.seed, "valid", index)))[0] for index in range(256)]
    probe = [example(random.Random(derive_seed(0, "probe", index)))[0] for index in range(64)]

    def enough() -> bool:  # about half right: rollouts must be able to fail and to succeed
        texts = answers(model, tokenizer, probe, sample=True)
        return sum(map(correct, probe, texts)) / len(probe) >= 0.45

    batches = answer_batches(rng, example, tokenizer, 48)
    fit(model, batches, 900 if context.quick else 3000, 1e-3, context.progress, "base model", enough)
    prompts = [example(rng)[0] for _ in range(questions)]
    texts = answers(model, tokenizer, prompts * samples, sample=True)
    graded = [(p, t, correct(p, t)) for p, t in zip(prompts * samples, texts, strict=True)]
    right = {p: t for p, t, good in graded if good}
    wrong: dict[str, list[str]] = {}
    for p, t, good in graded:
        if not good and t not in wrong.setdefault(p, []):
            wrong[p].append(t)
    context.progress(f"{sum(good for *_, good in graded)} of {len(graded)} traces are right")
    both = [p for p in prompts if p in right and wrong.get(p)]
    if not both:
        raise BadInputError(
            "No question had both a right and a wrong trace.", "The base model learnt too little: train it longer."
        )
    positive = tuned(model, tokenizer, [(p, right[p] + "\n") for p in both], steps, 3e-4, context.progress, "p+")
    negatives = [(p, t + "\n") for p in both for t in wrong[p]]
    negative = tuned(model, tokenizer, negatives, steps, 3e-4, context.progress, "p-")

    # which tokens of wrong traces were critical
    held = [example(rng)[0] for _ in range(8 * traces)]
    failed = [
        (p, t) for p, t in zip(held, answers(model, tokenizer, held, sample=True), strict=True) if not correct(p, t)
    ][:traces]
    oracle = RolloutOracle(model, tokenizer, correct, rollouts=rollouts, max_new_tokens=56, batch_size=512)
    rows, labels, first_drop = [], [], 0
    for index, (prompt, text) in enumerate(failed):
        context.progress(f"rollouts from every prefix of wrong trace {index + 1} of {len(failed)}")
        row = PromptResponse(tokenizer(prompt)["input_ids"], tokenizer(text + "\n")["input_ids"])
        found = critical_tokens(oracle.score(*row))
        if found:
            rows.append(row)
            labels.append([t in found for t in range(len(row[1]))])
            first_drop += 1

    def entropy(ids: torch.Tensor, mask: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        logits = model.get_output_embeddings()(response_hidden(model, ids, mask, attention))
        return torch.zeros(ids.shape).masked_scatter(mask, entropy_from_logits(logits))

    def improbable(ids: torch.Tensor, mask: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        return -response_logps(model, ids, mask, attention)

    estimator = ContrastiveEstimator(positive, negative)
    truth = np.concatenate(labels) if labels else np.zeros(1, dtype=bool)
    arms: Arms = {}
    scorers = {"contrast": lambda *batch: 1 - estimator.score(*batch), "entropy": entropy, "base log-prob": improbable}
    for name, scorer in scorers.items():
        with torch.no_grad():
            values = score_rows(rows, scorer) if rows else []
        lowest = [bool(label[int(value.argmax())]) for label, value in zip(labels, values, strict=True)]
        arms[name] = {
            "AUC for critical tokens": area_under_curve(torch.cat(values).numpy(), truth) if values else float("nan"),
            "first guess is critical": sum(lowest) / max(len(lowest), 1),
        }
    context.artifacts["wrong traces"] = {"scored": len(failed), "with a critical token": first_drop}

    pairs = [
        {"prompt": p, "prompt_ids": tokenizer(p)["input_ids"], "chosen_ids": tokenizer(right[p] + "\n")["input_ids"],
         "rejected_ids": tokenizer(t + "\n")["input_ids"]}
        for p in both for t in wrong[p]
    ]  # fmt: skip
    context.artifacts["pairs"] = len(pairs)
    policies = {"start": model}
    rates = (1e-5,) if context.quick else (3e-6, 1e-5)
    for name, loss, annotators in (("DPO", DPOLoss(0.1), []), ("cDPO", CDPOLoss(0.1), [estimator])):
        best = -1.0
        for lr in rates:  # each loss gets the learning rate that suits it, by other questions than the test's
            context.progress(f"{name}: {steps} steps on {len(pairs)} pairs, learning rate {lr}")
            trainer = train_quietly(
                copy.deepcopy(model), copy.deepcopy(model), loss, tokenizer, pairs, annotators, per_device_train_batch_size=16,
                max_steps=steps, learning_rate=lr, lr_scheduler_type="constant_with_warmup", warmup_steps=5, seed=context.seed,
                data_seed=context.seed,
            )  # fmt: skip
            accuracy = sum(map(correct, valid, answers(trainer.model, tokenizer, valid, sample=False))) / len(valid)
            context.artifacts.setdefault("validation", {})[f"{name} {lr}"] = accuracy
            if accuracy > best:
                best, policies[name] = accuracy, trainer.model
    for name, policy in policies.items():
        greedy = answers(policy, tokenizer, test, sample=False)
        torch.manual_seed(context.seed)
        sampled = answers(policy, tokenizer, test, sample=True)
        arms[name] = {
            "accuracy": sum(map(correct, test, greedy)) / len(test),
            "accuracy of samples": sum(map(correct, test, sampled)) / len(test),
        }
    return arms


REPRODUCTION = Reproduction(
    name="cdpo",
    summary="worked sums: contrastive estimation against 64 rollouts from every prefix of wrong traces; then cDPO and DPO at equal steps",
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
)

"""TDPO's claim: a better frontier of reward against divergence from the reference than DPO's (controlled sentiment)."""

from __future__ import annotations

import itertools
import tempfile
from typing import Any

import torch

from ..core.logprobs import token_stats
from .base import Arms, Claim, Context, Reproduction

WHY = (
    "The paper trains GPT-2 Large on IMDb prefixes for thousands of steps; here a 135M model learns from its own continuations "
    "of short openings for eight steps, judged by a lexicon, at a far smaller divergence."
)


@torch.no_grad()
def reward_and_kl(
    model: Any, reference: Any, tokenizer: Any, prompts: list[str], new_tokens: int
) -> tuple[float, float]:
    """Mean VADER score of sampled continuations, and their mean sequential KL(policy || reference), in nats a sequence."""
    from ..preference.sentiment import continuations, positivity

    texts = continuations(model, tokenizer, prompts, new_tokens)
    rewards = positivity([p + t for p, t in zip(prompts, texts, strict=True)])
    kls = []
    for first in range(0, len(prompts), 32):
        before = tokenizer(prompts[first : first + 32])["input_ids"]
        after = tokenizer(texts[first : first + 32])["input_ids"]
        rows = [b + a for b, a in zip(before, after, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for index, (b, a) in enumerate(zip(before, after, strict=True)):
            mask[index, len(b) - 1 : len(b) + len(a) - 1] = True
        hidden = [m.base_model(input_ids=ids).last_hidden_state[mask] for m in (model, reference)]
        heads = [m.get_output_embeddings().weight for m in (model, reference)]
        labels = ids.roll(-1, 1)[mask]
        stats = token_stats(hidden[0], heads[0], labels, ref_hidden=hidden[1], ref_weight=heads[1], reverse_kl=True)
        assert stats.reverse_kl is not None
        kls.append(stats.reverse_kl.sum().item())
    return sum(rewards) / len(rewards), sum(kls) / len(prompts)


def train_arm(
    loss: Any,
    policy: Any,
    model: Any,
    tokenizer: Any,
    rows: list[dict],
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    after: Any,
    every: int,
) -> None:
    """Trains ``policy`` against the reference ``model``; calls ``after(step, model)`` every so many steps."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    from ..preference.trainer import PreferenceTrainer, quiet_config

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % every == 0:
                kwargs["model"].eval()
                after(state.global_step, kwargs["model"])
                kwargs["model"].train()

    with tempfile.TemporaryDirectory() as folder:
        args = quiet_config(
            folder,
            per_device_train_batch_size=batch,
            max_steps=steps,
            learning_rate=lr,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=3,
            seed=seed,
            data_seed=seed,
        )
        trainer = PreferenceTrainer(
            policy,
            ref_model=model,
            loss=loss,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def reward_at(curve: list[tuple[float, float]], kl: float) -> float:
    """Linear interpolation of reward over KL along a training curve of ``(kl, reward)``."""
    points = sorted(curve)
    for (k0, r0), (k1, r1) in itertools.pairwise(points):
        if k0 <= kl <= k1:
            return r0 + (r1 - r0) * (kl - k0) / max(k1 - k0, 1e-12)
    return points[-1][1] if kl > points[-1][0] else points[0][1]


def run(context: Context) -> Arms:
    from transformers.utils import logging

    from ..core.loading import load_model, load_tokenizer
    from ..preference.dpo import DPOLoss
    from ..preference.sentiment import openings, sentiment_pairs
    from ..preference.tdpo import TDPOLoss

    logging.disable_progress_bar()
    import datasets

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(context.model)
    model = load_model(context.model, dtype="float32", packed=True)
    steps, batch, samples, new_tokens, every = (2, 4, 18, 10, 2) if context.quick else (8, 8, 48, 20, 4)
    rows = sentiment_pairs(model, tokenizer, steps * batch, max_new_tokens=new_tokens, report=context.progress)
    prompts = (openings("test") * 4)[:samples]
    torch.manual_seed(context.seed)
    start = reward_and_kl(model, model, tokenizer, prompts, new_tokens)
    curves: dict[str, list[tuple[float, float]]] = {}
    losses = {
        "DPO": DPOLoss(beta=0.1),
        "TDPO1": TDPOLoss(beta=0.1, variant="tdpo1"),
        "TDPO2": TDPOLoss(beta=0.1, alpha=0.5),
    }
    for name, loss in losses.items():
        curve = curves[name] = [(0.0, start[0])]

        def after(step: int, policy: Any, name: str = name, curve: list = curve) -> None:
            torch.manual_seed(context.seed)  # the same random numbers for every arm
            reward, kl = reward_and_kl(policy, model, tokenizer, prompts, new_tokens)
            curve.append((kl, reward))
            context.progress(f"{name} step {step} of {steps}: reward {reward:+.3f}, KL {kl:.2f}")

        # loaded anew, not copied: trainers patch the forward of their models, and a copy would share the patch
        policy = load_model(context.model, dtype="float32", packed=True)
        train_arm(loss, policy, model, tokenizer, rows, steps, batch, 5e-5, context.seed, after, every)
    shared = min(max(kl for kl, _ in curve) for curve in curves.values())
    context.artifacts["curves"] = {
        name: [[round(x, 5) for x in point] for point in curve] for name, curve in curves.items()
    }
    return {
        name: {
            "reward at the end": curve[-1][1],
            "KL at the end": curve[-1][0],
            "reward at equal KL": reward_at(curve, shared),
        }
        for name, curve in curves.items()
    }


REPRODUCTION = Reproduction(
    name="tdpo",
    summary="DPO, TDPO1 and TDPO2 from one start on the same sentiment pairs, equal steps; reward against sequential KL",
    run=run,
    claims=[
        Claim("KL at the end", "TDPO2", "DPO", "lower at like reward", higher_is_better=False, why=WHY),
        Claim("reward at the end", "TDPO2", "DPO", "like DPO's", kind="difference", why=WHY),
        Claim("reward at equal KL", "TDPO2", "DPO", "higher", kind="difference", why=WHY),
        Claim("reward at equal KL", "TDPO2", "TDPO1", "TDPO2 above TDPO1", kind="difference", why=WHY),
    ],
    seeds=2,
    extra=("train", "trl"),
)

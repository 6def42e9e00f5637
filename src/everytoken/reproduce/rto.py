"""RTO's claim: with a DPO model's token rewards, PPO reaches its final reward in a fraction of the rollouts (controlled
sentiment).
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from ..core.charts import lines_svg
from ..core.results import mean
from ..core.rng import seed_everything
from ..training.datasets.sentiment import openings, positivity
from .base import Arms, Claim, Context, Reproduction
from .beds.frontier import Work, make_work, measure, train_arm
from .files import Result, Scale

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

ARMS = {"PPO": ("gae", 0.0), "RTO": ("gae", 0.05), "GRPO": ("group", 0.0), "RTO, no critic": ("group", 0.05)}
WHY = (
    "The paper's figure (about an eighth of the data) is for 8 B models and a learned reward; here a language model of "
    "3M weights, VADER as the reward, and a DPO model trained for 120 steps. Reward is the mean of the rollouts "
    "themselves, smoothed over six batches. Losses are means of a batch's tokens (loss_type bnpo)."
)
SMOOTH = 6
BATCHES: dict[Scale, tuple[int, int]] = {"quick": (16, 4), "cpu": (64, 40), "gpu": (512, 150)}
"""Rollouts of a batch, and batches."""


def policy_arm(
    context: Context, work: Work, name: str, dpo_model: PreTrainedModel, batches: int
) -> tuple[PreTrainedModel, list[tuple[int, float]]]:
    """Trains a copy of the start by rollouts; returns it and ``(rollouts so far, mean reward of the batch)``.

    An interrupted run keeps finished arms.
    """
    policy, curve = context.model_part(f"rollouts of {name}", lambda: rollouts(context, work, name, dpo_model, batches))
    return policy, [(count, value) for count, value in curve]


def rollouts(
    context: Context, work: Work, name: str, dpo_model: PreTrainedModel, batches: int
) -> tuple[PreTrainedModel, list[tuple[int, float]]]:
    """One arm's training."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from ..reinforcement.rto import RTOConfig, RTOTrainer
    from ..training.quiet import quiet_arguments, without_printer

    estimator, scale = ARMS[name]
    seed_everything(context.seed)
    size = BATCHES[context.scale][0]
    rewards: list[float] = []

    def score(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        found = positivity([p + c for p, c in zip(prompts, completions, strict=True)])
        rewards.append(sum(found) / len(found))
        return found

    class Watch(TrainerCallback):
        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            context.report(f"{name}, reward {rewards[-1]:+.3f}", len(rewards), batches)

    with tempfile.TemporaryDirectory() as folder:
        args = RTOConfig(
            **quiet_arguments(
                folder,
                per_device_train_batch_size=size,
                num_generations=8,
                max_completion_length=20,
                num_iterations=2,
                max_steps=2 * batches,
                learning_rate=1.5e-4,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=4,
                seed=context.seed,
                data_seed=context.seed,
                estimator=estimator,
                dpo_reward_scale=scale,
                critic_lr=1e-3,
                critic_epochs=2,
                loss_type="bnpo",  # not the trainer's default: a result file stays comparable with its predecessors
                shuffle_dataset=True,
            )
        )
        trainer = RTOTrainer(
            work.writer.model(),
            reward_funcs=score,
            dpo_model=dpo_model if scale else None,
            ref_model=work.start,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": text} for text in openings("train")]),
            processing_class=work.writer.tokenizer,
            callbacks=[Watch()],
        )
        without_printer(trainer).train()
        policy = trainer.model.eval()
    return policy, [(size * (index + 1), value) for index, value in enumerate(rewards)]


def smoothed(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means of ``SMOOTH`` batches, at the last one's count of rollouts."""
    return [
        (curve[index][0], sum(value for _, value in curve[index + 1 - SMOOTH : index + 1]) / SMOOTH)
        for index in range(min(SMOOTH, len(curve)) - 1, len(curve))
        if index + 1 >= SMOOTH
    ] or [(curve[-1][0], sum(value for _, value in curve) / len(curve))]


def rollouts_to(curve: list[tuple[int, float]], reward: float) -> float:
    """Rollouts until the smoothed reward first reaches ``reward``; all of them and one batch more if it never does."""
    for count, value in smoothed(curve):
        if value >= reward:
            return float(count)
    return float(curve[-1][0] + curve[0][0])


def run(context: Context) -> Arms:
    from ..preference.dpo import DPOLoss

    work = make_work(context)
    batches = BATCHES[context.scale][1]
    dpo, dpo_curve = train_arm(context, work, "DPO", DPOLoss(beta=0.1))
    policies: dict[str, PreTrainedModel] = {}
    curves: dict[str, list[tuple[int, float]]] = {}
    for name in ARMS:
        policies[name], curves[name] = policy_arm(context, work, name, dpo, batches)
    context.artifacts["curves"] = {name: [[x, round(y, 4)] for x, y in curve] for name, curve in curves.items()}
    context.artifacts["DPO"] = [round(mean(value), 4) for value in dpo_curve[-1]]
    goals = {"PPO": smoothed(curves["PPO"])[-1][1], "GRPO": smoothed(curves["GRPO"])[-1][1]}
    arms: Arms = {}
    for name, curve in curves.items():
        goal = goals["PPO" if ARMS[name][0] == "gae" else "GRPO"]
        kl, reward = measure(work, policies[name], context.seed)
        arms[name] = {
            "rollouts to the baseline's final reward": rollouts_to(curve, goal),
            "mean reward over training": sum(value for _, value in curve) / len(curve),
            "reward on held-out openings": reward,
            "KL at the end": kl,
        }
    return arms


REPRODUCTION = Reproduction(
    name="rto",
    summary="PPO, GRPO and both with token rewards of a DPO model from one start; reward against rollouts (64 a batch)",
    run=run,
    claims=[
        Claim(
            "rollouts to the baseline's final reward",
            "RTO",
            "PPO",
            "about 1/8 of the data",
            higher_is_better=False,
            why=WHY,
        ),
        Claim("reward on held-out openings", "RTO", "PPO", "above PPO", kind="difference", why=WHY),
        Claim(
            "rollouts to the baseline's final reward",
            "RTO, no critic",
            "GRPO",
            "(no critic: not in the paper)",
            higher_is_better=False,
            why=WHY,
        ),
        Claim(
            "reward on held-out openings",
            "RTO, no critic",
            "GRPO",
            "(no critic: not in the paper)",
            kind="difference",
            why=WHY,
        ),
    ],
    extra=("train", "trl"),
    bed="sentiment",
    scales=("quick", "cpu", "gpu"),
)


def curve_svg(result: Result) -> str:
    """Smoothed reward against rollouts, means over seeds."""
    lines = {}
    for name in ARMS:
        seeds = [
            smoothed([tuple(point) for point in artifact["curves"][name]]) for artifact in result["artifacts"].values()
        ]  # type: ignore[misc]
        lines[name] = [[(step[0][0], sum(value for _, value in step) / len(step)) for step in zip(*seeds, strict=True)]]
    return lines_svg(lines, "rollouts", f"mean VADER score of {SMOOTH} batches of rollouts", markers=False)

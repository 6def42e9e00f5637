"""Training by rollouts inside an experiment: a small start, a copy of it, a recipe, a reward; sizes for every scale."""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ...core.results import mean
from ...core.rng import derive_seed, seed_everything
from ..base import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...reinforcement.base import Recipe
    from ...reinforcement.trainer import RecipeTrainer

GROUP = 8
Example = Callable[[random.Random], tuple[str, str]]
"""Draws a prompt and an answer that a start learns from."""


@dataclass(frozen=True)
class Size:
    """How large a version of an experiment is.

    Attributes:
        hidden, layers: of the model.
        warmup: steps of the start at most, of ``warmup_batch`` answers.
        updates, batch: of a training; each update has ``batch`` new rollouts in groups of eight.
        test: held-out questions.
        rates: learning rates that every arm tries.
    """

    hidden: int
    layers: int
    warmup: int
    updates: int
    batch: int
    test: int
    rates: tuple[float, ...]
    warmup_batch: int = 64


def device() -> str:
    """Where models of an experiment train: the GPU where the trainer will use one."""
    import torch

    from ...training.distributed import on_cpu

    return "cpu" if on_cpu() or not torch.cuda.is_available() else "cuda"


def start_model(size: Size, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model of a size with random weights."""
    from .small_models import small_model

    model = small_model(len(tokenizer), size.hidden, size.layers, end=tokenizer.eos_token_id)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def warmed_up(
    context: Context,
    size: Size,
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    share: Callable[[PreTrainedModel], float],
    goal: float,
    lr: float = 3e-3,
    every: int = 25,
) -> PreTrainedModel:
    """A start that is trained on answers until ``share(model)``, of right samples, reaches ``goal``; kept by the
    context.
    """
    import torch

    from .small_models import answer_batches, fit

    def train() -> tuple[PreTrainedModel, int]:
        torch.manual_seed(derive_seed(context.seed, "start"))
        model = start_model(size, tokenizer).to(device())
        draw = random.Random(derive_seed(context.seed, "warm-up"))
        batches = answer_batches(draw, example, tokenizer, size.warmup_batch)
        steps = fit(model, batches, size.warmup, lr, context.report, "warm-up", lambda: share(model) >= goal, every)
        return model.eval(), steps

    model, steps = context.model_part("start", train)
    context.artifacts["steps of the warm-up"] = steps
    return model.to(device())


def grpo_arguments(size: Size, seed: int, lr: float, length: int, **arguments: Any) -> dict[str, Any]:
    """Settings of GRPOConfig for an arm; ``arguments`` win."""
    settings: dict[str, Any] = dict(
        per_device_train_batch_size=size.batch,
        num_generations=GROUP,
        max_completion_length=length,
        max_steps=size.updates,
        learning_rate=lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=4,
        beta=0.0,
        seed=seed,
        data_seed=seed,
    )
    return settings | arguments


def train_by_rollouts(
    context: Context,
    label: str,
    start: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    reward: Any,
    rows: list[dict[str, Any]],
    arguments: dict[str, Any],
    trainer: type[RecipeTrainer] | None = None,
) -> tuple[PreTrainedModel, dict[str, list[float]]]:
    """A copy of ``start`` after updates with new rollouts.

    Args:
        label: for the progress.
        reward: of TRL's form; None where the recipe rewards.
        rows: of the data, with a ``prompt``.
        arguments: see ``grpo_arguments``.
        trainer: a class of trainers; None is ``RecipeTrainer``.

    Returns:
        The model, and one number a step: the mean ``reward`` of its rollouts, ``equal``, the share of groups with equal
        rewards, the policy's ``entropy``, ``tokens`` that were written and that were ``trained`` on, ``useful``, the
        share of trained rollouts with an advantage, the ``gradient``'s norm, and the ``seconds`` of the update without
        the rollouts.
    """
    from datasets import Dataset
    from trl import GRPOConfig

    from ...core.quiet import quiet_training
    from ...reinforcement.trainer import RecipeTrainer
    from ...training.quiet import ReportSteps, quiet_arguments, without_printer

    names = ("reward", "equal", "entropy", "tokens", "trained", "useful", "gradient", "seconds")
    logs: dict[str, list[float]] = {name: [] for name in names}

    base: Any = RecipeTrainer if trainer is None else trainer

    class Logged(base):  # type: ignore[misc]
        """Keeps what a step is about."""

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            batch = super()._generate_and_score_completions(inputs)
            written = batch["completion_mask"].bool()
            chosen = (written & batch.get("tool_mask", written).bool()).any(1)
            logs["tokens"].append(float(written.sum()))
            logs["trained"].append(float((written & batch.get("tool_mask", written).bool()).sum()))
            advantages = batch["advantages"]
            useful = (advantages if advantages.dim() == 1 else (advantages * written).abs().amax(1)) != 0
            logs["useful"].append(float(useful[chosen].float().mean()) if chosen.any() else 0.0)
            rewards = self.sequence_rewards().view(-1, GROUP)
            logs["reward"].append(rewards.nanmean().item())
            logs["equal"].append((rewards.amax(1) - rewards.amin(1) < 1e-6).float().mean().item())
            self.began = clock()
            return batch

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            float(loss)  # waits for a GPU
            logs["seconds"].append(clock() - self.began)
            logs["entropy"].append(self._metrics["train"]["entropy"][-1])
            squares = [p.grad.square().sum() for p in self.model.parameters() if p.grad is not None]
            logs["gradient"].append(float(sum(squares)) ** 0.5)
            return loss

    seed_everything(derive_seed(context.seed, "rollouts"))  # all arms begin with the same rollouts
    # other programs lengthen a process's own seconds little; a GPU's time is that of the clock
    clock = time.process_time if device() == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder, quiet_training():
        made = Logged(
            copy.deepcopy(start),
            recipe=recipe,
            reward_funcs=reward,
            args=GRPOConfig(**quiet_arguments(folder, **arguments)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[ReportSteps(context.report, label)],
        )
        without_printer(made).train()
        model: PreTrainedModel = made.model.eval()
    return model, logs


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int, sample: bool
) -> list[str]:
    """One answer a prompt, of ``length`` tokens at most."""
    from ...training.datasets.sentiment import continuations

    return continuations(model, tokenizer, list(prompts), length, 1024, sample)


@dataclass(frozen=True)
class Learner:
    """What an arm learns by.

    Attributes:
        recipe: of pieces.
        reward: of TRL's form; None where the recipe rewards.
        arguments: of GRPOConfig, beyond ``grpo_arguments``.
        trainer: see ``train_by_rollouts``.
    """

    recipe: Recipe
    reward: Any
    arguments: dict[str, Any]
    trainer: type[RecipeTrainer] | None = None


def learnt(
    context: Context,
    size: Size,
    start: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    length: int,
    arms: Iterable[str],
    learner: Callable[[str], Learner],
    tuned: Callable[[str, PreTrainedModel], float],
    measured: Callable[[str, PreTrainedModel, dict[str, list[float]]], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """What every arm measured, trained from one start with the learning rate that is best by its ``tuned``.

    The rate and the mean rewards of its training (see ``ends``) are kept as artifacts.

    Args:
        rows, length: the data, and tokens of a rollout at most.
        learner: by an arm's name.
        tuned: ``(arm, policy)``, a value on tuning questions; higher is better.
        measured: ``(arm, policy, logs of train_by_rollouts)``.
    """

    def trained(arm: str, lr: float) -> dict[str, Any]:
        by = learner(arm)
        arguments = grpo_arguments(size, context.seed, lr, length, **by.arguments)
        label = f"{arm}, learning rate {lr}"
        own = {} if by.trainer is None else {"trainer": by.trainer}
        policy, logs = train_by_rollouts(context, label, start, tokenizer, by.recipe, by.reward, rows, arguments, **own)
        value = tuned(arm, policy)
        return {"tuning": value, "rewards": ends(logs["reward"]), "found": measured(arm, policy, logs)}

    found: dict[str, dict[str, Any]] = {}
    for arm in arms:
        kept = {lr: context.part(f"{arm} {lr}", partial(trained, arm, lr)) for lr in size.rates}
        best = max(size.rates, key=lambda lr: float(kept[lr]["tuning"]))
        context.artifacts[f"{arm}: learning rate"] = best
        context.artifacts[f"{arm}: mean reward of the first and the last quarter"] = kept[best]["rewards"]
        found[arm] = kept[best]["found"]
    return found


def ends(values: Sequence[float]) -> list[float]:
    """Means of the first and the last quarter."""
    quarter = max(1, len(values) // 4)
    return [round(mean(values[:quarter]), 4), round(mean(values[-quarter:]), 4)]

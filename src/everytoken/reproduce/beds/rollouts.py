"""Training by rollouts inside an experiment: a copy of a start, a recipe, a reward."""

from __future__ import annotations

import copy
import tempfile
import time
from typing import TYPE_CHECKING, Any

from ...core.rng import seed_everything
from ..base import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...reinforcement.base import Recipe

GROUP = 8


def train_by_rollouts(
    context: Context,
    label: str,
    start: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    reward: Any,
    rows: list[dict[str, Any]],
    steps: int,
    *,
    lr: float = 3e-4,
    size: int = 64,
    length: int = 48,
    **arguments: Any,
) -> tuple[PreTrainedModel, dict[str, list[float]]]:
    """A copy of ``start`` after ``steps`` updates, each with ``size`` new rollouts in groups of eight, of ``length``
    tokens at most.

    Args:
        label: for the progress.
        reward: of TRL's form.
        rows: of the data, with a ``prompt``.
        arguments: of GRPOConfig; they win.

    Returns:
        The model, and one number a step: the mean ``reward`` of its rollouts, the policy's ``entropy``, ``tokens``
        that were written and that were ``trained`` on, and the ``seconds`` of the update without the rollouts.
    """
    from datasets import Dataset
    from trl import GRPOConfig

    from ...reinforcement.trainer import RecipeTrainer
    from ...training.quiet import ReportSteps, quiet_arguments, without_printer

    logs: dict[str, list[float]] = {name: [] for name in ("reward", "entropy", "tokens", "trained", "seconds")}

    class Logged(RecipeTrainer):
        """Keeps what a step is about."""

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            batch = super()._generate_and_score_completions(inputs)
            written, chosen = batch["completion_mask"], batch.get("tool_mask", batch["completion_mask"])
            logs["tokens"].append(float(written.sum()))
            logs["trained"].append(float((written * chosen).sum()))
            logs["reward"].append(self.sequence_rewards().nanmean().item())
            self.began = time.perf_counter()
            return batch

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            logs["seconds"].append(time.perf_counter() - self.began)
            logs["entropy"].append(self._metrics["train"]["entropy"][-1])
            return loss

    seed_everything(context.seed)
    settings: dict[str, Any] = dict(
        per_device_train_batch_size=size,
        num_generations=GROUP,
        max_completion_length=length,
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=4,
        beta=0.0,
        seed=context.seed,
        data_seed=context.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Logged(
            copy.deepcopy(start),
            recipe=recipe,
            reward_funcs=reward,
            args=GRPOConfig(**quiet_arguments(folder, **settings | arguments)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[ReportSteps(context.report, label)],
        )
        without_printer(trainer).train()
        model: PreTrainedModel = trainer.model.eval()
    return model, logs

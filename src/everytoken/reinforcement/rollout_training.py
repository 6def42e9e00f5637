"""Training on rollouts, whatever the recipe: settings, data, reward, and what is reported.

Without data, the prompts are tasks with checkable answers (reasoning_gym), and a completion is rewarded by the task's
own scorer: 1 or 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..core.errors import BadInputError, EverytokenError
from ..core.settings import load_function
from ..core.trace import TokenTrace
from ..training.base import TrainingContext, TrainingResult
from ..training.config import TrainConfig
from ..training.datasets.arithmetic import make_task, messages_of
from ..training.datasets.pairs import dataset_of, read_rows
from ..training.datasets.prompts import read_prompts
from ..training.datasets.tasks import COLUMNS, TaskReward, task_reward
from ..training.session import Prompt, TrainingSession
from .base import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METRICS = {
    "loss": "loss",
    "reward": "reward",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "recipe/tokens_trained": "tokens trained",
    "frac_reward_zero_std": "",
    "recipe/rollout_entropy": "",
}


class Method(Protocol):
    """A method of the station: settings that become a recipe.

    One for models that write in any order has ``any_order = True`` (``canvas_pieces.CanvasMethod``).

    One that learns from plain text, and rewards by itself, also has ``rows(texts, model, tokenizer, seed)``, which
    makes the data.
    """

    def recipe(self) -> Recipe: ...

    def arguments(self) -> dict[str, Any]: ...


@dataclass
class RolloutTraining(TrainConfig):
    """Training on the model's own rollouts.

    Args:
        task: of reasoning_gym, where there are no data; ``items`` of them are made.
        reward: ``module:function`` of TRL's form ``(prompts, completions, **columns) -> list of numbers``; with data of
            your own it must be given.
        num_generations: rollouts a prompt; ``batch_size`` counts rollouts.
        num_iterations: updates with a batch of rollouts.
        temperature: of sampling and of the loss.

    Raises:
        BadInputError: a value out of range.
    """

    batch_size: int = 16
    lr: float = 1e-6
    task: str = "chain_sum"
    items: int = 128
    reward: str | None = None
    num_generations: int = 8
    num_iterations: int = 1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations < 2:
            raise BadInputError(
                f"num_generations must be at least 2, or nothing is compared; got {self.num_generations}."
            )
        if self.batch_size % self.num_generations:
            raise BadInputError(
                f"batch_size={self.batch_size} is no multiple of num_generations={self.num_generations}."
            )
        if self.num_iterations < 1 or self.items < 2 or self.temperature <= 0:
            raise BadInputError("num_iterations must be at least 1, items at least 2 and temperature above 0.")


@dataclass(frozen=True)
class Workshop:
    """What a training on rollouts is done with; left out is what left-to-right models need.

    Attributes:
        session: loads the model, and writes texts for the report.
        rows: ``(config, context) -> rows, reward``, before any model is loaded.
        trainer: a class of ``RecipeTrainer``'s form.
        pictures: ``(trainer, row, tokenizer) -> traces, pictures`` of one prompt's rollouts.
        column: of the traces, shown first.
    """

    session: Callable[..., TrainingSession]
    rows: Callable[[Any, TrainingContext], tuple[list[dict[str, Any]], Callable[..., Any]]]
    trainer: Callable[..., Any]
    pictures: Callable[[Any, dict[str, Any], Any], tuple[list[TokenTrace], dict[str, str]]]
    column: str


def _workshop() -> Workshop:
    from .pictures import group_pictures
    from .trainer import RecipeTrainer

    return Workshop(TrainingSession, rows_and_reward, RecipeTrainer, group_pictures, "advantage")


def train_on_rollouts(
    name: str, config: RolloutTraining, method: Method, context: TrainingContext, workshop: Workshop | None = None
) -> TrainingResult:
    """Trains and reports.

    Args:
        workshop: None is that of left-to-right models.

    Raises:
        BadInputError: bad rows, an unknown task, or no reward for data of the user's.
    """
    from trl import GRPOConfig

    work = _workshop() if workshop is None else workshop
    if (of_texts := getattr(method, "rows", None)) is None:
        rows, reward = work.rows(config, context)
        session = work.session(config, context, name, METRICS)
    else:
        texts, reward = _texts(config, context), None
        session = TrainingSession(config, context, name, METRICS)
        rows = of_texts(texts, session.policy, session.tokenizer, config.seed)
    train, held = session.split(_dataset(rows, session.tokenizer))
    answered = session.sampled(held)
    before = session.write_texts(session.policy, answered)
    arguments = config.arguments(session.checkpoints) | method.arguments()
    args = GRPOConfig(
        **arguments,
        num_generations=config.num_generations,
        num_iterations=config.num_iterations,
        temperature=config.temperature,
        max_completion_length=config.sample_tokens,
    )
    trainer = work.trainer(
        session.policy,
        recipe=method.recipe(),
        reward_funcs=reward,
        args=args,
        train_dataset=train,
        processing_class=session.tokenizer,
        peft_config=session.adapter,
    )
    session.train(trainer)
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    quarter = max(1, len(logs) // 4)

    def mean(key: str, part: list[dict[str, Any]]) -> float:
        found = [entry[key] for entry in part if entry.get(key) is not None]
        return sum(found) / len(found) if found else float("nan")

    figures = {
        "reward, first quarter": mean("reward", logs[:quarter]),
        "reward, last quarter": mean("reward", logs[-quarter:]),
        "entropy, last quarter": mean("entropy", logs[-quarter:]),
        "tokens a response": mean("completions/mean_length", logs[-quarter:]),
    }
    if any("recipe/tokens_trained" in entry for entry in logs):
        figures["share of tokens trained"] = mean("recipe/tokens_trained", logs)
    # what the pieces logged, and the single rewards where there are several
    names = {name: "" for entry in logs for name in entry}
    single = {name: "" for name in names if name.startswith("rewards/") and name.endswith("/mean")}
    pieces = {name: "" for name in names if name.startswith("recipe/")}
    session.metrics = {**METRICS, **(single if len(single) > 1 else {}), **pieces}
    traces: list[TokenTrace] = []
    pictures: dict[str, str] = {}
    if trainer.accelerator.num_processes == 1:
        try:
            traces, pictures = work.pictures(trainer, trainer.train_dataset[0], session.tokenizer)
        except EverytokenError as error:  # what was trained is saved all the same
            session.notes.append(f"The report shows no rollouts: {error}")
    return session.finish(trainer, figures, answered, before, traces, work.column, pictures)


def rows_and_reward(
    config: RolloutTraining, context: TrainingContext
) -> tuple[list[dict[str, Any]], Callable[..., Any]]:
    """Rows with a ``prompt``, and the reward; before any model is loaded."""
    if context.data is None:
        if config.reward is not None:
            raise BadInputError("A reward of your own needs data of your own.", "Give --data, or leave reward out.")
        task = make_task(config.task, config.items, config.seed)
        held = {"task": config.task, "seed": config.seed, "count": config.items}
        rows = [{"question": task[index]["question"], "item": index} | held for index in range(config.items)]
        return rows, TaskReward("correct")
    rows = read_rows(context.data)
    if config.reward is None and not all(name in rows[0] for name in COLUMNS):
        raise BadInputError(
            "Your data need a reward.", "Give --set reward=module:function, of TRL's form (prompts, completions, ...)."
        )
    for index, row in enumerate(rows):
        if not row.get("prompt"):
            raise BadInputError(
                f"{context.data}, row {index}: 'prompt' is empty or missing.", "Rollouts answer prompts."
            )
    if config.reward is None:
        return rows, task_reward
    return rows, load_function(config.reward, "A reward", "rewards:score")


def _texts(config: RolloutTraining, context: TrainingContext) -> list[str]:
    """The user's texts, or tasks with their answers; before any model is loaded."""
    if config.reward is not None:
        raise BadInputError("This method rewards by itself.", "Leave reward out.")
    if context.data is not None:
        return read_prompts(context.data, "text")
    task = make_task(config.task, config.items, config.seed)
    return [f"{task[index]['question']} {task[index]['answer']}" for index in range(config.items)]


def _dataset(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Any:
    def prompt(row: dict[str, Any]) -> Prompt:
        if "prompt" in row:
            found: Prompt = row["prompt"]
            return found
        return messages_of(row["question"]) if tokenizer.chat_template else f"{row['question']}\n"

    return dataset_of([row | {"prompt": prompt(row)} for row in rows])

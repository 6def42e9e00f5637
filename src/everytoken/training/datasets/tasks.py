"""Tasks with checkable answers (reasoning_gym) as prompts for reinforcement, a warm-up set in their own format, and
rewards that check answers.

A small model that never answers right learns nothing from its rollouts. ``warmup.jsonl`` has questions of another seed
with their answers, for supervised training until a fifth of the rollouts or more are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ...core.errors import BadInputError, require
from ...core.progress import Report
from ...core.rng import derive_seed
from .arithmetic import is_correct, make_task, messages_of
from .base import DataKind, MadeRows, Rows
from .messages import completion_text

COLUMNS = ("task", "seed", "count", "item")
"""What says which item a row is of; ``task_reward`` reads them."""


@dataclass
class TaskData:
    """Questions of a task whose answers a program checks, with more for a warm-up and for a test.

    Args:
        task: of reasoning_gym (``countdown``, ``chain_sum``, ``gcd``, ...).
        count: questions to train on.
        warmup: questions with answers for supervised training; 0 for none.
        test: held-out questions; 0 for none.
        seed: of the items; warm-up and test have seeds of their own, so no set holds another's items by design.
        chat: prompts as messages; else as text that ends with a line end.

    Raises:
        BadInputError: a count below 1, or a negative one of the others.
    """

    task: str = "chain_sum"
    count: int = 256
    warmup: int = 256
    test: int = 64
    seed: int = 0
    chat: bool = True

    def __post_init__(self) -> None:
        if self.count < 1 or self.warmup < 0 or self.test < 0:
            raise BadInputError("count must be at least 1, warmup and test not negative.")


def task_rows(settings: TaskData, count: int, name: str) -> Rows:
    """Rows of one set: ``prompt``, ``answer``, and ``COLUMNS``."""
    seed = settings.seed if name == "train" else derive_seed(settings.seed, name)
    made = make_task(settings.task, count, seed)
    rows = []
    for index in range(count):
        question = made[index]["question"]
        prompt: Any = messages_of(question) if settings.chat else f"{question}\n"
        held = {"task": settings.task, "seed": seed, "count": count, "item": index}
        rows.append({"prompt": prompt, "answer": str(made[index]["answer"])} | held)
    return rows


def make_rows(settings: TaskData, model: str | None, report: Report) -> MadeRows:
    """All sets; a warm-up row is kept if the task's own scorer accepts its answer."""
    if model is not None:
        raise BadInputError("Tasks are made without a model.", "Leave --model out.")
    train = task_rows(settings, settings.count, "train")
    others = {}
    if settings.test:
        others["test"] = task_rows(settings, settings.test, "test")
    figures = {"questions": float(len(train))}
    if settings.warmup:
        rows = task_rows(settings, settings.warmup, "warmup")
        found = [row for row in rows if task_reward([f"<answer>{row['answer']}</answer>"], **_columns([row]))[0] == 1]
        others["warmup"] = [
            {"prompt": row["prompt"], "completion": _completion(row["answer"], settings.chat)} for row in found
        ]
        figures |= {"warm-up": float(len(found)), "warm-up answers that are accepted": len(found) / len(rows)}
    report("making tasks", 1, 1)
    return MadeRows(train, figures, others)


def _columns(rows: Rows) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in COLUMNS}


def _completion(answer: str, chat: bool) -> Any:
    text = f"<answer>{answer}</answer>"
    return [{"role": "assistant", "content": text}] if chat else text


@lru_cache(maxsize=16)
def _items(task: str, count: int, seed: int) -> Any:
    return make_task(task, count, seed)


class TaskReward:
    """1 where a task's own scorer gives exactly 1, else 0: its partial credit calls any text with the answer in it half
    right. A scorer that raises gives 0. Called in TRL's form, for rows with ``COLUMNS``.

    Args:
        name: what it is called in logs.
    """

    def __init__(self, name: str):
        self.__name__ = name

    def __call__(
        self,
        completions: Sequence[Any],
        task: Sequence[str],
        seed: Sequence[int],
        count: Sequence[int],
        item: Sequence[int],
        **_: Any,
    ) -> list[float]:
        rewards = []
        for completion, name, number, size, at in zip(completions, task, seed, count, item, strict=True):
            items = _items(name, size, number)
            rewards.append(float(is_correct(items, items[at], completion_text(completion))))
        return rewards


task_reward = TaskReward("task_reward")
"""For rows of ``everytoken data tasks``."""


def math_reward(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where math-verify finds the last expression of a response equal to ``answer``, in numbers or in symbols; else
    0. TRL's form, for data with a column ``answer``.

    Raises:
        MissingExtraError: math-verify is not installed.
    """
    require("math_verify", "math", "Checking answers of mathematics")
    from math_verify import parse, verify

    rewards = []
    for completion, truth in zip(completions, answer, strict=True):
        try:
            right = verify(parse(f"${truth}$"), parse(completion_text(completion)))
        except Exception:  # an answer that cannot be read is no right one
            right = False
        rewards.append(float(bool(right)))
    return rewards


DATA_KIND = DataKind(
    "tasks",
    TaskData,
    make_rows,
    title="{task} with checkable answers",
    origin="All questions and answers were made by reasoning_gym; its scorer says what is right.",
    tags="reasoning, trl, everytoken",
)

"""What ``everytoken try`` and ``compare`` run for planners: households, with the same model for every planner."""

from __future__ import annotations

import time
from typing import Any

from ..core.errors import BadInputError
from ..core.rng import numpy_generator
from ..core.trace import TokenTrace
from ..decoding.trial import TrialRequest, TrialResult
from .controlled import ControlledModel
from .tree_picture import rows, tree_picture
from .tree_planner import Planner, Run, StepPlanner
from .worlds import Household, shortest

TASKS, ACCURACY = 10, 0.8
BASELINE, REACT = "step by step", "ReAct-like"


def trace_columns(_trial: object) -> tuple[str, ...]:
    """The columns of the traces."""
    return ("state", "plans", "depth")


def household_rules(examples: int = 4) -> str:
    """The long part of a planning prompt: the rules, every action, and worked examples."""
    lines = [
        "You plan household tasks. A box must be opened before anything is taken from it or put into it. One thing "
    ]
    lines[0] += "is held at a time. Rooms are next to each other in the order kitchen, hall, bedroom. Actions:"
    lines += Household(0).vocabulary()
    for seed in range(1000, 1000 + examples):
        world = Household(seed)
        lines += [f"Task: {world.task}", world.observe(), *(shortest(world) or [])]
    return "\n".join(lines)


def trial(request: TrialRequest) -> TrialResult:
    """Carries ten tasks out with every planner; see ``decoding.trial``.

    Without a model, every planner gets a controlled one, which is right eight times in ten: plans are noisy copies of
    the perfect one. With one (``--model``), two tasks are planned by it.

    Raises:
        BadInputError: a data file or a prompt, which are not read.
    """
    if request.data is not None or request.prompt is not None:
        raise BadInputError("Planners read no --data and no --prompt: tasks come with their worlds.")
    seed, rules = int(request.options.get("seed", 0)), household_rules()
    local: Any = None
    if request.model is not None:
        from ..core.loading import load_model, load_tokenizer
        from .local_model import LocalModel

        request.report("loading the model", 0, 0)
        local = LocalModel(load_model(request.model), load_tokenizer(request.model))

    def planner(name: str, model: Any, settings: dict[str, Any] | None, factory: Any) -> Planner:
        if settings is None:
            return StepPlanner(model, rules, react=name == REACT)
        made: Planner = factory(**{"chooser": "logits", "rules": rules, "n_plans": 10} | settings, model=model)
        return made

    result = TrialResult({}, "tokens a task", column="state")
    arms: list[tuple[str, dict[str, Any] | None, Any]] = [(BASELINE, None, None), (REACT, None, None)]
    arms += [(item.name, item.settings, item.factory) for item in request.trials]
    for name, settings, factory in arms:
        runs: list[Run] = []
        began = time.perf_counter()
        tasks = TASKS if local is None else 2
        for number in range(tasks):
            request.report(f"running {name}", number, tasks)
            world = Household(100 * seed + number)
            generator = numpy_generator(seed, "planning", number)
            model = local or ControlledModel(world, world.vocabulary(), ACCURACY, generator)
            runs.append(planner(name, model, settings, factory).run(world, world.task))
        result.rows[name] = {
            "tokens a task": sum(run.tokens for run in runs) / len(runs),
            "success": sum(run.success for run in runs) / len(runs),
            "corrections a task": sum(run.corrections for run in runs) / len(runs),
            "questions a task": sum(run.decisions for run in runs) / len(runs),
            "s a task": (time.perf_counter() - began) / len(runs),
        }
        for run in runs[:1]:
            if run.tree is not None:
                result.traces.append(_trace(name, run))
                result.pictures.append(tree_picture(run.tree, run.actions, f"{name}: the first task's tree"))
    return result


def _trace(name: str, run: Run) -> TokenTrace:
    """The first task's tree, a node a line."""
    assert run.tree is not None
    found = rows(run.tree, run.actions)
    trace = TokenTrace(list(range(len(found))), title=f"{name}: the first task's tree", station="agents")
    trace.texts = [f"{'  ' * (depth - 1)}{text}\n" for depth, text, _, _ in found]
    trace.add("state", [state for _, _, state, _ in found])
    trace.add("plans", [count for _, _, _, count in found])
    return trace.add("depth", [depth for depth, _, _, _ in found])

"""Tree-Planner's claims: far fewer tokens than planning step by step, and fewer corrections, at equal success.

Tasks are households, and text games that TextWorld makes (where it is installed). Every planner gets the same
controlled model, which is right eight times in ten: plans are noisy copies of the perfect one, and every choice or next
action is right as often. So planners differ in how often they ask, and in what they send. Beside success stands
coverage: whether some sampled plan, carried out alone, meets the goal.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    from ..agents.controlled import ControlledModel

STEP, REACT, TEN, TWENTY_FIVE = "step by step", "ReAct-like", "tree, 10 plans", "tree, 25 plans"
SIZES = {"quick": (8, 0), "cpu": (60, 4)}
"""Scale -> households, text games."""
ACCURACY = 0.8
WHY = (
    "short tasks, a controlled model, and tokens counted as words and marks; the paper plans in VirtualHome with GPT-3"
)


def run(context: Context) -> Arms:
    from ..agents.tree_trial import household_rules
    from ..agents.worlds import Household

    households, games = SIZES[context.scale]
    rules = household_rules()
    worlds: list[tuple[Callable[[], Any], list[str] | None]] = []
    for number in range(households):
        worlds.append((lambda number=number: Household(1_000_000 + 1000 * context.seed + number), None))  # type: ignore[misc]
    arms: Arms = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = made_games(games, context, Path(folder)) if games and find_spec("textworld") is not None else []
        for arm in (STEP, REACT, TEN, TWENTY_FIVE):

            def measured(arm: str = arm) -> dict[str, Any]:
                return {**planned(arm, worlds, rules, "", context), **played(arm, paths, rules, context)}

            arms[arm] = context.part(arm, measured)
    return arms


def planned(arm: str, worlds: list[Any], rules: str, prefix: str, context: Context) -> dict[str, list[float]]:
    """One arm on households: a value a task."""
    from ..agents.controlled import ControlledModel
    from ..core.rng import numpy_generator

    found: dict[str, list[float]] = {}
    for number, (make, _) in enumerate(worlds):
        context.report(f"{arm}: households", number, len(worlds))
        world = make()
        model = ControlledModel(world, world.vocabulary(), ACCURACY, numpy_generator(context.seed, "tasks", number))
        note(found, prefix, arm, world, world.task, model, rules)
    return found


def played(arm: str, paths: list[str], rules: str, context: Context) -> dict[str, list[float]]:
    """One arm on text games; nothing where there are none."""
    from ..agents.controlled import ControlledModel
    from ..agents.worlds import TextGame
    from ..core.rng import numpy_generator

    found: dict[str, list[float]] = {}
    for number, path in enumerate(paths):
        context.report(f"{arm}: text games", number, len(paths))
        game = TextGame(path)
        vocabulary = list(dict.fromkeys([*game.perfect(), *game.actions(), "fly to the moon", "open the sky"]))
        generator = numpy_generator(context.seed, "games", number)
        model = ControlledModel(game, vocabulary, ACCURACY, generator, game.perfect)
        note(found, "text games: ", arm, game, game.task, model, rules)
    return found


def note(
    found: dict[str, list[float]], prefix: str, arm: str, world: Any, task: str, model: ControlledModel, rules: str
) -> None:
    """Runs one planner on one task and adds its figures."""
    from ..agents.tree_planner import StepPlanner, TreePlanner, covered

    count = {TEN: 10, TWENTY_FIVE: 25}.get(arm)
    start = world.snapshot()
    if count is None:
        run = StepPlanner(model, rules, react=arm == REACT).run(world, task)
    else:
        run = TreePlanner(count, "logits", model=model, rules=rules).run(world, task)
    figures = {"success": run.success, "tokens a task": run.tokens, "corrections a task": run.corrections}
    if run.tree is not None:
        world.restore(start)
        figures["coverage"] = covered(world, run.tree.plans)
    for name, value in figures.items():
        found.setdefault(prefix + name, []).append(float(value))


def made_games(count: int, context: Context, folder: Path) -> list[str]:
    """Files of games of three rooms and a quest of four steps."""
    import textworld

    paths = []
    for number in range(count):
        context.report("making text games", number, count)
        options = textworld.GameOptions()
        options.nb_rooms, options.nb_objects, options.quest_length = 3, 6, 4
        options.seeds, options.path = 1000 * context.seed + number, str(folder / f"game-{number}.z8")
        paths.append(textworld.make(options)[0])
    return paths


REPRODUCTION = Reproduction(
    name="tree-planner",
    summary="planning step by step and on a tree in households and text games, with one controlled model for all",
    run=run,
    claims=[
        Claim("tokens a task", TWENTY_FIVE, STEP, "92.2% fewer", higher_is_better=False, threshold=0.078, why=WHY),
        Claim("tokens a task", TEN, STEP, "92.2% fewer", higher_is_better=False, why=WHY),
        Claim(
            "corrections a task", TWENTY_FIVE, STEP, "40.5% fewer", kind="difference", higher_is_better=False, why=WHY
        ),
        Claim("success", TWENTY_FIVE, STEP, "higher", kind="difference", why=WHY),
        Claim("tokens a task", TWENTY_FIVE, REACT, "fewer", higher_is_better=False, why=WHY),
    ],
    scales=("quick", "cpu"),
)

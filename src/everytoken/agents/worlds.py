"""Worlds to plan in: a small household, Gymnasium's toy text, and text games made by TextWorld.

A household and toy text are copied to go back. A text game is replayed: it is deterministic, and repeating a few
commands is cheaper than a copy.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from typing import Any

from ..core.errors import BadInputError, require
from ..core.rng import numpy_generator
from .action_tree import Outcome, World

ROOMS = ("kitchen", "hall", "bedroom")
BOXES = (("fridge", "kitchen"), ("drawer", "kitchen"), ("shelf", "hall"), ("chest", "bedroom"))
THINGS = ("apple", "book", "cup", "key")


class Household:
    """Three rooms in a row, four boxes that open, four things: put one thing into one box.

    Args:
        seed: where things are, which box is locked shut (its contents cannot be had), and what is asked for.
    """

    def __init__(self, seed: int = 0):
        generator = numpy_generator(seed, "household")
        self.room = ROOMS[int(generator.integers(len(ROOMS)))]
        self.open: frozenset[str] = frozenset()
        self.place = {thing: BOXES[int(generator.integers(len(BOXES)))][0] for thing in THINGS}
        self.thing = THINGS[int(generator.integers(len(THINGS)))]
        others = [box for box, _ in BOXES if box != self.place[self.thing]]
        self.target = others[int(generator.integers(len(others)))]
        self.task = f"put the {self.thing} into the {self.target}"

    def observe(self) -> str:
        boxes = [box for box, room in BOXES if room == self.room]
        seen = []
        for box in boxes:
            inside = [thing for thing, place in self.place.items() if place == box]
            seen.append(f"{box} (open: {', '.join(inside) or 'empty'})" if box in self.open else f"{box} (closed)")
        held = [thing for thing, place in self.place.items() if place == "hand"]
        return f"You are in the {self.room}. There: {', '.join(seen)}. You hold {', '.join(held) or 'nothing'}."

    def vocabulary(self) -> list[str]:
        """Every action that there is."""
        moves = [f"go to the {room}" for room in ROOMS]
        opens = [f"open the {box}" for box, _ in BOXES]
        takes = [f"take the {thing} from the {box}" for thing in THINGS for box, _ in BOXES]
        return moves + opens + takes + [f"put the {thing} into the {box}" for thing in THINGS for box, _ in BOXES]

    def actions(self) -> list[str]:
        return [action for action in self.vocabulary() if not self._wrong(action)]

    def _wrong(self, action: str) -> str:
        """Why an action cannot be done; empty where it can."""
        words = action.split()
        verb = words[0] if words else ""
        if action not in self.vocabulary():
            return "that is no action"
        if verb == "go":
            room = words[-1]
            if abs(ROOMS.index(room) - ROOMS.index(self.room)) != 1:
                return f"the {room} is not next to the {self.room}"
            return ""
        box = words[-1]
        if dict(BOXES)[box] != self.room:
            return f"you are not close to the {box}"
        if verb == "open":
            return f"the {box} is open" if box in self.open else ""
        if box not in self.open:
            return f"the {box} is closed"
        thing, held = words[2], "hand" in self.place.values()
        if verb == "take":
            if self.place[thing] != box:
                return f"the {thing} is not in the {box}"
            return "your hand is full" if held else ""
        return "" if self.place[thing] == "hand" else f"you do not hold the {thing}"

    def step(self, action: str) -> Outcome:
        wrong = self._wrong(action)
        if wrong:
            return Outcome(False, wrong)
        words = action.split()
        if words[0] == "go":
            self.room = words[-1]
        elif words[0] == "open":
            self.open |= {words[-1]}
        else:
            self.place = self.place | {words[2]: "hand" if words[0] == "take" else words[-1]}
        return Outcome(True, "done")

    def snapshot(self) -> Any:
        return self.room, self.open, tuple(sorted(self.place.items()))

    def restore(self, snapshot: Any) -> None:
        self.room, self.open = snapshot[:2]
        self.place = dict(snapshot[2])

    def goal_met(self) -> bool:
        return self.place[self.thing] == self.target


class ToyText:
    """An environment of Gymnasium's toy text: the goal is a last step with a reward above 0.

    Args:
        environment: made by ``gymnasium.make``; deterministic.
        names: the name of each action.
        seed: of its reset.

    Raises:
        BadInputError: another number of names than actions.
    """

    def __init__(self, environment: Any, names: Sequence[str], seed: int = 0):
        self.environment, self.names = environment, list(names)
        if len(self.names) != environment.action_space.n:
            raise BadInputError(
                f"The environment has {environment.action_space.n} actions; got {len(self.names)} names."
            )
        self.state = environment.reset(seed=seed)[0]
        self.ended = self.met = False

    def observe(self) -> str:
        return f"state {self.state}"

    def actions(self) -> list[str]:
        return [] if self.ended else list(self.names)

    def step(self, action: str) -> Outcome:
        if action not in self.names or self.ended:
            return Outcome(False, "the game is over" if self.ended else "that is no action")
        before = copy.deepcopy(self.environment)
        state, reward, ended, cut, _ = self.environment.step(self.names.index(action))
        if ended and reward <= 0:  # a hole or a cliff: it counts as not done
            self.environment = before
            return Outcome(False, "that would end the game")
        if state == self.state and not ended:
            self.environment = before
            return Outcome(False, "nothing changes")
        self.state, self.ended, self.met = state, ended or cut, ended and reward > 0
        return Outcome(True)

    def snapshot(self) -> Any:
        return copy.deepcopy(self.environment), self.state, self.ended, self.met

    def restore(self, snapshot: Any) -> None:
        environment, self.state, self.ended, self.met = snapshot
        self.environment = copy.deepcopy(environment)

    def goal_met(self) -> bool:
        return self.met


class TextGame:
    """A game of TextWorld (package ``textworld``); going back starts it anew and repeats the commands.

    Args:
        path: the game's file, as ``textworld.make`` writes it.

    Raises:
        MissingExtraError: textworld is not installed.
    """

    def __init__(self, path: str):
        require("textworld", None, "Playing games of TextWorld")
        import textworld

        wanted = ("admissible_commands", "policy_commands", "won", "feedback", "description", "inventory", "objective")
        self.environment = textworld.start(path, request_infos=textworld.EnvInfos(**dict.fromkeys(wanted, True)))
        self.now = self.environment.reset()
        self.task = self.now.objective
        self.done: tuple[str, ...] = ()

    def observe(self) -> str:
        return f"{self.now.description}\n{self.now.inventory}"

    def actions(self) -> list[str]:
        return list(self.now.admissible_commands)

    def perfect(self) -> list[str]:
        """The commands that win from here, as the game itself knows them."""
        return list(self.now.policy_commands)

    def step(self, action: str) -> Outcome:
        if action not in self.now.admissible_commands:
            return Outcome(False, f"you cannot {action}")
        self.now, _, _ = self.environment.step(action)
        self.done = (*self.done, action)
        return Outcome(True, str(self.now.feedback).strip())

    def snapshot(self) -> Any:
        return self.done

    def restore(self, snapshot: Any) -> None:
        if snapshot == self.done:
            return
        self.now, self.done = self.environment.reset(), ()
        for action in snapshot:
            self.step(action)

    def goal_met(self) -> bool:
        return bool(self.now.won)


def shortest(world: World, limit: int = 100_000) -> list[str] | None:
    """A shortest plan that meets the goal, by breadth-first search over snapshots that can be hashed; the state comes
    back. None where there is none within ``limit`` states.
    """
    start = world.snapshot()
    seen = {start}
    waiting: deque[tuple[Any, tuple[str, ...]]] = deque([(start, ())])
    try:
        while waiting and len(seen) < limit:
            state, path = waiting.popleft()
            world.restore(state)
            if world.goal_met():
                return list(path)
            for action in world.actions():
                world.restore(state)
                world.step(action)
                after = world.snapshot()
                if after not in seen:
                    seen.add(after)
                    waiting.append((after, (*path, action)))
        return None
    finally:
        world.restore(start)

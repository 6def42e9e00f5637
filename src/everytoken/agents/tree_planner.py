"""Tree-Planner: sample whole plans once, merge them, and decide on the tree (arXiv 2310.08582).

One long prompt samples n plans before anything is done. Plans with common beginnings share them in an action tree. From
the root on, the observation decides between the children of a node by one short multiple-choice question; where a node
has one valid child, it is taken without a question. An action that fails is pruned: the siblings are decided between
again, and where none is left, the planner climbs to the nearest node that has one and goes back to the state that it
had there. With P the tokens of the long prompt, and o, h of observation and history, the tokens are::

    step by step   sum_t (P + o_t + h_t + a_t)
    on the tree    P + (tokens of n plans) + sum over decisions (D + o + h + options + 1)

A question is answered by the probabilities of the option letters in one forward pass (``logits``), by votes of an
endpoint without probabilities (``vote``), or by the number of plans behind each child (``count``), without a model.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..core.errors import BadInputError, check_choices
from .action_tree import END, ActionTree, Node, World

LETTERS = string.ascii_uppercase
SHOWN = 2_000
"""Characters of an observation or of a message that are shown to a model."""


class PlannerModel(Protocol):
    """What plans and decides."""

    def plans(self, prompt: str, count: int) -> list[str]:
        """Texts of ``count`` sampled plans, an action a line."""

    def letters(self, prompt: str, letters: Sequence[str]) -> list[float]:
        """The log-probability of each letter as the next token; up to a constant."""

    def answer(self, prompt: str) -> str:
        """A short text: the next action, or a letter."""

    def count(self, text: str) -> int:
        """Tokens of a text."""


@dataclass
class Ledger:
    """Tokens by use: prompts that were sent, text that was generated, and how many calls."""

    prompt: int = 0
    generated: int = 0
    calls: int = 0

    def add(self, prompt: int, generated: int) -> None:
        self.prompt, self.generated, self.calls = self.prompt + prompt, self.generated + generated, self.calls + 1

    @property
    def total(self) -> int:
        """All tokens."""
        return self.prompt + self.generated


@dataclass
class Run:
    """What a planner did.

    Attributes:
        success: whether the world's goal was met at the end.
        ended: ``"goal"``, ``"end"`` (the plan's end mark), ``"failed"`` (nothing left to try) or ``"limit"``.
        actions: those that count at the end, in order.
        corrections: actions that failed.
        decisions: questions that were asked.
        sampling, deciding: tokens.
        tree: the action tree with what was visited, for the planner that has one.
        tried: every action that was tried, with whether it could be done.
    """

    success: bool = False
    ended: str = "failed"
    actions: list[str] = field(default_factory=list)
    corrections: int = 0
    decisions: int = 0
    sampling: Ledger = field(default_factory=Ledger)
    deciding: Ledger = field(default_factory=Ledger)
    tree: ActionTree | None = None
    tried: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """All tokens of the run."""
        return self.sampling.total + self.deciding.total


class Planner(Protocol):
    """Anything that carries a task out in a world."""

    def run(self, world: World, task: str) -> Run:
        """Acts until the goal is met or nothing is left to do."""


Choose = Callable[[Node, list[Node], str], int]
"""``(node, options, observation) -> which option``: a chooser of one's own, such as an oracle."""


def cut(text: str) -> str:
    """What a model is shown of a text from the world: one line a line, cut, as JSON inside quotes."""
    return json.dumps(text[:SHOWN], ensure_ascii=False)


def read_plans(texts: Sequence[str], known: Callable[[str], str | None]) -> list[tuple[str, ...]]:
    """Plans from sampled texts: numbers and bullets are taken off, and lines that are no action are dropped.

    Args:
        known: a line -> the world's spelling of the action, or None.
    """
    plans = []
    for text in texts:
        lines = [re.sub(r"^\s*(?:\d+[.)]|[-*])\s*", "", line).strip() for line in text.splitlines()]
        actions = [action for line in lines if line and (action := known(line)) is not None]
        if actions:
            plans.append(tuple(actions))
    return plans


@dataclass
class TreePlanner:
    """Plans on a tree.

    Args:
        n_plans: how many plans are sampled.
        chooser: ``"logits"``, ``"vote"`` or ``"count"``.
        votes: answers of a vote.
        corrections: how many actions may fail; one more ends the run.
        model: what samples and decides; None where plans and choices come from elsewhere.
        rules: the long part of the sampling prompt: rules and examples.
        plans: plans that were sampled before; None samples.
        choose: a chooser of one's own instead of ``chooser``.
        known: a line -> the world's spelling of an action, or None; default every line as it is.

    Raises:
        BadInputError: numbers out of range, an unknown chooser, or no model where one is needed.
    """

    n_plans: int = 25
    chooser: str = "count"
    votes: int = 20
    corrections: int = 10
    model: PlannerModel | None = None
    rules: str = ""
    plans: Sequence[Sequence[str]] | None = None
    choose: Choose | None = None
    known: Callable[[str], str | None] = str.strip

    def __post_init__(self) -> None:
        check_choices(self, chooser=("logits", "vote", "count"))
        if self.n_plans < 1 or self.votes < 1 or self.corrections < 0:
            raise BadInputError("A tree needs one plan and one vote at least, and a correction limit of 0 or more.")

    def run(self, world: World, task: str) -> Run:
        """See ``Planner``. Where no sampled plan can be read, the run says so (``"failed"``) and does nothing."""
        run = Run()
        plans = self._plans(world, task, run)
        if not plans:
            return run
        run.tree = ActionTree.from_plans(plans)
        node, states = run.tree.root, {id(run.tree.root): world.snapshot()}
        complaint = ""
        while True:
            options = node.options()
            while not options:  # nothing left here: climb to a node with something left, and to its state
                node.valid = False
                if node.parent is None:
                    return run
                node = node.parent
                options = node.options()
                if options:
                    world.restore(states[id(node)])
            chosen = options[0]
            if len(options) > 1:
                chosen = options[self._decide(node, options, world.observe(), task, complaint, run)]
            if chosen.action == END:
                chosen.visited = True
                run.actions, run.ended, run.success = node.path(), "end", world.goal_met()
                return run
            outcome = world.step(chosen.action)
            run.tried.append((chosen.action, outcome.ok))
            if outcome.ok:
                chosen.visited, complaint, node = True, "", chosen
                states[id(node)] = world.snapshot()
                run.actions = node.path()
                if world.goal_met():
                    run.ended, run.success = "goal", True
                    return run
                continue
            chosen.valid, complaint = False, outcome.message
            run.corrections += 1
            if run.corrections > self.corrections:
                run.ended, run.actions = "limit", node.path()
                return run

    def _plans(self, world: World, task: str, run: Run) -> list[tuple[str, ...]]:
        if self.plans is not None:
            return [tuple(plan) for plan in self.plans]
        if self.model is None:
            raise BadInputError("A tree planner samples its plans from a model.", "Give it a model, or plans.")
        prompt = f"{self.rules}\nTask: {task}\nYou see: {cut(world.observe())}\nPlan, one action a line:\n"
        texts = self.model.plans(prompt, self.n_plans)
        run.sampling.add(self.model.count(prompt), sum(map(self.model.count, texts)))
        return read_plans(texts, self.known)

    def _decide(self, node: Node, options: list[Node], seen: str, task: str, complaint: str, run: Run) -> int:
        """Which of two or more options. More than 26 are asked for in rounds of up to 26."""
        run.decisions += 1
        if self.choose is not None:
            return self.choose(node, options, seen)
        if self.chooser == "count" or self.model is None:
            if self.chooser != "count":
                raise BadInputError(f"The chooser {self.chooser!r} needs a model.")
            return max(range(len(options)), key=lambda place: (options[place].count, -place))
        places = list(range(len(options)))
        while len(places) > 1:
            groups = [places[start : start + len(LETTERS)] for start in range(0, len(places), len(LETTERS))]
            places = [
                group[self._ask(node, [options[p] for p in group], seen, task, complaint, run)] for group in groups
            ]
        return places[0]

    def _ask(self, node: Node, options: list[Node], seen: str, task: str, complaint: str, run: Run) -> int:
        if len(options) == 1:
            return 0
        assert self.model is not None
        letters = LETTERS[: len(options)]
        prompt = question(task, seen, node.path(), complaint, [item.action for item in options])
        sent = self.model.count(prompt)
        if self.chooser == "logits":
            run.deciding.add(sent, 1)
            scores = self.model.letters(prompt, letters)
            return max(range(len(options)), key=lambda place: (scores[place], -place))
        answers = [self.model.answer(prompt) for _ in range(self.votes)]
        for text in answers:
            run.deciding.add(sent, self.model.count(text))
        found = Counter(text.strip()[:1].upper() for text in answers)
        votes = [found.get(letter, 0) for letter in letters]
        if not any(votes):  # no letter among the options: the child with most plans
            votes = [item.count for item in options]
        return max(range(len(options)), key=lambda place: (votes[place], -place))


def question(task: str, seen: str, done: Sequence[str], complaint: str, options: Sequence[str]) -> str:
    """The short prompt of a decision. Names are quoted and options come last, so that no name passes for an option."""
    lines = [f"Task: {task}", f"You see: {cut(seen)}", f"Done: {cut('; '.join(done) or 'nothing')}"]
    if complaint:
        lines.append(f"The last action failed: {cut(complaint)}")
    lines.append("What is next?")
    lines += [
        f"{letter}. {cut('the task is done' if text == END else text)}"
        for letter, text in zip(LETTERS, options, strict=False)
    ]
    return "\n".join([*lines, "Answer:"])


@dataclass
class StepPlanner:
    """The baselines: one long prompt for every action, as in plain iterative planning, or with a thought before it.

    Args:
        model: what answers the next action.
        rules: the long part of the prompt.
        react: ask for a thought and an action (ReAct).
        corrections: how many actions may fail; one more ends the run.
        steps: actions at most.
        known: as for ``TreePlanner``.

    Raises:
        BadInputError: numbers out of range.
    """

    model: PlannerModel
    rules: str = ""
    react: bool = False
    corrections: int = 10
    steps: int = 50
    known: Callable[[str], str | None] = str.strip

    def __post_init__(self) -> None:
        if self.corrections < 0 or self.steps < 1:
            raise BadInputError("A step planner needs a correction limit of 0 or more and one step at least.")

    def run(self, world: World, task: str) -> Run:
        """See ``Planner``."""
        run, complaint = Run(), ""
        for _ in range(self.steps):
            if world.goal_met():
                run.success, run.ended = True, "goal"
                return run
            asked = "Thought and action, the action on the last line:" if self.react else "Next action:"
            said = f"The last action failed: {cut(complaint)}\n" if complaint else ""
            done = cut("; ".join(run.actions) or "nothing")
            prompt = f"{self.rules}\nTask: {task}\nDone: {done}\nYou see: {cut(world.observe())}\n{said}{asked}\n"
            text = self.model.answer(prompt)
            run.deciding.add(self.model.count(prompt), self.model.count(text))
            run.decisions += 1
            lines = [line for line in text.strip().splitlines() if line.strip()]
            action = self.known(lines[-1].strip()) if lines else None
            if action == END:
                run.success, run.ended = world.goal_met(), "end"
                return run
            outcome = world.step(action) if action else None
            ok = outcome is not None and outcome.ok
            run.tried.append((action or text[:80], ok))
            if ok:
                run.actions.append(action or "")
                complaint = ""
                continue
            complaint = outcome.message if outcome is not None else "this is no action"
            run.corrections += 1
            if run.corrections > self.corrections:
                run.ended = "limit"
                return run
        run.success, run.ended = world.goal_met(), "goal" if world.goal_met() else "limit"
        return run


def covered(world: World, plans: Sequence[Sequence[str]]) -> bool:
    """Whether some plan, carried out alone from here, meets the goal at its end or before; the state comes back."""
    start: Any = world.snapshot()
    try:
        for plan in plans:
            world.restore(start)
            if world.goal_met():
                return True
            for action in plan:
                if not world.step(action).ok:
                    break
                if world.goal_met():
                    return True
        return False
    finally:
        world.restore(start)

"""The action tree and the planner by the sheet's numbers, and against brute force in random worlds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from everytoken.agents.action_tree import END, ActionTree, Outcome
from everytoken.agents.controlled import ControlledModel
from everytoken.agents.tree_picture import tree_picture, tree_text
from everytoken.agents.tree_planner import Ledger, StepPlanner, TreePlanner, covered, question, read_plans
from everytoken.agents.worlds import Household, TextGame, ToyText, shortest
from everytoken.core.errors import BadInputError

PLANS = ["abc", "abd", "ae", "f", "abc"]


class Letters:
    """Every action works but those that fail; the goal is a set of states, or none."""

    def __init__(self, failing="", goals=()):
        self.state, self.failing, self.goals, self.tried = "", set(failing), set(goals), []

    def observe(self):
        return self.state

    def actions(self):
        return []

    def step(self, action):
        self.tried.append((self.state, action))
        if action in self.failing:
            return Outcome(False, f"{action} failed")
        self.state += action
        return Outcome(True)

    def snapshot(self):
        return self.state

    def restore(self, snapshot):
        self.state = snapshot

    def goal_met(self):
        return self.state in self.goals


class Always:
    """A model that always answers one letter, and remembers every string."""

    def __init__(self, letter="A", plans=()):
        self.letter, self.texts, self.sent, self.got = letter, list(plans), [], []

    def plans(self, prompt, count):
        self.sent.append(prompt)
        self.got += self.texts
        return self.texts[:count]

    def letters(self, prompt, letters):
        self.sent.append(prompt)
        self.got.append("A")
        return [1.0 if letter == self.letter else 0.0 for letter in letters]

    def answer(self, prompt):
        self.sent.append(prompt)
        self.got.append(self.letter)
        return self.letter

    def count(self, text):
        return len(text)


def planned(world, plans=PLANS, **settings):
    return TreePlanner(plans=plans, chooser="logits", model=Always(), **settings).run(world, "task")


def test_the_tree_of_the_sheet():
    tree = ActionTree.from_plans(PLANS)
    assert len(tree.nodes()) == 11
    assert np.mean(tree.leaf_depths()) == 3.25
    assert list(tree.root.children) == ["a", "f"]
    below = tree.root.children["a"].children["b"].children
    assert {name: node.plans for name, node in below.items()} == {"c": [0, 4], "d": [1]}
    assert tree.branching_depths() == [0, 1, 2]
    paths = {tuple(node.path()) for node in tree.nodes() if not node.children}
    assert paths == {(*plan, END) for plan in PLANS}
    for node in tree.nodes():
        assert not node.children or node.count == sum(child.count for child in node.children.values())
    for plans in ([], [["a", " "]], [["a", END]]):
        with pytest.raises(BadInputError):
            ActionTree.from_plans(plans)


@pytest.mark.parametrize(
    ("failing", "actions", "corrections", "calls", "ended"),
    [("", "abc", 0, 3, "end"), ("c", "abd", 1, 3, "end"), ("cd", "ae", 2, 3, "end"), ("be", "f", 2, 2, "end"),
     ("af", "", 2, 1, "failed")],
)  # fmt: skip
def test_always_answering_a(failing, actions, corrections, calls, ended):
    run = planned(Letters(failing))
    assert ("".join(run.actions), run.corrections, run.decisions, run.ended) == (actions, corrections, calls, ended)
    assert run.deciding.calls == calls


def test_the_correction_limit():
    run = planned(Letters("c"), corrections=0)
    assert (run.ended, run.corrections, run.actions) == ("limit", 1, ["a", "b"])
    assert planned(Letters("cd"), corrections=1).ended == "limit"
    assert planned(Letters("cd"), corrections=2).ended == "end"


def random_world(generator):
    """States are strings; each action has a random outcome in each state; some states are goals."""
    table = {}

    class Random(Letters):
        def step(self, action):
            self.tried.append((self.state, action))
            key = self.state, action
            if key not in table:
                table[key] = generator.random() < 0.6
            if not table[key]:
                return Outcome(False, "no")
            self.state += action
            return Outcome(True)

    goals = {"".join(word) for length in (1, 2, 3) for word in itertools.product("abc", repeat=length)}
    return Random(goals={goal for goal in sorted(goals) if generator.random() < 0.1})


@pytest.mark.parametrize("seed", range(40))
def test_with_a_perfect_chooser_success_is_coverage(seed):
    """And no failed action is done twice from one state, history equals the path, and states come back as they were."""
    generator = np.random.default_rng(seed)
    for _ in range(25):
        world = random_world(generator)
        lengths = generator.integers(1, 4, int(generator.integers(1, 6)))
        plans = [tuple("abc"[k] for k in generator.integers(0, 3, length)) for length in lengths]

        def choose(node, options, _seen, world=world, plans=plans):
            for place, option in enumerate(options):
                through = [plans[number][len(node.path()) :] for number in option.plans]
                if option.action != END and covered(world, through):
                    return place
            return 0

        reachable = covered(world, plans)
        assert world.state == ""
        world.tried.clear()
        run = TreePlanner(plans=plans, choose=choose, corrections=99).run(world, "t")
        assert run.success == reachable
        assert "".join(run.actions) == world.state or run.ended == "failed"
        done = [(action, ok) for action, ok in run.tried if not ok]
        assert len(done) == run.corrections
        failed = [node for node in run.tree.nodes() if not node.valid]
        assert not any(node.visited and END in node.children and node.valid for node in failed)


def test_the_ledger_counts_every_string():
    model = Always(plans=["a\nb", "a\nc", "- d"])
    run = TreePlanner(model=model, chooser="logits", n_plans=3, rules="RULES").run(Letters(), "task")
    assert run.actions == ["a", "b"]
    assert run.sampling.total + run.deciding.total == run.tokens
    assert run.tokens == sum(map(len, model.sent)) + sum(map(len, model.got))
    assert "RULES" in model.sent[0] and not any("RULES" in text for text in model.sent[1:])
    model = Always("b")
    step = StepPlanner(model, "RULES", corrections=0, steps=3).run(Letters(goals=["bb"]), "task")
    assert step.success and step.actions == ["b", "b"]
    assert step.tokens == sum(map(len, model.sent)) + sum(map(len, model.got))
    assert all("RULES" in text for text in model.sent)
    ledger = Ledger()
    ledger.add(3, 4)
    assert (ledger.total, ledger.calls) == (7, 1)


def test_votes_and_counts():
    counted = TreePlanner(plans=["ab", "c", "c"]).run(Letters(), "t")
    assert counted.actions == ["c"] and counted.decisions == 1 and counted.tokens == 0
    tied = TreePlanner(plans=["ab", "c"]).run(Letters(), "t")
    assert tied.actions == ["a", "b"]  # by order
    voted = TreePlanner(plans=["a", "b"], chooser="vote", votes=3, model=Always(" b")).run(Letters(), "t")
    assert voted.actions == ["b"] and voted.deciding.calls == 3
    nonsense = TreePlanner(plans=["a", "b", "b"], chooser="vote", votes=3, model=Always("zzz")).run(Letters(), "t")
    assert nonsense.actions == ["b"]  # no letter among the options: most plans


def test_more_options_than_letters():
    """Sixty children are asked for in rounds; none is dropped silently."""
    plans = [(f"act {n}",) for n in range(60)]

    class Best(Always):
        def letters(self, prompt, letters):
            self.sent.append(prompt)
            return [1.0 if f'{letter}. "act 57"' in prompt else 0.0 for letter in letters]

    model = Best()
    run = TreePlanner(plans=plans, chooser="logits", model=model).run(Letters(), "t")
    assert run.actions == ["act 57"] and run.decisions == 1 and len(model.sent) == 4


def test_names_that_look_like_options_are_quoted():
    text = question("t", 'A. "done"\nB. fake', ["x"], "error\nA. no", ["A. done", END])
    options = [line for line in text.splitlines() if line[:2] in ("A.", "B.")]
    assert options == ['A. "A. done"', 'B. "the task is done"']
    assert len(question("t", "x" * 10_000, [], "", ["a", "b"])) < 3000


def test_reading_plans():
    known = {"go": "go", "GO": "go", "stay": "stay"}.get
    texts = ["1. GO\n2) stay\n\n- fly", "nothing", "* go"]
    assert read_plans(texts, known) == [("go", "stay"), ("go",)]
    run = TreePlanner(model=Always(plans=["x"]), known=lambda _line: None).run(Letters(), "t")
    assert (run.ended, run.tree, run.tried) == ("failed", None, [])  # said, not looped


def test_households_are_what_they_seem():
    for seed in range(10):
        world = Household(seed)
        before, best = world.snapshot(), shortest(world)
        assert world.snapshot() == before
        for action in best:
            assert action in world.actions() and world.step(action).ok
        assert world.goal_met()
        assert not world.step("fly").ok
        world.restore(before)
        for action in set(world.vocabulary()) - set(world.actions()):
            outcome = world.step(action)
            assert not outcome.ok and outcome.message and world.snapshot() == before


def test_planners_in_households():
    """With a sure model all planners succeed without a correction; the tree sends fewer tokens."""
    rules = "rules and examples. " * 100
    for seed in range(4):
        runs = []
        for kind in ("tree", "step", "react"):
            world = Household(seed)
            model = ControlledModel(world, world.vocabulary(), 1.0, np.random.default_rng(seed))
            if kind == "tree":
                runs.append(TreePlanner(5, "logits", model=model, rules=rules).run(world, world.task))
            else:
                runs.append(StepPlanner(model, rules, react=kind == "react").run(world, world.task))
        assert all(run.success and run.corrections == 0 for run in runs)
        assert runs[0].tokens < runs[1].tokens / 2 and runs[0].sampling.calls == 1
    noisy = Household(1)
    model = ControlledModel(noisy, noisy.vocabulary(), 0.7, np.random.default_rng(0))
    run = TreePlanner(25, "logits", model=model).run(noisy, noisy.task)
    assert run.success == noisy.goal_met()
    with pytest.raises(BadInputError):
        ControlledModel(noisy, [], 0.5, np.random.default_rng(0))


def test_gymnasiums_toy_text():
    """FrozenLake without slipping: a perfect plan is found, holes count as failed actions, and states come back."""
    gymnasium = pytest.importorskip("gymnasium")
    names = ["left", "down", "right", "up"]
    world = ToyText(gymnasium.make("FrozenLake-v1", is_slippery=False), names)
    good = ["down", "down", "right", "right", "down", "right"]
    hole = ["right", "down", "right"]
    run = TreePlanner(plans=[hole, hole, good]).run(world, "reach the goal")
    assert run.success and run.actions == good and run.corrections >= 1
    world.restore(ToyText(gymnasium.make("FrozenLake-v1", is_slippery=False), names).snapshot())
    assert world.observe() == "state 0" and not world.goal_met()
    with pytest.raises(BadInputError, match="4 actions"):
        ToyText(gymnasium.make("FrozenLake-v1"), names[:3])


@pytest.mark.slow
def test_text_games_of_textworld(tmp_path):
    """A game made here, its own perfect plan as oracle, going back by replay (about 15 s)."""
    textworld = pytest.importorskip("textworld")
    options = textworld.GameOptions()
    options.nb_rooms, options.nb_objects, options.quest_length, options.seeds = 3, 6, 4, 3
    options.path = str(tmp_path / "game.z8")
    path, _ = textworld.make(options)
    game = TextGame(path)
    best = game.perfect()
    assert covered(game, [best]) and not game.goal_met() and game.done == ()
    wrong = [*best[:2], "fly to the moon", *best[2:]]
    run = TreePlanner(plans=[wrong, wrong, best]).run(game, game.task)
    assert run.success and run.actions == best and run.corrections == 1
    seen = game.observe()
    game.restore(tuple(best[:1]))
    assert game.done == tuple(best[:1]) and game.observe() != seen


def test_pictures():
    run = planned(Letters("c"), plans=["abc", "abd", "<i>x"])
    text = tree_text(run.tree, run.actions)
    assert "x c (1)" in text and "* d (1)" in text and "- < (1)" in text
    html = tree_picture(run.tree, run.actions, "a <b> title")
    assert "&lt;b&gt;" in html and "<i>" not in html and "failed" in html


def test_bad_settings():
    for bad in ({"n_plans": 0}, {"votes": 0}, {"corrections": -1}, {"chooser": "magic"}):
        with pytest.raises(BadInputError):
            TreePlanner(**bad)
    with pytest.raises(BadInputError, match="samples its plans"):
        TreePlanner().run(Letters(), "t")
    with pytest.raises(BadInputError, match="needs a model"):
        TreePlanner(plans=["a", "b"], chooser="logits").run(Letters(), "t")
    for bad in ({"corrections": -1}, {"steps": 0}):
        with pytest.raises(BadInputError):
            StepPlanner(Always(), **bad)


def test_a_trial(monkeypatch):
    from everytoken.agents import tree_trial
    from everytoken.decoding.trial import Trial, TrialRequest

    monkeypatch.setattr(tree_trial, "TASKS", 2)
    result = tree_trial.trial(TrialRequest([Trial("tree-planner", TreePlanner, {"n_plans": 5})]))
    assert list(result.rows) == [tree_trial.BASELINE, tree_trial.REACT, "tree-planner"]
    assert result.rows["tree-planner"]["tokens a task"] < result.rows[tree_trial.BASELINE]["tokens a task"]
    assert tuple(result.traces[0].columns) == tree_trial.trace_columns(None) and "<section>" in result.pictures[0]
    for more in ({"data": "x"}, {"prompt": "x"}):
        with pytest.raises(BadInputError):
            tree_trial.trial(TrialRequest([], **more))


@pytest.mark.slow
def test_letters_and_plans_of_the_embedded_model():
    """Letters against the model's own probabilities, with and without a space; plans end at a blank line (10 s)."""
    import torch

    from everytoken.agents.local_model import LocalModel
    from everytoken.core.loading import load_model, load_tokenizer

    model = LocalModel(load_model(), load_tokenizer(), max_new_tokens=6, batch=2)
    prompt = 'Which is a fruit?\nA. "stone"\nB. "apple"\nAnswer:'
    with torch.no_grad():
        logits = model.model(model.tokenizer(prompt, return_tensors="pt")["input_ids"]).logits[0, -1].float()
    chances = logits.softmax(-1)
    for letter, score in zip("AB", model.letters(prompt, "AB"), strict=True):
        ids = {model.tokenizer.encode(text, add_special_tokens=False)[0] for text in (letter, f" {letter}")}
        assert score == pytest.approx(float(sum(chances[item] for item in ids).log()), abs=1e-4)
    torch.manual_seed(0)
    assert len(model.plans("Plan:\n", 3)) == 3
    assert "\n" not in model.answer("Say yes:")
    assert model.count("one two") == len(model.tokenizer.encode("one two", add_special_tokens=False))

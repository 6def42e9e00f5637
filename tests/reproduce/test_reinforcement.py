"""What the experiments of the reinforcement station stand on: counted passes, enumerated trees, steps of a head."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("trl")

from everytoken.reinforcement.ulorl import SegmentedRollouts
from everytoken.reproduce import thr, ulorl
from everytoken.reproduce.base import Context
from everytoken.reproduce.beds.small_models import small_model
from everytoken.reproduce.beds.sorting import Sorting, tokenizer
from everytoken.reproduce.tempo import CHOICES, LEVELS, NODES, Trees, estimated, updates_to
from everytoken.reproduce.thr import Group, measured
from everytoken.reproduce.ulorl import GROUP, LIMIT, Clock, lengths_of


def test_passes_are_those_of_the_longest():
    lengths = [length for number in range(16) for length in lengths_of("heavy tail", number, 3)]
    clock, piece = Clock("heavy tail", 3), SegmentedRollouts(1, 0.0)
    written = piece([{"number": at // GROUP} for at in range(16 * GROUP)], clock.writer(0))
    assert sorted(map(len, written.completions)) == sorted(lengths) and clock.passes == max(lengths)
    clock, piece = Clock("equal lengths", 3), SegmentedRollouts(8, 0.0)
    piece([{"number": at // GROUP} for at in range(16 * GROUP)], clock.writer(0))
    assert clock.passes == LIMIT // 4 + 1  # two segments, of which one reads again


def walked(trees, tree, path, start=0):
    """The chance that the policy goes on as ``path`` from a node, and the node that it ends at."""
    chance, node = 1.0, start
    for token in path:
        chance *= torch.softmax(trees.logits[tree, node], -1)[token].item()
        node = CHOICES * node + 1 + token
    return chance, node


@pytest.mark.parametrize("lucky", [False, True])
def test_values_of_a_tree_by_all_paths(lucky):
    trees = Trees(2, 5, lucky)
    paths = list(itertools.product(range(CHOICES), repeat=LEVELS))
    for tree in range(2):
        ends = [walked(trees, tree, path) for path in paths]
        whole = sum(chance * trees.rewards[tree, node - NODES].item() for chance, node in ends)
        assert trees.expected()[tree].item() == pytest.approx(whole, abs=1e-5)
        # the advantage of a first and of a second token, from all ways to go on
        for begin in ((), (1,)):
            _, node = walked(trees, tree, begin)
            values = []
            for token in range(CHOICES):
                behind = CHOICES * node + 1 + token
                rest = itertools.product(range(CHOICES), repeat=LEVELS - len(begin) - 1)
                after = [walked(trees, tree, path, behind) for path in rest]
                values.append(sum(chance * trees.rewards[tree, end - NODES].item() for chance, end in after))
            policy = torch.softmax(trees.logits[tree, node], -1)
            mean = (policy * torch.tensor(values)).sum().item()
            found = trees.advantages()[tree, node]
            assert found.tolist() == pytest.approx([value - mean for value in values], abs=1e-5)
            assert (policy * found).sum().item() == pytest.approx(0, abs=1e-6)
    if not lucky:
        assert set(trees.rewards.unique().tolist()) == {0.0, 1.0} and (trees.expected() <= 0.3 + 1e-5).all()


def test_rollouts_of_a_tree():
    trees, draw = Trees(3, 1), torch.Generator().manual_seed(0)
    nodes, tokens, rewards = trees.rollouts(400, draw)
    assert (nodes[..., 0] == 0).all() and torch.equal(nodes[..., 1:], CHOICES * nodes[..., :-1] + 1 + tokens[..., :-1])
    assert torch.allclose(rewards.mean(1), trees.expected(), atol=0.12)
    plain = estimated(tokens[:, :8], rewards[:, :8], 0.0)
    r = rewards[:, :8]
    assert torch.allclose(plain[..., 0], (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6), atol=1e-4)
    assert torch.equal(plain[..., 0], plain[..., -1])


def a_group():
    draw = torch.Generator().manual_seed(2)
    hidden, head = torch.randn(4, 5, 6, generator=draw), torch.randn(9, 6, generator=draw)
    ids = torch.randint(0, 9, (4, 5), generator=draw)
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 2])[:, None]
    return Group(hidden, hidden @ head.T, ids, mask, torch.tensor([True, False, True, False])), head


def test_a_step_of_the_head_is_that_of_its_matrix():
    group, head = a_group()
    weights = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    errors = (torch.eye(9)[group.ids] - group.logits.softmax(-1)) * (weights * group.mask)[..., None]
    moved = head + 0.1 * torch.einsum("jtv,jtd->vd", errors, group.hidden)
    assert torch.allclose(group.stepped(weights, 0.1), group.hidden @ moved.T, atol=1e-4)


def test_what_is_measured_of_a_group():
    figures = measured(a_group()[0])
    thr = figures["THR"]
    assert all(0 <= thr[name] <= 1 for name in thr)
    assert thr["agreement of measured and predicted change"] > 0.97
    up, down = (figures[arm]["right answers' log-probability after a step"] for arm in ("p = +0.2", "p = -0.2"))
    assert up > down


def test_updates_to_a_reward_are_those_of_the_first_ten_in_a_row_that_reach_it():
    curve = [0.0] * 10 + [1.0] * 10
    assert [updates_to(curve, goal) for goal in (0.0, 0.05, 0.5, 1.0, 1.1)] == [10, 11, 15, 20, 21]
    assert updates_to([0.5, 0.5], 0.5) == 2  # of a shorter curve, the mean of all


def test_one_right_sample_of_sixteen_passes(monkeypatch):
    codes, questions = tokenizer(), ["31425867=", "76543210="]

    def texts(self, model, codes, prompts, sample):
        answers = ["".join(sorted(prompt.strip("="))) for prompt in prompts]
        return [text if number in (0, 5) or not sample else text[::-1] for number, text in enumerate(answers)]

    monkeypatch.setattr(Sorting, "texts", texts)
    monkeypatch.setattr(Sorting, "surprises", lambda self, model, codes, prompts, texts: list(range(len(texts))))
    found = thr.graded(Context(0), None, codes, questions)
    assert found[thr.PASSED] == [1.0, 0.0] and found[thr.GREEDY] == [1.0, 1.0]
    assert found[thr.REMAINING] == [7.5, 23.5]  # means of sixteen


def test_entropy_of_a_token_of_a_model_that_knows_nothing():
    codes = tokenizer()
    torch.manual_seed(0)
    model = small_model(len(codes), hidden=16, layers=1, end=codes.eos_token_id).eval()
    model.generation_config.pad_token_id = codes.pad_token_id
    found = ulorl.graded(Context(0), model, codes, ulorl.TASK.questions(0, "test", 24))
    assert all(len(values) == 24 for values in found.values()) and max(found[ulorl.ACCURACY]) == 0.0
    assert sum(found[ulorl.ENTROPY]) / 24 == pytest.approx(torch.tensor(float(len(codes))).log().item(), abs=0.1)


@pytest.mark.slow
def test_thr_trains_three_policies_from_one_start():
    arms = thr.by_training(Context(0, "quick"))
    assert set(arms) == {"start", "GRPO", "p = +0.2", "p = -0.2"}
    found = [values[thr.REMAINING] for values in arms.values()]
    assert all(one != other for place, one in enumerate(found) for other in found[:place])
    assert {arm: p for arm, p in thr.STEPS.items() if arm in arms} == thr.TRAINED

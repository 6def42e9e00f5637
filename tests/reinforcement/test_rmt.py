"""RMT: its budget, triangle, curriculum and two losses, by the paper's formulas and against supervised training."""

from __future__ import annotations

import itertools
import types

import datasets
import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.reinforcement.budgets import BudgetPrompt, length_reward, thinking_and_rest
from everytoken.reinforcement.corpus import next_token_rows, position_entropies
from everytoken.reinforcement.rmt import (
    RMT,
    ClassCurriculum,
    CurriculumOrder,
    EntropyCurriculum,
    MatchReward,
    NextTokenLoss,
    ThinkingBudget,
    ThinkingLengthReward,
    prediction,
)
from everytoken.testing.models import tiny_tokenizer

from .common import TOKENIZER, distance, made, policy, score, weights

TEXTS = ["abcabcab", "ddeeffgg", "kkkk", "ijijijk"]
TAGS = tiny_tokenizer("<think>/abcd")


def test_budget():
    budget = ThinkingBudget()
    assert [budget(step, 1000) for step in (0, 100, 500, 1000, 2000)] == [800, 681, 357, 160, 160]
    found = [budget(step, 1000) for step in range(1001)]
    assert all(one >= other for one, other in itertools.pairwise(found))
    assert {ThinkingBudget(90, 1.0)(step, 10) for step in range(11)} == {90}
    assert ThinkingBudget(4, 0.01, 3)(10, 10) == 3


def test_triangle():
    found = [length_reward(n, 100) for n in (0, 50, 100, 150, 200, 201)]
    assert found == [0, 0.5, 1, 0.5, 0, 0]
    assert all(length_reward(n, 100) == pytest.approx(length_reward(200 - n, 100)) for n in range(201))


def test_the_curriculum_goes_from_one_distribution_to_the_other():
    curriculum = ClassCurriculum()
    assert curriculum(0.0).tolist() == curriculum(0.3).tolist() == pytest.approx([0.6, 0.3, 0.1])
    assert curriculum(0.7).tolist() == curriculum(1.0).tolist() == pytest.approx([0.1, 0.3, 0.6])
    assert curriculum(0.5).tolist() == pytest.approx([0.35, 0.3, 0.35])
    for progress in torch.linspace(0, 1, 9):
        assert curriculum(float(progress)).sum().item() == pytest.approx(1)


def test_draws_follow_the_curriculum_and_are_uniform_within_a_class():
    """Chi-square at the beginning, in the middle and at the end (99.9% bounds of 2 and 5 degrees of freedom)."""
    classes = [0] * 6 + [1] * 6 + [2] * 6
    repeats = dict(mini_repeat_count=2, batch_size=3000, repeat_count=2, shuffle=True, seed=3)
    sampler = EntropyCurriculum(classes, ClassCurriculum(), repeats, 100)
    for batch in (0, 50, 99):
        rows = torch.tensor(sampler.drawn(batch))
        counts = torch.bincount(rows, minlength=18).double().view(3, 6)
        expected = 3000 * sampler.curriculum(batch / 100)
        assert ((counts.sum(1) - expected).square() / expected).sum() < 13.8
        for part in counts:
            assert ((part - part.mean()).square() / part.mean()).sum() < 20.5
    few = EntropyCurriculum(classes, ClassCurriculum(), repeats | {"batch_size": 2}, 3)
    assert list(few) == list(few) and len(list(few)) == len(few) == 3 * 2 * 2 * 2
    order = list(few)[:8]
    assert order[:4] == order[4:] and order[0] == order[1] and order[2] == order[3]


def test_an_empty_class_leaves_its_share_to_the_others():
    repeats = dict(mini_repeat_count=1, batch_size=500, repeat_count=1, shuffle=True, seed=0)
    with pytest.warns(UserWarning, match="class 1"):
        sampler = EntropyCurriculum([0, 0, 2], ClassCurriculum(), repeats, 10)
    rows = sampler.drawn(0)
    assert set(rows) == {0, 1, 2} and 0.75 < sum(row < 2 for row in rows) / 500 < 0.95
    with pytest.raises(BadInputError, match="difficulty"):
        CurriculumOrder()(datasets.Dataset.from_list([{"prompt": "a"}]), repeats, 1)


def test_rewards_of_the_papers_example():
    """w = 0.2 and B = 100: (match, length) = (1, 100), (1, 250), (0, 50), (0, 100) -> 1.0, 0.8, 0.1, 0.2."""
    state = types.SimpleNamespace(global_step=0, max_steps=1)
    pieces = RMT(budget_start=100).recipe().of("reward")
    texts = [f"<think>{'a' * n}</think>{end}" for n, end in ((100, "b"), (250, "b"), (50, "c"), (100, "c"))]
    totals = torch.zeros(4)
    for piece in pieces:
        if isinstance(piece, ThinkingLengthReward):
            piece.use_tokenizer(TAGS)
        found = piece(
            completions=texts, completion_ids=[[2]] * 4, trainer_state=state, target_text=["b"] * 4, prompts=None
        )
        totals += piece.weight * torch.tensor(found)
    assert totals.tolist() == pytest.approx([1.0, 0.8, 0.1, 0.2])


def test_tags_and_spaces():
    assert prediction("<think>ab</think> c") == " c"
    for text in ("c", "<think>ab", "x<think>a</think>c", "<think>a</think>b</think>c", "<think><think>a</think>c"):
        assert thinking_and_rest(text) is None
    strict, loose = MatchReward(), MatchReward(spaces=True)
    texts = ["<think></think> c", "<think></think>c\n", "<think></think>c d", "c"]
    assert strict(texts, target_text=[" c"] * 4) == [1, 0, 0, 0]
    assert loose(texts, target_text=[" c"] * 4) == [1, 1, 0, 0]
    length = ThinkingLengthReward(ThinkingBudget(4, 1.0), only_correct=True)
    length.use_tokenizer(TAGS)
    state = types.SimpleNamespace(global_step=0, max_steps=1)
    # without tags all tokens but the end count as thinking; only_correct pays right predictions alone
    assert length.length("abc", [2, 3, 4, TAGS.eos_token_id]) == 3
    assert length(["<think>abab</think>c", "<think>abab</think>d"], [[2], [2]], state, ["c", "c"]) == [1.0, 0.0]


def test_the_prompt_keeps_what_a_prefix_ends_with():
    piece = BudgetPrompt(ThinkingBudget(9, 1.0), "{prompt}|{budget}", 5, inside=False)
    assert piece({"prompt": "ab \n"}, 0, 1)["prompt"] == "ab \n|9"
    assert piece.max_new_tokens(0, 1) == 23


def test_rows_of_a_corpus():
    model = policy()
    rows = next_token_rows([*TEXTS, "a", ""], model, TOKENIZER, positions=4)
    assert {row["text"] for row in rows} == {0, 1, 2, 3} and max(row["position"] for row in rows) < 8
    sizes = [sum(row["text"] == number for row in rows) for number in range(4)]
    assert sizes == [4, 4, 3, 4]  # the third text has four tokens
    for row in rows:
        assert TOKENIZER(row["prompt"] + row["target_text"])["input_ids"] == row["sequence"][: row["position"] + 1]
        logps = torch.log_softmax(model(torch.tensor([row["sequence"]])).logits[0, row["position"] - 1], -1)
        assert row["entropy"] == pytest.approx(-(logps.exp() * logps).sum().item(), abs=1e-4)
    levels = sorted((row["entropy"], row["difficulty"]) for row in rows)
    assert [level for _, level in levels] == [0] * 5 + [1] * 5 + [2] * 5
    fixed = next_token_rows(TEXTS, model, TOKENIZER, thresholds=[0.0, 9.0])
    assert {row["difficulty"] for row in fixed} == {1}
    with pytest.raises(BadInputError, match="two tokens"):
        next_token_rows(["a"], model, TOKENIZER)
    assert [len(part) for part in position_entropies(model, [[2, 3, 4], [5, 6]])] == [2, 1]


def row_of(text, position, sequence):
    return {"text": text, "position": position, "sequence": sequence, "prompt": "a", "target_text": "b"}


def test_every_position_belongs_to_one_of_the_two_losses():
    piece, long, short = NextTokenLoss(), [2, 3, 4, 5, 6], [7, 8, 9]
    rows = [row_of(4, 2, long), row_of(4, 2, long), row_of(4, 4, long), row_of(7, 1, short)]
    whole = piece.carry(rows, slice(0, 4))
    assert whole["text_learnt"].tolist() == [
        [False, True, False, True, False], [False] * 5, [False] * 5, [False, False, True, False, False],
    ]  # fmt: skip
    assert whole["text_ids"][3].tolist() == [7, 8, 9, -1, -1] and (whole["text_ids"][1] == -1).all()
    assert whole["text_share"].tolist() == [0.75] * 4
    # on two processes each text is learnt once, by the process that has its first row
    one, two = piece.carry(rows, slice(0, 2)), piece.carry(rows, slice(2, 4))
    assert (one["text_learnt"].sum(), two["text_learnt"].sum()) == (2, 1)
    assert two["text_share"].tolist() == [0.75] * 2


def ntp_batch(piece, rows):
    model = policy(5)
    piece.check_model(model)
    return model, piece.carry(rows, slice(0, len(rows)))


def test_without_targets_it_is_supervised_training_in_value_and_gradient():
    piece, sequences = NextTokenLoss(0.1), [[2, 3, 4, 5, 6], [7, 8, 9]]
    rows = [row_of(number, 0, ids) for number, ids in enumerate(sequences)]  # position 0 is predicted by nothing
    model, _ = ntp_batch(piece, rows)
    batch = piece.carry(rows, slice(0, 2))
    batch["text_share"] = torch.full((2,), 3.0)  # six tokens, none of them a target
    loss = piece(model, batch, 0, 1)
    loss.backward()
    ours = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    nats = [torch.nn.functional.cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]),
                                              reduction="sum") for ids in sequences]  # fmt: skip
    expected = 0.1 * sum(nats) / 6
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert all(torch.allclose(ours[name], weight.grad, atol=1e-6) for name, weight in model.named_parameters())


def test_micro_batches_average_to_the_whole_and_rows_without_text_add_nothing():
    piece, sequences = NextTokenLoss(1.0), [[2, 3, 4, 5, 6], [7, 8, 9], [3, 3, 4, 5]]
    rows = [row_of(number, 1, ids) for number, ids in enumerate(sequences) for _ in range(2)]
    model, batch = ntp_batch(piece, rows)
    whole = piece(model, batch, 0, 1)
    order = [1, 3, 0, 4, 5, 2]  # the first two carry no text
    parts = [{name: value[order[at : at + 2]] for name, value in batch.items()} for at in (0, 2, 4)]
    losses = [piece(model, part, 0, 1) for part in parts]
    assert losses[0].item() == 0 and losses[0].requires_grad
    assert (sum(losses) / 3).item() == pytest.approx(whole.item(), rel=1e-5)


def corpus_rows():
    return next_token_rows(TEXTS, policy(), TOKENIZER, positions=4)


@pytest.mark.slow
def test_without_its_parts_it_is_grpo_on_next_tokens(tmp_path):
    """lambda = 0, w = 0 and a flat curriculum leave GRPO, with the budget in the prompt alone."""
    flat = RMT(ntp_coef=0.0, weight_length=0.0, classes_early="1 0 0", classes_late="1 0 0")
    assert [piece.kind for piece in flat.recipe().pieces] == ["prompt", "sampler", "reward"]
    pieces = [piece for piece in flat.recipe().pieces if piece.kind == "sampler"]
    rows = [row | {"difficulty": 0} for row in corpus_rows()]
    changes = dict(prompts=rows, max_steps=2, num_iterations=1, steps_per_generation=1, temperature=0.7)
    ours = made(tmp_path / "a", *pieces, **changes)
    drawn = list(ours._get_train_sampler())[::4]
    theirs = made(tmp_path / "b", **changes | {"prompts": [rows[index] for index in drawn]}, shuffle_dataset=False)
    start = weights(theirs)
    for trainer in (ours, theirs):
        torch.manual_seed(3)
        trainer.train()
    assert distance(weights(theirs), start) > 1e-3
    assert distance(weights(ours), weights(theirs)) == 0.0


def test_the_two_losses_add_up(tmp_path):
    """The step's loss is GRPO's and lambda times the mean over what is no target; the policy learns the text."""
    piece = NextTokenLoss(0.5)
    changes = dict(prompts=corpus_rows(), num_iterations=1, steps_per_generation=1, temperature=0.7)
    trainer, plain = made(tmp_path / "a", piece, **changes), made(tmp_path / "b", **changes)
    found = []
    for each in (trainer, plain):
        each.model.train()
        each.current_gradient_accumulation_steps = 1
        torch.manual_seed(0)
        batch = each._generate_and_score_completions(next(iter(each.get_train_dataloader())))
        found.append(each._compute_loss(each.model, batch).item())
        if each is trainer:
            learnt, ids = batch["text_learnt"][0], batch["text_ids"][0]
            logps = torch.log_softmax(each.model(ids[None]).logits[0], -1)[:-1].gather(1, ids[1:, None])[:, 0]
            expected = -0.5 * logps[learnt[1:]].mean().item()
    assert found[0] - found[1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_resumed_in_the_middle_the_order_goes_on(tmp_path):
    pieces = lambda: [piece for piece in RMT().recipe().pieces if piece.kind in ("sampler", "auxiliary")]  # noqa: E731
    changes = dict(prompts=corpus_rows(), max_steps=4, num_iterations=1, steps_per_generation=1, reward=score)
    whole = made(tmp_path / "whole", *pieces(), save_strategy="steps", save_steps=2, **changes)
    whole.train()
    again = made(tmp_path / "again", *pieces(), **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert distance(weights(whole), weights(again)) == 0.0
    by_epochs = made(tmp_path / "epochs", *pieces(), prompts=changes["prompts"], max_steps=-1, num_train_epochs=2,
                     num_iterations=1, steps_per_generation=1)  # fmt: skip
    assert by_epochs.args.max_steps == 2 * len(changes["prompts"])
    assert len(by_epochs._get_train_sampler()) == 4 * by_epochs.args.max_steps


def test_bad_settings():
    for changes, name in (
        ({"budget_gamma": 0.0}, "gamma"), ({"classes_early": "1 1 1"}, "sum to 1"), ({"classes_late": "a b c"}, "late"),
        ({"transition_begin": 0.8}, "transition"), ({"weight_length": 1.5}, "weight_length"),
        ({"ntp_coef": -1.0}, "ntp_coef"), ({"positions": 0}, "positions"), ({"thinking_prompt": "{prompt}"}, "budget"),
        ({"thresholds": "2 1"}, "thresholds"),
    ):  # fmt: skip
        with pytest.raises(BadInputError, match=name):
            RMT(**changes)

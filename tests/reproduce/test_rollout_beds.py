"""What the experiments that train by rollouts stand on: their questions, answers, measurements and sizes."""

from __future__ import annotations

import importlib
import itertools
import random
import re

import pytest
import torch

pytest.importorskip("trl")

from everytoken.catalog import load_catalog
from everytoken.reinforcement.budgets import thinking_and_rest
from everytoken.reinforcement.curriculum_grpo import format_parts
from everytoken.reinforcement.rmt import matches
from everytoken.reinforcement.tw_grpo import hard_multichoice_reward, think_answer_format_reward
from everytoken.reproduce import curriculum_grpo, hapo, rmt, tw_grpo
from everytoken.reproduce.beds.rollouts import GROUP, grpo_arguments, start_model
from everytoken.reproduce.beds.small_models import character_tokenizer, small_model
from everytoken.reproduce.beds.sorting import Sorting, tokenizer


def test_a_tokenizer_of_characters_and_words():
    codes = character_tokenizer("ab<", words=("<think>", "<thin"))
    ids = codes("a<think>b<thin<")["input_ids"]
    assert codes.convert_ids_to_tokens(ids) == ["a", "<think>", "b", "<thin", "<"]
    assert codes.decode(ids) == "a<think>b<thin<"


@pytest.mark.parametrize(("given", "written"), [(6, 6), (4, 2)])
def test_right_answers_of_sorting_by_all_choices(given, written):
    task, draw = Sorting(given, written), random.Random(1)
    for _ in range(20):
        prompt, answer = task.example(draw)
        digits = prompt.removesuffix("=")
        right = {"".join(sorted(choice)) for choice in itertools.combinations(digits, written)}
        assert answer.strip() in right and len(digits) == given
        others = {answer.strip()[::-1], answer.strip()[1:], answer.strip() + "9", "", "x" * written}
        assert task.graded([prompt] * len(right), sorted(right)) == [1.0] * len(right)
        assert task.graded([prompt] * len(others - right), sorted(others - right)) == [0.0] * len(others - right)
    assert task.questions(3, "a", 5) == task.questions(3, "a", 5) != task.questions(3, "b", 5)


def test_surprise_of_a_response_is_its_negative_log_probability():
    codes = tokenizer()
    torch.manual_seed(0)
    model = small_model(len(codes), hidden=16, layers=1, end=codes.eos_token_id).eval()
    prompts, texts = ["01234567="] * 3, ["0123", "45", "012345"]  # the last one was cut: it has no end token
    found = hapo.TASK.surprises(model, codes, prompts, texts)
    for prompt, text, value in zip(prompts, texts, found, strict=True):
        before, ids = codes(prompt)["input_ids"], codes(text)["input_ids"]
        ids = ids + [codes.eos_token_id] * (len(ids) < hapo.TASK.length)
        total = 0.0
        for token in ids:
            with torch.no_grad():
                total -= torch.log_softmax(model(torch.tensor([before])).logits[0, -1], -1)[token].item()
            before = [*before, token]
        assert value == pytest.approx(total, abs=1e-4)


def test_entropy_where_a_curve_first_reaches_a_reward():
    rewards, entropies = [0.1 * number for number in range(10)], [2.0 - 0.1 * number for number in range(10)]
    curve = hapo.smoothed(rewards, entropies)
    assert [*curve[0], *curve[1], *curve[2]] == pytest.approx([0.35, 1.65, 0.45, 1.55, 0.55, 1.45])
    assert [hapo.entropy_at(curve, reward) for reward in (0.0, 0.36, 0.5, 9.0)] == pytest.approx(
        [1.65, 1.55, 1.45, 1.45]
    )
    assert hapo.smoothed([0.5], [1.0]) == [[0.5, 1.0]]


def test_worked_answers_of_letters_are_right_and_have_a_length():
    draw, lengths = random.Random(0), set()
    codes = character_tokenizer(f"0123456789:={curriculum_grpo.LETTERS}", words=curriculum_grpo.TAGS)
    for _ in range(80):
        prompt, answer = curriculum_grpo.example(draw)
        assert curriculum_grpo.correct(prompt, answer) and format_parts(answer) == (True, True)
        ordered = sorted(prompt.partition(":")[0])
        thought, said = re.findall(r"<think>(\w+)</think><answer>(\w)</answer>", answer)[0]
        places = [ordered.index(letter) for letter in thought]
        assert len(ordered) == 12 and said == ordered[6] and places[-1] == 6
        assert len({b - a for a, b in itertools.pairwise(places)}) <= 1 and (len(places) == 1 or places[0] == 0)
        lengths.add(len(codes(answer.strip())["input_ids"]))
    assert lengths == {6, 7, 8, 9, 12} and {curriculum_grpo.SHORT, curriculum_grpo.LONG} == {7, 12}
    prompt = "lkjihgfedcba:9="
    found = [curriculum_grpo.correct(prompt, f"<answer>{text}</answer>") for text in ("g", "f", "")]
    assert found == [True, False, False]
    assert not curriculum_grpo.correct(prompt, "<answer>g</answer><answer>g</answer>")


def test_budgets_of_the_arms():
    method = curriculum_grpo.method_of("curriculum", 160)
    budgets = [method.budget()(step, 160) for step in (0, 39, 40, 80, 120, 159)]
    assert budgets == [12, 12, 10, 8, 7, 7]
    fixed = curriculum_grpo.method_of("final budget from the start", 160).budget()
    assert {fixed(step, 160) for step in range(160)} == {7}
    free = curriculum_grpo.method_of("no length reward", 160)
    assert [piece.kind for piece in free.recipe().pieces] == ["prompt", "group_advantage", "reward"]


def test_thoughts_about_texts_lead_to_their_tokens():
    draw = random.Random(0)
    for _ in range(40):
        text = rmt.text_of(draw)
        digits = sorted(text[:9])
        assert text[9:] == f"={digits[0]}{digits[4]}{digits[8]}ab"
        for position in range(9, len(text)):
            thought = rmt.thought_of(text, position, draw)
            ordered = thought.lstrip(".")
            assert 1 <= len(thought) <= rmt.LONG
            if position == 11:
                assert ordered[-1] == text[position] and ordered == "".join(digits[5 - len(ordered) : 5])
            else:
                assert not ordered
            said = f"<think>{thought}</think>{text[position]}"
            assert matches(said, text[position]) and thinking_and_rest(said) == (thought, text[position])


def test_targets_are_what_the_digits_tell():
    codes = character_tokenizer("0123456789=ab[].", words=rmt.TAGS)
    torch.manual_seed(0)
    model = small_model(len(codes), hidden=16, layers=1, end=codes.eos_token_id).eval()
    texts = rmt.texts_of(0, "corpus", 8)
    rows = rmt.targets(rmt.method_of("RMT"), texts, model, codes, 0)
    assert len(rows) == 8 * 6 and {row["difficulty"] for row in rows} == {0, 1, 2}
    for row in rows:
        text = texts[row["text"]]
        assert row["prompt"] == text[: row["position"]] and row["target_text"] == text[row["position"]]
    hard = [row["entropy"] for row in rows if row["difficulty"] == 2]
    assert min(hard) > max(row["entropy"] for row in rows if row["difficulty"] == 0)
    loss = rmt.plain_loss(model, codes, texts)
    ids = torch.tensor(codes(texts[3])["input_ids"])[None]
    with torch.no_grad():
        logps = torch.log_softmax(model(ids).logits[0], -1)
    assert loss[3] == pytest.approx(-sum(logps[at - 1, ids[0, at]].item() for at in range(9, 15)) / 6, abs=1e-4)


def test_questions_about_capitals():
    counts, own = set(), []
    for seed in range(60):
        asked, right = tw_grpo.question(random.Random(seed))
        letters = sorted(letter for letter in asked if letter.isupper())
        assert right == ",".join(letters) and sorted(asked.upper()) == ["=", *"ABCDEF"]
        counts.add(len(letters))
        answer = tw_grpo.example(random.Random(seed))[1]
        own += hard_multichoice_reward([answer], [right])
        assert think_answer_format_reward([answer]) == [1.0]
    assert counts == {1, 2, 3, 4} and 0.1 < sum(own) / len(own) < 0.45  # a fifth, and some by chance


def test_positions_of_the_answer_weigh_more_where_only_they_are_disputed():
    """A policy that is sure of the preamble, and torn between two answers, each of them the reader's own."""
    codes = tw_grpo.tokenizer()
    texts = [f"{tw_grpo.HEAD}{answer}</answer>" for answer in ("A,D", "B,C") for _ in range(GROUP // 2)]
    ids = [[*codes(text)["input_ids"], codes.eos_token_id] for text in texts]

    class Torn(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids):
            logits = torch.zeros(*input_ids.shape, len(codes))
            for row, tokens in enumerate(ids):  # the prompt is one token
                for place, token in enumerate(tokens):
                    logits[row, place, token] = 4.0
            return type("Output", (), {"logits": logits})

    preamble, own = tw_grpo.weights(Torn(), codes, [{"prompt": "?"}], texts)
    assert preamble == [1.0]
    assert own == pytest.approx([(1.7 + 1.0 + 1.7) / 3])  # the comma is beyond dispute
    assert tw_grpo.weights(Torn(), codes, [{"prompt": "?"}], ["no format"] * GROUP) == ([], [])


STATION = sorted(
    card.slug
    for card in load_catalog().values()
    if card.station == "reinforcement"
    and card.reproduction.startswith("everytoken.reproduce.")
    and not getattr(card.load(), "any_order", False)  # their network is the sudoku bed's, for a CPU
)


@pytest.mark.parametrize("slug", STATION)
def test_every_experiment_has_a_version_for_a_gpu_that_can_be_built(slug, tmp_path):
    from trl import GRPOConfig

    experiment = load_catalog()[slug].load_reproduction()
    assert experiment.scales == ("quick", "cpu", "gpu")
    module = importlib.import_module(load_catalog()[slug].reproduction.partition(":")[0])
    for size in getattr(module, "SIZES", {}).values():
        assert size.batch % GROUP == 0 and size.hidden % 4 == 0
        with torch.device("meta"):
            model = start_model(size, tokenizer())
        assert model.config.num_hidden_layers == size.layers
        arguments = grpo_arguments(size, 0, size.rates[0], 16, loss_type="dapo")
        assert GRPOConfig(str(tmp_path), bf16=False, use_cpu=True, **arguments).generation_batch_size == size.batch
    if sizes := getattr(module, "SIZES", None):
        work = {scale: size.hidden**2 * size.layers * size.updates * size.batch for scale, size in sizes.items()}
        assert work["quick"] < work["cpu"] < work["gpu"]


def test_a_clock_that_decodes_counts_as_one_that_does_not():
    from everytoken.reproduce.ulorl import GROUP, Clock

    torch.manual_seed(0)
    model = small_model(16, hidden=16, layers=1, end=0).eval()
    clocks = [Clock("heavy tail", 3, decoder) for decoder in (None, model)]
    texts = [[number // GROUP] for number in range(GROUP)]
    found = [clock.write(texts, 8) for clock in clocks]
    assert found[0] == found[1] and clocks[0].passes == clocks[1].passes == 8
    assert clocks[0].seconds == 0 < clocks[1].seconds


def test_every_arm_has_the_rate_that_is_best_for_it(monkeypatch):
    from everytoken.reproduce.base import Context
    from everytoken.reproduce.beds import rollouts

    def train(context, label, start, codes, recipe, reward, rows, arguments):
        logs = {"reward": [0.0, arguments["learning_rate"], 1.0, 2.0]}
        return (recipe, arguments["learning_rate"], arguments["max_completion_length"]), logs

    monkeypatch.setattr(rollouts, "train_by_rollouts", train)
    context, best = Context(0), {"slow": 1e-3, "fast": 2e-3}
    found = rollouts.learnt(
        context,
        rollouts.Size(16, 1, 0, 4, 16, 0, (1e-3, 2e-3)),
        None,
        tokenizer(),
        [],
        5,
        best,
        lambda arm: rollouts.Learner(f"recipe of {arm}", None, {}),
        lambda arm, policy: -abs(policy[1] - best[arm]),
        lambda arm, policy, logs: {"policy": list(policy), "reward": logs["reward"][1]},
    )
    assert found == {arm: {"policy": [f"recipe of {arm}", lr, 5], "reward": lr} for arm, lr in best.items()}
    assert context.artifacts["fast: learning rate"] == 2e-3
    assert context.artifacts["slow: mean reward of the first and the last quarter"] == [0.0, 2.0]


@pytest.mark.slow
def test_arms_begin_with_the_same_rollouts_and_leave_the_start_as_it_is():
    from everytoken.reinforcement.base import Recipe
    from everytoken.reinforcement.d3s import D3S
    from everytoken.reproduce.base import Context
    from everytoken.reproduce.beds.rollouts import Size, ends, train_by_rollouts

    task, codes, size = Sorting(3, 3), tokenizer(), Size(16, 1, 0, 2, 16, 0, ())
    torch.manual_seed(0)
    start = start_model(size, codes).eval()
    before = {name: value.clone() for name, value in start.state_dict().items()}
    data = [{"prompt": text} for text in task.questions(0, "rollouts", 8)]
    drawn = random.Random(0)

    def reward(completions, **_):
        return [drawn.random() for _ in completions]

    logs = {}
    for arm, recipe in (("GRPO", Recipe()), ("D3S", D3S().recipe())):
        drawn.seed(0)
        arguments = grpo_arguments(size, 0, 1e-2, 4, loss_type="dapo")
        model, logs[arm] = train_by_rollouts(Context(0), arm, start, codes, recipe, reward, data, arguments)
        assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())
    assert all(len(values) == 2 for values in (*logs["GRPO"].values(), *logs["D3S"].values()))
    for name in ("reward", "equal", "tokens"):
        assert logs["GRPO"][name][0] == logs["D3S"][name][0]
    assert logs["GRPO"]["trained"] == logs["GRPO"]["tokens"] and logs["GRPO"]["equal"] == [0.0, 0.0]
    # a quarter of the rollouts, and a tenth of their tokens, rounded up
    assert logs["D3S"]["trained"][0] == 2 and logs["D3S"]["useful"] == [1.0, 1.0]
    assert ends([0.0, 1.0, 2.0, 3.0]) == [0.0, 3.0]

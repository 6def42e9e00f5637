"""UloRL: the mask by its numbers, and segments against uninterrupted generation and the two ratios by hand."""

from __future__ import annotations

import collections

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.reinforcement.base import Recipe, UpdateBatch
from everytoken.reinforcement.curriculum_grpo import BudgetPrompt, ExponentialBudget
from everytoken.reinforcement.recipe_checks import check_recipe
from everytoken.reinforcement.rollouts import Writer
from everytoken.reinforcement.ulorl import (
    InformativeGroups,
    MasteredTokenMask,
    SegmentedRollouts,
    TruncatedIsWrong,
    UloRL,
    mastered_tokens,
)

from .common import PROMPTS, batch_of, config, distance, made, varied, weights

P = torch.tensor([[0.995, 0.5, 0.999], [0.992, 0.3, 0.9], [0.999, 0.999, 0.99]])
H = torch.tensor([0.15, 0.10, 0.25])[:, None].expand(3, 3)
RIGHT = torch.tensor([True, False, True])[:, None]


def masked(tau=0.99, sigma=0.2, scope="response", mask=None, right=RIGHT):
    mask = torch.ones(3, 3, dtype=torch.bool) if mask is None else mask
    return mastered_tokens(P.log(), H, mask, right, tau, sigma, scope).int().tolist()


def test_the_papers_example():
    assert masked(sigma=0.2) == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert masked(sigma=0.3) == [[1, 0, 1], [0, 0, 0], [1, 1, 1]]


def test_limits_of_the_mask():
    nothing = [[0] * 3] * 3
    assert masked(sigma=0.0) == masked(tau=1.1, sigma=9.0) == nothing
    assert masked(sigma=float("inf")) == (RIGHT & (P >= 0.99)).int().tolist()
    assert masked(right=torch.zeros(3, 1, dtype=torch.bool), sigma=9.0) == nothing
    ends = torch.tensor([[True, True, False]] * 3)
    assert masked(sigma=0.3, mask=ends)[2] == [1, 1, 0]
    # the mean entropy of all tokens is 1/6 nats
    assert masked(sigma=0.16, scope="batch") == nothing and masked(sigma=0.17, scope="batch")[2] == [1, 1, 1]
    for tau in (0.5, 0.9, 0.995):
        for sigma in (0.1, 0.2, 0.3):
            more, less = torch.tensor(masked(tau - 0.2, sigma + 0.1)), torch.tensor(masked(tau, sigma))
            assert (more >= less).all()


def test_reinforcing_what_is_mastered_lowers_entropy():
    """To first order along e_y - p, for tokens of probability 0.99 and more: the fact behind the mask."""
    torch.manual_seed(0)
    for _ in range(50):
        logits = torch.randn(8, dtype=torch.double)
        logits[3] = logits.exp().sum().log() + 5.5
        logits.requires_grad_()
        logp = torch.log_softmax(logits, -1)
        assert logp[3].exp() > 0.99
        (slope,) = torch.autograd.grad(-(logp.exp() * logp).sum(), logits)
        step = torch.nn.functional.one_hot(torch.tensor(3), 8) - logp.exp().detach()
        assert (slope * step).sum() < 0


def test_the_weight_of_an_update():
    update = UpdateBatch(
        torch.ones(3, 3),
        P.log(),
        H,
        torch.ones(3, 3, dtype=torch.bool),
        torch.tensor([1.0, -1, 1])[:, None].expand(3, 3),
    )
    piece = MasteredTokenMask(target=0.3)
    assert piece(update, None, None).tolist() == [[0, 1, 0], [1, 1, 1], [0, 0, 0]]
    assert piece.metrics["tokens_mastered"] == pytest.approx(5 / 9)


def test_truncated_responses_are_wrong():
    batch = batch_of([1.0, 1.0, 0.0, 0.0, 1.0, float("nan"), 1.0, 0.0], group=4, truncated=torch.tensor([False] * 8))
    group = torch.tensor([1.0, 1.0, 0.0, 0.0])
    expected = (group - 0.5) / (group.std() + 1e-4)
    found = TruncatedIsWrong()(batch)
    assert torch.allclose(found[:4], expected) and found[5] == 0 and found[4] > 0
    batch.truncated[0] = True
    cut = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert torch.allclose(TruncatedIsWrong()(batch)[:4], (cut - 0.25) / (cut.std() + 1e-4))
    batch.truncated[1] = True
    assert not TruncatedIsWrong()(batch)[:4].any()
    kept = InformativeGroups()(batch, TruncatedIsWrong()(batch)[:, None].expand(8, 3))
    assert kept.tolist() == [False] * 4 + [True] * 4


# -- segments
# ---------------------------------------------------------------------------------------------------------
class Scripted:
    """A writer whose responses have set lengths: token 1 ends, others count up."""

    def __init__(self, lengths, group=2, limit=12):
        self.lengths, self.calls, self.limit, self.group = lengths, [], limit, group
        self.lines = collections.defaultdict(collections.deque)

    def writer(self, step):
        return Writer(
            tokenize=lambda rows: [[100 + row["number"]] for row in rows],
            write=self.write,
            score=lambda prompts, completions: [[float(step)] * len(ids) for ids in completions],
            count=50,
            data=lambda index: {"number": 1000 + index, "prompt": "x"},
            limit=self.limit,
            group=self.group,
            ends=frozenset({1}),
            step=step,
        )

    def write(self, texts, size):
        self.calls.append((len(texts), size))
        found = []
        for ids in texts:
            length = self.lengths[ids[0] % len(self.lengths)]
            new = [2 + at if at + 1 < length else 1 for at in range(len(ids) - 1, min(len(ids) - 1 + size, length))]
            found.append(new)
        return found


@pytest.mark.parametrize(("segments", "limit"), [(4, 12), (5, 12), (1, 12), (20, 12)])
def test_every_response_is_finished_once_and_whole(segments, limit):
    """Conservation over many steps; lengths up to the limit, at a border, and above it (which are cut)."""
    script = Scripted([3, 12, 5, 40, 1, 6, 9], limit=limit)
    piece, given, taken = SegmentedRollouts(segments, ahead=1.0, ratio="sais"), [], []
    for step in range(30):
        rows = [{"number": 4 * step + at // 2, "prompt": "x"} for at in range(8)]
        taken += rows[::2]
        written = piece(rows, script.writer(step))
        assert len(written.rows) == len(written.completions) == 8
        for at in range(0, 8, 2):
            assert written.rows[at] == written.rows[at + 1]  # whole groups, side by side
        for row, ids, logps in zip(written.rows, written.completions, written.logps, strict=True):
            length = min(script.lengths[(100 + row["number"]) % 7], limit)
            cut = script.lengths[(100 + row["number"]) % 7] > limit
            assert ids == [2 + at for at in range(length - 1)] + [2 + length - 1 if cut else 1]
            assert len(logps) == len(ids) and logps == sorted(logps)  # versions only rise
            assert len(set(logps)) <= min(segments, -(-limit // -(-limit // segments)))
        given += [row["number"] for row in written.rows[::2]]
        assert len(piece.pool) == 4
    assert len(set(given)) == len(given)
    numbers = [row["number"] for row in taken]
    left = [group["row"]["number"] for group in piece.pool]
    assert sorted([number for number in given + left if number < 1000]) == sorted(numbers)
    assert all(size <= -(-limit // segments) for _, size in script.calls)


def test_a_step_does_not_wait_for_the_longest():
    """One group in seven is long: with prompts ahead a step writes few segments, without it waits for all."""
    counts = {}
    for ahead in (0.0, 2.0):
        script, piece = Scripted([2, 2, 2, 12, 2, 2, 2]), SegmentedRollouts(6, ahead)
        total = 0
        for step in range(20):
            piece([{"number": 4 * step + at // 2} for at in range(8)], script.writer(step))
            total += piece.metrics["segments_written"]
        counts[ahead] = total / 20
    assert counts[2.0] < 1.5 and counts[0.0] > 3


def test_state_goes_on_where_it_was():
    script, rows = Scripted([3, 12, 5, 40, 1]), [{"number": at // 2, "prompt": "x"} for at in range(8)]
    one = SegmentedRollouts(4)
    one(rows, script.writer(0))
    two = SegmentedRollouts(4)
    two.load_state_dict(one.state_dict())
    later = [row | {"number": row["number"] + 9} for row in rows]
    assert one(later, script.writer(1)) == two(later, script.writer(1))


SHORT = dict(num_iterations=1, steps_per_generation=1, max_steps=3)


def rollout(trainer, seed=0):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    torch.manual_seed(seed)
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def test_greedy_segments_of_a_frozen_policy_are_one_uninterrupted_text(tmp_path):
    greedy = dict(generation_kwargs={"do_sample": False}, **SHORT)
    texts = {}
    for name, pieces in (("whole", []), ("parts", [SegmentedRollouts(4, ahead=2.0)])):
        trainer, found = made(tmp_path / name, *pieces, **greedy), {}
        for _ in range(4):
            batch = rollout(trainer)
            rows = (batch["prompt_ids"], batch["completion_ids"], batch["completion_mask"])
            for prompt, ids, mask in zip(*rows, strict=True):
                key = tuple(prompt[prompt != 1].tolist())
                found.setdefault(key, set()).add(tuple(ids[mask.bool()].tolist()))
        texts[name] = found
    shared = texts["whole"].keys() & texts["parts"].keys()
    assert shared and all(
        texts["whole"][key] == texts["parts"][key] and len(texts["whole"][key]) == 1 for key in shared
    )


@pytest.mark.slow
def test_samples_in_segments_are_distributed_as_whole_ones(tmp_path):
    """The first two tokens of the answers to one prompt, by chi-square against the model's own probabilities."""
    trainer = made(tmp_path, SegmentedRollouts(3, ahead=0.0), prompts=PROMPTS[:1], per_device_train_batch_size=1024,
                   num_generations=1024, max_completion_length=3, **SHORT)  # fmt: skip
    batch = rollout(trainer)
    start = batch["prompt_ids"][0]
    with torch.no_grad():
        first = torch.softmax(trainer.model(start[None]).logits[0, -1], -1)
        texts = torch.cat([start.expand(13, -1), torch.arange(13)[:, None]], 1)
        second = torch.softmax(trainer.model(texts).logits[:, -1], -1)
    second[0] = 0.0
    joint = torch.cat([first[:1], (first[1:, None] * second[1:]).flatten()])  # an end first, or two tokens
    ids = batch["completion_ids"][:, :2]
    cells = torch.where(ids[:, 0] == 0, 0, 1 + (ids[:, 0] - 1) * 13 + ids[:, 1])
    counts, expected = torch.bincount(cells, minlength=len(joint)).double(), 1024 * joint.double()
    many = expected >= 5
    statistic = ((counts - expected).square() / expected)[many].sum()
    rare = expected[~many].sum()
    statistic += (counts[~many].sum() - rare).square() / rare
    degrees = int(many.sum())
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.slow
def test_one_segment_and_no_mask_is_grpo(tmp_path):
    """K = 1 and tau above 1, with rewards that differ in every group: stock GRPO's weights, to the last bit."""
    pieces = UloRL(segments=1, mastered=1.1).recipe().pieces
    changes = dict(SHORT, loss_type="dapo", reward=varied, generation_kwargs={"suppress_tokens": [1]})
    ours, theirs = made(tmp_path / "a", *pieces, **changes), made(tmp_path / "b", **changes)
    for trainer in (ours, theirs):
        trainer._truncated = lambda batch: torch.zeros(len(batch["completion_ids"]), dtype=torch.bool)
        torch.manual_seed(3)
        trainer.train()
    assert distance(weights(ours), weights(theirs)) < 1e-6
    assert ours.state.log_history[0]["recipe/tokens_mastered"] == 0


def gradient(trainer, batch):
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, batch).backward()
    return trainer.model.lm_head.weight.grad.clone()


def logps_of(model, batch):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    length = batch["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1]
    return torch.log_softmax(logits, -1).gather(-1, batch["completion_ids"][..., None])[..., 0]


def test_pois_is_reinforce_and_sais_divides_by_the_policy_that_wrote(tmp_path):
    """The gradient by hand: -(1 / sum |o|) sum (1 - I) A grad logp, and the same times the ratio for SAIS."""
    for ratio in ("pois", "sais"):
        method = UloRL(segments=3, ratio=ratio, mastered=0.2, entropy_target=9.0, drop_equal_groups=False)
        pieces = [piece for piece in method.recipe().pieces if not isinstance(piece, TruncatedIsWrong)]
        trainer = made(tmp_path / ratio, *pieces, reward=varied, **SHORT)
        rollout(trainer)
        rollout(trainer)  # leaves a group of which one segment is written
        with torch.no_grad():  # the policy moves while responses are under way
            for weight in trainer.model.parameters():
                weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
        batch = rollout(trainer)
        mask, advantages = batch["completion_mask"].bool(), batch["advantages"][:, None]
        logps = logps_of(trainer.model, batch)
        left = mask & ~((advantages > 0) & (logps.detach().exp() >= 0.2))
        assert left.sum() < mask.sum()
        weight = advantages * left / mask.sum()
        if ratio == "pois":
            assert batch.get("old_per_token_logps") is None
            expected = -(weight * logps).sum()
        else:
            old = batch["old_per_token_logps"]
            ratios = torch.exp(logps - old)
            moved = (ratios.detach() - 1).abs() > 1e-3
            assert (moved & mask).any() and not (moved & mask).all()  # older and newest segments
            low, high = trainer.epsilon_low, trainer.epsilon_high
            expected = -(torch.minimum(ratios, ratios.clamp(1 - low, 1 + high)) * weight)[weight >= 0].sum()
            expected -= (torch.maximum(ratios, ratios.clamp(1 - low, 1 + high)) * weight)[weight < 0].sum()
        found = gradient(trainer, batch)
        trainer.model.zero_grad()
        expected.backward()
        assert torch.allclose(found, trainer.model.lm_head.weight.grad, atol=1e-5)


@pytest.mark.slow
def test_resumed_in_the_middle_it_ends_at_the_same_weights(tmp_path):
    changes = dict(SHORT, max_steps=4, reward=varied)
    whole = made(tmp_path / "whole", *UloRL(3).recipe().pieces, save_strategy="steps", save_steps=2, **changes)
    whole.train()
    again = made(tmp_path / "again", *UloRL(3).recipe().pieces, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert distance(weights(whole), weights(again)) == 0.0


def test_what_is_refused(tmp_path):
    for changes, name in (
        ({"ratio": "tis"}, "ratio"), ({"segments": 0}, "segments"), ({"prompts_ahead": -1.0}, "prompts_ahead"),
        ({"mastered": 0.0}, "mastered"), ({"entropy_target": -0.1}, "entropy_target"),
        ({"entropy_scope": "token"}, "scope"),
    ):  # fmt: skip
        with pytest.raises(BadInputError, match=name):
            UloRL(**changes)
    piece = SegmentedRollouts(2)
    with pytest.raises(BadInputError, match="use_vllm"):
        made(tmp_path, piece, use_vllm=True)
    with pytest.raises(BadInputError, match="another budget"):
        made(tmp_path, piece, BudgetPrompt(ExponentialBudget(8)))
    with pytest.raises(BadInputError, match="tools"):
        made(tmp_path, piece, prompts=[row | {"tools": []} for row in PROMPTS])
    args = config(tmp_path)
    args.distributed_state.num_processes = 2
    try:
        with pytest.raises(BadInputError, match="one process"):
            check_recipe(Recipe(piece), args, None)
    finally:
        args.distributed_state.num_processes = 1
    with pytest.raises(BadInputError, match="rollout_func"):
        check_recipe(Recipe(piece), args, None, {"rollout_func": print})

"""RCR: the released code's bookkeeping, its limits, and what it never touches."""

from __future__ import annotations

import pytest
import torch

from everytoken.decoding.canvas.denoising import DenoisingSampler, RemaskState
from everytoken.decoding.canvas.model import CanvasModel
from everytoken.generation.rcr import RCR, RunningConfidence
from everytoken.testing.canvas import MASK, TinyDenoiser

IDS = torch.randint(MASK, (16, 4), generator=torch.Generator().manual_seed(3))
RUNNING = [0.7314, 0.6932, 0.9006, 0.7384, 0.7917, 0.5188, 0.9017, 0.9494]


def test_the_released_bookkeeping():
    """Positions 5 and 1 of eight are opened again, though 1 was fixed a step earlier."""
    state = RemaskState(torch.tensor([RUNNING]), torch.ones(1, 8, dtype=torch.bool), torch.tensor([2]))
    for rule in (RunningConfidence(), RunningConfidence(reopen_blocks=True)):
        assert rule(state)[0].nonzero()[:, 0].tolist() == [1, 5]


def test_ties_leave_the_left_ones():
    state = RemaskState(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool), torch.tensor([2]))
    assert RunningConfidence()(state).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("schedule", ["even", "cosine"])
def test_as_many_masks_remain_as_the_schedule_says(schedule):
    sampler = RCR(gen_length=12, steps=4, schedule=schedule)
    found = sampler(TinyDenoiser(), IDS)
    left = [int(number) for number in 12 - torch.tensor(found.counts[0].tolist()).cumsum(0)]
    assert left[-1] == 0
    for state, count in zip(list(found.states())[1:], left, strict=True):
        assert bool(((state == MASK).sum(1) == count).all())
    assert sampler.stats.revised == int(found.revisions.sum()) > 0 and sampler.stats.target_forwards == 4


def by_hand(model, ids, length, counts):
    """RCR on one row in plain Python."""
    canvas = ids.tolist() + [MASK] * length
    running = {}
    for step, _ in enumerate(counts):
        with torch.no_grad():
            probs = CanvasModel(model, MASK).logits(torch.tensor([canvas]))[0].softmax(-1)
        for place in range(len(ids), len(canvas)):
            if canvas[place] == MASK:
                canvas[place], running[place] = int(probs[place].argmax()), float(probs[place].max())
        again = sorted(running, key=lambda place: (running[place], -place))[: sum(counts[step + 1 :])]
        for place in again:
            canvas[place] = MASK
            del running[place]
    return canvas


def test_by_hand():
    model = TinyDenoiser()
    found = RCR(gen_length=12, steps=4)(model, IDS)
    for row, ids in enumerate(IDS):
        assert found.final_ids[row].tolist() == by_hand(model, ids, 12, [3, 3, 3, 3])


def test_one_step_is_one_shot():
    model = TinyDenoiser()
    ours, plain = RCR(gen_length=12, steps=1)(model, IDS), DenoisingSampler(gen_length=12, steps=1)(model, IDS)
    assert torch.equal(ours.final_ids, plain.final_ids) and not bool(ours.revisions.any())


def test_without_revisions_it_is_plain_sampling():
    """Rows in which no later choice outranks an earlier one."""
    model = TinyDenoiser()
    ours, plain = RCR(gen_length=6, steps=6)(model, IDS), DenoisingSampler(gen_length=6, steps=6)(model, IDS)
    calm = ~ours.revisions.any(1)
    assert 0 < int(calm.sum()) < len(IDS)
    assert torch.equal(ours.final_ids[calm], plain.final_ids[calm])
    assert torch.equal(ours.fix_step[calm], plain.fix_step[calm])
    assert not torch.equal(ours.final_ids[~calm], plain.final_ids[~calm])


def test_finished_blocks_stay_unless_they_may_reopen():
    model = TinyDenoiser()
    kept = RCR(gen_length=12, steps=6, block_length=4)(model, IDS)
    again = RCR(gen_length=12, steps=6, block_length=4, reopen_blocks=True)(model, IDS)

    def early(found):
        """Tokens taken back in a block that was finished at an earlier step."""
        step, _, position, old, _ = found.events.unbind(1)
        return int(((old != MASK) & ((position - 4) // 4 < step // 2)).sum())

    assert early(kept) == 0 < early(again)
    assert torch.equal(again.final_ids[:, :4], IDS)


def test_saturated_confidences_never_open_the_prompt():
    for seed in range(6):
        found = RCR(gen_length=12, steps=4, block_length=6, reopen_blocks=True)(TinyDenoiser(seed, peak=1e5), IDS)
        assert torch.equal(found.final_ids[:, :4], IDS) and not bool((found.final_ids == MASK).any())

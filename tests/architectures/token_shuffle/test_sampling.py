"""How Token-Shuffle draws: guidance over the windows, seeds, batches, the cache, and each token's choice."""

from __future__ import annotations

import pytest
import torch

from everytoken.architectures.token_shuffle.sampling import Sampling, left_padded
from everytoken.architectures.token_shuffle.shuffle import independence_cost
from everytoken.core.errors import BadInputError

from .test_modeling_token_shuffle import BOI, CASES, CODES, FIRST, PAD, TEXT, network

GUIDED = {"guidance": 3.0}


def test_half_linear_guidance_over_eight_windows():
    assert Sampling(7.5).scales(8) == [1, 2.625, 4.25, 5.875, 7.5, 7.5, 7.5, 7.5]
    assert Sampling(7.5, "constant").scales(2) == [7.5, 7.5]
    assert Sampling(5, "linear").scales(5) == [1, 2, 3, 4, 5]
    assert Sampling(7.5).scales(1) == Sampling(7.5, "linear").scales(1) == [7.5]
    assert Sampling(1.0).scales(4) == [1, 1, 1, 1]


@torch.no_grad()
@pytest.mark.parametrize("backbone", CASES)
def test_the_cache_changes_nothing_and_texts_of_any_length_share_a_batch(backbone):
    """With a cache, without one, and each image alone: the same tokens, and the log-probabilities of a forward."""
    model = network(backbone)
    ids = torch.tensor([[PAD, PAD, TEXT], [PAD, TEXT + 3, TEXT + 1], [TEXT, TEXT + 2, TEXT + 5]])
    mask, seeds = (ids != PAD).long(), [3, 1, 2]
    together = model.generate(ids, mask, seeds=seeds, **GUIDED)
    fresh = model.generate(ids, mask, seeds=seeds, use_cache=False, **GUIDED)
    assert torch.equal(fresh.codes, together.codes) and fresh.positions == 0
    torch.testing.assert_close(fresh.logps, together.logps, rtol=1e-4, atol=1e-4)
    assert together.positions == 3 + 1 + 4 - 1  # the last window is not read again
    right = torch.tensor([[TEXT, PAD, PAD], [TEXT + 3, TEXT + 1, PAD], [TEXT, TEXT + 2, TEXT + 5]])
    assert torch.equal(model.generate(right, (right != PAD).long(), seeds=seeds, **GUIDED).codes, together.codes)
    for row in range(3):
        text = ids[row : row + 1, 2 - row :]
        alone = model.generate(text, seeds=seeds[row : row + 1], **GUIDED)
        assert torch.equal(alone.codes[0], together.codes[row])
        whole = torch.cat([text, torch.tensor([[BOI]]), alone.codes.flatten(1) + FIRST], 1)
        logps = model(whole).logits[:, -17:-1].log_softmax(-1)
        wanted = logps.gather(-1, whole[:, -16:, None]).view(1, 4, 4)
        torch.testing.assert_close(alone.logps, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.logps[row], wanted[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_scale_of_one_is_no_guidance_and_guidance_is_the_formula():
    model, ids = network(), torch.tensor([[TEXT, TEXT + 1]])
    plain = model.generate(ids, seeds=[0], guidance=1.0)
    for schedule in ("constant", "linear", "half-linear"):
        assert torch.equal(model.generate(ids, seeds=[0], guidance=1.0, schedule=schedule).codes, plain.codes)
    greedy = model.generate(ids, guidance=4.0, schedule="constant", do_sample=False)
    whole = torch.cat([ids, torch.tensor([[BOI]]), greedy.codes.flatten(1) + FIRST], 1)
    with_text = model(whole).logits[0, 2:-1, FIRST : FIRST + CODES]
    without = model(whole[:, 2:]).logits[0, :-1, FIRST : FIRST + CODES]
    assert torch.equal((without + 4.0 * (with_text - without)).argmax(-1), greedy.codes.flatten())
    assert not torch.equal(with_text.argmax(-1), greedy.codes.flatten())
    # without a text there is nothing to guide by
    none = model.generate(ids[:, :0], guidance=4.0, schedule="constant", do_sample=False)
    assert torch.equal(none.codes, model.generate(ids[:, :0], do_sample=False).codes)


@torch.no_grad()
def test_images_follow_from_their_own_seeds():
    model, ids = network(), torch.full((4, 1), TEXT)
    found = model.generate(ids, seeds=[5, 6, 5, 7])
    assert torch.equal(found.codes[0], found.codes[2]) and not torch.equal(found.codes[0], found.codes[1])
    torch.manual_seed(0)
    first = model.generate(ids)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids).codes, first.codes)
    assert not torch.equal(model.generate(ids).codes, first.codes)


@torch.no_grad()
def test_progress_and_the_growing_image():
    model, seen = network(), []
    found = model.generate(torch.full((2, 1), TEXT), seeds=[0, 1], report=lambda *item: seen.append(item))
    assert seen == [("drawing windows", number, 4) for number in (1, 2, 3, 4)]
    grown = found.grown(blank=-1)
    assert grown.shape == (2, 4, 4, 4) and torch.equal(grown[:, -1], found.codes)
    assert (grown[0, 0] >= 0).tolist() == [[True, True, False, False]] * 2 + [[False] * 4] * 2
    assert found.window.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    wide = model.generate(torch.full((1, 1), TEXT), grid=(2, 6), seeds=[0])
    assert wide.codes.shape == (1, 2, 6) and wide.positions == 1 + 1 + 2


def test_tokens_are_drawn_one_by_one_from_their_own_probabilities():
    """Windows of one fair coin, drawn by independent tokens: one in eight is legal, as the exact cost says."""
    half = torch.zeros(20_000, 4, 2)
    uniform = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = Sampling().choose(half, uniform)
    joint = torch.zeros(2, 2, 2, 2)
    joint[0, 0, 0, 0] = joint[1, 1, 1, 1] = 0.5
    legal = (drawn == drawn[:, :1]).all(1).float().mean()
    assert float(legal) == pytest.approx(float(independence_cost(joint).legal), abs=0.008)
    skewed = torch.tensor([0.1, 0.0, 0.6, 0.3]).log().expand(20_000, 1, 4)
    shares = torch.bincount(Sampling().choose(skewed, uniform[:, :1]).flatten(), minlength=4) / 20_000
    assert torch.allclose(shares, torch.tensor([0.1, 0.0, 0.6, 0.3]), atol=0.012) and shares[1] == 0


def test_temperature_top_k_and_top_p_act_on_each_token():
    logits = torch.tensor([[[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]]])
    for point in (0.001, 0.3, 0.6, 0.999):
        uniform = torch.full((1, 2), point, dtype=torch.float64)
        assert Sampling(top_k=1).choose(logits, uniform).tolist() == [[0, 3]]
        assert Sampling(top_p=0.5).choose(logits, uniform).tolist() == [[0, 3]]
        assert Sampling(temperature=0.01).choose(logits, uniform).tolist() == [[0, 3]]
        found = Sampling(top_k=2).choose(logits, uniform)
        assert found[0, 0] in (0, 1) and found[0, 1] in (2, 3)
    ends = [Sampling().choose(logits, torch.full((1, 2), at, dtype=torch.float64)).tolist() for at in (0.0, 1 - 1e-12)]
    assert ends == [[[0, 0]], [[3, 3]]]


def test_padding_moves_to_the_left():
    ids, mask = torch.tensor([[7, 0, 8, 0], [0, 0, 0, 9]]), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]])
    found, real = left_padded(ids, mask, 5)
    assert found.tolist() == [[5, 5, 7, 8], [5, 5, 5, 9]]
    assert real.tolist() == [[False, False, True, True], [False, False, False, True]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": (3, 4)}, "tile"),
        ({"guidance": -1.0}, "guidance"),
        ({"guidance": float("nan")}, "guidance"),
        ({"schedule": "cosine"}, "schedule"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"seeds": [1]}, "seeds"),
        ({"attention_mask": torch.ones(2, 2)}, "attention_mask"),
        ({"input_ids": torch.tensor([[TEXT], [FIRST]])}, "no image tokens"),
        ({"input_ids": torch.tensor([[TEXT], [BOI]])}, "no image tokens"),
        ({"input_ids": torch.tensor([[TEXT], [99]])}, "Ids lie"),
        ({"input_ids": torch.zeros(2, 1)}, "Texts are ids"),
        ({"input_ids": torch.zeros(0, 1, dtype=torch.long)}, "Texts are ids"),
        ({"grid": (16, 32)}, "smaller grid"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_computed(settings, message):
    model = network("gpt2")
    model.backbone.register_forward_pre_hook(lambda *_: pytest.fail("the backbone ran"))
    model.backbone.base_model.register_forward_pre_hook(lambda *_: pytest.fail("the backbone ran"))
    with pytest.raises(BadInputError, match=message):
        model.generate(**({"input_ids": torch.full((2, 1), TEXT)} | settings))

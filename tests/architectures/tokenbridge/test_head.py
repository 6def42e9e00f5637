"""The channel head: brute force over all tokens, causality, caches, samples and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats
from torch import nn

from everytoken.architectures.tokenbridge.continuous import ContinuousHead
from everytoken.architectures.tokenbridge.head import ChannelARHead
from everytoken.core.errors import BadInputError


def moved(head, seed=0, spread=0.5):
    """Weights away from their start, where every block is the identity, in float64."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in head.parameters():
            weight.normal_(std=spread)
    return head.double()


def small(**settings):
    return moved(ChannelARHead(4, **{"channels": 3, "bins": 4, "width": 8, "heads": 2, **settings}))


def vectors(*shape):
    return torch.randn(*shape, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("settings", [{}, {"order": [1, 0]}, {"independent": True}, {"layers": 3}])
def test_the_nine_tokens_of_two_channels_of_three_bins(settings):
    """Their probabilities sum to 1, and samples with and without a cache come as often (chi-square)."""
    head, g = small(channels=2, bins=3, **settings), vectors()
    tokens = torch.tensor(list(itertools.product(range(3), repeat=2)))
    joint = head.log_prob(g.expand(9, 4), tokens).sum(-1).exp()
    assert float(joint.detach().sum()) == pytest.approx(1, abs=1e-6)
    for cache in (True, False):
        generator = torch.Generator().manual_seed(1)
        codes = head.sample(g.expand(4000, 4), cache=cache, generator=generator).codes
        counts = torch.bincount(codes @ torch.tensor([3, 1]), minlength=9).double()
        expected = joint.detach().double() * 4000
        many = expected > 5
        seen = [*counts[many].tolist(), float(counts[~many].sum())]
        wanted = [*expected[many].tolist(), float(expected[~many].sum())]
        wanted[-1] += sum(seen) - sum(wanted)  # rounding
        if wanted[-1] < 1:
            seen, wanted = [*seen[:-2], seen[-2] + seen[-1]], [*wanted[:-2], wanted[-2] + wanted[-1]]
        assert stats.chisquare(seen, wanted).pvalue > 1e-3


def test_a_cache_changes_nothing():
    head, g = small(channels=6, order=[2, 0, 5, 1, 4, 3]), vectors(2, 5)
    noise = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0))
    with_cache, without = (head.sample(g, cache=cache, uniforms=noise) for cache in (True, False))
    assert torch.equal(with_cache.codes, without.codes) and with_cache.codes.shape == (2, 5, 6)
    assert torch.allclose(with_cache.entropies, without.entropies, atol=1e-6)


def test_samples_are_drawn_from_what_forward_says():
    """Entropies and inverse distribution functions, channel by channel, from the logits of the finished tokens."""
    head, g = small(channels=4, order=[3, 1, 0, 2]), vectors(50)
    noise = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 0.7):
        drawn = head.sample(g, temperature, uniforms=noise)
        logits = head(g, drawn.codes).detach()
        p = logits.softmax(-1)
        assert torch.allclose(drawn.entropies.double(), -(p * p.log()).sum(-1), atol=1e-5)
        reached = (logits / temperature).softmax(-1).cumsum(-1)
        assert torch.equal((noise[..., None] >= reached).sum(-1), drawn.codes)


def test_temperature_zero_takes_the_likeliest():
    head, g = small(), vectors(20)
    codes = head.sample(g, 0.0).codes
    assert torch.equal(codes, head(g, codes).argmax(-1))
    assert torch.equal(codes, head.sample(g, 1e-6).codes)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_a_channel_sees_those_before_it_only(order):
    head, g = small(order=order), vectors(3)
    q = torch.randint(0, 4, (3, 3), generator=torch.Generator().manual_seed(0))
    before = head(g, q)
    for step, channel in enumerate(order):
        other = q.clone()
        other[:, channel] = (q[:, channel] + 1) % 4
        after = head(g, other)
        same, later = order[: step + 1], order[step + 1 :]
        assert torch.equal(before[:, same], after[:, same])
        if later:
            assert not torch.allclose(before[:, later], after[:, later])


def test_independent_channels_see_none():
    head, g = small(independent=True), vectors(3)
    first, second = torch.zeros(3, 3, dtype=torch.long), torch.full((3, 3), 2)
    assert torch.equal(head(g, first), head(g, second))


def test_results_do_not_depend_on_how_channels_are_stored():
    """Channels stored otherwise, with the order changed accordingly and the same weights, give the same tokens."""
    head, g = small(order=[2, 0, 1]), vectors(7)
    stored = [1, 2, 0]  # new place of every old channel
    other = small(order=[stored[channel] for channel in head.order])
    other.load_state_dict(head.state_dict())
    assert [head.order[place] for place in head.places] == [0, 1, 2] == [head.places[item] for item in head.order]
    q = torch.randint(0, 4, (7, 3), generator=torch.Generator().manual_seed(0))
    moved_q = torch.empty_like(q)
    moved_q[:, stored] = q
    assert torch.allclose(head.log_prob(g, q), other.log_prob(g, moved_q)[:, stored])
    noise = torch.rand(7, 3, generator=torch.Generator().manual_seed(0))
    moved_noise = torch.empty_like(noise)
    moved_noise[:, stored] = noise
    drawn = head.sample(g, uniforms=noise).codes
    assert torch.equal(drawn, other.sample(g, uniforms=moved_noise).codes[:, stored])


def by_hand(head, g, q):
    """The head written out for one token, step by step, without a batch and without masks."""
    given, logits = head.project(g), []
    spelt = [int(q[channel]) for channel in head.order]
    rows = [given + head.positions[0]]
    rows += [head.embeddings[j - 1, spelt[j - 1]] + head.positions[j] for j in range(1, head.channels)]
    layers = [list(rows)]
    conditions = [given + head.steps[j] for j in range(head.channels)]

    def norm(x):
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt()

    for block in head.blocks:
        keys, values, out = [], [], []
        for j, x in enumerate(layers[-1]):
            b1, s1, g1, b2, s2, g2 = block.modulation.linear(nn.functional.silu(conditions[j])).chunk(6)
            query, key, value = block.qkv(norm(x) * (1 + s1) + b1).view(3, block.heads, -1)
            query, key = block.query_norm(query), block.key_norm(key)
            keys.append(key)
            values.append(value)
            found = []
            for h in range(block.heads):
                scores = torch.stack([query[h] @ k[h] for k in keys]) / query.shape[1] ** 0.5
                found.append(sum(p * v[h] for p, v in zip(scores.softmax(0), values, strict=True)))
            x = x + g1 * block.out(torch.cat(found))
            out.append(x + g2 * block.down(nn.functional.gelu(block.up(norm(x) * (1 + s2) + b2))))
        layers.append(out)
    for j, x in enumerate(layers[-1]):
        shift, scale = head.norm.modulation.linear(nn.functional.silu(conditions[j])).chunk(2)
        logits.append(head.weight[j] @ (norm(x) * (1 + scale) + shift) + head.bias[j])
    return torch.stack([logits[head.order.index(channel)] for channel in range(head.channels)])


def test_it_is_the_equation_in_value_and_gradient():
    head, g = small(order=[1, 2, 0]), vectors(2).requires_grad_()
    q = torch.tensor([[0, 3, 2], [1, 1, 0]])
    found = head.log_prob(g, q)
    logits = torch.stack([by_hand(head, g[row], q[row]) for row in range(2)])
    wanted = logits.log_softmax(-1).gather(-1, q[..., None])[..., 0]
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    weights = torch.randn(2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    learned = [g, *head.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), learned)
    theirs = torch.autograd.grad((wanted * weights).sum(), learned)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_every_block_is_the_identity_at_first():
    torch.manual_seed(0)
    head, g = ChannelARHead(4, 3, 4, width=8, heads=2), torch.randn(5, 4)
    x = torch.randn(5, 3, 8)
    assert torch.equal(head.blocks[0](x, torch.randn(5, 3, 8)), x)
    entropies = head.sample(g).entropies
    assert torch.allclose(entropies, torch.full_like(entropies, 4.0).log(), atol=0.02)  # every bin as likely


def test_the_released_first_input_differs_while_sampling_only():
    head, other = small(), small(released_first_input=True)
    other.load_state_dict(head.state_dict())
    g, q = vectors(20), torch.randint(0, 4, (20, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(g, q), other(g, q))
    noise = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = (item.sample(g, uniforms=noise) for item in (head, other))
    assert not torch.allclose(ours.entropies, theirs.entropies)
    with torch.no_grad():  # the same as adding it to the first position
        head.positions[0] += head.steps[0]
    shifted = head.sample(g, uniforms=noise)
    assert torch.equal(shifted.codes, theirs.codes) and torch.allclose(shifted.entropies, theirs.entropies)


def test_it_stands_on_any_model_that_predicts_vectors():
    """A recurrent network of torch learns to spell a token of two channels."""
    torch.manual_seed(0)
    body, head = nn.GRU(1, 8, batch_first=True), ChannelARHead(8, 2, 3, width=8, layers=1, heads=2)
    x, q = torch.randn(6, 4, 1), torch.randint(0, 3, (6, 4, 2))
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = -head.log_prob(body(x)[0], q).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(torch.tensor(3.0).log().item(), abs=0.02) and losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "settings",
    [{"channels": 0}, {"bins": 1}, {"width": 9}, {"layers": 0}, {"order": [0, 1]}, {"order": [0, 1, 1]},
     {"order": [1, 2, 3]}],
)  # fmt: skip
def test_sizes_that_cannot_be(settings):
    with pytest.raises(BadInputError):
        small(**settings)


def test_bad_input_is_refused():
    head, g, q = small(), vectors(2), torch.zeros(2, 3, dtype=torch.long)
    for bad in (q + 4, q - 1, q.double(), q[:, :2], q[:1]):
        with pytest.raises(BadInputError, match="Codes"):
            head(g, bad)
    with pytest.raises(BadInputError, match="Vectors"):
        head(g[:, :3], q)
    with pytest.raises(BadInputError, match="temperature"):
        head.sample(g, -1.0)
    with pytest.raises(BadInputError, match="uniforms"):
        head.sample(g, uniforms=torch.rand(2, 2))


def test_the_flow_of_the_continuous_head():
    """Its loss by hand with gradient, and samples that land on the token where the velocity is the right one."""
    head = moved(ContinuousHead(4, 3, width=8, layers=2))
    g, z, noise = vectors(5), torch.randn(5, 3).double(), torch.randn(5, 3).double()
    time = torch.rand(5).double()
    found = head.losses(g, z, noise, time)
    mixed = (1 - time[:, None]) * noise + time[:, None] * z
    wanted = (head(g, mixed, time) - (z - noise)) ** 2
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    ours, theirs = (torch.autograd.grad(item.sum(), head.write.weight)[0] for item in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        head.write.weight.zero_()
        head.write.bias.copy_(torch.tensor([1.0, -2.0, 0.5]))
    assert torch.allclose(head.sample(g, noise, 7), noise + torch.tensor([1.0, -2.0, 0.5]), atol=1e-5)
    for arguments in ({"steps": 0}, {"temperature": -1.0}):
        with pytest.raises(BadInputError):
            head.sample(g, noise, **arguments)
    with pytest.raises(BadInputError, match="fit"):
        head.sample(g, noise[:, :2])

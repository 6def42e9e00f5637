"""The two modules by a loop, and every figure of the paper's arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel

from everytoken.architectures.token_shuffle.shuffle import (
    TokenShuffle,
    TokenUnshuffle,
    WindowOrder,
    independence_cost,
    map_weights,
    saving,
    stack_operations,
)
from everytoken.core.errors import BadInputError


def test_windows_of_four_by_four():
    order = WindowOrder(4, 4, 2)
    assert order.indices.view(4, 4).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert (order.windows, order.tokens) == (4, 4)


def test_scatter_undoes_gather_for_every_grid_that_windows_divide():
    for height in range(1, 9):
        for width in range(1, 9):
            for rows in (item for item in (1, 2, 3, 4) if height % item == 0):
                for columns in (item for item in (1, 2, 4, width) if width % item == 0):
                    order = WindowOrder(height, width, (rows, columns))
                    raster = torch.arange(2 * height * width).view(2, -1)
                    windows = order.gather(raster)
                    assert windows.shape == (2, height * width // rows // columns, rows * columns)
                    assert torch.equal(order.scatter(windows), raster)


@pytest.mark.parametrize("grid", [(5, 4), (4, 5), (0, 4)])
def test_grids_that_windows_do_not_divide_are_refused(grid):
    with pytest.raises(BadInputError):
        WindowOrder(*grid, 2)


def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return module.double()


def block_by_hand(block, x):
    mean, deviation = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    normed = (x - mean) / torch.sqrt(deviation + 1e-5) * block.norm.weight + block.norm.bias
    inner = normed @ block.up.weight.T + block.up.bias
    return x + gelu(inner) @ block.down.weight.T + block.down.bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("window", [2, 4, (1, 2), 1])
def test_the_modules_are_the_loop_in_value_and_gradient(window):
    tokens = window**2 if isinstance(window, int) else window[0] * window[1]
    shuffle, unshuffle = filled(TokenShuffle(16, window, 2)), filled(TokenUnshuffle(16, window, 2))
    embeds = torch.randn(3, tokens, 16, dtype=torch.float64, requires_grad=True)
    parts = [gelu(embeds[:, token] @ shuffle.linear.weight.T + shuffle.linear.bias) for token in range(tokens)]
    x = torch.cat(parts, -1)
    for block in shuffle.blocks:
        x = block_by_hand(block, x)
    y = x
    for block in unshuffle.blocks:
        y = block_by_hand(block, y)
    size = 16 // tokens
    pieces = [y[:, token * size : (token + 1) * size] for token in range(tokens)]
    wanted = torch.stack([piece @ unshuffle.linear.weight.T + unshuffle.linear.bias for piece in pieces], 1)
    found = unshuffle(shuffle(embeds))
    assert torch.allclose(found, wanted, rtol=1e-10)
    learned, weights = [embeds, *shuffle.parameters(), *unshuffle.parameters()], torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), learned),
        torch.autograd.grad((wanted * weights).sum(), learned),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)


def test_the_maps_have_as_many_weights_as_computed():
    assert map_weights(3072, 2) == 4_718_592 and map_weights(3072, 4) == 1_179_648
    with torch.device("meta"):
        for window, wanted in ((2, 4_718_592), (4, 1_179_648)):
            maps = TokenShuffle(3072, window, 0), TokenUnshuffle(3072, window, 0)
            assert (
                sum(weight.numel() for module in maps for weight in module.parameters() if weight.dim() > 1) == wanted
            )
            biases = sum(weight.numel() for module in maps for weight in module.parameters() if weight.dim() == 1)
            assert biases == 3072 + 3072 // window**2


@pytest.mark.parametrize(("width", "window"), [(18, 2), (16, 3), (16, 0), (16, (3, 1))])
def test_widths_that_a_window_does_not_divide_are_refused(width, window):
    for module in (TokenShuffle, TokenUnshuffle):
        with pytest.raises(BadInputError, match="width"):
            module(width, window)


# -- operations --------------------------------------------------------------------------------------------------------
def test_operations_saved_are_those_of_the_paper():
    assert saving(4096, 2, 3072) == pytest.approx(4.63, abs=0.005)
    assert saving(16_384, 2, 3072) == pytest.approx(6.18, abs=0.005)
    scores = [4 * positions**2 * 3072 for positions in (16_384, 4096)]
    assert scores[0] / scores[1] == 16
    assert stack_operations(4096, 3072, 20) == 20 * stack_operations(4096, 3072)
    with pytest.raises(BadInputError, match="divide"):
        saving(10, 2, 8)


@pytest.mark.parametrize("positions", [16, 64])
def test_operations_are_what_a_stack_counts(positions):
    """A Llama with a third of 8 d^2 weights in each of its three maps of the MLP: 12 d^2 a layer."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        attn_implementation="eager",
    )  # fmt: skip
    model = LlamaModel(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs_embeds=torch.zeros(1, positions, 96), use_cache=False)
    assert counter.get_total_flops() == pytest.approx(stack_operations(positions, 96, 2), rel=0.01)


# -- independence ------------------------------------------------------------------------------------------------------
def coin_windows():
    joint = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    joint[0, 0, 0, 0] = joint[1, 1, 1, 1] = 0.5
    return joint


def test_windows_of_one_coin_cost_four_coins():
    cost = independence_cost(coin_windows())
    assert float(cost.entropy) == pytest.approx(0.6931, abs=5e-5)
    assert float(cost.independent) == pytest.approx(2.7726, abs=5e-5)
    assert float(cost.legal) == 2 * 0.5**4 == 1 / 8
    assert float(cost.lost) == pytest.approx(3 * math.log(2))


def test_the_cost_is_the_best_that_independent_tokens_can_do():
    """Gradient descent on the tokens' own distributions ends at the sum of entropies, and there alone the gradient is
    zero.
    """
    torch.manual_seed(0)
    joint = torch.rand(3, 2, 4, dtype=torch.float64)
    joint = joint / joint.sum()
    cost = independence_cost(joint)
    marginals = [joint.sum((1, 2)), joint.sum((0, 2)), joint.sum((0, 1))]

    def paid(logits):
        logps = [item.log_softmax(-1) for item in logits]
        return -(joint * (logps[0][:, None, None] + logps[1][:, None] + logps[2])).sum()

    best = [item.log().requires_grad_() for item in marginals]
    assert float(paid(best).detach()) == pytest.approx(float(cost.independent), rel=1e-12)
    for gradient in torch.autograd.grad(paid(best), best):
        assert gradient.abs().max() < 1e-12
    worse = [(item.log() + torch.randn_like(item)).requires_grad_() for item in marginals]
    assert float(paid(worse).detach()) > float(cost.independent) + 1e-3


def test_the_gradient_of_the_cost():
    torch.manual_seed(0)
    joint = torch.rand(2, 3, dtype=torch.float64)
    joint = (joint / joint.sum()).requires_grad_()
    cost = independence_cost(joint)
    (found,) = torch.autograd.grad(cost.lost, joint)
    rows, columns = joint.detach().sum(1), joint.detach().sum(0)
    wanted = joint.detach().log() - rows.log()[:, None] - columns.log() - 1  # of sum p log p / (p_i p_j)
    assert torch.allclose(found, wanted)
    assert float(cost.legal.detach()) == pytest.approx(1.0)


def test_independent_tokens_and_single_tokens_cost_nothing():
    rows, columns = torch.tensor([0.2, 0.8]), torch.tensor([0.5, 0.3, 0.2])
    assert float(independence_cost(rows[:, None] * columns).lost) == pytest.approx(0, abs=1e-6)
    assert float(independence_cost(columns).lost) == 0


@pytest.mark.parametrize("joint", [torch.ones(2, 2), torch.tensor([1.5, -0.5]), torch.tensor(1.0)])
def test_no_distribution_is_refused(joint):
    with pytest.raises(BadInputError, match="sum to"):
        independence_cost(joint)

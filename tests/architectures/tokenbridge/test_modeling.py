"""The network: what the encoder sees, the loss against the head, schedules of sampling, guidance, seeds and batches."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from scipy import stats

from everytoken.architectures.tokenbridge.configuration_tokenbridge import RELEASED_ORDER, TokenBridgeConfig
from everytoken.architectures.tokenbridge.method import TokenBridge, tiny_config, trace_of
from everytoken.architectures.tokenbridge.modeling_tokenbridge import TokenBridgeModel, others, rows_at
from everytoken.architectures.tokenbridge.schedules import drawn_masked, masked_after
from everytoken.core.errors import BadInputError
from everytoken.core.rng import numpy_generator


def network(seed=0, **settings):
    """A tiny network whose heads are away from their start."""
    torch.manual_seed(seed)
    model = TokenBridgeModel(tiny_config(**settings)).eval()
    with torch.no_grad():
        for weight in model.head.parameters():
            weight.normal_(std=0.3)
    return model


def latents(batch=2, seed=0):
    return torch.randn(batch, 9, 2, generator=torch.Generator().manual_seed(seed))


# -- schedules ---------------------------------------------------------------------------------------------------------
def test_the_schedule_of_the_paper():
    masked = masked_after(256, 64)
    assert len(masked) == 64 and masked[-1] == 0
    assert all(before > after for before, after in pairwise([256, *masked]))
    assert masked[:3] == [255, 254, 253] and masked[31] == 181 and masked[47] == 97  # 256 cos(pi/4), 256 cos(3 pi/8)


@pytest.mark.parametrize(("positions", "steps"), [(1, 1), (5, 5), (16, 1), (16, 7), (256, 255), (256, 256)])
def test_every_step_predicts_something(positions, steps):
    masked = [positions, *masked_after(positions, steps)]
    assert len(masked) == steps + 1 and masked[-1] == 0
    assert all(before > after for before, after in pairwise(masked))


@pytest.mark.parametrize(("positions", "steps"), [(16, 17), (16, 0), (0, 1)])
def test_schedules_that_cannot_be(positions, steps):
    with pytest.raises(BadInputError, match="steps"):
        masked_after(positions, steps)


def test_the_masked_share_is_a_cut_normal():
    generator = numpy_generator(0, "masks")
    shares = [drawn_masked(1000, 0.7, generator) / 1000 for _ in range(1500)]
    assert min(shares) >= 0.7 and max(shares) <= 1
    wanted = stats.truncnorm((0.7 - 1) / 0.25, 0, loc=1, scale=0.25)
    assert stats.kstest([share - 0.0005 for share in shares], wanted.cdf).pvalue > 1e-3
    assert drawn_masked(4, 0.99, generator) == 4


# -- forward -----------------------------------------------------------------------------------------------------------
def test_the_defaults_are_the_papers():
    config = TokenBridgeConfig()
    assert (config.positions, config.channels, config.bins) == (256, 16, 64)
    assert config.channel_order == list(RELEASED_ORDER)
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in TokenBridgeModel(config).parameters())
    assert weights == pytest.approx(486e6, rel=0.03)  # as the paper counts


def test_the_loss_is_the_mean_over_masked_positions_and_channels_with_gradient():
    model, z = network(), latents()
    known = torch.tensor([[0, 4, 8], [7, 2, 1]])
    output = model(z, class_labels=torch.tensor([3, 5]), known=known)
    assert output.unknown.tolist() == [[1, 2, 3, 5, 6, 7], [0, 3, 4, 5, 6, 8]]
    codes = model.quantizer.encode(z)
    total, g_all = 0.0, []
    for row in range(2):
        for place, position in enumerate(output.unknown[row].tolist()):
            g = output.vectors[row, place]
            total = total - model.head.log_prob(g, codes[row, position]).sum()
            g_all.append(g)
    assert torch.allclose(output.loss, total / 24, atol=1e-6)
    ours = torch.autograd.grad(output.loss, model.read.weight, retain_graph=True)[0]
    theirs = torch.autograd.grad(total / 24, model.read.weight)[0]
    torch.testing.assert_close(ours, theirs)


def test_latents_and_their_codes_are_the_same_input():
    model, z = network(), latents()
    known, labels = torch.tensor([[0, 4, 8], [7, 2, 1]]), torch.tensor([3, 5])
    from_latents = model(z, class_labels=labels, known=known)
    from_codes = model(codes=model.quantizer.encode(z), class_labels=labels, known=known)
    assert torch.equal(from_latents.logits, from_codes.logits)
    scaled = network(latent_scale=0.5)
    again = scaled(2 * z, class_labels=labels, known=known)
    assert torch.allclose(again.logits, from_latents.logits, atol=1e-5)


def test_vectors_see_known_positions_and_nothing_else():
    model, z = network(), latents(1)
    known, labels = torch.tensor([[0, 4, 8]]), torch.tensor([3])
    before = model(z, class_labels=labels, known=known).vectors
    for position in range(9):
        other = z.clone()
        other[:, position] += 2
        same = torch.equal(model(other, class_labels=labels, known=known).vectors, before)
        assert same == (position not in (0, 4, 8))
    shuffled = model(z, class_labels=labels, known=known.flip(1)).vectors
    assert torch.allclose(shuffled, before, atol=1e-5)  # the order of known positions does not count
    assert not torch.allclose(model(z, class_labels=torch.tensor([4]), known=known).vectors, before)


def test_labels_are_left_out_while_learning_only():
    model, z = network(label_dropout=0.999), latents()
    known, labels = torch.tensor([[0], [1]]), torch.tensor([3, 5])
    torch.manual_seed(0)
    with_labels = model(z, class_labels=labels, known=known).loss
    without = model(z, known=known).loss
    assert not torch.allclose(with_labels, without)
    assert torch.allclose(model.train()(z, class_labels=labels, known=known).loss, without)


def test_masks_that_are_drawn():
    model = network()
    torch.manual_seed(0)
    counts = set()
    for _ in range(40):
        known = model.draw_known(3)
        counts.add(known.shape[1])
        assert all(len(set(row)) == len(row) and set(row) <= set(range(9)) for row in known.tolist())
    assert counts == {0, 1, 2}  # seven to nine of nine positions are masked
    assert others(torch.tensor([[1, 3]]), 5).tolist() == [[0, 2, 4]]
    assert rows_at(torch.arange(6).view(1, 3, 2), torch.tensor([[2, 0]])).tolist() == [[[4, 5], [0, 1]]]


@pytest.mark.parametrize("name", ["independent", "continuous"])
def test_other_heads_learn_and_draw(name):
    model = network(head=name)
    found = model(latents(), class_labels=torch.tensor([1, 2]))
    assert bool(found.loss.isfinite()) and (found.logits is None) == (name == "continuous")
    drawn = model.generate([1, 2], seed=3)
    assert drawn.latents.shape == (2, 9, 2) and bool(drawn.latents.isfinite().all())
    assert (drawn.codes is None) == (name == "continuous")
    if name == "continuous":
        with pytest.raises(BadInputError, match="latents, not codes"):
            model(codes=torch.zeros(1, 9, 2, dtype=torch.long))


# -- generate ----------------------------------------------------------------------------------------------------------
def test_every_position_is_predicted_once_as_the_schedule_says():
    model, seen = network(), []
    drawn = model.generate([1, 2, 3], steps=4, progress=lambda *arguments: seen.append(arguments))
    assert seen == [("sampling", step, 4) for step in (1, 2, 3, 4)]
    assert drawn.masked == masked_after(9, 4)
    for row in drawn.revealed:
        assert torch.bincount(row, minlength=4).tolist() == [1, 2, 3, 3]
    assert torch.allclose(drawn.latents, model.quantizer.decode(drawn.codes))
    orders = {tuple(row) for row in drawn.revealed.tolist()}
    assert len(orders) == 3  # every picture has an order of its own


def test_a_picture_follows_from_its_label_and_seed():
    model = network()
    both = model.generate([1, 2], guidance=2.0, seed=5)
    alone = model.generate([2], guidance=2.0, seed=6)
    assert torch.equal(both.codes[1], alone.codes[0]) and torch.equal(both.revealed[1], alone.revealed[0])
    assert torch.equal(model.generate([2], guidance=2.0, seed=[6]).codes, alone.codes)
    assert not torch.equal(model.generate([2], guidance=2.0, seed=7).codes, alone.codes)
    torch.manual_seed(1)
    assert torch.equal(model.generate([2], guidance=2.0, seed=6).codes, alone.codes)  # torch's generator has no part


def test_a_picture_is_drawn_from_the_likelihood():
    """Entropies of the last iteration are those of a forward that knows the rest."""
    model = network()
    drawn = model.generate([1, 2], steps=9)
    last = [int(row.argmax()) for row in drawn.revealed]
    known = torch.tensor([[place for place in range(9) if place != end] for end in last])
    output = model(codes=drawn.codes, class_labels=torch.tensor([1, 2]), known=known)
    p = output.logits.softmax(-1)[:, 0]
    wanted = -(p * p.log()).sum(-1)
    found = torch.stack([drawn.entropies[row, end] for row, end in enumerate(last)])
    assert torch.allclose(found, wanted, atol=1e-5)


def test_the_cache_of_the_head_changes_nothing():
    model = network()
    first, second = (model.generate([1, 2], cache=cache) for cache in (True, False))
    assert torch.equal(first.codes, second.codes)


def test_guidance_of_one_is_none_and_runs_one_pass():
    model, rows = network(), []
    handle = model.classes.register_forward_hook(lambda _module, labels, _out: rows.append(len(labels[0])))
    plain, one = model.generate([1, 2], steps=3), model.generate([1, 2], steps=3, guidance=1.0)
    assert torch.equal(plain.codes, one.codes) and rows == [2] * 6
    model.generate([1, 2], steps=3, guidance=1.5)
    assert rows[6:] == [4] * 3
    handle.remove()


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_guidance_mixes_vectors(schedule):
    """The vectors that the head gets are g_u + w_s (g_c - g_u), with w_s by the share that is revealed."""
    model, given = network(), []
    handle = model.head.project.register_forward_hook(lambda _module, g, _out: given.append(g[0]))
    drawn = model.generate([1], steps=3, guidance=3.0, guidance_schedule=schedule)
    handle.remove()
    values = model.quantizer.decode(drawn.codes)
    for step, left in enumerate(drawn.masked):
        order = drawn.revealed[0].argsort(stable=True)
        known = order[drawn.revealed[0][order] < step][None]
        wanted = order[drawn.revealed[0][order] == step][None]
        c, u = (model.vectors(rows_at(values, known), known, torch.tensor([label]), wanted) for label in (1, 8))
        scale = 3.0 if schedule == "constant" else 1 + 2 * (9 - left) / 9
        mixed = (u + scale * (c - u))[0]
        assert sorted(given[step].sum(1).tolist()) == pytest.approx(sorted(mixed.sum(1).tolist()), abs=1e-4)


def test_temperature_zero_ignores_numbers_though_not_orders():
    model = network()
    cold = model.generate([1, 2], steps=1, temperature=0.0, seed=0)
    assert torch.equal(cold.codes, model.generate([1, 2], steps=1, temperature=0.0, seed=9).codes)


def test_pictures_of_no_class():
    model = network()
    drawn = model.generate(batch=2, seed=4)
    assert drawn.latents.shape == (2, 9, 2)
    assert not torch.equal(drawn.codes, model.generate([1, 1], seed=4).codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [8]}, "Labels"),
        ({"class_labels": [-1]}, "Labels"),
        ({"class_labels": []}, "One picture"),
        ({"class_labels": [0.5]}, "Labels"),
        ({}, "class_labels"),
        ({"class_labels": [1], "batch": 1}, "class_labels"),
        ({"batch": 0}, "One picture"),
        ({"batch": 1, "guidance": 2.0}, "class"),
        ({"class_labels": [1], "steps": 10}, "steps"),
        ({"class_labels": [1], "steps": 0}, "steps"),
        ({"class_labels": [1], "guidance": -1.0}, "guidance"),
        ({"class_labels": [1], "guidance_schedule": "cubic"}, "schedule"),
        ({"class_labels": [1], "temperature": -0.1}, "temperature"),
        ({"class_labels": [1], "temperature": float("nan")}, "temperature"),
        ({"class_labels": [1], "seed": [1, 2]}, "seeds"),
        ({"class_labels": [1], "seed": -1}, "Seeds"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_any_work(arguments, message):
    model = network()
    model.vectors = None  # whoever worked would fail otherwise
    with pytest.raises(BadInputError, match=message):
        model.generate(**arguments)


def test_what_cannot_be_read_is_refused():
    model, z = network(), latents()
    codes = model.quantizer.encode(z)
    good = {"latents": z, "class_labels": torch.tensor([1, 2]), "known": torch.tensor([[0], [1]])}
    for bad, message in (
        ({"latents": z[:, :8]}, "channels are those"),
        ({"latents": z[..., :1]}, "Latents and codes"),
        ({"latents": z / 0}, "finite"),
        ({"latents": None}, "one of them"),
        ({"codes": codes}, "one of them"),
        ({"latents": None, "codes": codes + 8}, "bins"),
        ({"class_labels": torch.tensor([1, 8])}, "Labels"),
        ({"class_labels": torch.tensor([1])}, "label"),
        ({"known": torch.tensor([[0], [9]])}, "positions"),
        ({"known": torch.tensor([[0, 0], [1, 2]])}, "once"),
        ({"known": torch.arange(9).expand(2, 9)}, "below 9"),
        ({"known": torch.tensor([[0]])}, "positions"),
    ):
        with pytest.raises(BadInputError) as caught:
            model(**(good | bad))
        assert message in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    "settings",
    [{"bins": 741}, {"bins": 1}, {"head": "dense"}, {"rows": 0}, {"channel_order": [0, 0]}, {"channel_order": [0]},
     {"channels": 0}, {"hidden_size": 15}, {"head_width": 15}, {"label_dropout": 1.0}, {"least_masked": -0.1},
     {"flow_steps": 0}],
)  # fmt: skip
def test_configurations_that_cannot_be(settings):
    with pytest.raises(BadInputError):
        tiny_config(**settings)


def test_the_trace_says_when_and_how_open():
    model = network()
    drawn = model.generate([1])
    trace = trace_of(drawn, model.config, "one")
    assert trace.columns["step"] == drawn.revealed[0].tolist()
    assert trace.columns["entropy"] == pytest.approx(drawn.entropies[0].sum(1).tolist())
    assert len(trace.columns["channels"][0].split()) == 2
    for settings in ({"label": 10}, {"steps": 0}, {"guidance": -1.0}, {"temperature": -1.0}):
        with pytest.raises(BadInputError):
            TokenBridge(**settings)


def test_a_drawing_grows_to_the_picture():
    model = network()
    drawing = TokenBridge(count=2, steps=4).draw(model, torch.tensor([7, 7]), 3)
    assert drawing.images.shape == (2, 1, 3, 3) and len(drawing.frames) == len(drawing.steps) == 4
    assert torch.equal(drawing.frames[-1], drawing.images[0])
    assert [int((frame != 0).sum()) for frame in drawing.frames] == [1, 3, 6, 9]
    assert drawing.steps[1] == "3 of 9 tokens"

"""xAR: entities, the mask, samplers against a normal distribution, and drawing with and without its cache."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from everytoken.architectures.images.guidance import guidance_scale
from everytoken.architectures.xar.configuration_xar import ENTITIES, XARConfig
from everytoken.architectures.xar.modeling_xar import XARModel
from everytoken.architectures.xar.sampling import noised, sample, sampling_times, score_of
from everytoken.core.errors import BadInputError

SMALL = {"grid": (4, 4), "channels": 2, "entity_size": 2, "num_classes": 3, "hidden_size": 16, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 2, "frequencies": 16, "dropout": 0.0}
SIZES = {"patch": (16, 1), "row": (4, 4), "cell": (4, 4), "subsample": (4, 4), "image": (1, 16)}


def small(**settings):
    torch.manual_seed(0)
    model = XARModel(XARConfig(**(SMALL | settings))).eval()
    with torch.no_grad():
        for weight in model.parameters():  # the start leaves velocities so small that no test could fail
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def inputs(model, batch=2):
    torch.manual_seed(1)
    config = model.config
    latents, noise = torch.randn(2, batch, config.channels, *config.grid)
    return {
        "latents": latents,
        "class_labels": torch.arange(batch) % 3,
        "times": torch.rand(batch, config.entities),
        "noise": noise,
    }


# -- entities ----------------------------------------------------------------------------------------------------------
def test_cells_of_the_paper():
    config = XARConfig(grid=(16, 16), entity_size=8)
    order = config.entity_order().view(config.entities, -1)
    assert config.entities == 4 and config.entity_tokens == 64
    assert order[:, 0].tolist() == [0, 8, 128, 136]
    assert order[1, :3].tolist() == [8, 9, 10] and int(order[1, 8]) == 24


def test_subsamples():
    config = XARConfig(grid=(4, 4), entity="subsample", entity_size=2)
    order = config.entity_order().view(4, -1)
    assert order.tolist() == [[0, 2, 8, 10], [1, 3, 9, 11], [4, 6, 12, 14], [5, 7, 13, 15]]


@pytest.mark.parametrize("entity", ENTITIES)
def test_merging_undoes_splitting(entity):
    model = small(entity=entity)
    latents = torch.randn(2, 2, 4, 4)
    entities = model.split(latents)
    assert tuple(entities.shape[1:3]) == SIZES[entity] == (model.config.entities, model.config.entity_tokens)
    assert torch.equal(model.merge(entities), latents)


def test_positions_follow_the_grid_and_not_the_sequence():
    """The first token of the second of the paper's cells stands in row 0 and column 8."""
    config = XARConfig(grid=(16, 16), entity_size=8, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    model = XARModel(config)
    cos, _ = model.rotary(config.entity_order())
    rates = 10_000.0 ** (-torch.arange(2) / 2)
    torch.testing.assert_close(cos[64], torch.cat([torch.ones(2), (8 * rates).cos()]))


# -- the mask ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("entity", ["patch", "row", "cell"])
def test_an_entity_sees_itself_and_those_before_it(entity):
    model = small(entity=entity)
    given = inputs(model)
    before = model(**given).logits.detach()
    for m in range(model.config.entities):
        changed = model.split(given["noise"]).clone()
        changed[:, m, 0] += 1.0
        after = model(**(given | {"noise": model.merge(changed)})).logits.detach()
        moved = (after - before).abs().amax((0, 2, 3))
        assert float(moved[:m].max() if m else 0.0) == 0
        assert bool((moved[m:] > 0).all())


def test_a_whole_image_sees_everything():
    model = small(entity="image")
    assert bool(model.mask(torch.arange(1)).all())


def test_clean_context_is_teacher_forcing():
    """One pass with clean context gives what a pass for each entity gives, which is what drawing computes."""
    model = small(noisy_context=False)
    given = inputs(model)
    found = model(**given).logits
    clean, noise = model.split(given["latents"]), model.split(given["noise"])
    for n in range(4):
        seen, times = clean[:, : n + 1].clone(), torch.zeros(2, n + 1)
        times[:, n] = given["times"][:, n]
        seen[:, n] = noised(clean[:, n], noise[:, n], times[:, n, None, None])
        alone = model.velocity(seen, given["class_labels"], times, torch.arange(n + 1), model.mask(torch.arange(n + 1)))
        torch.testing.assert_close(found[:, n], alone[:, n], rtol=1e-4, atol=1e-5)


def test_noisy_context_with_clean_entities_is_clean_context():
    noisy, clean = small(), small(noisy_context=False)
    given = inputs(noisy)
    for n in range(4):
        times = torch.zeros(2, 4)
        times[:, n] = 0.3
        ours, theirs = (model(**(given | {"times": times})).logits[:, n] for model in (noisy, clean))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_entity_without_noise_counts_in_no_loss():
    model = small()
    given = inputs(model)
    times = given["times"].clone()
    times[:, 1:] = 0
    with torch.no_grad():
        output = model(**(given | {"times": times}))
    target = model.split(given["noise"] - given["latents"])
    assert float(output.loss) == pytest.approx(float((output.logits - target)[:, 0].square().mean()), rel=1e-5)


# -- times, noise and samplers -----------------------------------------------------------------------------------------
def test_times_are_logit_normal():
    torch.manual_seed(0)
    model = small()
    times = model.draw_times(50_000)
    assert times.shape == (50_000, 4)
    assert float(times.mean()) == pytest.approx(0.5, abs=0.003) and float(times.std()) == pytest.approx(0.208, abs=2e-3)
    assert float((times < 0.1).float().mean()) == pytest.approx(0.014, abs=2e-3)
    shared = small(clean_share=0.25).draw_times(50_000)
    assert float((shared == 0).float().mean()) == pytest.approx(0.25, abs=0.01)


def test_identities_of_the_path():
    x, e, t = torch.randn(5), torch.randn(5), torch.rand(5)
    f, v = noised(x, e, t), e - x
    torch.testing.assert_close(f + (1 - t) * v, e)
    torch.testing.assert_close(f - t * v, x)
    assert float(score_of(torch.tensor(0.3), torch.tensor(0.7), 0.25)) == pytest.approx(-3.7)
    with pytest.raises(BadInputError):
        score_of(x, f, 0.0)


def normal_velocity(mean=1.5, deviation=0.5):
    """The velocity of data that are normal."""
    s = deviation**2

    def velocity(x, t, step):
        return (t - (1 - t) * s) * (x - (1 - t) * mean) / ((1 - t) ** 2 * s + t**2) - mean

    return velocity


@pytest.mark.parametrize(
    ("sampler", "steps", "deviation"),
    [("ode", 5, 0.3694), ("ode", 10, 0.4309), ("ode", 25, 0.4714), ("ode", 50, 0.4856),
     ("sde", 5, 0.4917), ("sde", 10, 0.4861), ("sde", 25, 0.4903), ("sde", 50, 0.4925)],
)  # fmt: skip
def test_samplers_reach_what_the_released_ones_do(sampler, steps, deviation):
    noise = torch.randn(steps, 60_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = sample(normal_velocity(), noise, sampler)
    assert float(found.mean()) == pytest.approx(1.5, abs=0.01)
    assert float(found.std()) == pytest.approx(deviation, abs=0.005)


def test_a_step_of_the_stochastic_sampler_is_drift_of_velocity_and_score():
    """One step by hand: v - t s, and noise of strength 2 t."""
    noise = torch.randn(3, 4, dtype=torch.float64)
    times, velocity, seen = sampling_times("sde", 3), normal_velocity(), []
    sample(velocity, noise, "sde", lambda x, step: seen.append(x))
    x = noise[0]
    for step, (t, then) in enumerate(pairwise(times)):
        v = velocity(x, t, step)
        x = x + (v - t * score_of(v, x, t)) * (then - t)
        if step < 2:
            x = x + math.sqrt(2 * t) * math.sqrt(t - then) * noise[step + 1]
        torch.testing.assert_close(seen[step], x)
    assert times[0] == 1 and times[-2] == pytest.approx(0.04) and times[-1] == 0


# -- drawing -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("entity", ENTITIES)
@pytest.mark.parametrize("guidance", [1.0, 2.7])
def test_the_cache_changes_nothing(entity, guidance):
    model = small(entity=entity)
    labels = torch.tensor([0, 2])
    ways = [model.generate(labels, steps=3, guidance=guidance, use_cache=use) for use in (True, False)]
    torch.testing.assert_close(*ways, rtol=1e-4, atol=1e-5)
    assert float(ways[0].abs().max()) > 0.1


def test_inner_steps_read_the_cache_and_never_rebuild_it(monkeypatch):
    model = small()
    seen, kept = [], []
    velocity = model.velocity

    def watched(noisy, labels, times, entities, mask, cache):
        kept.append((cache.kept, cache.store.data_ptr(), cache.store[:, :, :, :, : cache.kept].clone()))
        seen.append((len(noisy), noisy.shape[1] * noisy.shape[2], times[0].tolist()))
        return velocity(noisy, labels, times, entities, mask, cache)

    monkeypatch.setattr(model, "velocity", watched)
    model.generate(torch.tensor([1]), steps=4, guidance=2.7)
    assert [item[:2] for item in seen] == [(1, 4)] * 4 + [(2, 8), (2, 4), (2, 4), (2, 4)] * 3
    assert seen[4][2] == [0.0, 1.0]  # the finished entity is clean
    assert [item[0] for item in kept] == [0] * 5 + [4] * 4 + [8] * 4 + [12] * 3
    assert len({item[1] for item in kept}) == 1
    for before, after in pairwise(kept):
        assert torch.equal(before[2], after[2][..., : before[0], :])


def test_the_guidance_ramp(monkeypatch):
    scales = []

    def noted(schedule, scale, share):
        scales.append(guidance_scale(schedule, scale, share))
        return scales[-1]

    monkeypatch.setattr("everytoken.architectures.xar.modeling_xar.guidance_scale", noted)
    small().generate(torch.tensor([0]), steps=1, guidance=2.7)
    small(entity="image").generate(torch.tensor([0]), steps=1, guidance=2.7)
    assert scales == pytest.approx([1, 1.5667, 2.1333, 2.7, 2.7], abs=1e-4)


def test_guidance_towards_no_class_is_none():
    model = small()
    null = torch.tensor([3, 3])
    ways = [model.generate(null, steps=3, guidance=guidance) for guidance in (1.0, 3.0)]
    torch.testing.assert_close(*ways, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_an_image_does_not_depend_on_its_batch(sampler):
    model = small()
    together = model.generate(torch.tensor([1, 2, 0]), steps=3, sampler=sampler, seed=5)
    alone = model.generate(torch.tensor([1]), steps=3, sampler=sampler, seed=5)
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.equal(alone, model.generate(torch.tensor([1]), steps=3, sampler=sampler, seed=6))
    assert model.generate(torch.empty(0, dtype=torch.long), steps=2).shape == (0, 2, 4, 4)


def test_progress_sees_the_image_grow():
    model = small()
    seen = []
    last = model.generate(torch.tensor([1]), steps=2, progress=lambda n, step, z: seen.append((n, step, z)))
    assert [item[:2] for item in seen] == [(n, step) for n in range(4) for step in range(2)]
    assert torch.equal(seen[-1][2], last)
    assert float(model.split(seen[1][2])[:, 1:].abs().max()) == 0


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong",
    [{"entity": "scale"}, {"entity_size": 3}, {"entity": "subsample", "entity_size": 3}, {"hidden_size": 18},
     {"label_dropout": 1.0}, {"clean_share": -0.1}, {"channels": 0}, {"grid": (4, 0)}, {"grid": (4,)},
     {"latent_tokenizer": "digits-kl"}],
)  # fmt: skip
def test_settings_that_are_refused(wrong):
    with pytest.raises(BadInputError):
        XARConfig(**(SMALL | wrong))


def test_inputs_that_are_refused():
    model = small()
    given = inputs(model)
    bad = [
        {"latents": torch.zeros(2, 1, 8, 8)}, {"class_labels": torch.tensor([0, 3])},
        {"class_labels": torch.tensor([0])},
        {"times": torch.rand(2, 3)}, {"times": torch.full((2, 4), 1.5)}, {"noise": torch.zeros(2, 2, 4, 3)},
        {"latents": torch.full((2, 2, 4, 4), math.nan)}, {"latents": torch.zeros(2, 2, 4, 4, dtype=torch.long)},
    ]  # fmt: skip
    for wrong in bad:
        with pytest.raises(BadInputError):
            model(**(given | wrong))
    calls = [{"steps": 0}, {"guidance": -1.0}, {"sampler": "euler"}, {"noise": torch.zeros(1)},
             {"class_labels": torch.tensor([4])}, {"class_labels": torch.tensor([0.5])}]  # fmt: skip
    for wrong in calls:
        with pytest.raises(BadInputError):
            model.generate(**({"class_labels": torch.tensor([0])} | wrong))

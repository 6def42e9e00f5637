"""OpenMoE: who is served under a capacity limit, against a plain loop; and the whole model."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.nn import functional as F

from everytoken.architectures.openmoe.capacity import expert_capacity, serve
from everytoken.architectures.openmoe.configuration_openmoe import OpenMoeConfig
from everytoken.architectures.openmoe.method import OpenMoe, OpenMoeRecipe
from everytoken.architectures.openmoe.modeling_openmoe import OpenMoeForCausalLM, OpenMoeRouter
from everytoken.architectures.routing import balance_loss, record_routing, router_z_loss
from everytoken.architectures.routing_analysis import RoutingAnalysis
from everytoken.core.errors import BadInputError

CHOICES = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 2], [0, 1], [0, 1], [2, 3], [0, 3]])
TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "moe_every": 2,
    "max_position_embeddings": 64,
    "eos_token_id": None,
}


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    model = OpenMoeForCausalLM(OpenMoeConfig(**(TINY | settings))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    return model


def ids_of(rows=2, length=12, seed=0):
    return torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def looped(indices, experts, capacity, mask):
    """The rule as a loop: all first choices in token order, then all second ones; ranks count dropped ones too."""
    asked = [0] * experts
    served = torch.zeros_like(indices, dtype=torch.bool)
    for choice in range(indices.shape[1]):
        for token in range(indices.shape[0]):
            if mask[token]:
                expert = int(indices[token, choice])
                served[token, choice] = asked[expert] < capacity
                asked[expert] += 1
    return served


# -- who is served -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("factor", "capacity", "kept"),
    [(1.0, 4, "11 11 10 11 11 00 11 01"), (0.5, 2, "11 10 10 01 00 00 11 01"), (2.0, 8, "11 11 11 11 11 11 11 11")],
)
def test_the_worked_case(factor, capacity, kept):
    found = expert_capacity(torch.tensor([8]), 4, 2, factor, minimum=1)
    assert found.tolist() == [capacity]
    served = serve(CHOICES[None], 4, found)[0].int().tolist()
    assert " ".join("".join(map(str, row)) for row in served) == kept


def test_the_losses_of_the_worked_case():
    logits = torch.zeros(8, 4).scatter(1, CHOICES[:, :1], 3.0).scatter(1, CHOICES[:, 1:], 2.0)
    chosen = torch.zeros(4).scatter_add(0, CHOICES.flatten(), torch.full((16,), 1 / 8))
    assert chosen.tolist() == pytest.approx([0.875, 0.625, 0.25, 0.25])
    assert float(balance_loss([logits], 2)) == pytest.approx(2.7015, abs=5e-5)
    assert float(router_z_loss([logits])) == pytest.approx(11.4483, abs=5e-5)


@pytest.mark.parametrize(
    ("tokens", "factor", "capacity"),
    [(1, 1.25, 4), (64, 1.25, 6), (64, 2.0, 8), (512, 1.25, 40), (512, 2.0, 64), (2048, 1.25, 160), (2048, 2.0, 256)],
)
def test_capacities_of_32_experts(tokens, factor, capacity):
    assert int(expert_capacity(torch.tensor(tokens), 32, 2, factor)) == capacity


@pytest.mark.parametrize("seed", range(10))
def test_ranking_is_the_loop(seed):
    """Groups, padding and any number of choices."""
    generator = torch.Generator().manual_seed(seed)
    groups, tokens, experts, top_k = 3, 17, 5, 1 + seed % 3
    indices = torch.rand(groups, tokens, experts, generator=generator).topk(top_k, -1).indices
    mask = torch.rand(groups, tokens, generator=generator) > 0.25
    capacity = torch.randint(1, 7, (groups,), generator=generator)
    served = serve(indices, experts, capacity, mask)
    for group in range(groups):
        wanted = looped(indices[group], experts, int(capacity[group]), mask[group])
        assert torch.equal(served[group], wanted)
    assert torch.equal(serve(indices, experts, capacity)[0], looped(indices[0], experts, int(capacity[0]), [True] * 17))


def test_another_order_changes_which_tokens_drop_and_not_how_many_first_choices():
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(1, 64, 4, generator=generator).topk(2, -1).indices
    capacity, order = torch.tensor([6]), torch.randperm(64, generator=generator)
    plain, mixed = serve(indices, 4, capacity), serve(indices, 4, capacity, order=order)
    assert not torch.equal(plain, mixed)
    assert torch.equal(mixed[0, order], serve(indices[:, order], 4, capacity)[0])
    for expert in range(4):
        wants = indices[0, :, 0] == expert
        assert int(plain[0, wants, 0].sum()) == int(mixed[0, wants, 0].sum()) == min(6, int(wants.sum()))


# -- the router --------------------------------------------------------------------------------------------------------
def test_ties_go_to_the_lower_expert():
    router = OpenMoeRouter(OpenMoeConfig(**TINY))
    torch.nn.init.zeros_(router.weight)
    logits, scores, indices = router.eval()(torch.randn(1, 3, 16))
    assert indices.tolist() == [[0, 1]] * 3
    assert logits.dtype == torch.float32
    assert scores.tolist() == [[0.25, 0.25]] * 3


def test_weights_are_raw_probabilities_or_sum_to_one():
    torch.manual_seed(0)
    hidden = torch.randn(1, 5, 16)
    for renormalise in (False, True):
        router = OpenMoeRouter(OpenMoeConfig(**TINY, renormalise=renormalise, capacity_factor_eval=None)).eval()
        torch.manual_seed(1)
        torch.nn.init.normal_(router.weight)
        logits, scores, indices = router(hidden)
        raw = logits.softmax(-1).gather(-1, indices)
        wanted = raw / raw.sum(-1, keepdim=True) if renormalise else raw
        torch.testing.assert_close(scores, wanted)


def test_a_random_filling_is_the_same_in_every_evaluation_and_not_in_training():
    limit = {"capacity_factor_eval": 0.5, "capacity_factor_train": 0.5, "min_capacity": 1}
    router = OpenMoeRouter(OpenMoeConfig(**TINY, fill_order="random", **limit))
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(2, 16, 16)
    router.eval()
    assert torch.equal(router(hidden)[1], router(hidden)[1])
    router.train()
    assert not torch.equal(router(hidden)[1], router(hidden)[1])


# -- the model ---------------------------------------------------------------------------------------------------------
def dense_sum(model, normed, keep):
    """The experts' sum by its definition: every expert on every token."""
    gate, experts = model.model.layers[1].moe.gate, model.model.layers[1].moe.experts
    _, weights, indices = gate(normed)
    flat = normed.flatten(0, 1)
    total = torch.zeros_like(flat)
    for expert in range(4):
        up, value = F.linear(flat, experts.gate_up_proj[expert]).chunk(2, -1)
        output = F.linear(F.silu(up) * value, experts.down_proj[expert])
        weight = (weights * (indices == expert) * keep).sum(-1, keepdim=True)
        total = total + weight * output
    return total


@pytest.mark.parametrize("factor", [None, 0.5])
def test_dispatch_is_the_dense_sum_in_value_and_gradient(factor):
    model = tiny(capacity_factor_eval=factor, min_capacity=1)
    moe = model.model.layers[1].moe
    found = []
    for way in ("fast", "dense"):
        torch.manual_seed(3)
        normed = torch.randn(2, 9, 16, requires_grad=True)
        moe.zero_grad()
        output = moe(normed).flatten(0, 1) if way == "fast" else dense_sum(model, normed, 1)
        (output * torch.arange(output.numel()).view_as(output).cos()).sum().backward()
        found.append([output, normed.grad, *(weight.grad.clone() for weight in moe.parameters())])
    for fast, dense in zip(*found, strict=True):
        torch.testing.assert_close(fast, dense, rtol=1e-4, atol=1e-5)


def test_a_dropped_token_keeps_the_dense_block_bit_for_bit():
    model = tiny(capacity_factor_eval=0.5, min_capacity=1)
    layer, ids = model.model.layers[1], ids_of()
    seen = {}
    layer.mlp.register_forward_hook(lambda module, args, output: seen.update(normed=args[0], dense=output))
    layer.register_forward_hook(lambda module, args, output: seen.update(output=output))
    layer.post_attention_layernorm.register_forward_hook(lambda module, args, output: seen.update(residual=args[0]))
    with torch.no_grad(), record_routing(model) as records:
        model(ids)
    lost = ~records[0].kept.any(-1).view(ids.shape)
    assert 0 < int(lost.sum()) < ids.numel()
    assert torch.equal(seen["output"][lost], (seen["residual"] + seen["dense"])[lost])
    assert not torch.equal(seen["output"], seen["residual"] + seen["dense"])


def test_padding_takes_no_capacity():
    """Rows padded on either side are what they are alone, drops included, where rows do not share capacity."""
    model = tiny(capacity_factor_eval=0.6, min_capacity=1, routing_group="sequence")
    ids = ids_of(1, 10)
    with torch.no_grad():
        bare = model(ids).logits
        for side in ((4, 0), (0, 4)):
            padded, mask = F.pad(ids, side), F.pad(torch.ones_like(ids), side)
            with record_routing(model) as records:
                logits = model(padded, attention_mask=mask).logits
            torch.testing.assert_close(logits[mask.bool()], bare[0], rtol=1e-4, atol=1e-5)
            assert not records[0].kept[~mask.bool().flatten()].any()


def test_other_rows_take_capacity_away_from_a_batch_and_not_from_a_sequence():
    ids = ids_of(3)
    for group, equal in (("batch", False), ("sequence", True)):
        model = tiny(capacity_factor_eval=0.6, min_capacity=1, routing_group=group)
        with torch.no_grad():
            assert torch.allclose(model(ids).logits[2:], model(ids[2:]).logits, atol=1e-5) == equal


def test_generation_with_a_cache_is_recomputation_where_nothing_drops():
    ids = ids_of(1)
    arguments = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    free = tiny(capacity_factor_eval=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached, fresh = (free.generate(ids, use_cache=use, **arguments) for use in (True, False))
    torch.testing.assert_close(torch.stack(cached.scores), torch.stack(fresh.scores), rtol=1e-4, atol=1e-5)
    limited = tiny(capacity_factor_eval=0.4, min_capacity=1)
    with pytest.warns(UserWarning, match="limited number of tokens"):
        cached, fresh = (limited.generate(ids, use_cache=use, **arguments) for use in (True, False))
    assert not torch.allclose(torch.stack(cached.scores), torch.stack(fresh.scores), atol=1e-3)


def test_the_loss_in_training_adds_what_the_paper_adds():
    model, ids = tiny(capacity_factor_train=None), ids_of()
    bare = model(ids, labels=ids)
    assert bare.aux_loss is None and bare.router_logits is None
    asked = model(ids, labels=ids, output_router_logits=True)
    model.train()
    taught = model(ids, labels=ids)
    balance, squares = balance_loss(taught.router_logits, 2), router_z_loss(taught.router_logits)
    vocabulary = (torch.logsumexp(taught.logits, -1) ** 2).mean()
    wanted = bare.loss + 0.01 * balance + 1e-4 * squares
    torch.testing.assert_close(asked.loss, wanted)
    torch.testing.assert_close(taught.loss, wanted + 1e-3 * vocabulary)
    torch.testing.assert_close(taught.aux_loss, balance)


def test_experts_stand_in_every_so_manieth_layer():
    model = OpenMoeForCausalLM(OpenMoeConfig(**(TINY | {"num_hidden_layers": 6, "moe_every": 3})))
    assert [number for number, layer in enumerate(model.model.layers) if layer.moe is not None] == [2, 5]
    spread = model.model.layers[2].moe.gate.weight.std()
    assert spread.item() == pytest.approx((0.1 / 16) ** 0.5, rel=0.3)


def test_late_tokens_drop_and_a_random_order_spreads_the_drops():
    """With experts that everybody wants, token order drops the end, and a random order drops anywhere."""
    model = tiny(capacity_factor_eval=0.5, min_capacity=1)
    texts = ids_of(64, 32).tolist()
    rates = {}
    for order in ("token", "random"):
        model.config.fill_order = order
        model.config.routing_group = "sequence"
        analysis = RoutingAnalysis.from_model(model, texts, max_length=32, bins=4)
        rates[order] = analysis.drop_rate()[0]
    assert rates["token"][-1] > 0.5 > 0.3 > rates["token"][0]
    assert abs(rates["random"][-1] - rates["random"][0]) < 0.2


# -- the method --------------------------------------------------------------------------------------------------------
def test_the_observation_shows_drops_and_leaves_the_network_as_it_was():
    model = tiny(vocab_size=259, capacity_factor_eval=2.0)
    before = copy.deepcopy(model.config.to_dict())
    seen = OpenMoe(capacity=0.5, fill_order="random").observe(model, None, "a text of some length " * 2)
    free = OpenMoe(capacity=0).observe(model, None, "a text of some length " * 2)
    assert model.config.to_dict() == before
    assert seen.figures["% of choices dropped"] > 10 > free.figures["% of choices dropped"] == 0
    assert any("(" in str(value) for value in seen.traces[0].columns["choices"])
    assert set(seen.traces[0].columns["served"]) <= {0, 1, 2}
    written = OpenMoe(capacity=1).observe(model, None, "ab", new_tokens=3)
    assert written.text and "limited number of tokens" in written.notes[0]


def test_the_recipe_trains_the_network_that_it_describes():
    recipe = OpenMoeRecipe(layers=2, width=16, intermediate=16, heads=2, experts=4, capacity=0)
    model = recipe.begin(None)
    assert model.config.capacity_factor_train is None
    windows = torch.randint(0, 256, (2, 16))
    loss, figures = recipe.loss(model.train(), windows, 0)
    assert loss.requires_grad and figures["balance loss"] >= 1
    assert recipe.measure(model.eval(), windows)["bits per byte"] > 0
    assert "expert 3" in next(iter(recipe.pictures(model, {}, windows).values()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moe_every": 3}, "moe_every"),
        ({"num_experts_per_tok": 5}, "1 to 4 of the experts"),
        ({"capacity_factor_train": 0}, "capacity_factor_train"),
        ({"capacity_factor_eval": -1.0}, "capacity_factor_eval"),
        ({"min_capacity": -1}, "min_capacity"),
        ({"routing_group": "rows"}, "routing_group"),
        ({"fill_order": "late"}, "fill_order"),
        ({"router_jitter_noise": 0.1}, "jitter"),
    ],
)
def test_bad_configurations(settings, message):
    with pytest.raises(BadInputError, match=message):
        OpenMoeConfig(**(TINY | settings))


def test_bad_settings():
    for settings, message in (({"capacity": -1}, "capacity"), ({"fill_order": "late"}, "fill_order")):
        with pytest.raises(BadInputError, match=message):
            OpenMoe(**settings)
    for settings, message in (({"width": 30}, "even size"), ({"layers": 0}, "1 or more"), ({"experts": 1}, "experts")):
        with pytest.raises(BadInputError, match=message):
            OpenMoeRecipe(**settings)
    with pytest.raises(BadInputError, match="from scratch"):
        OpenMoeRecipe().begin("somewhere")
    with pytest.raises(BadInputError, match="reads 2 to 64"):
        OpenMoe().observe(tiny(vocab_size=259), None, "x" * 65)

"""Duo-LLM: routes against dense models and a masked form, costs, routers, and the oracle against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from everytoken.architectures.duo_llm import oracle
from everytoken.architectures.duo_llm.configuration_duo_llm import BIG, SKIP, SMALL, DuoLlmConfig
from everytoken.architectures.duo_llm.method import DuoLlm, DuoLlmRecipe
from everytoken.architectures.duo_llm.modeling_duo_llm import DuoFeedForward, DuoLlmForCausalLM, DuoRouter, mean_cost
from everytoken.architectures.duo_llm.oracle import all_routes, budget_curve, oracle_routes, route_losses
from everytoken.architectures.routing import record_routing
from everytoken.architectures.routing_analysis import RoutingAnalysis
from everytoken.core.errors import BadInputError, UnknownNameError

TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "small_intermediate_size": 6,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "allow_skip": True,
    "pad_token_id": 0,
    "eos_token_id": None,
}
IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    model = DuoLlmForCausalLM(DuoLlmConfig(**(TINY | settings))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.4)
    return model


def random_route(seed=0, shape=(2, 9, 4)):
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(seed))


# -- routes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "choice"), [("big", BIG), ("small", SMALL), ("skip", SKIP)])
def test_one_route_for_all_is_a_dense_model_bit_for_bit(name, choice):
    model = tiny()
    size = {"big": 24, "small": 6, "skip": 6}[name]
    shared = {k: v for k, v in TINY.items() if k not in ("small_intermediate_size", "allow_skip")}
    llama = LlamaForCausalLM(LlamaConfig(**(shared | {"intermediate_size": size}))).eval()
    part = "small" if name == "skip" else name
    weights = {}
    for key, weight in model.state_dict().items():
        if f"mlp.{part}." in key:
            weights[key.replace(f"mlp.{part}.", "mlp.")] = weight * (name != "skip")
        elif ".mlp." not in key and ".router." not in key:
            weights[key] = weight
    llama.load_state_dict(weights)
    with torch.no_grad():
        wanted = llama(IDS).logits
        assert torch.equal(model(IDS, route=name).logits, wanted)
        assert torch.equal(model(IDS, route=torch.full((2, 9, 4), choice)).logits, wanted)


def test_a_mixed_batch_is_the_masked_form_in_value_and_gradient():
    torch.manual_seed(0)
    block = DuoFeedForward(DuoLlmConfig(**TINY))
    route = torch.randint(0, 3, (30,))
    found = []
    for way in ("gathered", "masked"):
        hidden = torch.randn(30, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        block.zero_grad()
        output = block(hidden, route) if way == "gathered" else block.weighted(hidden, F.one_hot(route, 3))
        output.sin().sum().backward()
        found.append([output, hidden.grad, *(weight.grad.clone() for weight in block.parameters())])
        assert not output[route == SKIP].any()
    for fast, masked in zip(*found, strict=True):
        torch.testing.assert_close(fast, masked, rtol=1e-4, atol=1e-5)


def test_a_block_that_no_token_takes_has_a_zero_gradient():
    block = DuoFeedForward(DuoLlmConfig(**TINY))
    block(torch.randn(3, 16), torch.full((3,), BIG)).sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in block.small.parameters())
    assert all(weight.grad.any() for weight in block.big.parameters())


def test_rows_take_their_own_routes():
    model, route = tiny(), random_route()
    with torch.no_grad():
        both = model(IDS, route=route).logits
        for row in range(2):
            torch.testing.assert_close(model(IDS[row, None], route=route[row, None]).logits[0], both[row])


def test_the_cost_is_a_count_of_what_ran():
    """Floating point operations by hooks on the blocks: two a weight and token."""
    model, route, ran = tiny(), random_route(), []
    for layer in model.model.layers:
        for block in (layer.mlp.small, layer.mlp.big):
            weights = sum(weight.numel() for weight in block.parameters())
            block.register_forward_hook(lambda _, args, output, w=weights: ran.append(2 * w * len(args[0])))
    with torch.no_grad():
        output = model(IDS, route=route)
    big = 2 * sum(weight.numel() for weight in model.model.layers[0].mlp.big.parameters())
    assert float(output.cost) == pytest.approx(sum(ran) / big / route.numel(), rel=1e-6)
    assert torch.equal(output.routes, route)


def test_padding_costs_nothing():
    costs, mask = torch.tensor([[[1.0, 0], [1, 1]]]), torch.tensor([[True, False]])
    assert float(mean_cost(costs, mask)) == 0.5
    assert float(mean_cost(costs, None)) == 0.75


def test_random_routes_have_their_shares_and_follow_the_seed():
    model = tiny(route_probabilities=(0.2, 0.3, 0.5))
    ids = IDS.repeat(20, 1)
    torch.manual_seed(0)
    routes = model(ids, route="random").routes
    shares = torch.bincount(routes.flatten(), minlength=3) / routes.numel()
    assert shares.tolist() == pytest.approx([0.2, 0.3, 0.5], abs=0.05)
    torch.manual_seed(0)
    assert torch.equal(model(ids, route="random").routes, routes)
    model.train()
    assert not torch.equal(model(ids).routes, model(ids).routes)  # the policy of training
    assert model.eval()(ids).routes.unique().tolist() == [BIG]


def test_generation_by_every_policy_with_a_cache_as_without():
    model = tiny()
    for route in ("big", "small", "skip", "router"):
        cached, fresh = (
            model.generate(IDS, route=route, use_cache=use, max_new_tokens=4, do_sample=False) for use in (True, False)
        )
        assert torch.equal(cached, fresh)
    with record_routing(model) as records:
        model.generate(IDS, route="small", max_new_tokens=2, do_sample=False)
    assert {int(choice) for record in records for choice in record.indices} == {SMALL}


# -- routers -----------------------------------------------------------------------------------------------------------
def test_routers_speak_the_record_of_mixtures_of_experts():
    model = tiny()
    with torch.no_grad(), record_routing(model) as records:
        routes = model(IDS, route="router").routes
    assert torch.equal(torch.stack([record.indices[:, 0] for record in records], -1).view(2, 9, 4), routes)
    assert records[0].logits.shape == (18, 3)
    model.config.route = "small"
    analysis = RoutingAnalysis.from_model(model, IDS.tolist())
    assert analysis.load().tolist() == [[0.0, 1.0, 0.0]] * 4


def test_a_network_that_may_not_skip_never_does():
    model = tiny(allow_skip=False)
    model.model.layers[0].router.weight.data[SKIP] = 100
    assert int(model(IDS, route="router").routes.min()) >= SMALL


def test_a_gumbel_choice_is_a_draw_from_the_probabilities():
    torch.manual_seed(0)
    router = DuoRouter(DuoLlmConfig(**TINY)).train()
    torch.nn.init.normal_(router.weight, std=0.5)
    hidden, count = torch.randn(1, 16).expand(20_000, -1), 20_000
    logits, _, indices = router(hidden)
    expected = count * logits[0].softmax(-1)
    observed = torch.bincount(indices[:, 0], minlength=3)
    assert float(((observed - expected) ** 2 / expected).sum().detach()) < 13.8  # chi-square, 2 degrees, 0.1%
    router.eval()
    assert router(hidden)[2].unique().tolist() == [int(logits[0].argmax())]


def test_straight_through_is_the_hard_choice_forward_and_the_probabilities_backward():
    model = tiny(router_training="straight_through", train_route="router").train()
    torch.manual_seed(3)
    output = model(IDS, labels=IDS)
    with torch.no_grad():
        hard = model.eval()(IDS, route=output.routes)
    torch.testing.assert_close(output.logits, hard.logits, rtol=1e-4, atol=1e-4)
    output.loss.backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in model.model.layers)
    layer, logits = model.model.layers[0], torch.randn(5, 3, requires_grad=True)
    weights = layer._soft(logits, torch.tensor([0, 1, 2, 1, 0]))
    probe = torch.randn(5, 3)
    (ours,) = torch.autograd.grad((weights * probe).sum(), logits)
    (wanted,) = torch.autograd.grad((logits.softmax(-1) * probe).sum(), logits)
    torch.testing.assert_close(weights.detach(), F.one_hot(torch.tensor([0, 1, 2, 1, 0]), 3).float())
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("target", [None, 0.3])
def test_the_loss_of_routers_adds_the_cost(target):
    model = tiny(router_training="expectation", train_route="router", cost_weight=2.0, cost_target=target).train()
    output = model(IDS, labels=IDS)
    bare = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    added = 2 * (output.cost if target is None else (output.cost - target) ** 2)
    torch.testing.assert_close(output.loss, bare + added)
    torch.testing.assert_close(model(IDS, labels=IDS, route="big").loss, model.eval()(IDS, labels=IDS).loss)


def test_an_infinite_weight_leaves_the_least_cost():
    """Only the cost's gradient: every router turns to skips."""
    model = tiny(router_training="expectation", train_route="router", cost_weight=1e4).train()
    routers = [layer.router.weight for layer in model.model.layers]
    optimizer = torch.optim.Adam(routers, lr=0.5)
    for _ in range(25):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert model.eval()(IDS, route="router").cost.item() < 0.05


# -- the oracle --------------------------------------------------------------------------------------------------------
def recomputed(model, ids, route, position, policy=BIG):
    """The whole text read anew, with that route at the position and the policy before it."""
    routes = torch.full((1, position + 1, model.config.num_hidden_layers), policy)
    routes[0, position] = torch.as_tensor(route)
    with torch.no_grad():
        logits = model(ids[None, : position + 1], route=routes, use_cache=False).logits[0, -1]
    return float(F.cross_entropy(logits, ids[position + 1]))


@pytest.mark.parametrize("policy", [BIG, SMALL])
def test_the_shared_cache_is_recomputation(policy):
    model, ids = tiny(), IDS[0]
    routes = all_routes(4, allow_skip=True)[::9]
    assert len(routes) == 9
    losses = route_losses(model, ids, routes, policy={BIG: "big", SMALL: "small"}[policy])
    assert losses.shape == (8, 9)
    for position, number in itertools.product((0, 3, 7), range(9)):
        wanted = recomputed(model, ids, routes[number], position, policy)
        assert losses[position, number].item() == pytest.approx(wanted, abs=1e-5)


def test_chunks_and_routes_of_each_position(monkeypatch):
    model, routes = tiny(), all_routes(4)
    whole = route_losses(model, IDS[0], routes)
    monkeypatch.setattr(oracle, "ROWS", 5)
    torch.testing.assert_close(route_losses(model, IDS[0], routes), whole)
    own = routes[torch.arange(8)[:, None] + torch.arange(2)]
    found = route_losses(model, IDS[0], own, torch.arange(8))
    torch.testing.assert_close(found, whole.gather(1, torch.arange(8)[:, None] + torch.arange(2)))
    one = route_losses(model, IDS[0], routes, torch.tensor([4]), targets=torch.tensor([7]))
    assert not torch.allclose(one, whole[4:5])


@pytest.mark.parametrize("search", ["exhaustive", "greedy"])
def test_on_its_own_routes_the_oracle_goes_from_left_to_right(search):
    """Each token is chosen with full forwards in which those before it keep what was chosen for them."""
    model, ids, layers = tiny(allow_skip=False, num_hidden_layers=3), IDS[:1, :6], 3
    budget = 1  # one block: adding the best single one is exact too
    taken, losses = torch.full((1, 6, layers), BIG), []
    for place in range(5):
        tried = {}
        for route in all_routes(layers):
            if int((route == BIG).sum()) <= budget:
                taken[0, place] = route
                with torch.no_grad():
                    logits = model(ids, route=taken).logits[0, place].log_softmax(-1)
                tried[tuple(route.tolist())] = -float(logits[ids[0, place + 1]])
        best = min(tried, key=tried.get)
        taken[0, place] = torch.tensor(best)
        losses.append(tried[best])
    found = oracle_routes(model, ids, budget, search=search, context_policy="oracle")
    assert found.routes.tolist() == taken[0, :5].tolist()
    assert found.losses.tolist() == pytest.approx(losses, abs=1e-5)
    some = oracle_routes(model, ids, budget, search=search, context_policy="oracle", positions=torch.tensor([3, 1]))
    assert some.routes.tolist() == taken[0, [3, 1]].tolist()
    assert some.difficulty.min() >= -1e-6
    other = oracle_routes(model, ids, budget, search=search)
    assert other.losses[1:].tolist() != pytest.approx(losses[1:], abs=1e-4)  # the context matters


def test_exhaustive_is_brute_force_and_budgets_behave():
    model, ids = tiny(allow_skip=False, num_hidden_layers=3), IDS[0, :5]
    losses = {
        route: [recomputed(model, ids, route, position) for position in range(4)]
        for route in itertools.product((SMALL, BIG), repeat=3)
    }
    table = torch.tensor([losses[tuple(route.tolist())] for route in all_routes(3)]).T
    for mode in ("at_most", "exactly"):
        curve = budget_curve(table, all_routes(3), mode)
        for budget in range(4):
            allowed = [r for r in losses if r.count(BIG) == budget or (mode == "at_most" and r.count(BIG) < budget)]
            found = oracle_routes(model, ids, budget, mode)
            for position in range(4):
                best = min(allowed, key=lambda r: losses[r][position])
                assert found.losses[position].item() == pytest.approx(losses[best][position], abs=1e-5)
                assert tuple(found.routes[position].tolist()) in allowed
            assert curve[budget].item() == pytest.approx(float(found.losses.mean()), abs=1e-5)
            assert found.small.tolist() == pytest.approx(losses[(SMALL,) * 3], abs=1e-5)
            assert found.big.tolist() == pytest.approx(losses[(BIG,) * 3], abs=1e-5)
    hardness = [oracle_routes(model, ids, budget).difficulty for budget in range(4)]
    assert not hardness[0].abs().gt(1e-6).any()
    assert all((b >= a - 1e-6).all() for a, b in itertools.pairwise(hardness))
    assert (found.losses <= oracle_routes(model, ids, 3).big + 1e-6).all()


def test_greedy_and_random_searches_never_beat_the_best():
    model, ids = tiny(), IDS[0]
    for mode, budget in (("at_most", 0), ("at_most", 1), ("at_most", 3), ("exactly", 1), ("exactly", 3)):
        best = oracle_routes(tiny(allow_skip=False), ids, budget, mode)
        for search in ("greedy", "random"):
            found = oracle_routes(model, ids, budget, mode, search, tries=6)
            spent = (found.routes == BIG).sum(-1)
            assert (spent <= budget).all() and (mode == "at_most" or (spent == budget).all())
            assert (found.losses >= best.losses - 1e-5).all()
            again = route_losses(model, ids, found.routes[:, None])[:, 0]
            torch.testing.assert_close(found.losses, again, rtol=1e-4, atol=1e-5)
        if budget == 1:  # one step of greed is exact
            torch.testing.assert_close(oracle_routes(model, ids, 1, mode, "greedy").losses, best.losses)


def test_greed_can_miss_the_best_pair():
    gaps = []
    for seed in range(4):
        model = tiny(seed, allow_skip=False)
        greedy, best = (oracle_routes(model, IDS[0], 2, search=search).losses for search in ("greedy", "exhaustive"))
        gaps.append(float((greedy - best).max()))
    assert max(gaps) > 0.01 and min(gaps) >= -1e-5


def test_the_oracle_gains_in_an_untrained_network_and_the_controls_say_why():
    """The best of many routes beats all large blocks where nothing was learned; that for a wrong target does not."""
    model, ids = tiny(allow_skip=False), torch.cat([IDS[0], IDS[1]])
    routes = all_routes(4)
    losses = route_losses(model, ids, routes)
    wrong = route_losses(model, ids, routes, targets=ids[1:].flip(0))
    control = oracle.wrong_target_control(losses, wrong)
    assert losses.min(-1).values.mean() < losses[:, -1].mean() - 0.2
    assert control.mean() > losses.min(-1).values.mean() + 0.2
    dropped = oracle.dropout_control(model, ids, 16, rate=0.2)
    assert dropped.mean() < losses[:, -1].mean() - 0.2
    torch.testing.assert_close(oracle.dropout_control(model, ids, 1, rate=0.0), losses[:, -1], rtol=1e-4, atol=1e-5)
    assert torch.equal(dropped, oracle.dropout_control(model, ids, 16, rate=0.2))


def test_counts_of_routes():
    assert len(all_routes(12)) == 4096
    assert [int((all_routes(12) == BIG).sum(-1).eq(b).sum()) for b in (1, 6)] == [12, 924]
    assert len(all_routes(4, allow_skip=True)) == 81
    with pytest.raises(BadInputError, match="531,441"):
        all_routes(12, allow_skip=True)


# -- the method --------------------------------------------------------------------------------------------------------
def test_the_observation_shows_routes_and_difficulty():
    model = tiny(vocab_size=259, allow_skip=False, route="small")
    seen = DuoLlm(budget=2).observe(model, None, "some words", new_tokens=2)
    columns = seen.traces[0].columns
    assert set(columns["route"]) == {"ssss"} and set(columns["large blocks"]) == {0}
    assert columns["cost"][0] == pytest.approx(0.25)
    gained = [a - b for a, b in zip(columns["nats"][:-1], columns["difficulty"][:-1], strict=True)]
    assert seen.figures["nats, oracle of 2"] == pytest.approx(sum(gained) / len(gained), abs=1e-5)
    assert seen.text and "knows the next token" in seen.notes[0]
    assert DuoLlm(budget=0).observe(model, None, "ab").traces[0].columns["oracle"] == ["ssss", None]


def test_the_recipe_trains_paths_first_and_then_routers_alone():
    recipe = DuoLlmRecipe(layers=2, width=16, intermediate=24, heads=2, small=8, steps=4, router_share=0.5)
    model = recipe.begin(None).train()
    windows = torch.randint(0, 256, (2, 16))
    names, weights = zip(*model.named_parameters(), strict=True)
    for step in range(4):
        loss, figures = recipe.loss(model, windows, step)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        moved = {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
        routers = {name for name in names if name.endswith("router.weight")}
        assert moved == (routers if step >= 2 else set(names) - routers)
        assert bool(figures) == (step >= 2)
    found = recipe.measure(model.eval(), windows)
    assert {"bits per byte, big", "bits per byte, router", "routers' cost"} <= set(found)
    assert model.config.route == "router"
    assert len(recipe.pictures(model, {}, windows)) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"small_intermediate_size": 25}, "small blocks"),
        ({"route_probabilities": (0.5, 0.6, -0.1)}, "sum to 1"),
        ({"allow_skip": False, "route_probabilities": (0.2, 0.4, 0.4)}, "may not skip"),
        ({"allow_skip": False, "route": "skip"}, "may not skip"),
        ({"route": "best"}, "route"),
        ({"router_training": "reinforce"}, "router_training"),
        ({"cost_weight": -1.0}, "cost_weight"),
        ({"cost_target": 1.5}, "cost_target"),
    ],
)
def test_bad_configurations(settings, message):
    with pytest.raises(BadInputError, match=message):
        DuoLlmConfig(**(TINY | settings))


def test_bad_routes():
    model = tiny(allow_skip=False)
    for route, message in (
        ("skip", "no route called 'skip'"),
        ("best", "no route called 'best'"),
        (torch.full((2, 8, 4), 1), "shape"),
        (torch.full((2, 9, 4), 1.0), "whole numbers"),
        (torch.full((2, 9, 4), 0), "made of 1"),
        (torch.full((2, 9, 4), 3), "made of 1"),
    ):
        with pytest.raises(BadInputError, match=message):
            model(IDS, route=route)
    with pytest.raises(BadInputError, match="written by a policy"):
        model.generate(IDS, route=torch.full((2, 9, 4), 1))
    with pytest.raises(BadInputError, match="either input_ids or inputs_embeds"):
        model(None)


def test_bad_oracles():
    model, ids = tiny(), IDS[0]
    for arguments, message in (
        ({"budget": 5}, "budget"),
        ({"budget": 1, "mode": "below"}, "mode"),
        ({"budget": 1, "search": "random", "tries": 0}, "at least one route"),
        ({"budget": 1, "positions": torch.tensor([8])}, "between 0 and 7"),
    ):
        with pytest.raises(BadInputError, match=message):
            oracle_routes(model, ids, **arguments)
    with pytest.raises(UnknownNameError, match="greedy"):
        oracle_routes(model, ids, 1, search="greedily")
    with pytest.raises(BadInputError, match="at least two tokens"):
        oracle_routes(model, ids[:1], 1)
    with pytest.raises(BadInputError, match="one text"):
        oracle_routes(model, IDS, 1)
    with pytest.raises(BadInputError, match="positions, routes, layers"):
        route_losses(model, ids, torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(BadInputError, match="at least one try"):
        oracle.dropout_control(model, ids, 0)
    for settings, message in (({"route": "best"}, "route"), ({"budget": -1}, "budget"), ({"tries": 0}, "tries")):
        with pytest.raises(BadInputError, match=message):
            DuoLlm(**settings)
    with pytest.raises(BadInputError, match="reads 2 to 64"):
        DuoLlm().observe(tiny(vocab_size=259), None, "a")
    with pytest.raises(BadInputError, match="at most the 4 layers"):
        DuoLlm(budget=5).observe(tiny(vocab_size=259), None, "ab")
    for settings, message in (({"router_share": 1.0}, "router_share"), ({"small": 999}, "small blocks")):
        with pytest.raises(BadInputError, match=message):
            DuoLlmRecipe(**settings)

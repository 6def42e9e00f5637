"""RMoE: the recurrent router by hand and against torch's cell, its limits, and Mixtral as a special case."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from everytoken.architectures.rmoe.configuration_rmoe import RMoeConfig
from everytoken.architectures.rmoe.method import CHANGED, RMoe, RMoeRecipe
from everytoken.architectures.rmoe.modeling_rmoe import RecurrentRouter, RMoeForCausalLM
from everytoken.architectures.routing import balance_loss, record_routing
from everytoken.core.errors import BadInputError

TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "pad_token_id": 0,
}
IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    model = RMoeForCausalLM(RMoeConfig(**(TINY | {"router_size": 6} | settings))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    return model


def router_of(d=5, experts=4, top_k=2, p=3, seed=0, **settings):
    torch.manual_seed(seed)
    router = RecurrentRouter(d, experts, top_k, p, **settings)
    for weight in router.parameters():
        nn.init.normal_(weight)
    return router


# -- the cell ----------------------------------------------------------------------------------------------------------
def patterned_cell():
    """Every parameter a repeating pattern, in the order ir, hr, b_ir, b_hr, iz, hz, b_iz, b_hz, in, hn, b_in, b_hn."""

    def pattern(j, *shape):
        count = int(torch.tensor(shape).prod())
        return (0.3 * ((torch.arange(count) + j) % 5 - 2)).view(shape)

    cell = nn.GRUCell(3, 3)
    with torch.no_grad():
        cell.weight_ih.copy_(torch.cat([pattern(j, 3, 3) for j in (0, 4, 8)]))
        cell.weight_hh.copy_(torch.cat([pattern(j, 3, 3) for j in (1, 5, 9)]))
        cell.bias_ih.copy_(torch.cat([pattern(j, 3) for j in (2, 6, 10)]))
        cell.bias_hh.copy_(torch.cat([pattern(j, 3) for j in (3, 7, 11)]))
    return cell


def test_the_worked_states():
    router, cell = router_of(d=3), patterned_cell()
    with torch.no_grad():
        router.projection.copy_(torch.eye(3))
    *_, first = router(torch.tensor([[1, -0.5, 0.25], [0, 2, -1]]), None, cell)
    *_, second = router(torch.tensor([[0.3, 0.3, 0.3], [-1, 0, 1]]), first, cell)
    for found, wanted in (
        (first, [[-0.26419, -0.20493, 0.28948], [0.60739, -0.22855, -0.27588]]),
        (second, [[-0.46274, -0.21058, 0.25622], [-0.59575, -0.13511, -0.37484]]),
    ):
        torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=1e-5)


def test_the_cell_is_its_equations_in_value_and_gradient():
    torch.manual_seed(0)
    router, cell = router_of(), nn.GRUCell(3, 3)
    hidden, before = torch.randn(6, 5, requires_grad=True), torch.randn(6, 3, requires_grad=True)

    def written_out():
        a = hidden @ router.projection.T
        wi, wh = cell.weight_ih.chunk(3), cell.weight_hh.chunk(3)
        bi, bh = cell.bias_ih.chunk(3), cell.bias_hh.chunk(3)
        gates = [a @ wi[i].T + bi[i] for i in range(3)]
        own = [before @ wh[i].T + bh[i] for i in range(3)]
        reset, update = torch.sigmoid(gates[0] + own[0]), torch.sigmoid(gates[1] + own[1])
        new = torch.tanh(gates[2] + reset * own[2])
        state = (1 - update) * new + update * before
        return state @ router.weight.T, state

    parameters = [hidden, before, *router.parameters(), *cell.parameters()]
    logits, _, _, state = router(hidden, before, cell)
    ours = torch.autograd.grad((logits.sin() + state.sum(-1, keepdim=True)).sum(), parameters)
    logits_by_hand, state_by_hand = written_out()
    theirs = torch.autograd.grad((logits_by_hand.sin() + state_by_hand.sum(-1, keepdim=True)).sum(), parameters)
    torch.testing.assert_close(state, state_by_hand)
    torch.testing.assert_close(logits, logits_by_hand)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_gate_that_forgets_leaves_an_independent_router():
    """z = 0 and no recurrent part in n: h = tanh(W_in r + b_in), whatever came before."""
    router, cell = router_of(), nn.GRUCell(3, 3)
    with torch.no_grad():
        cell.bias_ih[3:6] = -1e4
        cell.weight_hh[6:] = 0
        cell.bias_hh[6:] = 0
    hidden = torch.randn(4, 5)
    wanted = torch.tanh((hidden @ router.projection.T) @ cell.weight_ih[6:].T + cell.bias_ih[6:])
    for before in (None, torch.randn(4, 3)):
        torch.testing.assert_close(router(hidden, before, cell)[3], wanted)


def test_a_gate_that_keeps_leaves_the_state_at_zero_and_routes_uniformly():
    router, cell = router_of(), nn.GRUCell(3, 3)
    with torch.no_grad():
        cell.bias_ih[3:6] = 1e4
    state = None
    for _ in range(3):
        logits, scores, indices, state = router(torch.randn(4, 5), state, cell)
    assert not state.any() and not logits.any()
    assert scores.tolist() == [[0.5, 0.5]] * 4
    assert indices.tolist() == [[0, 1]] * 4


def test_tokens_are_routed_each_on_its_own():
    router, cell = router_of(), nn.GRUCell(3, 3)
    hidden, state, order = torch.randn(8, 5), torch.randn(8, 3), torch.randperm(8)
    whole = router(hidden, state, cell)
    for found, wanted in zip(router(hidden[order], state[order], cell), whole, strict=True):
        torch.testing.assert_close(found, wanted[order])
    for found, wanted in zip(router(hidden[:3], state[:3], cell), whole, strict=True):
        torch.testing.assert_close(found, wanted[:3])


def test_the_state_stays_in_float32():
    router, cell = router_of().bfloat16(), nn.GRUCell(3, 3).bfloat16()
    logits, scores, _, state = router(torch.randn(4, 5).bfloat16(), None, cell)
    assert logits.dtype == scores.dtype == state.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert router(torch.randn(4, 5), None, cell)[3].dtype == torch.float32


def test_without_a_cell_and_with_an_identity_it_is_mixtrals_router_bit_for_bit():
    config = MixtralConfig(hidden_size=5, num_local_experts=4)
    theirs, router = MixtralTopKRouter(config), router_of(p=5)
    nn.init.normal_(theirs.weight)
    with torch.no_grad():
        router.projection.copy_(torch.eye(5))
        router.weight.copy_(theirs.weight)
    hidden = torch.randn(7, 5)
    for found, wanted in zip(router(hidden), (*theirs(hidden), None), strict=True):
        assert found is None if wanted is None else torch.equal(found, wanted)


# -- the model ---------------------------------------------------------------------------------------------------------
def test_the_whole_model_is_mixtral_then():
    model = tiny(cell="none", router_size=16, num_hidden_layers=2)
    mixtral = MixtralForCausalLM(MixtralConfig(**(TINY | {"num_hidden_layers": 2}))).eval()
    weights = model.state_dict()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.projection.copy_(torch.eye(16))
    mixtral.load_state_dict({name: weight for name, weight in weights.items() if "projection" not in name})
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, mixtral(IDS).logits)


def losses(model):
    """The last router's balance loss, through the routers' states alone."""
    model.zero_grad()
    state, cell = None, model.model.router_cell
    for layer in model.model.layers[:2]:
        torch.manual_seed(1)
        logits, _, _, state = layer.mlp.gate(torch.randn(12, 16), state, cell)
    balance_loss([logits], 2).backward()
    return model.model.layers[0].mlp.gate.projection.grad


def test_the_gradient_reaches_the_layer_below_through_the_state_unless_it_is_cut():
    assert losses(tiny()).abs().sum() > 0
    assert losses(tiny(detach_state=True)) is None


def test_cutting_the_gradient_changes_no_value():
    with torch.no_grad():
        assert torch.equal(tiny()(IDS).logits, tiny(detach_state=True)(IDS).logits)


def test_the_state_begins_anew_in_every_forward_and_walks_through_dense_layers():
    model = tiny(num_hidden_layers=4, moe_num_layers=2)
    assert [hasattr(layer.mlp, "gate") for layer in model.model.layers] == [False, False, True, True]
    with torch.no_grad(), record_routing(model) as records:
        first = model(IDS).logits
        assert torch.equal(model(IDS).logits, first)
    assert len(records) == 4
    assert torch.equal(records[0].state, records[2].state)
    gate, cell = model.model.layers[3].mlp.gate, model.model.router_cell
    given = []
    gate.register_forward_pre_hook(lambda _, args: given.append(args))
    with torch.no_grad():
        model(IDS)
    assert torch.equal(given[0][1], records[0].state)
    assert not torch.equal(gate(given[0][0], None, cell)[0], gate(*given[0])[0])


def test_the_shared_expert_has_half_of_the_weight():
    model = tiny(shared_expert=True)
    block = model.model.layers[0].mlp
    hidden = torch.randn(1, 5, 16)
    with torch.no_grad():
        output, _ = block(hidden, None, model.model.router_cell)
        _, weights, indices, _ = block.gate(hidden, None, model.model.router_cell)
        routed = block.experts(hidden[0], indices, weights)
        torch.testing.assert_close(output[0], 0.5 * routed + 0.5 * block.shared(hidden)[0])


def test_the_balance_loss_is_of_each_layer_or_pooled():
    for pooled in (False, True):
        model = tiny(pooled_balance=pooled)
        output = model(IDS, labels=IDS, output_router_logits=True)
        wanted = balance_loss(output.router_logits, 2, pooled=pooled)
        torch.testing.assert_close(output.aux_loss, wanted)
        torch.testing.assert_close(output.loss, model(IDS, labels=IDS).loss + 0.001 * wanted)
    assert not torch.isclose(balance_loss(output.router_logits, 2), wanted)


def test_one_cell_is_saved_once():
    names = [name for name in tiny().state_dict() if "cell" in name]
    assert names == [f"model.router_cell.{part}" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


@pytest.mark.parametrize(
    ("d", "p", "experts", "layers", "extra"), [(256, 64, 8, 8, 160128), (1024, 128, 16, 24, 3293952)]
)
def test_parameters_of_the_routers(d, p, experts, layers, extra):
    with torch.device("meta"):
        router, cell = RecurrentRouter(d, experts, 2, p), nn.GRUCell(p, p)
    count = sum(w.numel() for w in router.parameters()) * layers + sum(w.numel() for w in cell.parameters())
    assert count == layers * (d * p + p * experts) + 6 * p * p + 6 * p == extra


def test_initial_weights():
    model = RMoeForCausalLM(RMoeConfig(**(TINY | {"router_size": 64, "hidden_size": 64})))
    gate, cell = model.model.layers[0].mlp.gate, model.model.router_cell
    assert gate.projection.std().item() == pytest.approx(0.02, rel=0.1)
    assert 0.115 < cell.weight_hh.abs().max().item() <= 1 / 8


@pytest.mark.parametrize("side", [(3, 0), (0, 3)])
def test_padding_rows_change_nothing(side):
    model = tiny()
    with torch.no_grad():
        padded = model(F.pad(IDS, side), attention_mask=F.pad(torch.ones_like(IDS), side)).logits
        torch.testing.assert_close(padded[:, side[0] : side[0] + 9], model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_other_cells_generate_with_a_cache_as_without():
    for settings in ({"cell": "rnn"}, {"cell": "none"}, {"moe_num_layers": 1}):
        model = tiny(**settings)
        cached, fresh = (model.generate(IDS, use_cache=use, max_new_tokens=5, do_sample=False) for use in (True, False))
        assert torch.equal(cached, fresh)


# -- the method --------------------------------------------------------------------------------------------------------
def test_the_observation_shows_what_history_changes():
    model = tiny(vocab_size=259)
    seen = RMoe().observe(model, None, "some words", new_tokens=2)
    alone = RMoe(forget=True).observe(model, None, "some words")
    assert seen.figures[CHANGED] > 0 and CHANGED not in alone.figures
    assert seen.text
    assert seen.traces[0].columns["choices"] == alone.traces[0].columns["choices"]
    assert seen.traces[1].columns["state change"] != alone.traces[1].columns["state change"]
    assert RMoe().observe(tiny(vocab_size=259, cell="none"), None, "ab").traces[0].columns["state change"] == [
        None,
        None,
    ]


def test_the_recipe_trains_the_network_that_it_describes():
    recipe = RMoeRecipe(layers=2, width=16, intermediate=16, heads=2, experts=4, router_size=4, cell="rnn", balance=0.5)
    model = recipe.begin(None)
    assert isinstance(model.model.router_cell, nn.RNNCell)
    windows = torch.randint(0, 256, (2, 16))
    loss, figures = recipe.loss(model.train(), windows, 0)
    assert loss.requires_grad and figures["balance loss"] >= 1
    assert "nats between layers" in recipe.measure(model.eval(), windows)
    assert len(recipe.pictures(model, {}, windows)) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cell": "lstm"}, "cell"),
        ({"router_size": 0}, "router_size"),
        ({"num_experts_per_tok": 5}, "1 to 4 of the experts"),
        ({"moe_num_layers": 4}, "moe_num_layers"),
        ({"cell": "none", "detach_state": True}, "no state to detach"),
        ({"router_jitter_noise": 0.1}, "jitter"),
    ],
)
def test_bad_configurations(settings, message):
    with pytest.raises(BadInputError, match=message):
        RMoeConfig(**(TINY | settings))


def test_bad_input():
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        tiny()(None)
    with pytest.raises(BadInputError, match="from scratch"):
        RMoeRecipe().begin("somewhere")

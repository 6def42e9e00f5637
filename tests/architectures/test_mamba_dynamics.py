"""Token dynamics: the sheet's numbers, the sign rule, the constraint on real models, and reordering."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

from everytoken.architectures.mamba_dynamics.analysis import (
    ConstrainedRows,
    analyze_dynamics,
    constrain_x_proj,
    constrained_rows,
    release_x_proj,
    symmetric_eigenvalues,
)
from everytoken.architectures.mamba_dynamics.configuration_mamba_dynamics import MambaDynamicsConfig
from everytoken.architectures.mamba_dynamics.method import (
    MambaDynamics,
    MambaDynamicsRecipe,
    phase_picture,
    token_sizes,
)
from everytoken.architectures.mamba_dynamics.modeling_mamba_dynamics import MambaDynamicsForCausalLM
from everytoken.architectures.mamba_dynamics.reorder import TokenReorder, reorder_layers, soft_sort
from everytoken.architectures.mamba_dynamics.theory import (
    blow_up_time,
    convergence_constants,
    growth,
    layer,
    phase_diagram,
    regime,
    simulate,
)
from everytoken.architectures.plainmamba.method import PlainMamba
from everytoken.architectures.training import learn
from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.testing.models import tiny_llama
from everytoken.training.datasets.plain_text import TextWindows

X = np.array([0.5, -0.4, 0.3, 1.0])
BY_HAND = [0.143550, -0.133502, 0.095203, 1.616941]


def recurrence(x, mu, s, a):
    """One layer token by token."""
    h, found = 0.0, []
    for value in x:
        step = math.log1p(math.exp(s * value))
        h = math.exp(-a * step) * h + step * value * value  # B u, with B = x
        found.append(mu * value * h)
    return found


# -- one layer and its limit -------------------------------------------------------------------------------------------
def test_the_recurrence_is_the_closed_form():
    one = np.array([[1.0]])
    closed = layer(X[:, None], one, 1.3 * one, 0.7 * one, 0.5)[:, 0]
    assert np.allclose(closed, BY_HAND, atol=1e-6)
    assert np.allclose(closed, recurrence(X, 1.3, 0.7, 0.5), atol=1e-15)
    assert np.allclose(1.3 * X * growth(X, 0.7, 0.5), closed, atol=1e-15)


def test_several_dimensions_by_a_loop():
    rng = np.random.default_rng(0)
    x, s_b, s_c, s_d = rng.normal(size=(5, 3)), *rng.normal(size=(2, 2, 3)), rng.normal(size=(3, 3))
    steps = np.log1p(np.exp(x @ s_d.T))
    wanted = np.zeros_like(x)
    for at in range(5):
        for j in range(at + 1):
            fade = np.exp(-0.4 * steps[j + 1 : at + 1].sum(0))
            wanted[at] += (s_c @ x[at]) @ (s_b @ x[j]) * steps[j] * fade * x[j]
    assert np.allclose(layer(x, s_b, s_c, s_d, 0.4), wanted)


def test_a_deep_stack_approaches_the_equation_at_rate_one_over_its_depth():
    start, time = np.array([0.5, -0.4, 0.3]), 1.0
    exact = simulate(start, 1.0, 0.7, 0.5, time).tokens[0]
    errors = []
    for depth in (50, 100, 200):
        x = start.copy()
        for _ in range(depth):
            x = x + np.array(recurrence(x, 1.0, 0.7, 0.5)) * time / depth
        errors.append(np.abs(x - exact).max())
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1) and errors[1] / errors[2] == pytest.approx(2, abs=0.1)


# -- the sign rule -----------------------------------------------------------------------------------------------------
def test_tokens_converge_for_a_negative_mu_at_the_sharp_rate():
    first, later = convergence_constants(-1.0, 0.5)
    assert (round(first, 5), round(later, 5)) == (0.84932, 0.45965)
    end = simulate([1.0, -0.5, 0.8, 2.0], -1.0, 0.7, 0.5, 1e6)
    assert np.allclose(1e3 * np.abs(end.tokens[0]), [0.8490, 0.4611, 0.4617, 0.4553], atol=6e-5)
    rng = np.random.default_rng(0)
    start, mu = rng.normal(size=(20, 4)), -rng.uniform(0.3, 2, 20)
    end = simulate(start, mu, rng.normal(size=20), rng.uniform(0.2, 1, 20), 1e4)
    assert (np.abs(end.tokens) < np.abs(start)).all() and np.abs(end.tokens).max() < 0.1
    assert (np.sign(end.tokens) == np.sign(start)).all()


def test_slow_divergence_by_the_numbers():
    found = [float(simulate([0.5], 1.0, -1.0, 0.5, 10.0**power).tokens[0, 0]) for power in range(2, 7)]
    assert np.allclose(found, [11.51, 14.71, 17.61, 20.39, 23.09], atol=6e-3)


@pytest.mark.parametrize(
    ("mu", "s", "x", "time"),
    [(1, 1, 0.5, 1.67694), (1, 0.5, 0.5, 2.13847), (2, 1, 0.5, 0.83847), (1, 1, 1, 0.28296), (1, -1, -0.5, 1.67694)],
)
def test_fast_divergence_by_the_numbers(mu, s, x, time):
    assert blow_up_time(mu, s, x) == pytest.approx(time, abs=6e-6)
    end = simulate([x], mu, s, 0.5, 100.0, limit=1e4)
    assert end.time[0] == pytest.approx(time, abs=1e-4) and end.passed[0] == 0
    assert blow_up_time(2 * mu, s, x) == pytest.approx(blow_up_time(mu, s, x) / 2)


def test_a_later_token_may_be_first():
    end = simulate([[0.5, 0.4, 0.3], [-0.5, -0.4, -0.3]], 1.0, 1.0, 0.5, 100.0, limit=30.0)
    assert end.passed.tolist() == [1, 2]
    assert np.allclose(end.time, [1.603, 11.28], atol=1e-2)


def test_a_mu_of_zero_changes_nothing():
    assert np.allclose(simulate(X, 0.0, 1.0, 0.5, 1e3).tokens[0], X)
    assert regime(0, 1, 1) == "constant" and math.isinf(blow_up_time(0, 1, 1)) and math.isinf(blow_up_time(1, -1, 1))


def test_the_phase_diagram_is_the_sign_rule():
    found = phase_diagram(8, time=1e3)
    assert (found.found[found.mu < 0] == "convergent").all() and (found.found[found.mu > 0] != "convergent").all()
    assert found.agreement > 0.9  # very small tokens blow up later than anybody waits
    assert "convergent" in phase_picture(2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: simulate([0.0, 1.0], 1, 1, 1, 1),
        lambda: simulate([1.0], 1, 1, 1, -1),
        lambda: simulate([1.0], 1, 1, 0, 1),
        lambda: simulate([2e3], 1, 1, 1, 1),
        lambda: convergence_constants(1, 0.5),
        lambda: blow_up_time(1, 1, 0),
        lambda: phase_diagram(3),
    ],
)
def test_systems_that_make_no_sense_are_refused(call):
    with pytest.raises(BadInputError):
        call()


# -- layers of real models ---------------------------------------------------------------------------------------------
def tiny_mamba(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 3}
    return MambaForCausalLM(MambaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()


def test_eigenvalues_are_those_of_the_whole_matrix():
    for n, d in ((3, 9), (4, 5)):
        s_b, s_c = torch.randn(2, n, d, dtype=torch.float64)
        whole = torch.linalg.eigvalsh((s_c.T @ s_b + s_b.T @ s_c) / 2)
        found = symmetric_eigenvalues(s_b, s_c)
        filled = torch.cat([found, torch.zeros(d - len(found), dtype=torch.float64)]).sort().values
        assert torch.allclose(filled, whole, atol=1e-10)


def test_the_constraint_has_the_signs_that_it_promises():
    for kind, positive in (("positive", 3), ("negative", 0), ("mixed", 2)):
        s_b, s_c = constrained_rows(torch.randn(3, 6), torch.randn(3), kind)
        product = s_c.double().T @ s_b.double()
        assert torch.allclose(product, product.T, atol=1e-5) and torch.linalg.matrix_rank(product) == 3
        values = symmetric_eigenvalues(s_b, s_c)
        assert int((values > 1e-5).sum()) == positive and int((values < -1e-5).sum()) == 3 - positive
        assert torch.equal(s_c.diagonal(), torch.ones(3)) and not s_c.tril(-1).any()
    w = constrained_rows(torch.zeros(3, 6), torch.zeros(3), "positive")[0].diagonal()
    assert torch.allclose(w, torch.full((3,), math.log(2) + 0.7))


def test_the_released_layout_reads_v_from_the_first_column_of_c():
    weight = torch.randn(8, 6)
    s_b, s_c = constrained_rows(weight[2:5], weight[5:, 0], "mixed")
    assert torch.equal(ConstrainedRows("mixed", 2, 3)(weight), torch.cat([weight[:2], s_b, s_c]))


@pytest.mark.parametrize("kind", ["positive", "negative", "mixed"])
def test_a_mamba_is_constrained_trained_and_released(kind):
    model, ids = tiny_mamba(), torch.randint(3, 20, (2, 9))
    free = analyze_dynamics(model)
    assert [item.regime for item in free] == ["divergent"] * 2 and 0 < free[0].positive < 1
    constrain_x_proj(model, kind)
    with pytest.raises(BadInputError, match="constrained already"):
        constrain_x_proj(model, kind)
    shares = {"positive": 1.0, "negative": 0.0, "mixed": 2 / 3}
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.1 * weight.grad
    for item in analyze_dynamics(model):
        assert item.positive == shares[kind] and item.regime == ("convergent" if kind == "negative" else "divergent")
    wanted = model(ids).logits
    written = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(written, model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))
    release_x_proj(model)
    assert torch.allclose(model(ids).logits, wanted)
    assert not any("parametrizations" in name for name in model.state_dict())
    with pytest.raises(BadInputError, match="No layer"):
        release_x_proj(model)


def test_falcon_mamba_is_read_and_constrained_too():
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 3, "pad_token_id": 0}
    model = FalconMambaForCausalLM(FalconMambaConfig(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    assert analyze_dynamics(constrain_x_proj(model, "negative"))[0].regime == "convergent"
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_models_and_settings_that_do_not_fit_are_refused():
    with pytest.raises(UnsupportedModelError, match="no selective"):
        analyze_dynamics(tiny_llama())
    for kind in ("sideways", "free"):
        with pytest.raises(BadInputError, match="dynamics are one of"):
            constrain_x_proj(tiny_mamba(), kind)
    with pytest.raises(BadInputError, match="dynamics are one of"):
        MambaDynamicsConfig(dynamics="sideways")
    with pytest.raises(BadInputError, match="as many channels"):
        MambaDynamicsConfig(hidden_size=4, state_size=9)


# -- the network -------------------------------------------------------------------------------------------------------
def network(dynamics="positive", seed=0):
    torch.manual_seed(seed)
    config = MambaDynamicsRecipe(layers=2, width=16, states=4, dynamics=dynamics).config()
    return MambaDynamicsForCausalLM(config).eval()


def test_a_free_network_is_transformers_mamba():
    model, ids = network("free"), torch.randint(3, 259, (2, 19))
    plain = MambaForCausalLM(
        MambaConfig(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"})
    ).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)


def test_a_constrained_network_is_a_mamba_with_the_rows_that_it_made(tmp_path):
    for kind, share in (("positive", 1.0), ("mixed", 0.5), ("negative", 0.0)):
        model, ids = network(kind), torch.randint(3, 259, (2, 9))
        plain = network("free")
        state = {k: v for k, v in model.state_dict().items() if "x_proj" not in k}
        for number, block in enumerate(model.backbone.layers):
            state[f"backbone.layers.{number}.mixer.x_proj.weight"] = block.mixer.x_proj.weight
        plain.load_state_dict(state)
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)
        assert all(item.positive == share for item in analyze_dynamics(model))
        model.save_pretrained(tmp_path / kind)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / kind).eval()
        assert torch.equal(again(ids).logits, model(ids).logits) and again.config.dynamics == kind


def test_sizes_of_tokens_are_those_of_the_hidden_states():
    model, ids = network(), torch.randint(3, 259, (1, 7))
    sizes, importance, loss = token_sizes(model, ids, 1)
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert sizes.shape == (3, 7) and importance.shape == (7,) and loss > 0
    assert torch.allclose(sizes[1], hidden[0][0].square().mean(-1).sqrt(), atol=1e-6)
    assert torch.allclose(sizes[0], model.backbone.embeddings(ids)[0].square().mean(-1).sqrt(), atol=1e-6)
    with pytest.raises(BadInputError, match="layers 0 to 1"):
        MambaDynamics(layer=2).observe(model, None, "abc")
    with pytest.raises(BadInputError):
        MambaDynamics(layer=-1)
    assert token_sizes(model, ids[:, :1])[2] is None


@pytest.mark.slow
def test_a_recipe_trains_and_keeps_the_constraint():
    recipe = MambaDynamicsRecipe(layers=1, width=16, states=4, steps=8, batch=4, length=16, dynamics="negative")
    model = recipe.begin(None)
    text = TextWindows("the cat sat on the mat. " * 40, held_share=0.2)
    curves = learn("mamba", model, recipe, text, None)
    assert curves["loss"][-1][1] < curves["loss"][0][1]
    figures = recipe.measure(model, text.held(2, 16))
    assert figures["% of positive eigenvalues"] == 0 and figures["bits per byte"] > 0
    assert len(recipe.pictures(model, curves, text.held(2, 16))) == 3
    with pytest.raises(BadInputError):
        MambaDynamicsRecipe(dynamics="sideways")


# -- reordering --------------------------------------------------------------------------------------------------------
SCORES = torch.tensor([0.2, 1.5, -0.3, 0.9])


def test_the_soft_matrix_by_hand():
    matrix = soft_sort(SCORES)
    assert torch.allclose(matrix[0], torch.tensor([0.137, 0.503, 0.083, 0.276]), atol=6e-4)
    assert torch.allclose(matrix.sum(-1), torch.ones(4)) and not torch.allclose(
        matrix.sum(-2), torch.ones(4), atol=0.01
    )
    hard = soft_sort(SCORES, hard=True)
    assert hard.argmax(-1).tolist() == [1, 3, 0, 2]
    assert torch.allclose(soft_sort(SCORES, tau=0.01), hard, atol=1e-4)
    assert torch.allclose(soft_sort(SCORES, power=2.0)[0], torch.softmax(-((SCORES - 1.5) ** 2), 0))


def test_the_hard_form_learns_like_the_soft_one():
    weights, found = torch.randn(4, 4), []
    for hard in (False, True):
        scores = SCORES.clone().requires_grad_()
        (soft_sort(scores, hard=hard) * weights).sum().backward()
        found.append(scores.grad)
    assert torch.allclose(*found, atol=1e-6)


def test_equal_scores_lose_no_token():
    assert soft_sort(torch.tensor([1.0, 2.0, 2.0, 1.0]), hard=True).argmax(-1).tolist() == [1, 2, 0, 3]


def test_tokens_come_least_important_first_and_go_back():
    torch.manual_seed(0)
    layer_, hidden, steps = TokenReorder(3, hard=True), torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    moved = layer_(hidden, steps)
    order = moved.scores.argsort(-1)
    assert torch.allclose(moved.hidden, hidden.gather(1, order[..., None].expand_as(hidden)))
    assert torch.allclose(moved.restore(moved.hidden), hidden, atol=1e-6)
    assert torch.equal(moved.ranks.gather(1, order), torch.arange(5).expand(2, -1))
    released = TokenReorder(3, hard=True, restore=False)
    output = torch.randn(2, 5, 3)
    assert torch.equal(released(hidden, steps).restore(output), output)
    soft = TokenReorder(3)(hidden, steps)
    assert torch.allclose(soft.restore(output), soft.matrix.transpose(1, 2) @ output)
    moved.hidden[:, -1].sum().backward()
    assert layer_.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_a_network_for_images_takes_an_order_and_learns_it():
    torch.manual_seed(0)
    model = PlainMamba.tiny()
    inputs = PlainMamba.inputs(model)
    before = model(**inputs).logits
    (item,) = reorder_layers(model, (1,), hard=True)
    assert "plainmamba.layers.1.mixer.ssm.reorder.weight" in dict(model.named_parameters())
    output = model(**inputs)
    assert not torch.equal(output.logits, before)
    output.loss.backward()
    assert item.weight.grad.abs().sum() > 0


def test_orders_that_would_show_the_future_are_refused():
    with pytest.raises(UnsupportedModelError, match="show it the future"):
        reorder_layers(tiny_mamba())
    with pytest.raises(UnsupportedModelError, match="show it the future"):
        reorder_layers(tiny_llama())
    with pytest.raises(UnsupportedModelError, match="no scan"):
        reorder_layers(torch.nn.Linear(2, 2))
    with pytest.raises(BadInputError, match="layers 0 to 1"):
        reorder_layers(PlainMamba.tiny(), (2,))
    for bad in ({"tau": 0.0}, {"power": -1.0}, {"channels": 0}):
        with pytest.raises(BadInputError):
            TokenReorder(**({"channels": 2} | bad))

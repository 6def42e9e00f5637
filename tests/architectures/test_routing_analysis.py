"""RoutingAnalysis on transformers' own mixtures of experts, as they are, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from everytoken.architectures.routing import RouterRecord, balance_loss, record_routing, router_z_loss, routers_of
from everytoken.architectures.routing_analysis import RoutingAnalysis, early_learning
from everytoken.architectures.routing_counts import PairCounts, explained_share, mutual_information
from everytoken.core.errors import BadInputError, UnknownNameError, UnsupportedModelError
from everytoken.testing.models import tiny_llama, tiny_tokenizer

SHARED = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "eos_token_id": None,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
DEEPSEEK = {"n_routed_experts": 4, "first_k_dense_replace": 1, "moe_intermediate_size": 8}
LATENT = DEEPSEEK | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
CLASSES = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 4}),
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 8}),
    "gpt-oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {"num_local_experts": 4, "layer_types": ["full_attention"] * 3},
    ),
    "deepseek-v2": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config,
        {"n_routed_experts": 4, "first_k_dense_replace": 1, "moe_intermediate_size": 8, "topk_method": "greedy"}
        | LATENT,
    ),
    "deepseek-v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 8,
            "n_group": 2,
            "topk_group": 1,
            "head_dim": 4,
        }
        | LATENT,
    ),
}


def tiny_moe(name, seed=0):
    kind, config, own = CLASSES[name]
    torch.manual_seed(seed)
    model = kind(config(**(SHARED | own))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.4)
    return model


TEXTS = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10], [2, 2, 3, 3, 4]]


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_as_it_is(name):
    """One text at a time or all in one padded batch: the same counts, and they are those of a loop."""
    model = tiny_moe(name)
    whole = RoutingAnalysis.from_model(model, TEXTS, bins=4, max_length=8)
    single = RoutingAnalysis.from_model(model, TEXTS, bins=4, max_length=8, batch_size=1)
    layers = 2 if name.startswith("deepseek") else 3
    assert len(whole.layers) == layers
    assert whole.load().shape == (layers, 4)
    for a, b in zip(whole.layers, single.layers, strict=True):
        assert np.array_equal(a.first.keys, b.first.keys)
        assert np.array_equal(a.first.counts, b.first.counts)
        assert np.array_equal(a.picked, b.picked)
        assert a.probability == pytest.approx(b.probability, abs=1e-4)
    pairs = [{} for _ in range(layers)]
    with torch.no_grad(), record_routing(model) as records:
        for text in TEXTS:
            records.clear()
            model(torch.tensor([text]))
            assert len(records) == layers
            for place, record in enumerate(records):
                assert record.state is None and record.kept.all()
                for token, scores, indices in zip(text, record.scores, record.indices, strict=True):
                    key = (token, int(indices[scores.argmax()]))
                    pairs[place][key] = pairs[place].get(key, 0) + 1
    for layer, expected in zip(whole.layers, pairs, strict=True):
        width = layer.first.width
        found = {
            (int(k) // width, int(k) % width): int(c) for k, c in zip(layer.first.keys, layer.first.counts, strict=True)
        }
        assert found == expected
    assert not whole.drop_rate()[:, :3].any()
    assert set(whole.figures()) >= {"specialisation by token id", "nats between layers"}


def test_the_records_are_what_transformers_records():
    model = tiny_moe("mixtral")
    model(torch.tensor([TEXTS[0]]), output_router_logits=True)  # transformers hooks itself in once and for all
    before = [len(part._forward_hooks) for part in routers_of(model).values()]
    with torch.no_grad(), record_routing(model) as records:
        output = model(torch.tensor([TEXTS[0]]), output_router_logits=True)
    for record, logits in zip(records, output.router_logits, strict=True):
        assert torch.equal(record.logits, logits)
    assert [len(part._forward_hooks) for part in routers_of(model).values()] == before


def test_models_without_routers_are_refused():
    with pytest.raises(UnsupportedModelError, match="no routers"):
        RoutingAnalysis.from_model(tiny_llama(), TEXTS)


# -- balance -----------------------------------------------------------------------------------------------------------
COMPLEMENTARY = (torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 0]]), torch.tensor([[0, 0, 2.0, 0], [0, 0, 0, 2]]))


def test_layers_unbalanced_in_opposite_ways_look_balanced_when_pooled():
    assert float(balance_loss(COMPLEMENTARY, 1, pooled=True)) == pytest.approx(1.0)
    for layer in COMPLEMENTARY:
        assert float(balance_loss([layer], 1)) == pytest.approx(1.6150, abs=5e-5)
    assert float(balance_loss(COMPLEMENTARY, 1)) == pytest.approx(1.6150, abs=5e-5)


def test_the_analysis_sees_the_same():
    records = []
    for layer, logits in enumerate(COMPLEMENTARY):
        scores, indices = logits.softmax(-1).topk(1)
        records.append(RouterRecord(str(layer), logits, scores, indices))
    analysis = RoutingAnalysis(bins=1, length=2)
    analysis.add(records, torch.tensor([[0, 1]]))
    assert analysis.balance().tolist() == pytest.approx([1.6150, 1.6150], abs=5e-5)
    assert analysis.balance(pooled=True).tolist() == pytest.approx([1.0])
    assert analysis.layer_information().tolist() == pytest.approx([math.log(2)])


def test_balance_at_uniform_probabilities_is_k():
    assert float(balance_loss([torch.zeros(5, 4)], 2)) == pytest.approx(2.0)


def test_the_pooled_loss_is_transformers_in_value_and_gradient():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    for given in (None, mask):
        ours = [torch.randn(8, 5, requires_grad=True) for _ in range(3)]
        theirs = [item.detach().clone().requires_grad_() for item in ours]
        first = balance_loss(ours, 2, given, pooled=True)
        second = load_balancing_loss_func(tuple(theirs), 5, 2, given)
        first.backward()
        second.backward()
        assert torch.allclose(first, second)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a.grad, b.grad, atol=1e-7)


@pytest.mark.parametrize(("experts", "value"), [(8, 4.3241), (16, 7.6872), (32, 12.0113)])
def test_the_z_loss_of_zero_logits(experts, value):
    assert float(router_z_loss([torch.zeros(3, experts)])) == pytest.approx(value, abs=5e-5)


def test_padding_does_not_count():
    torch.manual_seed(0)
    logits = torch.randn(6, 4)
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    real = logits[mask.reshape(-1).bool()]
    assert torch.allclose(balance_loss([logits], 2, mask), balance_loss([real], 2))
    assert torch.allclose(router_z_loss([logits], mask), router_z_loss([real]))
    assert float(balance_loss([logits], 2, torch.zeros(2, 3))) == 0


def test_bad_balance():
    with pytest.raises(BadInputError, match="at least one layer"):
        balance_loss([], 2)
    with pytest.raises(BadInputError, match="top_k"):
        balance_loss([torch.zeros(2, 4)], 5)
    with pytest.raises(BadInputError, match="mask"):
        balance_loss([torch.zeros(2, 4)], 2, torch.ones(1, 3))


# -- counts ------------------------------------------------------------------------------------------------------------
def counts(table):
    pairs = PairCounts(len(table[0]))
    for a, row in enumerate(table):
        for b, count in enumerate(row):
            pairs.add(np.full(count, a), np.full(count, b))
    return pairs


@pytest.mark.parametrize(
    ("table", "share"),
    [([[8, 0], [0, 8]], 1.0), ([[6, 2], [2, 6]], 0.18872), ([[6, 3], [4, 2]], 0.0), ([[3, 0], [2, 0]], 0.0)],
)
def test_explained_share(table, share):
    assert explained_share(np.array(table)) == pytest.approx(share, abs=5e-6)
    assert counts(table).explained() == pytest.approx(share, abs=5e-6)


def test_information_by_its_definition():
    table = np.array([[5, 1, 2], [0, 4, 3]])
    joint, rows, columns = table / 15, table.sum(1) / 15, table.sum(0) / 15
    expected = sum(
        joint[i, j] * math.log(joint[i, j] / rows[i] / columns[j]) for i in range(2) for j in range(3) if joint[i, j]
    )
    assert mutual_information(table) == pytest.approx(expected)


def test_a_shuffle_keeps_both_margins_and_loses_the_rest():
    pairs = counts([[400, 0], [0, 400]])
    mixed = pairs.shuffled(np.random.default_rng(0))
    assert mixed.table()[1].sum(0).tolist() == [400, 400]
    assert mixed.table()[1].sum(1).tolist() == [400, 400]
    assert mixed.explained() < 0.02 < pairs.explained()


def test_favourites_take_the_lower_of_equal_experts():
    pairs = counts([[1, 3, 3], [0, 0, 2]])
    assert pairs.favourites(2) == {0: (1, 2), 1: (2,)}
    assert pairs.occurrences() == {0: 7, 1: 2}


# -- questions ---------------------------------------------------------------------------------------------------------
def record(indices, scores=None, experts=4, name="0"):
    indices = torch.tensor(indices)
    logits = F.one_hot(indices[:, 0], experts).float() * 2
    return RouterRecord(name, logits, torch.ones(indices.shape) if scores is None else torch.tensor(scores), indices)


def test_drops_by_position_and_turn():
    """A row of padding on the left and one on the right; the last two positions of each lose something."""
    analysis = RoutingAnalysis(bins=3, length=3, domains=["a", "b"])
    ids = torch.tensor([[9, 1, 2, 3], [4, 5, 6, 9]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    kinds = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1]])
    scores = [[0.0, 0], [1, 1], [1, 0], [0, 0], [1, 1], [1, 1], [1, 0], [0, 0]]
    analysis.add([record([[0, 1]] * 8, scores)], ids, mask, kinds)
    assert analysis.drop_rate().tolist() == [[0.0, 0.25, 0.75]]
    assert analysis.drop_rate_by_domain() == {"a": 1 / 8, "b": 3 / 4}
    assert analysis.figures()["share of dropped choices"] == pytest.approx(4 / 12)


def test_positions_that_no_text_had_have_no_rate():
    analysis = RoutingAnalysis(bins=2, length=8)
    analysis.add([record([[0, 1]] * 2)], torch.tensor([[1, 2]]))
    assert math.isnan(analysis.drop_rate()[0, 1])


def test_the_first_choice_is_the_best_kept_one():
    """Routers may return their choices unsorted, and a capacity limit may take the best one."""
    given = RouterRecord(
        "0", torch.tensor([[1.0, 3, 2]] * 3), torch.tensor([[0.2, 0.6], [0.2, 0], [0, 0]]), torch.tensor([[2, 1]] * 3)
    )
    assert given.first().tolist() == [1, 2, 1]


def test_specialisation_by_each_variable():
    analysis = RoutingAnalysis(bins=2, length=4, domains=["x", "y"])
    ids = torch.tensor([[1, 2, 1, 2]] * 50)
    by_token = [[(item - 1) * 2, 3] for item in ids.reshape(-1).tolist()]
    analysis.add([record(by_token)], ids, None, torch.tensor([[0, 0, 1, 1]] * 50))
    token, position, domain = (analysis.specialisation(name)[0] for name in ("token", "position", "domain"))
    assert token.share == pytest.approx(1.0)
    assert token.shuffled < 0.1 < token.corrected
    assert position.share == domain.share == pytest.approx(0.0, abs=1e-12)
    assert analysis.experts() == [[1], [], [2], []]
    assert analysis.favourites(number=1)[2] == (2,)
    assert 0 < analysis.specialisation("token", "all")[0].share < 1


def test_early_learning_by_hand():
    """Of three ids one changes its favourite; each token's two experts are compared as sets."""
    ids = torch.tensor([[1, 2, 3]])
    runs = []
    for indices in ([[0, 1], [1, 2], [2, 3]], [[1, 0], [1, 3], [2, 3]]):
        analysis = RoutingAnalysis(bins=1, length=3)
        analysis.add([record(indices)], ids)
        runs.append(analysis)
    before, last = early_learning(runs)
    assert before.favourite == pytest.approx(2 / 3)
    assert before.overlap == pytest.approx((1 + 0.5 + 1) / 3)
    assert (last.favourite, last.overlap, last.ids) == (1.0, 1.0, 3)


def test_early_learning_over_checkpoints_of_a_model():
    runs = []
    for share in (0.0, 0.9, 1.0):
        model = tiny_moe("olmoe")
        for number, router in enumerate(routers_of(model).values()):
            torch.manual_seed(number)
            final = torch.randn_like(router.weight)
            router.weight.data.mul_(1 - share).add_(share * final)
        runs.append(RoutingAnalysis.from_model(model, TEXTS))
    found = [item.favourite for item in early_learning(runs)]
    assert found[0] < found[1] <= found[2] == 1


def test_bad_input():
    model, tokenizer = tiny_moe("mixtral"), tiny_tokenizer()
    for texts, message in (([], "at least one token"), ([[1], []], "Text 1 is empty"), (["abc"], "no token ids")):
        with pytest.raises(BadInputError, match=message):
            RoutingAnalysis.from_model(model, texts)
    assert RoutingAnalysis.from_model(model, ["abc", "d"], tokenizer).layers[0].tokens == 4
    with pytest.raises(BadInputError, match="1 domains for 2"):
        RoutingAnalysis.from_model(model, [[1], [2]], domains=["a"])
    with pytest.raises(BadInputError, match="1 labels for 2"):
        RoutingAnalysis.from_model(model, [[1, 2]], domains=[["a"]])
    with pytest.raises(BadInputError, match="Nothing was counted"):
        RoutingAnalysis().load()
    analysis = RoutingAnalysis.from_model(model, TEXTS)
    with pytest.raises(UnknownNameError, match="token"):
        analysis.specialisation("tokens")
    with pytest.raises(BadInputError, match="no domains"):
        analysis.specialisation("domain")
    with pytest.raises(BadInputError, match="tokens are asked for"):
        analysis.specialisation("position", "all")
    with pytest.raises(BadInputError, match="several forwards"):
        analysis.add([record([[0, 1]])], torch.tensor([[1]]))
    with pytest.raises(BadInputError, match="saw 1 tokens"):
        analysis.add([record([[0, 1]])], torch.tensor([[1, 2]]))
    with pytest.raises(BadInputError, match="bins"):
        RoutingAnalysis(bins=9, length=8)
    with pytest.raises(BadInputError, match="no checkpoints"):
        early_learning([])
    with pytest.raises(BadInputError, match="different texts"):
        early_learning([RoutingAnalysis.from_model(model, [[1, 2]]), analysis])
    with pytest.raises(BadInputError, match="different routers"):
        early_learning([RoutingAnalysis.from_model(tiny_moe("deepseek-v3"), TEXTS), analysis])
    with pytest.raises(BadInputError, match="occurs 99 times"):
        early_learning([analysis], minimum=99)

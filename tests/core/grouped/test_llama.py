"""The compiled forward of a Llama against transformers' forward of the same weights."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import UnsupportedModelError
from everytoken.core.grouped.linear import group_linears
from everytoken.core.grouped.llama import CHUNK, LlamaForward, lacks
from everytoken.core.grouped.weights import group_weight

from .conftest import small_llama

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def grouped(**settings):
    """A model with grouped weights, and one with their float32 values and transformers' own layers."""
    model = small_llama(**settings)
    group_linears(model)
    plain = small_llama(**settings)
    plain.load_state_dict(model.state_dict())
    return model, plain


def caches(model, room):
    config = model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads, room, config.head_dim)
    return torch.zeros(shape), torch.zeros(shape)


@pytest.mark.parametrize(
    "settings",
    [{}, {"tied": True}, {"heads": 4, "kv_heads": 4}, {"heads": 8, "kv_heads": 1}, {"rope_parameters": LLAMA3}],
    ids=["grouped queries", "tied", "full attention", "one key head", "llama3"],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_logits_and_states_are_transformers(settings, threads):
    model, plain = grouped(**settings)
    ids = torch.randint(0, 24, (CHUNK + 9,))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        logits, states = model._lean(ids, torch.arange(len(ids)), *caches(model, len(ids)), 0, wanted=len(ids))
    finally:
        torch.set_num_threads(before)
    with torch.no_grad():
        expected = plain(ids[None], output_hidden_states=True)
    assert torch.allclose(logits, expected.logits[0], atol=5e-3)
    for ours, theirs in zip(states, expected.hidden_states, strict=True):
        assert torch.allclose(ours, theirs[0], atol=5e-3)


def test_one_by_one_and_together_are_the_same_bits():
    model, _ = grouped()
    ids, room = torch.randint(0, 24, (CHUNK + 13,)), CHUNK + 13
    together, _ = model._lean(ids, torch.arange(room), *caches(model, room), 0, wanted=room)
    keys, values = caches(model, room)
    single = [model._lean(ids[i : i + 1], torch.tensor([i]), keys, values, i)[0] for i in range(room)]
    assert torch.equal(torch.cat(single), together)
    last, _ = model._lean(ids, torch.arange(room), *caches(model, room), 0, wanted=3)
    assert torch.equal(last, together[-3:])


def test_each_node_of_a_tree_sees_its_path_alone():
    model, _ = grouped()
    start, paths = [1, 2, 3], [[4, 5], [4, 6], [7]]
    keys, values = caches(model, 16)
    model._lean(torch.tensor(start), torch.arange(3), keys, values, 0)
    allowed = torch.eye(4, dtype=torch.bool)  # nodes 4, 5, 6, 7; the two after 4 are its children
    allowed[1, 0] = allowed[2, 0] = True
    logits, _ = model._lean(torch.tensor([4, 5, 6, 7]), torch.tensor([3, 4, 4, 3]), keys, values, 3, allowed, 4)
    for path, node in zip(paths, (1, 2, 3), strict=True):
        text = torch.tensor(start + path)
        alone, _ = model._lean(text, torch.arange(len(text)), *caches(model, 16), 0)
        assert torch.equal(alone[0], logits[node])


def test_models_of_another_kind_have_none():
    assert lacks(small_llama()) is None
    assert "biases" in lacks(small_llama(attention_bias=True))
    assert "gelu" in lacks(small_llama(hidden_act="gelu"))
    assert "multiples" in lacks(small_llama(vocab=23))
    assert "dynamic" in lacks(small_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}))
    assert "Linear" in lacks(torch.nn.Linear(2, 2))
    odd = small_llama(vocab=23)
    group_linears(odd)
    assert not hasattr(odd, "_lean")
    with pytest.raises(UnsupportedModelError, match="no compiled forward"):
        LlamaForward(odd, {name: group_weight(item.weight) for name, item in odd.named_modules() if name == "lm_head"})

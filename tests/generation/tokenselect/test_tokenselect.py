"""TokenSelect: the definition by brute force, equality with full attention, needles, reuse, extrapolation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.generation.tokenselect import (
    Rotation,
    TokenSelect,
    TokenSelectCache,
    TokenSelectLayer,
    find_rotary,
    select,
    votes,
)

from ...conftest import tiny_llama

PROMPT = torch.randint(1, 13, (1, 60), generator=torch.Generator().manual_seed(0))


def rotation_of(model):
    import transformers.models.llama.modeling_llama as llama

    return Rotation(find_rotary(model), llama.apply_rotary_pos_emb)


# -- the definition ----------------------------------------------------------------------------------------------------
@given(seed=st.integers(0, 1000), heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]), count=st.integers(1, 60))
def test_votes_sum_to_the_number_of_heads(seed, heads, count):
    torch.manual_seed(seed)
    query, keys = torch.randn(heads[0], 8), torch.randn(heads[1], count, 8)
    assert votes(query, keys).sum() == pytest.approx(heads[0], rel=1e-4)


@given(seed=st.integers(0, 1000), top_k=st.integers(1, 20), n_init=st.integers(0, 5), n_local=st.integers(1, 9))
def test_selection_is_the_brute_force_top_k(seed, top_k, n_init, n_local):
    torch.manual_seed(seed)
    model = tiny_llama(13)
    rotation = rotation_of(model)
    length = top_k + n_init + n_local + 1 + seed % 30
    query, keys = torch.randn(4, 4), torch.randn(2, length, 4)
    settings = TokenSelect(top_k=top_k, n_init=n_init, n_local=n_local, chunk_size=1)
    chosen = select(settings, query, keys, rotation)
    total = np.zeros(length)
    for head in range(4):
        turned = rotation(query[None, head : head + 1, None], n_local)[0, 0, 0]
        scores = np.array([float(turned @ keys[head // 2, i]) for i in range(n_init, length - n_local)])
        weights = np.exp(scores - scores.max())
        total[n_init : length - n_local] += weights / weights.sum()
    expected = sorted(np.argsort(-total, kind="stable")[:top_k].tolist())
    assert chosen.tolist() == sorted(chosen.tolist())
    # tokens on the edge may tie by rounding: what is chosen must vote at least as much as what is left out
    assert total[chosen.numpy()].min() >= total[expected].min() * (1 - 1e-4) - 1e-12
    assert len(set(chosen.tolist())) == top_k


def test_permuting_heads_leaves_votes_unchanged():
    torch.manual_seed(0)
    query, keys = torch.randn(6, 8), torch.randn(6, 40, 8)
    order = torch.randperm(6)
    assert torch.allclose(votes(query, keys), votes(query[order], keys[order]), atol=1e-6)


def test_pooling_takes_the_largest_neighbour():
    torch.manual_seed(0)
    query, keys = torch.randn(4, 8), torch.randn(2, 30, 8)
    plain, pooled = votes(query, keys), votes(query, keys, 3)
    for i in range(30):
        assert pooled[i] == plain[max(i - 1, 0) : i + 2].max()


@given(seed=st.integers(0, 200), needle=st.integers(4, 80))
def test_a_planted_key_is_always_selected(seed, needle):
    torch.manual_seed(seed)
    model = tiny_llama(13)
    rotation = rotation_of(model)
    settings = TokenSelect(top_k=1, n_init=4, n_local=8, chunk_size=8)
    query, keys = torch.randn(4, 4), torch.randn(2, 100, 4)
    turned = rotation(query[None, :, None], settings.n_local)[0, :, 0]
    keys[:, needle] = 30 * turned.view(2, 2, 4).sum(1)
    if (turned.view(2, 2, 4).sum(1, keepdim=True) * turned.view(2, 2, 4)).sum(-1).min() > 1:  # it looks at every head
        assert select(settings, query, keys, rotation).tolist() == [needle]


def test_a_chunk_asks_by_the_mean_of_its_rotated_queries():
    """Query t is rotated to ``n_local + t`` before the mean is taken, as in the official code."""
    torch.manual_seed(0)
    rotation = rotation_of(tiny_llama(13))
    settings = TokenSelect(top_k=3, n_init=2, n_local=6, chunk_size=5)
    queries, keys = torch.randn(4, 5, 4), torch.randn(2, 40, 4)
    asked = torch.stack([rotation(queries[None, :, t : t + 1], 6 + t)[0, :, 0] for t in range(5)]).mean(0)
    expected = votes(asked, keys[:, 2:34]).topk(3).indices.sort().values + 2
    assert select(settings, queries, keys, rotation).tolist() == expected.tolist()
    averaged_first = select(settings, queries.mean(1), keys, rotation)
    assert averaged_first.tolist() != expected.tolist()


# -- against full attention --------------------------------------------------------------------------------------------
def logits_of(model, decoder, prompt, new=6, **kwargs):
    output = model.generate(
        prompt, max_new_tokens=new, do_sample=False, custom_generate=decoder, return_dict_in_generate=True,
        output_logits=True, **{"attention_mask": torch.ones_like(prompt)} | kwargs,
    )  # fmt: skip
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_a_selection_of_everything_is_full_attention(attention, chunk):
    model = tiny_llama(13, seed=1, layers=3)
    model.set_attn_implementation(attention)
    decoder = TokenSelect(top_k=0, n_init=0, n_local=100, chunk_size=chunk, score_dtype="float32")
    ours, theirs = logits_of(model, decoder, PROMPT), logits_of(model, None, PROMPT)
    assert ours[0].tolist() == theirs[0].tolist()
    assert torch.allclose(ours[1], theirs[1], atol=1e-4)
    assert model.config._attn_implementation == attention


def test_full_attention_when_the_top_k_covers_all_candidates():
    """Just above the budget the selection path runs; with a top-k that leaves out one candidate only, little
    changes."""
    model = tiny_llama(13, seed=1, layers=3)
    decoder = TokenSelect(top_k=59, n_init=1, n_local=5, chunk_size=5, score_dtype="float32", trace_enabled=True)
    ours, theirs = logits_of(model, decoder, PROMPT, new=2), logits_of(model, None, PROMPT, new=2)
    assert torch.allclose(ours[1], theirs[1], atol=1e-4)  # 60 + 1 tokens fit
    assert decoder.attended == decoder.available


def test_a_step_attends_to_the_definitions_tokens_with_positions_in_order():
    """One decoding step by hand: un-rotated keys, votes, the selection rotated to 0 .. M-1."""
    model = tiny_llama(13, seed=1, layers=1)
    decoder = TokenSelect(top_k=6, n_init=2, n_local=4, chunk_size=4, score_dtype="float32")
    cache = decoder.new_cache(model)
    logits_of(model, decoder, PROMPT, new=1, past_key_values=cache)
    layer, attention = cache.layers[0], model.model.layers[0].self_attn
    token = torch.tensor([[5]])
    with decoder.attention(model), torch.no_grad():
        seen = {}
        attention.o_proj.register_forward_pre_hook(lambda _m, args: seen.setdefault("output", args[0]))
        attention.q_proj.register_forward_hook(lambda _m, _a, out: seen.setdefault("query", out))
        model(token, past_key_values=cache, use_cache=True)
    rotation = rotation_of(model)
    query = seen["query"].view(1, 1, 4, 4).transpose(1, 2)
    length = layer.keys.shape[2]
    chosen = select(decoder, query[0, :, 0], layer.keys[0], rotation)
    kept = torch.cat([torch.arange(2), chosen, torch.arange(length - 4, length)])
    keys, values = rotation(layer.keys[:, :, kept]), layer.values[:, :, kept]
    turned = rotation(query, len(kept) - 1)
    keys, values = keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)
    weights = torch.softmax(turned @ keys.transpose(-1, -2) * attention.scaling, -1)
    assert torch.allclose((weights @ values)[0, :, 0].flatten(), seen["output"].flatten(), atol=1e-5)


@pytest.mark.parametrize(("tau", "share"), [(1.1, 0.0), (-1.1, 1.0), (None, 0.0)])
def test_selections_are_reused_by_similarity(tau, share):
    model = tiny_llama(13, seed=1, layers=2)
    decoder = TokenSelect(top_k=4, n_init=2, n_local=8, chunk_size=8, tau=tau)
    logits_of(model, decoder, PROMPT, new=10)
    first = 2  # the first selection of a layer has nothing to reuse
    reusable = decoder.stats.proposed - first
    assert decoder.stats.accepted == round(share * reusable)


def test_padding_is_never_attended_to():
    model = tiny_llama(97, seed=1, layers=3)
    decoder = TokenSelect(top_k=6, n_init=2, n_local=4, chunk_size=1, score_dtype="float32")
    prompt = torch.randperm(90, generator=torch.Generator().manual_seed(0))[
        None
    ]  # equal tokens have equal keys, and tie
    alone = logits_of(model, decoder, prompt[:, :31])
    padded = torch.cat([torch.full((1, 9), 12), prompt[:, :31]], 1)
    mask = torch.cat([torch.zeros(1, 9, dtype=torch.long), torch.ones(1, 31, dtype=torch.long)], 1)
    both = torch.cat([padded, prompt[:, :40]])
    masks = torch.cat([mask, torch.ones(1, 40, dtype=torch.long)])
    together = logits_of(model, decoder, both, attention_mask=masks)
    assert torch.allclose(together[1][:, 0], alone[1][:, 0], atol=1e-4)


def test_sliding_layers_are_left_alone():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=13, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=2, eos_token_id=None,
            bos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    assert len(set(model.config.layer_types)) == 2
    decoder = TokenSelect(top_k=0, n_init=0, n_local=200, chunk_size=16)
    ours, theirs = logits_of(model, decoder, PROMPT), logits_of(model, None, PROMPT)
    assert torch.allclose(ours[1], theirs[1], atol=1e-4)


def test_texts_beyond_the_trained_length():
    """Positions never pass the budget: a text of many times the context is read, and rotations stay inside it."""
    model = tiny_llama(13, seed=1)
    model.config.max_position_embeddings = 16
    decoder = TokenSelect(top_k=6, n_init=2, n_local=4, chunk_size=4)
    seen = []
    original = Rotation.__call__

    def spy(self, x, start=0):
        seen.append(start + x.shape[-2])
        return original(self, x, start)

    Rotation.__call__ = spy
    try:
        logits_of(model, decoder, PROMPT.repeat(1, 4))
    finally:
        Rotation.__call__ = original
    assert max(seen) == decoder.budget


# -- the cache ---------------------------------------------------------------------------------------------------------
@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=6), crop=st.integers(0, 5))
def test_buffers_hold_what_was_put_in(sizes, crop):
    layer, whole = TokenSelectLayer(torch.bfloat16), []
    for size in sizes:
        part = torch.randn(2, 3, size, 4), torch.randn(2, 3, size, 4)
        whole.append(part)
        keys, values = layer.update(*part)
    assert torch.equal(keys, torch.cat([key for key, _ in whole], 2))
    assert torch.equal(values, torch.cat([value for _, value in whole], 2))
    assert torch.equal(layer.score_keys, keys.bfloat16())
    crop = min(crop, sum(sizes) - 1)
    layer.crop(-crop)
    assert layer.get_seq_length() == sum(sizes) - crop
    layer.update(torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 4))
    assert layer.keys[:, :, -1].eq(1).all()
    assert torch.equal(layer.keys[:, :, :-1], keys[:, :, : sum(sizes) - crop])
    layer.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.keys[0], layer.keys[1])
    layer.update(torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 4))
    assert torch.equal(layer.score_keys, layer.keys.bfloat16())
    layer.reset()
    assert layer.get_seq_length() == 0


def test_the_trace_counts_reads():
    model = tiny_llama(13, seed=1, layers=2)
    decoder = TokenSelect(top_k=4, n_init=2, n_local=3, chunk_size=3, trace_enabled=True)
    sequences, _ = logits_of(model, decoder, PROMPT, new=8)
    trace = decoder.trace[0]
    assert trace.ids == sequences[0].tolist()
    reads = trace.columns["reads"]
    assert reads[:2] == [1.0, 1.0]  # always kept
    assert reads[-1] is None  # never fed
    assert sum(value is not None for value in reads) == 67
    assert all(0 <= value <= 1 for value in reads[:-1])
    steps = 7 * 2
    assert decoder.attended == 9 * steps
    # what was attended is what the trace counts, up to the newest tokens, which could be read by fewer steps
    total = sum(value * 7 * 2 for value in reads[:60]) + sum(
        value * (67 - place) * 2 for place, value in enumerate(reads[60:67], 60)
    )
    assert total == pytest.approx(decoder.attended, rel=0.02)


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": -1}, "top_k >= 0"),
        ({"n_local": 0}, "n_local >= 1"),
        ({"chunk_size": 600}, "does not fit the local window"),
        ({"pool_size": 2}, "odd"),
        ({"score_dtype": "int4"}, "Unknown score_dtype"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(BadInputError, match=words):
        TokenSelect(**settings)


def test_a_filled_cache_of_another_kind_is_refused():
    model = tiny_llama(13)
    first = model.generate(PROMPT, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    with pytest.raises(BadInputError, match=r"decoder\.new_cache"):
        model.generate(
            first.sequences, past_key_values=first.past_key_values, max_new_tokens=2, custom_generate=TokenSelect()
        )


def test_models_without_rotary_embeddings_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=13, n_embd=8, n_layer=2, n_head=2, n_positions=128))
    with pytest.raises(UnsupportedModelError, match="0 rotary embeddings"):
        model.generate(PROMPT, max_new_tokens=2, custom_generate=TokenSelect())


def test_partial_and_interleaved_rotations():
    """Rotations of other models go through their own function, in full or in part."""
    from transformers import CohereConfig, CohereForCausalLM, GlmConfig, GlmForCausalLM

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=13, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    for model in (CohereForCausalLM(CohereConfig(**sizes)), GlmForCausalLM(GlmConfig(**sizes, head_dim=4))):
        decoder = TokenSelect(top_k=0, n_init=0, n_local=100, chunk_size=16)
        ours, theirs = logits_of(model.eval(), decoder, PROMPT), logits_of(model, None, PROMPT)
        assert torch.allclose(ours[1], theirs[1], atol=1e-4)
    assert isinstance(decoder.new_cache(model), TokenSelectCache)

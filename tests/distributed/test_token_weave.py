"""Woven forwards against transformers' own, the order of the lanes, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import (
    DynamicCache,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.distributed.sharding import check_world, divides_heads
from everytoken.distributed.texts import lower_right, pieces_of
from everytoken.distributed.token_weave import Request, TokenWeave, weave

from .ranks import ids_of, llama

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip


def made(kind, config, **settings):
    torch.manual_seed(0)
    return kind(config(**SIZES | settings)).eval()


def far(ours, theirs):
    return (ours - theirs).abs().max().item() / theirs.abs().max().item()


@pytest.mark.parametrize(
    ("kind", "config", "settings"),
    [(Qwen2ForCausalLM, Qwen2Config, {}), (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
     (MistralForCausalLM, MistralConfig, {"sliding_window": None}), (GemmaForCausalLM, GemmaConfig, {"head_dim": 8})],
)  # fmt: skip
@torch.no_grad()
def test_models_that_are_llama_like(kind, config, settings):
    model, ids = made(kind, config, **settings), ids_of(2, 9)
    wanted = model(ids).logits
    woven = weave(model, first=4)
    assert far(model(ids).logits, wanted) < 2e-6
    woven.remove()
    assert torch.equal(model(ids).logits, wanted)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_cuts_of_a_padded_batch(attention):
    model = llama(12, 4, attn_implementation=attention)
    ids, mask = ids_of(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    wanted, padded = model(ids).logits, model(ids, attention_mask=mask).logits
    woven = weave(model)
    for first in (1, 4, 8, 9, 10, 13, 17):
        woven.settings = TokenWeave(first=first)
        assert far(model(ids).logits, wanted) < 2e-6
        assert far(model(ids, attention_mask=mask).logits[mask.bool()], padded[mask.bool()]) < 2e-6
    assert woven.steps.woven == woven.steps.forwards == 14
    for schedule in ("fused", "plain"):
        woven.settings = TokenWeave(schedule)
        assert far(model(ids).logits, wanted) < 2e-6
    assert woven.steps.woven == 14


@torch.no_grad()
def test_generation_with_a_cache_is_the_same():
    model, ids, mask = llama(12, 4), ids_of(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(ids, **asked)
    woven = weave(model, first=2)
    assert torch.equal(model.generate(ids, **asked), wanted)
    assert woven.steps.woven == 8  # single tokens of three rows are cut too
    cache = DynamicCache()
    first = model(ids[:, :4], past_key_values=cache).logits
    second = model(ids[:, 4:], past_key_values=cache).logits
    woven.remove()
    assert far(torch.cat([first, second], 1), model(ids).logits) < 2e-6
    assert cache.get_seq_length() == 7


@torch.no_grad()
def test_prompts_and_single_tokens_in_one_step():
    model = llama(12, 4)
    before, new = (5, 9, 0), (6, 1, 4)
    texts = [ids_of(1, b + n, seed)[0] for seed, (b, n) in enumerate(zip(before, new, strict=True))]
    wanted = [model(text[None]).logits[0, -n:] for text, n in zip(texts, new, strict=True)]
    woven = weave(model)
    for first in (1, 5, 6, 7, 10):
        woven.settings = TokenWeave(first=first)
        caches = [DynamicCache() for _ in texts]
        read = [Request(t[:b], c) for t, b, c in zip(texts, before, caches, strict=True) if b]
        woven.step(read)
        found = woven.step([Request(t[b:], c) for t, b, c in zip(texts, before, caches, strict=True)])
        for ours, theirs in zip(found, wanted, strict=True):
            assert far(ours, theirs) < 2e-6
        assert [cache.get_seq_length() for cache in caches] == [11, 10, 4]


@torch.no_grad()
def test_the_order_of_the_lanes():
    """In every stage one part computes while the result of the other travels; a result travels once it is there."""
    model = llama(12, 12)
    woven = weave(model, first=4)
    woven.log = []
    model(ids_of(1, 9))
    one, two = "attention 0.1", "attention 0.2"
    assert woven.log[:5] == [
        ("compute", one), ("communication", f"exchange of {one}"), ("compute", two),
        ("communication", f"exchange of {two}"), ("compute", "mlp 0.1"),
    ]  # fmt: skip
    assert woven.log[7:9] == [("communication", "exchange of mlp 0.2"), ("compute", "attention 1.1")]
    assert woven.log[-1] == ("communication", "exchange of mlp 1.2")
    assert len(woven.log) == 2 * 4 * 2
    done = [what for lane, what in woven.log if lane == "compute"]
    for place, (lane, what) in enumerate(woven.log):
        if lane == "communication":
            assert what.removeprefix("exchange of ") in done[: sum(x == "compute" for x, _ in woven.log[:place])]


@torch.no_grad()
def test_a_group_of_one_rank():
    """Collectives and DTensor's shards, within this process: what one GPU runs under NCCL."""
    ids = ids_of(2, 9)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = llama(12, 4)
        wanted = model(ids).logits
        woven = weave(model, init_device_mesh("cpu", (1,)), first=4)
        assert type(model.model.layers[0].mlp.down_proj.weight) is DTensor
        assert far(model(ids).logits, wanted) < 2e-6
        woven.settings = TokenWeave("plain")
        assert far(model(ids).logits, wanted) < 2e-6
        woven.remove()
        with pytest.raises(UnsupportedModelError, match=r"cannot be sharded|hooks"):
            weave(model)
    finally:
        dist.destroy_process_group()


def test_stretches_as_rectangles():
    for rows, width in ((1, 5), (3, 4), (4, 1)):
        for first in range(rows * width):
            for last in range(first + 1, rows * width + 1):
                seen = [
                    row * width + column
                    for row, end, begin, stop in pieces_of(first, last, width)
                    for row in range(row, end)
                    for column in range(begin, stop)
                ]
                assert seen == list(range(first, last))
    assert lower_right(1, 5, torch.device("cpu")) is None and lower_right(4, 4, torch.device("cpu")) is None
    assert lower_right(2, 4, torch.device("cpu"))[0, 0].tolist() == [[True, True, True, False], [True] * 4]


@pytest.mark.parametrize(
    ("kind", "config", "settings", "words"),
    [(GPT2LMHeadModel, GPT2Config, {}, "has no embed_tokens"), (Phi3ForCausalLM, Phi3Config, {}, "Layer 0 of Phi3"),
     (MistralForCausalLM, MistralConfig, {"sliding_window": 8}, "sliding window"),
     (GraniteForCausalLM, GraniteConfig, {"residual_multiplier": 0.2}, "computes something else"),
     (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}, "changes its logits"),
     (Qwen2ForCausalLM, Qwen2Config, {"attn_implementation": "flex_attention"}, "sdpa or eager")],
)  # fmt: skip
def test_models_that_are_refused(kind, config, settings, words):
    model = made(kind, config, **settings)
    with pytest.raises(UnsupportedModelError, match=words):
        weave(model)
    assert "forward" not in vars(getattr(model, "model", model))


def test_weights_hooks_and_second_weavings_are_refused():
    class Packed(nn.Linear):
        pass

    model = llama()
    model.model.layers[1].mlp.up_proj = Packed(48, 96, bias=False)
    with pytest.raises(UnsupportedModelError, match=r"Layer 1 .*up_proj is Packed .*cannot be sharded"):
        weave(model)
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(torch.zeros(48, 48, dtype=torch.int8), False)
    with pytest.raises(UnsupportedModelError, match="quantisation"):
        weave(model)
    model = llama()
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"hooks on layers\.0"):
        weave(model)
    hook.remove()
    weave(model)
    with pytest.raises(BadInputError, match="woven already"):
        weave(model)


def test_calls_that_are_refused():
    model, ids = llama(12, 4), ids_of(1, 6)
    woven = weave(model, first=2)
    for arguments, words in (
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, r"\[B, keys\]"),
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, r"\(1, 6\); got \(1, 3\)"),
    ):
        with pytest.raises(BadInputError, match=words):
            model(ids, **arguments)
    with pytest.raises(UnsupportedModelError, match="StaticCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=8))
    with pytest.raises(BadInputError, match="inference"):
        model.train()(ids)
    model.eval()
    with pytest.raises(BadInputError, match="one token or more"):
        woven.step([])
    cache = DynamicCache()
    with pytest.raises(BadInputError, match="share a cache"):
        woven.step([Request(ids[0], cache), Request(ids[0], cache)])
    other = DynamicCache()
    llama(12, 12)(ids, past_key_values=other)
    with pytest.raises(BadInputError, match="12 key heads, a rank has 4"):
        model(ids, past_key_values=other)


def test_settings_and_ranks_that_are_refused():
    for settings, words in (
        ({"schedule": "sideways"}, "woven or fused or plain"),
        ({"table": "gpt"}, "offset table"),
        ({"minimum": 1}, "minimum"),
        ({"minimum": 100}, "100 tokens would be cut"),
        ({"first": 0}, "after one token"),
        ({"first": 3, "table": "llama-3.3-70b-w8"}, "one of table"),
    ):
        with pytest.raises(BadInputError, match=words):
            TokenWeave(**settings)
    config = llama(9, 3, hidden=54).config
    assert divides_heads(config, 3) and not divides_heads(config, 2)
    check_world(config, 2)
    with pytest.raises(BadInputError, match=r"5 ranks do not divide the MLP's width of 96") as refused:
        check_world(config, 5)
    assert "2, 3, 4, 6" in refused.value.hint
    plan = TokenWeave(first=5)
    assert plan.plan(5).woven is False and plan.plan(6).first == 5
    assert TokenWeave(cost=lambda _tokens: lambda first, _second: abs(first - 384)).plan(2000).first == 384
    assert TokenWeave(offsets={1024: 128}).plan(1024).first == 640

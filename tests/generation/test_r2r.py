"""R2R: both ends of the threshold, catching up, counters, routers."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import BadInputError, TokenizerMismatchError
from everytoken.generation.r2r import (
    R2R,
    AleatoricRouter,
    DraftWriter,
    EntropyRouter,
    LearnedRouter,
    Writer,
    as_router,
)
from everytoken.generation.routing import load_router
from everytoken.generation.routing.configuration_token_router import TokenRouterConfig
from everytoken.generation.routing.modeling_token_router import TokenRouter, top_logits

from ..conftest import tiny_llama

PROMPT = torch.tensor([[3, 5, 8, 2]])


def models():
    return tiny_llama(13, seed=1, layers=3, hidden=32), tiny_llama(13, seed=7)


def run(model, decoder, **kwargs):
    kwargs = {"do_sample": False, "max_new_tokens": 20, "attention_mask": torch.ones_like(PROMPT)} | kwargs
    return model.generate(PROMPT, custom_generate=decoder, **kwargs)


class Coin:
    """A router that calls the large model at chosen steps."""

    threshold = 0.5

    def __init__(self, steps):
        self.steps, self.step = steps, 0

    def __call__(self, hidden, embedding, logits):
        self.step += 1
        return torch.tensor([float(self.step in self.steps)])


# -- decoding ----------------------------------------------------------------------------------------------------------
def test_threshold_zero_is_the_large_model_and_above_one_the_small():
    large, small = models()
    router = LearnedRouter(TokenRouter(TokenRouterConfig(16, 16, 13, 8, 1)))
    assert run(large, R2R(small, router, threshold=0.0)).tolist() == run(large, None).tolist()
    decoder = R2R(small, router, threshold=1.01)
    assert run(large, decoder).tolist() == run(small, None).tolist()
    assert decoder.stats.target_forwards == 0
    assert decoder.large_share == 0


@pytest.mark.parametrize("steps", [{1}, {4, 5, 11}, {2, 20}, set(range(1, 30, 2))], ids=str)
def test_the_large_model_writes_what_a_fresh_forward_would(steps):
    large, small = models()
    decoder = R2R(small, Coin(steps), trace_enabled=True)
    output = run(large, decoder, return_dict_in_generate=True, output_logits=True)
    text = output.sequences[0].tolist()
    sources = decoder.trace[0].columns["source"]
    for place, source in enumerate(sources):
        before = torch.tensor([text[: 4 + place]])
        fresh = (large if source == "large" else small)(before).logits[0, -1]
        assert torch.allclose(output.logits[place][0], fresh, atol=1e-4)
        assert text[4 + place] == int(fresh.argmax())
    assert [place + 1 for place, source in enumerate(sources) if source == "large"] == sorted(
        s for s in steps if s <= 20
    )


def test_the_cache_after_catching_up_equals_a_fresh_one():
    large, small = models()
    output = run(large, R2R(small, Coin({3, 9, 20})), return_dict_in_generate=True)
    cache = output.past_key_values
    with torch.no_grad():
        fresh = large(output.sequences[:, : cache.get_seq_length()].clone(), use_cache=True).past_key_values
    assert cache.get_seq_length() == 4 + 19
    for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
        assert torch.allclose(ours.keys, theirs.keys, atol=1e-4)
        assert torch.allclose(ours.values, theirs.values, atol=1e-4)


def test_counters_agree_with_the_trace():
    large, small = models()
    decoder = R2R(small, EntropyRouter(), threshold=1.0, trace_enabled=True)
    run(large, decoder)
    sources = decoder.trace[0].columns["source"]
    assert 0 < sources.count("large") < 20
    assert decoder.large_share == pytest.approx(sources.count("large") / 20)
    assert decoder.stats.target_forwards == sources.count("large")
    assert decoder.stats.draft_forwards == decoder.stats.proposed == 20
    values = decoder.trace[0].columns["divergence"]
    assert all((value >= 1.0) == (source == "large") for value, source in zip(values, sources, strict=True))
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in (small, large)]
    share = decoder.large_share
    mean = (1 - share) * sizes[0] + share * sizes[1]
    assert decoder.figures()["parameters a token, M"] == pytest.approx(mean / 1e6)


def test_a_feature_draft_as_the_small_model(embedded):
    from everytoken.generation.speculative import load_draft

    model, tokenizer = embedded
    ids = tokenizer("The sky is blue because", return_tensors="pt")
    arguments = dict(**ids, max_new_tokens=16, do_sample=False)
    expected = model.generate(**arguments)
    draft = load_draft(model)
    assert model.generate(**arguments, custom_generate=R2R(draft, threshold=0.0)).tolist() == expected.tolist()
    decoder = R2R(draft, threshold=3.0, trace_enabled=True)
    output = model.generate(**arguments, custom_generate=decoder)
    sources = decoder.trace[0].columns["source"]
    assert sources[0] == "large"  # the draft reads the large model's states, so that one begins
    assert sources.count("small") > 0
    text, start = output[0].tolist(), ids["input_ids"].shape[1]
    for place, source in enumerate(sources):
        if source == "large":
            assert text[start + place] == int(model(torch.tensor([text[: start + place]])).logits[0, -1].argmax())
    assert decoder.stats.target_forwards == sources.count("large")


def test_a_feature_drafts_chain_equals_its_own_pass(embedded):
    """After the large model's turn the draft sees true features everywhere, as in one pass over the text."""
    from everytoken.generation.routing.labels import read_answer
    from everytoken.generation.speculative import load_draft

    model, tokenizer = embedded
    draft = load_draft(model)
    text = tokenizer("The sky is blue because the air")["input_ids"]
    with torch.inference_mode():
        writer = DraftWriter(draft, model, 49152)
        from transformers import DynamicCache

        cache = DynamicCache()
        model(torch.tensor([text[:3]]), past_key_values=cache, use_cache=True)
        writer.caught_up(text[:3], text[3])
        writer.step(text[:4])
        writer.step(text[:5])  # two tokens of its own ...
        model(torch.tensor([text[3:5]]), past_key_values=cache, use_cache=True)
        writer.caught_up(text[:5], text[5])  # ... which the large model then reads
        hidden, logits = writer.step(text[:6])
        writer.close()
    states, whole = read_answer(draft, model, text[:5], text[5:7], 49152)
    assert torch.allclose(hidden, states[1], atol=1e-3)
    kept = whole[1] > -1e30
    assert torch.allclose(logits[kept], whole[1][kept], atol=1e-2)


# -- routers -----------------------------------------------------------------------------------------------------------
def test_entropy_and_aleatoric_values():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]])
    assert EntropyRouter()(logits, logits, logits).tolist() == pytest.approx([1.3863, 0.0], abs=1e-3)
    alpha = torch.tensor([3.0, 1.0, 1e-6])  # the official code's evidence: the largest logits themselves
    total = alpha.sum()
    expected = -(alpha / total * (torch.digamma(alpha + 1) - torch.digamma(total + 1))).sum()
    value = AleatoricRouter(top_k=3)(logits[:1], logits[:1], torch.tensor([[3.0, 1.0, -2.0, -5.0]]))
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    draws = torch.distributions.Dirichlet(alpha).sample((20000,))
    assert value.item() == pytest.approx(float(-(draws * draws.clamp(min=1e-12).log()).sum(-1).mean()), abs=0.01)


@pytest.mark.parametrize(("router", "official"), [("entropy", 0.45), ("aleatoric", 2.275)])
def test_thresholds_belong_to_their_measure(router, official):
    """The official code's, which decide where none is given."""
    model, prompt = tiny_llama(13, seed=1, scale=0.4), torch.tensor([[3, 5, 8, 2]])
    small, sources = tiny_llama(13, seed=9, scale=0.4), []
    for threshold in (None, official):
        decoder = R2R(small, router, threshold, trace_enabled=True)
        model.generate(prompt, custom_generate=decoder, max_new_tokens=20, do_sample=False, pad_token_id=0)
        sources.append(decoder.trace[0].columns["source"])
        values = decoder.trace[0].columns["divergence"]
        assert sources[-1] == ["large" if value is None or value >= official else "small" for value in values]
    assert sources[0] == sources[1]
    assert as_router(router).threshold == official


def test_top_logits_fall_and_are_filled_up():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert top_logits(logits, 2).tolist() == [[3.0, 2.0]]
    assert top_logits(logits, 5).tolist() == [[3.0, 2.0, 1.0, 1.0, 1.0]]


def test_what_counts_as_a_router(tmp_path):
    assert isinstance(as_router(None), EntropyRouter)
    assert isinstance(as_router("aleatoric"), AleatoricRouter)
    network = TokenRouter(TokenRouterConfig(16, 16, 13, 8, 1, threshold=0.37))
    assert as_router(network).threshold == 0.37
    network.save_pretrained(tmp_path)
    again = load_router(tmp_path)
    inputs = torch.randn(5, 16), torch.randn(5, 16), torch.randn(5, 13)
    assert torch.allclose(again(*inputs), network.eval()(*inputs))
    decoder = R2R(router=str(tmp_path))
    assert decoder.router.threshold == 0.37
    with pytest.raises(BadInputError, match="holds no router"):
        R2R(router=str(tmp_path / "nowhere"))
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(BadInputError, match="cannot be read"):
        load_router(tmp_path)
    with pytest.raises(BadInputError, match="cannot be a int"):
        as_router(3)


def test_a_router_for_another_model_is_refused():
    large, small = models()
    with pytest.raises(BadInputError, match="reads states of size 24"):
        run(large, R2R(small, TokenRouter(TokenRouterConfig(24, 16, 13, 8, 1))))


def test_bad_input():
    large, small = models()
    with pytest.raises(TokenizerMismatchError, match="small model has a vocabulary"):
        run(large, R2R(tiny_llama(1000)))
    with pytest.raises(BadInputError, match="must not be negative"):
        R2R(small, threshold=-1)
    with pytest.raises(BadInputError, match="context"):
        large.config.max_position_embeddings = 4
        run(large, R2R(small))
    writer = Writer(small, 13)
    writer.close()
    assert not small.get_output_embeddings()._forward_pre_hooks

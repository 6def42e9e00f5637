"""Texts read by ``generate``'s own steps: models that keep their state elsewhere, further inputs, and picking texts."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from everytoken.constraints.awrs import AWRS
from everytoken.constraints.logits_processor import letters
from everytoken.constraints.xgrammar import XGrammar
from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.decoding.steps import Steps
from everytoken.testing.models import tiny_llama, tiny_llava

from .families import VOCAB, build
from .matrix import PADDED, PROMPT, close, generate, masked

NARROW = letters(VOCAB, "[b-h]{40}")
LIKELIEST = {"do_sample": True, "top_k": 1, "prefix_allowed_tokens_fn": masked}


def small(name):
    model = build(name)
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=0)
    return model


@pytest.mark.parametrize("name", ["mamba", "rwkv", "recurrent_gemma", "openai-gpt", "jamba"])
def test_grammars_need_no_cache(name):
    """A matcher needs the tokens written, wherever the model keeps what it has read."""
    model = small(name)
    for ids in (PROMPT, PADDED):
        plain = generate(model, ids, 6, prefix_allowed_tokens_fn=masked)
        assert plain.sequences.tolist() != generate(model, ids, 6).sequences.tolist()  # the mask bites
        # padding changes what some families write, and a batch what RWKV writes in any of its rows
        alone = generate(model, ids[-1:], 6, prefix_allowed_tokens_fn=masked).sequences[0].tolist()
        for decoder in (XGrammar(NARROW), AWRS(NARROW)):
            got = generate(model, ids, 6, decoder)
            assert got.sequences[-1].tolist() == alone
            assert name == "rwkv" or close(got, plain, len(ids) - 1)


def test_forced_text_is_appended_without_a_cache_too():
    model, forced = small("rwkv"), letters(VOCAB, "bcdefgh[b-h]{40}")
    decoder = XGrammar(forced, jump_forward=True, tokenizer=Letters())
    got = model.generate(PROMPT, custom_generate=decoder, max_new_tokens=12, do_sample=False)
    plain = model.generate(PROMPT, custom_generate=XGrammar(forced), max_new_tokens=12, do_sample=False)
    assert got.tolist() == plain.tolist()
    assert decoder.stats.accepted > 0


class Letters:
    """One token a letter, as ``letters`` spells them."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


# -- several texts in one forward --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "mamba", "jamba", "mistral", "deepseek_v3"])
def test_picked_texts_go_on_as_themselves(name):
    model = small(name)
    texts = torch.tensor([[3, 5, 8, 2, 7], [4, 4, 9, 6, 2]])
    inputs = {"attention_mask": torch.ones_like(texts), "use_cache": True}
    key = "cache_params" if name == "mamba" else "past_key_values"
    steps = Steps(model, inputs | {key: DynamicCache(config=model.config)})
    with torch.no_grad():
        steps.read(texts)
        steps.pick([1, 1, 0])
        ids = torch.cat([texts[[1, 1, 0]], torch.tensor([[5], [6], [7]])], 1)
        steps.read(ids)
        ids = torch.cat([ids, torch.tensor([[2], [2], [9]])], 1)
        got = steps.read(ids)
        fresh = [model(row[None]).logits[0, -1] for row in ids]
    assert torch.allclose(got, torch.stack(fresh), atol=1e-3)


def test_particles_share_a_recurrent_models_forwards():
    """Particles that are picked by weight follow the constrained law: only one text is possible here."""
    model = small("mamba")
    decoder = AWRS(letters(VOCAB, "bcd(e|f)gh[b-h]{40}"), particles=4, ess_threshold=1.0, seed=0)
    plain = generate(model, PROMPT, 8, prefix_allowed_tokens_fn=lambda _row, text: next_letters(text))
    output = model.generate(PROMPT, custom_generate=decoder, max_new_tokens=8, do_sample=True, top_k=0)
    assert output[0, 12:15].tolist() == [1, 2, 3] == plain.sequences[0, 12:15].tolist()
    weights = [weight for _, weight in decoder.particles_]
    assert len(weights) == 4
    assert sum(weights) == pytest.approx(1)


def next_letters(text):
    forced = {12: [1], 13: [2], 14: [3], 15: [4, 5], 16: [6], 17: [7]}
    return forced.get(len(text), list(range(1, 8)))


@pytest.mark.parametrize("name", ["rwkv", "xlnet", "recurrent_gemma", "minimax"])
def test_particles_are_refused_where_texts_cannot_be_picked(name):
    model, called = small(name), []
    model.register_forward_pre_hook(lambda *_: called.append(1))
    with pytest.raises(UnsupportedModelError, match="AWRS with several particles"):
        generate(model, PROMPT, 2, AWRS(NARROW, particles=2))
    assert not called


# -- further inputs ----------------------------------------------------------------------------------------------------
IMAGE = torch.tensor([[3, VOCAB - 1, VOCAB - 1, VOCAB - 1, VOCAB - 1, 5, 6]])


@pytest.mark.parametrize("make", [XGrammar, AWRS, lambda grammar: AWRS(grammar, particles=3)])
def test_images_reach_the_model(make):
    model = tiny_llava(VOCAB)
    images = {"pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    plain = generate(model, IMAGE, 6, prefix_allowed_tokens_fn=masked, **images)
    other = generate(model, IMAGE, 6, prefix_allowed_tokens_fn=masked, pixel_values=-images["pixel_values"])
    assert not close(plain, other)  # the image matters
    assert close(generate(model, IMAGE, 6, make(NARROW), **images), plain)
    with pytest.raises(BadInputError, match="one after the other and cannot divide pixel_values"):
        generate(model, IMAGE.repeat(2, 1), 6, make(NARROW), pixel_values=images["pixel_values"].repeat(2, 1, 1, 1))
    embeds = torch.zeros(1, 12, model.config.text_config.hidden_size)
    with pytest.raises(BadInputError, match="inputs_embeds"):
        generate(model, PROMPT, 6, make(NARROW), inputs_embeds=embeds)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_reach_the_model(kind):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(tiny_llama(VOCAB), config).eval()
    ids = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    arguments = {"max_new_tokens": 6, "pad_token_id": 0}
    plain = tuned.generate(**ids, **arguments, do_sample=False, prefix_allowed_tokens_fn=masked).tolist()
    assert tuned.generate(**ids, **arguments, do_sample=False, custom_generate=XGrammar(NARROW)).tolist() == plain
    assert tuned.generate(**ids, **arguments, **LIKELIEST, custom_generate=AWRS(NARROW)).tolist() == plain
    with pytest.raises(BadInputError, match="PEFT's p"):
        tuned.generate(**ids, **arguments, **LIKELIEST, custom_generate=AWRS(NARROW, particles=2))

"""HAT: what a byte may see, ragged rows, the cache, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from everytoken.architectures.hat.configuration_hat import HATConfig
from everytoken.architectures.hat.method import HAT, bits_per_byte, noisy, rows_of, symbol_nats
from everytoken.architectures.hat.modeling_hat import HATForCausalLM, WordLayout
from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.core.loading import load_model, load_tokenizer
from everytoken.core.rng import numpy_generator

TEXTS = ("An old bridge, in the rain.", "It", "  two spaces", "für 日本語")


def network(seed=0):
    torch.manual_seed(seed)
    return HAT.tiny()


def test_the_layout_by_hand():
    """[W] a b [W] c, padded on the left."""
    w = 0xC0
    layout = WordLayout.of(torch.tensor([[0xC1, w, 97, 98, w, 99]]), torch.tensor([[0, 1, 1, 1, 1, 1]]))
    assert layout.started.tolist() == [[0, 1, 1, 1, 2, 2]]
    assert layout.offset[:, 1:].tolist() == [[0, 1, 2, 0, 1]]
    assert layout.counts.tolist() == [2]
    assert layout.end_places().tolist() == [[1, 4]]


@torch.no_grad()
def test_a_byte_changes_its_word_vector_and_nothing_before_itself():
    model = network()
    inputs = rows_of([TEXTS[0]])
    ids = inputs["input_ids"]
    before = symbol_nats(model, inputs)
    layout = WordLayout.of(ids, None)
    place = 10  # a byte inside a word
    assert ids[0, place] != 0xC0 and ids[0, place + 1] != 0xC0
    changed = {name: value.clone() for name, value in inputs.items()}
    changed["input_ids"][0, place] = 65
    after = symbol_nats(model, changed)
    torch.testing.assert_close(after[:, : place - 1], before[:, : place - 1], rtol=1e-5, atol=1e-6)
    assert (after[:, place:] - before[:, place:]).abs().max() > 1e-4
    words = model._encoded(ids, layout), model._encoded(changed["input_ids"], layout)
    different = (words[0] - words[1]).abs().amax(-1)[0] > 1e-6
    assert different.nonzero().flatten().tolist() == [int(layout.started[0, place])]


@torch.no_grad()
def test_a_ragged_batch_is_one_by_one_on_either_side():
    model = network()
    together = symbol_nats(model, rows_of(TEXTS, 20))
    for row, text in enumerate(TEXTS):
        alone = symbol_nats(model, rows_of([text], 20))[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)
        assert bits_per_byte(model, [text])[0] == pytest.approx(
            float(alone.sum()) / 0.6931472 / len(text.encode()), rel=1e-5
        )


@torch.no_grad()
def test_the_cache_is_recomputation_symbol_by_symbol():
    """Teacher-forced log-probabilities, those of a cache that grows symbol by symbol, in rows that end words apart."""
    model = network()
    inputs = rows_of(["An old bridge", "to a far land"], 20)
    ids = inputs["input_ids"]
    length = int(inputs["attention_mask"].sum(1).min())
    whole = model(ids[:, :length]).logits
    cache = None
    for end in range(3, length + 1):
        output = model(ids[:, :end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        torch.testing.assert_close(output.logits[:, -1], whole[:, end - 1], rtol=1e-4, atol=1e-5)
    jumped = model(ids[:, :5], use_cache=True).past_key_values  # several words at once
    found = model(ids[:, :length], past_key_values=jumped).logits[:, -1]
    torch.testing.assert_close(found, whole[:, -1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_beams_take_the_cache_with_them():
    model = network()
    prompt = rows_of(["An old bri"])
    del prompt["labels"]
    arguments = {"num_beams": 3, "max_new_tokens": 10, "do_sample": False}
    cached, fresh = (model.generate(**prompt, **arguments, use_cache=use) for use in (True, False))
    assert torch.equal(cached, fresh)


@torch.no_grad()
def test_a_word_as_long_as_it_may_be_ends():
    model = network()
    model.config.max_word_bytes = 4
    new = model.generate(
        torch.tensor([[0xC0, 97, 98]]), max_new_tokens=40, do_sample=True, suppress_tokens=[0xF5, 0xC1]
    )
    layout = WordLayout.of(new, None)
    assert int(layout.offset.max()) == 4


def test_no_weight_scales_with_a_vocabulary():
    model = HATForCausalLM(HATConfig())
    assert max(weight.shape[0] for weight in model.parameters()) < 1000
    assert model.backbone.embed_tokens is None
    names = [name for name, weight in model.named_parameters() if weight.shape[0] == 256]
    assert all("embed_tokens" in name or "lm_head" in name or "mlp" in name for name in names)


def test_noise_disturbs_about_its_share():
    text = "Some words, in a row, of a text. " * 30
    changed = noisy(text, 0.1, numpy_generator(0, "test"))
    assert changed != text
    assert abs(len(text) - len(changed)) < 0.06 * len(text)
    assert noisy(text, 0.0, numpy_generator(0, "test")) == text


def test_it_loads_by_its_folder(tmp_path):
    model = network()
    model.save_pretrained(tmp_path)
    HAT.tiny_tokenizer().save_pretrained(tmp_path)
    assert type(load_model(tmp_path)) is HATForCausalLM
    assert load_tokenizer(tmp_path)("An old").input_ids == HAT.tiny_tokenizer()("An old").input_ids


def test_bad_input_is_refused():
    model = network()
    ids = rows_of(["An old bridge"])["input_ids"]
    with pytest.raises(BadInputError, match="not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 4, 16))
    with pytest.raises(BadInputError, match="attention_mask must be"):
        model(ids, attention_mask=torch.ones(1, 2))
    with pytest.raises(BadInputError, match="A word has 30 bytes; this network reads 20"):
        model(torch.full((1, 30), 97))
    with pytest.raises(BadInputError, match="words; this network reads 3"):
        model.config.backbone_config.max_position_embeddings = 3
        model(ids.repeat(1, 3))
    model = network()
    with pytest.raises(UnsupportedModelError, match="not in a DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(UnsupportedModelError, match="not in a static cache"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    for settings in (
        {"max_word_bytes": 0},
        {"vocab_size": 300},
        {"encoder_config": {"max_position_embeddings": 50}, "max_word_bytes": 50},
    ):
        with pytest.raises(BadInputError):
            HATConfig(**settings)
    with pytest.raises(BadInputError, match="share"):
        HAT(noise=1.0)

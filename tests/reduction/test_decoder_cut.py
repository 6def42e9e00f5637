"""Cuts inside the decoder, by FastV, against the full model in which the dropped tokens are hidden behind the cut."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import StaticCache

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.reduction.base import ReductionContext
from everytoken.reduction.fastv import FastV
from everytoken.reduction.seam import reduce_tokens

from .models import BUILDERS, IMAGE, VIDEO, inputs_of, tiny
from .test_seam import TOLERANCE, decoder_logits, embeddings, full_positions

QUICK = (("llava", "eager"), ("qwen2_vl", "sdpa"))
ALL = [
    pytest.param(name, kernel, marks=() if (name, kernel) in QUICK else pytest.mark.slow)
    for name in BUILDERS
    for kernel in ("sdpa", "eager")
]


@contextlib.contextmanager
def hidden_behind(model, dropped):
    """Hides tokens from decoder layers: ``dropped`` is layer -> ``[B, L]`` bool; masks handed over are full ones."""
    handles = []
    for number, layer in enumerate(model.get_decoder().layers):
        if number not in dropped:
            continue

        def hook(_module, args, kwargs, hide=dropped[number]):
            mask = kwargs["attention_mask"]
            hide = torch.nn.functional.pad(hide, (0, mask.shape[-1] - hide.shape[1]))
            seen = ~hide[:, None, None] | torch.eye(mask.shape[-1], dtype=torch.bool)
            return args, kwargs | {"attention_mask": mask & seen}

        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def eager_row(model, embeds, positions, mask, layer):
    """``[B, L]`` attention of the last token in one layer, averaged over heads, by transformers' eager kernel."""
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = "eager"
    try:
        length = embeds.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None, None]
        additive = torch.where(causal | torch.eye(length, dtype=torch.bool), 0.0, torch.finfo(torch.float32).min)
        output = decoder(
            inputs_embeds=embeds, position_ids=positions, attention_mask=additive, output_attentions=True,
            use_cache=False,
        )  # fmt: skip
    finally:
        decoder.config._attn_implementation = before
    return output.attentions[layer][:, :, -1].mean(1)


def images_of(inputs):
    """Per prompt the places of every image or video: runs of placeholders."""
    visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    found = []
    for row in visual:
        places, runs = row.nonzero()[:, 0].tolist(), []
        for place in places:
            if runs and runs[-1][-1] == place - 1:
                runs[-1].append(place)
            else:
                runs.append([place])
        found.append([torch.tensor(run) for run in runs])
    return found


@torch.no_grad()
@pytest.mark.parametrize(("name", "kernel"), ALL)
def test_fastv_generates_what_the_masked_full_model_does(name, kernel):
    model = tiny(name)
    inputs = inputs_of(name, model)
    model.set_attn_implementation(kernel)
    steps = 4
    try:
        with reduce_tokens(model, FastV(layer=2, remove=0.6)) as run:
            output = model.generate(
                **inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
    finally:
        model.set_attn_implementation("sdpa")
    embeds, positions = embeddings(model, inputs), full_positions(model, inputs)
    mask = inputs["attention_mask"].bool()
    row = eager_row(model, embeds, positions, mask, 1)
    dropped = torch.zeros_like(mask)
    for number, runs in enumerate(images_of(inputs)):
        for places in runs:
            count = int(len(places) * 0.4 + 1e-9)
            dropped[number, places] = True
            dropped[number, places[row[number, places].topk(count).indices]] = False
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    visible = mask
    for step in range(steps):
        with hidden_behind(model, {2: dropped, 3: dropped}):
            expected = decoder_logits(model, embeds, positions, visible)[:, -1]
        torch.testing.assert_close(output.logits[step], expected, **TOLERANCE)
        embeds = torch.cat([embeds, model.get_input_embeddings()(new[:, step : step + 1])], 1)
        positions = torch.cat([positions, positions[..., -1:] + 1], -1)
        visible = torch.cat([visible, torch.ones(len(visible), 1, dtype=torch.bool)], 1)
    lengths = [layer.get_seq_length() for layer in output.past_key_values.layers]
    assert lengths[0] == lengths[1] > lengths[2] == lengths[3]
    whole = mask.sum(-1).tolist()
    assert run.lengths[1] == whole
    assert run.lengths[2] == run.lengths[3] == (mask & ~dropped).sum(-1).tolist()


@torch.no_grad()
def test_one_prompt_without_padding_and_a_plain_call():
    model = tiny("llava")
    inputs = {name: value[:1] for name, value in inputs_of("llava", model).items() if name != "pixel_values"}
    inputs["input_ids"] = inputs["input_ids"][:, inputs["attention_mask"][0].bool()]
    del inputs["attention_mask"]
    inputs["pixel_values"] = inputs_of("llava", model)["pixel_values"][:2]
    with reduce_tokens(model, FastV(layer=1, remove=0.5)):
        called = model(**inputs).logits[:, -1]
        generated = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        several = model.generate(**inputs, max_new_tokens=2, do_sample=True, num_return_sequences=3)
    torch.testing.assert_close(called, generated.logits[0], **TOLERANCE)
    assert len(several) == 3


@torch.no_grad()
def test_removing_nothing_changes_nothing():
    model = tiny("llava")
    inputs = inputs_of("llava", model)
    plain = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    with reduce_tokens(model, FastV(layer=2, remove=0.0)):
        same = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    for ours, theirs in zip(same.logits, plain.logits, strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_of_the_hooks_is_left():
    model = tiny("llava")
    layers = model.get_decoder().layers
    before = [layer.self_attn.config for layer in layers]
    with reduce_tokens(model, FastV(layer=1)):
        assert layers[0].self_attn.config is not before[0]
    assert all(layer.self_attn.config is config for layer, config in zip(layers, before, strict=True))
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_the_pure_function_keeps_what_is_attended_to():
    features, attention = torch.randn(6, 3), torch.tensor([0.1, 0.4, 0.2, 0.4, 0.0, 0.3])
    reduction = FastV(remove=0.5).reduce(features, ReductionContext(attention=attention))
    assert reduction.kept.tolist() == [1, 3, 5]
    assert FastV(remove=0.8).reduce(features, ReductionContext(attention=attention)).kept.tolist() == [1]
    with pytest.raises(BadInputError, match="attention"):
        FastV().reduce(features, ReductionContext())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda model: {"num_beams": 2}, "beams"),
        (lambda model: {"cache_implementation": "static"}, "only the dynamic cache"),
        (lambda model: {"past_key_values": StaticCache(model.get_decoder().config, 99)}, "dynamic cache"),
        (lambda model: {"assistant_model": model}, "assisted decoding"),
        (lambda model: {"prompt_lookup_num_tokens": 3}, "assisted decoding"),
        (lambda model: {"use_cache": False}, "need the cache"),
        (lambda model: {"prefill_chunk_size": 8}, "at once"),
    ],
)  # fmt: skip
def test_what_ragged_caches_cannot_do_is_refused(settings, message):
    model = tiny("llava")
    ran = []
    handle = model.model.vision_tower.register_forward_pre_hook(lambda *_: ran.append(1))
    with reduce_tokens(model, FastV(layer=1)):
        with pytest.raises(BadInputError, match=message):
            model.generate(**inputs_of("llava", model), max_new_tokens=2, **settings(model))
    handle.remove()
    assert not ran


def test_other_refusals():
    model = tiny("llava")
    inputs = inputs_of("llava", model)
    with reduce_tokens(model, FastV(layer=1)):
        with pytest.raises(BadInputError, match="cannot be trained through"):
            model(**inputs, labels=inputs["input_ids"])
    with pytest.raises(UnsupportedModelError, match="4 layers"):
        with reduce_tokens(model, FastV(layer=4)):
            pass
    for bad in ({"layer": 0}, {"remove": 1.0}):
        with pytest.raises(BadInputError):
            FastV(**bad)

"""TokenPacker inside a LLaVA: right placeholders, the model as it was behind the block, weights on disk."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.reduction.base import Reducer, ReductionContext
from everytoken.reduction.changed_weights import read_changed, swapped
from everytoken.reduction.tokenpacker.packing import (
    TokenPacker,
    check_llava,
    new_projector,
    packed,
    packed_processor,
    save_packer,
)
from everytoken.testing.models import tiny_llama, tiny_llava

IMAGE = 12


def batch(tokens):
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.full((2, tokens), IMAGE), torch.randint(1, 11, (2, 5), generator=generator)], 1)
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator), "input_ids": ids}


def test_the_model_reads_what_the_projector_made_and_is_then_as_before():
    model = tiny_llava()
    projector = new_projector(model, scale=2)
    assert projector.config.levels == [1, 2] and projector.config.num_tokens == 1
    own, before = model.model.multi_modal_projector, model(**batch(4)).logits
    with packed(model, projector):
        logits = model(**batch(1)).logits
        states = model.model.vision_tower(batch(1)["pixel_values"], output_hidden_states=True).hidden_states
        z = torch.cat([states[level][:, 1:] for level in (1, 2)], -1)
        embedded = model.get_input_embeddings()(batch(1)["input_ids"][:, 1:])
        whole = torch.cat([projector(z), embedded], 1)
        assert torch.allclose(model(inputs_embeds=whole).logits, logits, atol=1e-5)
        assert model.generate(**batch(1), max_new_tokens=3, do_sample=False).shape[1] == 6 + 3
        with pytest.raises(ValueError, match="do not match"):
            model(**batch(4))
    assert model.model.multi_modal_projector is own
    assert torch.equal(model(**batch(4)).logits, before) and model.config.image_seq_length == 576


def test_behind_an_error_the_model_is_as_before_too():
    model = tiny_llava()
    with pytest.raises(RuntimeError), packed(model, new_projector(model)):
        raise RuntimeError
    assert type(model.model.multi_modal_projector).__name__ == "LlavaMultiModalProjector"
    assert model.config.vision_feature_layer == -2


def test_weights_on_disk_bring_the_language_models_with_them(tmp_path):
    model = tiny_llava()
    projector = new_projector(model)
    name = "model.language_model.norm.weight"
    save_packer(projector, tmp_path, {name: torch.full((16,), 3.0)})
    before = model(**batch(4)).logits
    with packed(model, TokenPacker(weights=str(tmp_path))):
        assert (model.model.language_model.norm.weight == 3).all()
        loaded = model(**batch(1)).logits
    assert torch.equal(model(**batch(4)).logits, before)
    with packed(model, projector):
        swapped(model, read_changed(tmp_path))
        assert torch.equal(model(**batch(1)).logits, loaded)


def test_on_its_own_it_keeps_the_reducers_contract():
    model = tiny_llava()
    projector = new_projector(model)
    packer = TokenPacker(projector=projector)
    assert isinstance(packer, Reducer)
    levels = tuple(torch.randn(4, 16) for _ in range(2))
    reduction = packer.reduce(levels[-1], ReductionContext(levels=levels))
    assert torch.allclose(reduction.features, projector(torch.cat(levels, -1)[None])[0], atol=1e-6)
    assert reduction.assignment.shape == (1, 4) and torch.allclose(reduction.assignment.sum(1), torch.ones(1))
    assert reduction.sizes.tolist() == [4]
    with pytest.raises(BadInputError, match="reads 2 levels"):
        packer.reduce(levels[-1], ReductionContext())
    with pytest.raises(BadInputError, match="no projector yet"):
        TokenPacker().reduce(levels[-1], ReductionContext(levels=levels))


def test_the_assignment_says_which_feature_went_where():
    from everytoken.reduction.tokenpacker.packing import region_matrix

    weights = torch.arange(1.0, 9).reshape(2, 4)  # two regions of a grid of 2 x 4
    assert region_matrix(weights, (2, 4), 2).tolist() == [[1, 2, 0, 0, 3, 4, 0, 0], [0, 0, 5, 6, 0, 0, 7, 8]]


def test_the_processor_counts_as_the_projector_does():
    from everytoken.training.vlm_files import scene_processor

    pytest.importorskip("PIL")
    import numpy as np
    from PIL import Image

    model = tiny_llava()
    processor = scene_processor(8, 4)
    changed = packed_processor(processor, new_projector(model))
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    for made, tokens in ((processor, 4), (changed, 1)):
        assert made(images=image, text="<image> where?", return_tensors="pt")["input_ids"].shape[1] == tokens + 1
    with pytest.raises(UnsupportedModelError, match="LLaVA's processor"):
        packed_processor(processor.tokenizer, new_projector(model))


def test_levels_of_a_deep_encoder_are_the_papers():
    model = tiny_llava()
    model.config.vision_config.num_hidden_layers = 24
    assert new_projector(model).config.levels == [12, 16, 22, 23]
    with pytest.raises(BadInputError, match="levels 0 to 24"):
        new_projector(model, levels=(25,))


def test_what_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        check_llava(tiny_llama())
    model = tiny_llava()
    with pytest.raises(BadInputError, match="No TokenPacker ships"):
        TokenPacker().load(model)
    with (
        pytest.raises(BadInputError, match="no trained TokenPacker"),
        packed(model, TokenPacker(weights=str(tmp_path))),
    ):
        pass
    with pytest.raises(BadInputError, match="scale 2, not 1"):
        TokenPacker(1, projector=new_projector(model)).load(model)
    other = new_projector(model, levels=(1,))
    other.config.text_hidden_size = 5
    with pytest.raises(BadInputError, match="for widths of 16 and 5"), packed(model, other):
        pass
    with pytest.raises(BadInputError, match="no weights nonsense"):
        swapped(model, {"nonsense": torch.zeros(1)})
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(UnsupportedModelError, match="class token"):
        new_projector(model)
    for settings, words in (({"scale": 0}, "one feature"), ({"query_pool": "max"}, "bilinear, mean")):
        with pytest.raises(BadInputError, match=words):
            TokenPacker(**settings)

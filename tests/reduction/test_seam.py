"""The seam on tiny random models of every class: exact against gathered embeddings and the masked full model."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.reduction.base import Declaration, ReductionContext, combination
from everytoken.reduction.divprune import DivPrune
from everytoken.reduction.families import FAMILIES, encoded, family_of
from everytoken.reduction.inputs import reduce_inputs
from everytoken.reduction.seam import reduce_tokens

from ..conftest import tiny_llama
from .models import BUILDERS, IMAGE, VIDEO, inputs_of, tiny

SLOW = pytest.mark.slow
FAST = ("llava", "qwen2_vl")
ALL = [pytest.param(name, marks=() if name in FAST else SLOW) for name in BUILDERS]
TOLERANCE = dict(rtol=0, atol=2e-5)


def embeddings(model, inputs, reductions=None):
    """``[B, L, d]`` embeddings of the full prompts with the features in their places, and the features."""
    _, units, _ = encoded(model, family_of(model), inputs)
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids).clone()
    for modality, token in (("image", IMAGE), ("video", VIDEO)):
        rows = [unit.features for unit in units if unit.modality == modality]
        if rows:
            embeds[ids == token] = torch.cat(rows)
    return embeds


def full_positions(model, inputs):
    """``[B, L]`` or ``[3, B, L]``, by transformers' own functions."""
    mask = inputs["attention_mask"]
    if not FAMILIES[model.config.model_type].axes:
        return (mask.cumsum(-1) - 1).clamp(min=0)
    return model.model.get_rope_index(
        inputs["input_ids"], image_grid_thw=inputs["image_grid_thw"], video_grid_thw=inputs["video_grid_thw"],
        attention_mask=mask, mm_token_type_ids=inputs["mm_token_type_ids"],
    )[0]  # fmt: skip


def decoder_logits(model, embeds, positions, visible):
    """Logits of a plain pass of the decoder in which token j is hidden from all others unless ``visible[b, j]``."""
    length = embeds.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = (causal & visible[:, None, None]) | torch.eye(length, dtype=torch.bool)
    hidden = model.get_decoder()(
        inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden)


def kept(batch):
    """``[B, L]`` bool: which tokens of the batch as given are left."""
    mask = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    for row, index in enumerate(batch.index):
        mask[row, index[index >= 0]] = True
    return mask


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_original_positions_equal_the_full_model_with_the_dropped_tokens_hidden(name):
    model = tiny(name)
    inputs = inputs_of(name, model)
    with reduce_tokens(model, DivPrune(keep=0.4), positions="original") as run:
        logits = model(**inputs).logits
    expected = decoder_logits(model, embeddings(model, inputs), full_positions(model, inputs), kept(run.last))
    there = run.last.index >= 0
    rows = torch.arange(len(there))[:, None].expand_as(there)
    torch.testing.assert_close(logits[there], expected[rows[there], run.last.index[there]], **TOLERANCE)
    assert run.last.tokens_after < run.last.tokens_before


@torch.no_grad()
@pytest.mark.parametrize("name", [p for p in ALL if not FAMILIES[p.values[0]].axes])
def test_packed_positions_equal_the_gathered_embeddings(name):
    model = tiny(name)
    inputs = inputs_of(name, model)
    with reduce_tokens(model, DivPrune(keep=0.4)) as run:
        logits = model(**inputs).logits
    index = run.last.index
    there = index >= 0
    embeds = embeddings(model, inputs).gather(1, index.clamp(min=0)[..., None].expand(-1, -1, 32))
    expected = decoder_logits(model, embeds, (there.long().cumsum(-1) - 1).clamp(min=0), there)
    torch.testing.assert_close(logits[there], expected[there], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["packed", "original"])
@pytest.mark.parametrize("name", ALL)
def test_generation_with_the_cache_equals_recomputing_every_step(name, positions):
    model = tiny(name)
    axes = FAMILIES[name].axes
    if axes and positions == "packed":
        pytest.skip("refused, see below")
    inputs = inputs_of(name, model)
    steps = 4
    with reduce_tokens(model, DivPrune(keep=0.4), positions=positions) as run:
        out = model.generate(**inputs, max_new_tokens=steps, do_sample=False)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :length], inputs["input_ids"])
    new = out[:, length:]
    embeds, full = embeddings(model, inputs), full_positions(model, inputs)
    visible = kept(run.last)
    if positions == "packed":
        full = (visible.long().cumsum(-1) - 1).clamp(min=0)
    for step in range(steps):
        logits = decoder_logits(model, embeds, full, visible)[:, -1]
        assert torch.equal(logits.argmax(-1), new[:, step])
        embeds = torch.cat([embeds, model.get_input_embeddings()(new[:, step : step + 1])], 1)
        full = torch.cat([full, full[..., -1:] + 1], -1)
        visible = torch.cat([visible, torch.ones(len(visible), 1, dtype=torch.bool)], 1)


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_keeping_everything_is_the_unpruned_model_bit_by_bit(name):
    model = tiny(name)
    inputs = inputs_of(name, model)
    plain = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    with reduce_tokens(model, DivPrune(keep=1.0)) as run:
        same = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    assert run.last.tokens_after == run.last.tokens_before
    assert torch.equal(same.sequences, plain.sequences)
    for ours, theirs in zip(same.logits, plain.logits, strict=True):
        assert torch.equal(ours, theirs)


def test_training_shortens_labels_and_gradients_reach_the_encoder():
    model = tiny("llava")
    inputs = inputs_of("llava", model)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    with reduce_tokens(model, DivPrune(keep=0.4)) as run:
        output = model(**inputs, labels=labels)
    index = run.last.index
    moved = torch.where(index >= 0, labels.gather(1, index.clamp(min=0)), -100)[:, 1:]
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), moved.flatten(), ignore_index=-100
    )
    torch.testing.assert_close(output.loss, expected)
    (gradient,) = torch.autograd.grad(output.loss, model.model.multi_modal_projector.linear_1.weight)
    assert bool(gradient.abs().sum() > 0)


def test_right_padding_stays_on_the_right():
    model = tiny("llava")
    inputs = inputs_of("llava", model)
    swapped = {name: inputs[name].clone() for name in ("input_ids", "attention_mask")}
    for row in range(2):
        own = inputs["attention_mask"][row].bool()
        for name, values in swapped.items():
            values[row] = torch.cat([inputs[name][row][own], inputs[name][row][~own]])
    right, left = (reduce_inputs(model, DivPrune(keep=0.4), inputs | given) for given in (swapped, {}))
    a, b = right.arguments, left.arguments
    assert a["attention_mask"][1].tolist() == sorted(a["attention_mask"][1].tolist(), reverse=True)
    assert torch.equal(a["input_ids"][a["attention_mask"].bool()], b["input_ids"][b["attention_mask"].bool()])


class Halves:
    """Pairs of neighbours become their mean: a reducer that combines."""

    declares = Declaration(("model input",), "none", "pool", "half", ("grid",))

    def reduce(self, features, context: ReductionContext):
        rows, columns = context.grid
        assert rows * columns == len(features)
        count = len(features) // 2
        assignment = torch.zeros(count, len(features))
        assignment[torch.arange(count), 2 * torch.arange(count)] = 0.5
        assignment[torch.arange(count), 2 * torch.arange(count) + 1] = 0.5
        return combination(features, assignment, torch.full((count,), 2))


def test_combined_tokens_take_the_place_of_their_first_part():
    model = tiny("llava")
    inputs = inputs_of("llava", model)
    batch = reduce_inputs(model, Halves(), inputs, positions="original")
    assert [reduction.groups().tolist() for reduction in batch.reductions] == [[i // 2 for i in range(16)]] * 3
    visual = batch.arguments["position_ids"][0][batch.units[0] == 0]
    assert torch.equal(visual, 3 + 2 * torch.arange(8))


def test_a_grid_is_known_or_its_reducer_is_refused():
    with pytest.raises(UnsupportedModelError, match="Halves needs a full grid"):
        reduce_inputs(tiny("llava_next"), Halves(), {})
    qwen = tiny("qwen2_vl")
    batch = reduce_inputs(qwen, Halves(), inputs_of("qwen2_vl", qwen))
    assert list(batch.grids.values()) == [(2, 4), (4, 4), (2, 2), (4, 2)]


def test_several_answers_of_one_prompt_and_beams():
    model = tiny("llava")
    inputs = inputs_of("llava", model)
    with reduce_tokens(model, DivPrune(keep=0.4)):
        one = model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2)
        two = model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2, num_return_sequences=2)
    assert torch.equal(two[::2], one)
    assert torch.equal(two[:, : inputs["input_ids"].shape[1]], inputs["input_ids"].repeat_interleave(2, 0))


def test_max_length_counts_the_prompt_as_given():
    model = tiny("llava")
    inputs = inputs_of("llava", model)
    length = inputs["input_ids"].shape[1]
    with reduce_tokens(model, DivPrune(keep=0.2)):
        assert model.generate(**inputs, max_length=length + 3, do_sample=False).shape[1] == length + 3


def test_nothing_of_it_is_left_and_other_models_do_not_notice():
    model = tiny("llava")
    before = dict(vars(model))
    with reduce_tokens(model, DivPrune(keep=0.2)):
        with pytest.raises(BadInputError, match="inside another"):
            with reduce_tokens(model, DivPrune()):
                pass
        assert "generate" not in vars(tiny("smolvlm"))
    assert vars(model).keys() == before.keys()
    assert not model._forward_pre_hooks and not model._forward_hooks


@pytest.fixture
def counted():
    """The model, its inputs, and how often its encoder ran."""
    model = tiny("llava")
    ran = []
    handle = model.model.vision_tower.register_forward_pre_hook(lambda *_: ran.append(1))
    yield model, inputs_of("llava", model), ran
    handle.remove()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {k: x[k] for k in ("input_ids", "attention_mask")}, "no pixels"),
        (lambda x: {"input_ids": torch.ones(1, 4, dtype=torch.long)}, "text only"),
        (lambda x: x | {"input_ids": torch.ones_like(x["input_ids"])}, "no place for its features"),
        (lambda x: x | {"position_ids": x["attention_mask"]}, "its own position_ids"),
        (lambda x: x | {"input_ids": x["input_ids"][:, 1:]}, "attention_mask has shape"),
        (lambda x: x | {"depths": x["attention_mask"]}, "how to shorten depths"),
        (lambda x: {k: v for k, v in x.items() if k != "attention_mask"}, "no attention_mask"),
    ],
)
def test_bad_input_is_refused_before_the_encoder_runs(counted, change, message):
    model, inputs, ran = counted
    with reduce_tokens(model, DivPrune(keep=0.4)):
        with pytest.raises(BadInputError, match=message):
            model.generate(**change(inputs), max_new_tokens=2)
    assert not ran


def test_features_that_do_not_fit_the_prompt():
    model = tiny("llava")
    inputs = inputs_of("llava", model)
    with pytest.raises(BadInputError, match=r"48 places .* returned 32"):
        reduce_inputs(model, DivPrune(), inputs | {"pixel_values": inputs["pixel_values"][:2]})


def test_a_call_from_a_cache_is_refused():
    model = tiny("llava")
    inputs = inputs_of("llava", model)
    with reduce_tokens(model, DivPrune(keep=0.4)):
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(BadInputError, match="continues from a cache"):
            model(torch.ones(2, 1, dtype=torch.long), past_key_values=cache)


def test_classes_that_were_not_tried_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no images"):
        with reduce_tokens(tiny_llama(), DivPrune()):
            pass
    with pytest.raises(BadInputError, match="rows and columns"):
        with reduce_tokens(tiny("qwen2_vl"), DivPrune(), positions="packed"):
            pass
    with pytest.raises(BadInputError, match="positions is one of"):
        with reduce_tokens(tiny("llava"), DivPrune(), positions="odd"):
            pass


def test_images_of_unequal_counts_are_not_copied_where_they_cannot():
    class Uneven(DivPrune):
        def reduce(self, features, context):
            self.num_tokens = 1 + int(features[0, 0].abs() * 1000) % 7
            return super().reduce(features, context)

    model = tiny("internvl")
    inputs = inputs_of("internvl", model)
    with reduce_tokens(model, Uneven()) as run:
        with pytest.raises(BadInputError, match="cannot be copied"):
            model.generate(**inputs, max_new_tokens=2, num_beams=2)
        assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2
    assert len({len(item.features) for item in run.last.reductions}) > 1


@torch.no_grad()
def test_without_the_cache_the_text_is_the_same():
    model = tiny("llava")
    inputs = inputs_of("llava", model)
    with reduce_tokens(model, DivPrune(keep=0.4)):
        cached = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=False), cached)
    with reduce_tokens(model, DivPrune(keep=0.4), positions="original"):
        with pytest.raises(BadInputError, match="need the cache"):
            model.generate(**inputs, max_new_tokens=3, use_cache=False)


@SLOW
@torch.no_grad()
def test_a_decoder_reads_the_shorter_prompt_or_says_what_it_lacks():
    """``custom_generate`` inside the block: the same tokens as transformers' own loop, or a refusal by name."""
    from everytoken.decoding.plain import PlainDecoding

    model = tiny("llava")
    inputs = {name: value[1:] for name, value in inputs_of("llava", model).items()}
    inputs["pixel_values"] = inputs_of("llava", model)["pixel_values"][2:]
    with reduce_tokens(model, DivPrune(keep=0.4)):
        plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        try:
            ours = model.generate(**inputs, max_new_tokens=3, do_sample=False, custom_generate=PlainDecoding())
        except (BadInputError, UnsupportedModelError) as error:
            assert "does not pass pixel_values or other media" in str(error)
        else:
            assert torch.equal(ours, plain)


def test_positional_arguments_and_hidden_states():
    model = tiny("llava")
    inputs = inputs_of("llava", model)
    with torch.no_grad(), reduce_tokens(model, DivPrune(keep=0.4)) as run:
        named = model(**inputs, output_hidden_states=True)
        placed = model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
    assert torch.equal(named.logits, placed.logits)
    assert named.hidden_states[0].shape[1] == run.last.index.shape[1]

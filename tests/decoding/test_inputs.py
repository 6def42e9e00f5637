"""What plain ``generate`` would pass to a model is passed on or refused by name: real families, PEFT, offloading."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
import transformers
from transformers import DynamicCache, TextIteratorStreamer

from everytoken.constraints.awrs import AWRS
from everytoken.constraints.logits_processor import letters
from everytoken.constraints.xgrammar import XGrammar
from everytoken.core.errors import BadInputError, EverytokenError, UnsupportedModelError
from everytoken.decoding.inputs import changes_inputs, check_trees, device_of, is_offloaded, takes
from everytoken.decoding.masks import attention_mask_for
from everytoken.decoding.row import read_on
from everytoken.decoding.row_cache import RowCache
from everytoken.generation.dyspec import DySpec
from everytoken.generation.qstar_beam import QStarBeam
from everytoken.generation.r2r import R2R
from everytoken.generation.skipdecode import LinearDepth, SkipDecode
from everytoken.testing.distributions import Recorder
from everytoken.testing.models import tiny_llama, tiny_tokenizer

from ..testing.test_decoder import Plain
from .families import build

PROMPT = torch.tensor([[3, 5, 8, 2, 7, 7, 4]])
NEW = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
TINY = {
    "vocab_size": 29, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "Bloom": ("BloomForCausalLM", {"n_layer": 2, "n_head": 4}),
    "MPT": ("MptForCausalLM", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "use_cache": True}),
    "Falcon with ALiBi": ("FalconForCausalLM", {"alibi": True}),
    "OPT": ("OPTForCausalLM", {"ffn_dim": 32, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "Bart": ("BartForCausalLM", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4,
                                 "decoder_ffn_dim": 32}),
    "GPT-2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "Mamba": ("MambaForCausalLM", {"state_size": 4}),
    "Mamba2": ("Mamba2ForCausalLM", {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2}),
    "T5": ("T5ForConditionalGeneration", {"d_model": 32, "d_ff": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8,
                                          "decoder_start_token_id": 0}),
    "BART": ("BartForConditionalGeneration", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
             "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4}),
}  # fmt: skip
REFUSED = {
    "plain": {"Mamba", "Mamba2", "T5", "BART"},
    "R2R": {"T5", "BART"},
    "DySpec": {"T5", "BART"},
}


@functools.cache
def family(name):
    architecture, settings = FAMILIES[name]
    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = kind(kind.config_class(**TINY | settings)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 0.3)
    return model


def refused(model, decoder, error=EverytokenError, match=None, **arguments):
    """Refuses by name, before any forward."""
    called = []
    hook = model.register_forward_pre_hook(lambda *_: called.append(1))
    try:
        with pytest.raises(error, match=match):
            decoder.generate(model, PROMPT, **NEW | arguments)
    finally:
        hook.remove()
    assert not called


@pytest.mark.parametrize("decoder", REFUSED)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_plains_text_or_is_refused_by_name(name, decoder):
    model, draft = family(name), tiny_llama(29, seed=9)
    make = {"plain": Plain(), "R2R": R2R(draft, threshold=0.0), "DySpec": DySpec(draft, budget=6)}[decoder]
    if name in REFUSED[decoder]:
        refused(model, make, UnsupportedModelError, match="DySpec|R2R|Plain")
        return
    expected = model.generate(PROMPT, **NEW)
    assert model.generate(PROMPT, custom_generate=make, **NEW).tolist() == expected.tolist()


def test_drafts_are_checked_as_targets_are():
    target = tiny_llama(29)
    refused(target, DySpec(family("T5")), UnsupportedModelError, match="DySpec's draft")
    refused(target, R2R(family("T5")), UnsupportedModelError, match="R2R's small model")
    expected = target.generate(PROMPT, **NEW).tolist()
    for name in ("GPT-2", "Bloom", "MPT", "Falcon with ALiBi", "Bart", "Mamba"):  # most draft one path without a mask
        assert target.generate(PROMPT, custom_generate=DySpec(family(name)), **NEW).tolist() == expected
    small = target.generate(PROMPT, custom_generate=R2R(family("Mamba"), threshold=99.0), **NEW)
    own = family("Mamba").generate(PROMPT, **NEW)
    # the large model writes nothing: the text is the small model's own
    assert small.tolist() == own.tolist()


def test_images_and_embeddings_are_refused_by_rows():
    model = tiny_llama(29)
    embeds = model.get_input_embeddings()(PROMPT).detach()
    for decoder in (Plain(), DySpec(tiny_llama(29, seed=9)), R2R(tiny_llama(29, seed=9))):
        refused(model, decoder, BadInputError, match="inputs_embeds", inputs_embeds=embeds)
    config = transformers.LlavaConfig(
        text_config=model.config,
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        ),
        image_token_index=28,
    )
    torch.manual_seed(0)
    llava = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[3, 28, 28, 28, 28, 5, 6]])
    pixels = torch.randn(1, 3, 8, 8)
    expected = llava.generate(ids, pixel_values=pixels, **NEW)
    for decoder in (Plain(), DySpec(tiny_llama(29, seed=9))):
        with pytest.raises(BadInputError, match="pixel_values"):
            llava.generate(ids, pixel_values=pixels, custom_generate=decoder, **NEW)
    beams = llava.generate(ids, pixel_values=pixels, custom_generate=QStarBeam(1), **NEW)
    assert beams.tolist() == expected.tolist()


def test_embeddings_alone_go_through_transformers_loops():
    model = tiny_llama(29)
    embeds = model.get_input_embeddings()(PROMPT).detach()
    expected = model.generate(inputs_embeds=embeds, **NEW).tolist()
    for decoder in (QStarBeam(1), SkipDecode(LinearDepth(2, 2, 1, 8))):
        assert model.generate(inputs_embeds=embeds, custom_generate=decoder, **NEW).tolist() == expected


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "LoraConfig"])
def test_peft(kind):
    peft = pytest.importorskip("peft")
    model = tiny_llama(29)
    settings = {"num_virtual_tokens": 3} if kind != "LoraConfig" else {"init_lora_weights": False}
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **settings)).eval()
    ids = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    expected = tuned.generate(**ids, **NEW).tolist()
    for decoder in (Plain(), DySpec(tiny_llama(29, seed=9)), R2R(tiny_llama(29, seed=9), threshold=0.0)):
        if kind == "LoraConfig":
            assert tuned.generate(**ids, custom_generate=decoder, **NEW).tolist() == expected
        else:
            with pytest.raises(BadInputError, match="PEFT's p"):
                tuned.generate(**ids, custom_generate=decoder, **NEW)
    assert tuned.generate(**ids, custom_generate=QStarBeam(1), **NEW).tolist() == expected
    if kind != "LoraConfig":
        with pytest.raises(BadInputError, match="PEFT's p"):
            tuned.generate(**ids, custom_generate=QStarBeam(2, trace_enabled=True), **NEW)
    assert changes_inputs(tuned.get_base_model()) is None  # nothing is left behind


def test_inputs_that_a_model_adds_by_itself_are_refused():
    class Adds(transformers.LlamaForCausalLM):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            return super().prepare_inputs_for_generation(*args, **kwargs) | {"inputs_of_its_own": torch.ones(1)}

    refused(Adds(tiny_llama(29).config).eval(), Plain(), BadInputError, match="inputs_of_its_own")


def test_offloaded_weights():
    accelerate = pytest.importorskip("accelerate")
    plain = tiny_llama(29)
    expected = plain.generate(PROMPT, **NEW).tolist()
    target = accelerate.cpu_offload(tiny_llama(29), torch.device("cpu"))
    draft = accelerate.cpu_offload(tiny_llama(29, seed=9), torch.device("cpu"))
    assert is_offloaded(target) and target.device.type == "meta" and device_of(target).type == "cpu"
    for decoder in (Plain(), DySpec(draft, budget=5), R2R(draft, threshold=0.0), QStarBeam(1)):
        assert target.generate(PROMPT, custom_generate=decoder, **NEW).tolist() == expected
    assert target.generate(PROMPT, custom_generate=R2R(draft, threshold=99.0), **NEW).shape == (1, 15)
    under = plain.generate(PROMPT, prefix_allowed_tokens_fn=lambda *_: list(range(1, 8)), **NEW).tolist()
    assert target.generate(PROMPT, custom_generate=XGrammar(letters(29, "[b-h]{40}")), **NEW).tolist() == under
    particles = AWRS(letters(29, "[b-h]{40}"), particles=3)
    assert target.generate(PROMPT, custom_generate=particles, **NEW | {"do_sample": True}).shape == (1, 15)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(plain.config)
    with pytest.raises(UnsupportedModelError, match="meta device"):
        device_of(empty)


# -- masks -------------------------------------------------------------------------------------------------------------
def test_flex_attention_gets_a_function_that_knows_no_place_beyond_the_mask():
    model, allowed = tiny_llama(29), torch.rand(1, 1, 5, 130) > 0.5
    model.config._attn_implementation = "flex_attention"
    mask = attention_mask_for(model, allowed)
    assert mask.shape == (1, 1, 5, 130)
    rows, columns = torch.meshgrid(torch.arange(128), torch.arange(256), indexing="ij")  # whole blocks
    seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), rows, columns)
    assert torch.equal(seen[:5, :130], allowed[0, 0])
    assert int(seen.sum()) == int(allowed.sum())


def test_attention_without_masks_of_trees_is_refused():
    model = tiny_llama(29)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="flash_attention_2"):
        check_trees("X", model)
    assert takes(model, "position_ids")
    assert not takes(model, "token_type_ids")


def test_flex_attention_on_a_cpu_is_refused():
    """There torch's compiler fails at a single token; the masks are compared below."""
    target, draft = tiny_llama(29, scale=2), tiny_llama(29, seed=9)
    target.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedModelError, match="flex_attention on a CPU"):
        target.generate(PROMPT, custom_generate=DySpec(draft, budget=6), **NEW)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_trees_flex_mask_shows_what_its_boolean_mask_shows(name):
    """Also in layers with a window, which ends within the text and the tree."""
    model = build(name)
    held = RowCache(model)
    with torch.no_grad():
        held.read([*PROMPT[0].tolist(), 3, 5])
    held.mark()
    model.config._attn_implementation = "sdpa"
    allowed, depths = torch.rand(3, held.length + 3) > 0.3, torch.tensor([0, 1, 1]) + held.length
    boolean = held._masks(allowed, depths)
    model.config._attn_implementation = "flex_attention"
    assert RowCache(model).trees
    blocks = held._masks(allowed, depths)
    kinds = list(boolean) if isinstance(boolean, dict) else [None]
    for kind in kinds:
        expected, mask = (boolean, blocks) if kind is None else (boolean[kind], blocks[kind])
        rows, columns = torch.meshgrid(torch.arange(3), torch.arange(expected.shape[-1]), indexing="ij")
        assert tuple(mask.shape) == (1, 1, *expected.shape[-2:])
        assert torch.equal(mask.mask_mod(torch.tensor(0), torch.tensor(0), rows, columns), expected[0, 0])


def test_attention_without_masks_of_trees_drafts_one_path():
    model = tiny_llama(29)
    assert RowCache(model).trees
    model.config._attn_implementation = "flash_attention_2"
    assert not RowCache(model).trees


# -- vocabularies of unequal size --------------------------------------------------------------------------------------
def larger(eos=None):
    """A target of 32 tokens that likes the last three, which a draft of 29 lacks."""
    target = tiny_llama(32, eos=eos)
    with torch.no_grad():
        target.lm_head.weight[29:] *= 4
    return target


def test_tokens_that_the_draft_lacks_are_read_and_written():
    target, draft = larger(), tiny_llama(29, seed=9)
    prompt = torch.tensor([[3, 31, 8, 29, 7, 30, 4]])
    expected = target.generate(prompt, **NEW | {"max_new_tokens": 24})
    assert max(expected[0, 7:].tolist()) > 28
    for decoder in (DySpec(draft, budget=6), DySpec(draft, budget=6, threshold=None), R2R(draft, threshold=0.0)):
        got = target.generate(prompt, custom_generate=decoder, **NEW | {"max_new_tokens": 24})
        assert got.tolist() == expected.tolist()
    only_new = {"prefix_allowed_tokens_fn": lambda _row, _ids: [29, 30]}
    expected = target.generate(prompt, **NEW, **only_new)
    for decoder in (DySpec(draft, budget=6), R2R(draft, threshold=99.0)):
        assert target.generate(prompt, custom_generate=decoder, **NEW, **only_new).tolist() == expected.tolist()
    sampled = target.generate(prompt, custom_generate=DySpec(draft), **NEW | {"do_sample": True}, **only_new)
    assert set(sampled[0, 7:].tolist()) <= {29, 30}


def test_an_end_token_that_the_draft_lacks_ends_the_text():
    target, draft = larger(eos=31), tiny_llama(29, seed=9, eos=3)
    with torch.no_grad():
        target.lm_head.weight[31] *= 2
    arguments = NEW | {"max_new_tokens": 60}
    expected = target.generate(PROMPT, **arguments)
    got = target.generate(PROMPT, custom_generate=DySpec(draft, budget=6), **arguments)
    assert got.tolist() == expected.tolist()


def test_a_draft_of_more_tokens_proposes_none_that_the_target_lacks():
    target, draft = tiny_llama(29), tiny_llama(32, seed=9)
    expected = target.generate(PROMPT, **NEW).tolist()
    for decoder in (DySpec(draft, budget=6), R2R(draft, threshold=0.0)):
        assert target.generate(PROMPT, custom_generate=decoder, **NEW).tolist() == expected
    assert target.generate(PROMPT, custom_generate=R2R(draft, threshold=99.0), **NEW).max() < 29


# -- what generate keeps for itself ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "decoder", [Plain(), DySpec(tiny_llama(13, seed=9)), QStarBeam(1), R2R(tiny_llama(13, seed=9))]
)
def test_a_streamer_of_generate_is_fed_and_ends(decoder):
    model, streamer = tiny_llama(13), Recorder()
    output = model.generate(PROMPT, custom_generate=decoder, streamer=streamer, **NEW)
    assert streamer.tokens == output[0].tolist()
    assert streamer.ended == 1


def test_whoever_reads_a_streamer_of_a_refused_call_is_let_go():
    model = tiny_llama(13)
    streamer = TextIteratorStreamer(tiny_tokenizer(), timeout=20)
    read = []
    reader = threading.Thread(target=lambda: read.extend(streamer))
    reader.start()
    with pytest.raises(BadInputError, match="streamer"):
        model.generate(PROMPT.repeat(2, 1), custom_generate=Plain(), streamer=Recorder(), **NEW)
    with pytest.raises(BadInputError, match="streamer"):
        QStarBeam(3).generate(model, PROMPT, streamer=streamer, **NEW)
    reader.join(20)
    assert not reader.is_alive()


def test_an_assistant_is_refused_by_name():
    model = tiny_llama(13)
    with pytest.raises(BadInputError, match="assistant_model"):
        model.generate(PROMPT, custom_generate=Plain(), assistant_model=tiny_llama(13, seed=9), **NEW)


def test_reading_on_continues_models_that_count_positions_themselves():
    model, text = family("Bloom"), [3, 5, 8, 2, 7]
    cache = DynamicCache()
    with torch.no_grad():
        read_on(model, cache, text[:3], 29)
        got = read_on(model, cache, text, 29)
        assert torch.allclose(got, model(torch.tensor([text])).logits[0, -1], atol=1e-4)


def test_awrs_reads_models_that_count_positions_themselves():
    model = family("Bloom")
    decoder = AWRS.examples(model)["anything"].make()
    got = model.generate(PROMPT, custom_generate=decoder, **NEW | {"do_sample": True, "top_k": 1})
    assert got.tolist() == model.generate(PROMPT, **NEW).tolist()

"""What every decoder of the station promises: generate's settings are honoured, and nothing is left behind on the model."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.decoding.loop import MatcherLogitsProcessor
from everytoken.generation.dyspec import DySpec
from everytoken.generation.qstar_beam import QStarBeam
from everytoken.generation.r2r import R2R, EntropyRouter
from everytoken.generation.skipdecode import LinearDepth, SkipDecode
from everytoken.generation.tokenselect import TokenSelect

from ..conftest import tiny_llama
from .common import VOCAB, ToyMatcher, check_distribution

LAYERS = 4


def small(vocab=VOCAB):
    return tiny_llama(vocab, seed=9)


LOSSLESS = {
    "dyspec": lambda **kwargs: DySpec(small(kwargs.pop("vocab", VOCAB)), budget=6, **kwargs),
    "skipdecode, all layers": lambda vocab=0, **kwargs: SkipDecode(LinearDepth(LAYERS, LAYERS, 1, 8), **kwargs),
    "tokenselect, all tokens": lambda vocab=0, **kwargs: TokenSelect(score_dtype="float32", **kwargs),
    "r2r, large only": lambda **kwargs: R2R(
        small(kwargs.pop("vocab", VOCAB)), EntropyRouter(), threshold=0.0, **kwargs
    ),
    "one beam": lambda vocab=0, **kwargs: QStarBeam(1, **kwargs),
}
LOSSY = {
    "skipdecode": lambda vocab=0, **kwargs: SkipDecode(LinearDepth(LAYERS, 2, 1, 8), **kwargs),
    "tokenselect": lambda vocab=0, **kwargs: TokenSelect(
        top_k=2, n_init=1, n_local=3, chunk_size=2, score_dtype="float32", **kwargs
    ),
    "r2r": lambda **kwargs: R2R(small(kwargs.pop("vocab", VOCAB)), EntropyRouter(), threshold=0.9, **kwargs),
    "three beams": lambda vocab=0, **kwargs: QStarBeam(3, **kwargs),
}
ALL = LOSSLESS | LOSSY
STREAMING = [name for name in ALL if name != "three beams"]
PROMPT = torch.tensor([[3, 5, 8, 2, 7, 7, 1]])


def target(**kwargs):
    return tiny_llama(VOCAB, seed=1, layers=LAYERS, **kwargs)


def run(model, decoder, prompt=PROMPT, **kwargs):
    kwargs = {"do_sample": False, "max_new_tokens": 12, "attention_mask": torch.ones_like(prompt)} | kwargs
    return model.generate(prompt, custom_generate=decoder, **kwargs)


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"max_new_tokens": 1},
        {"max_new_tokens": None, "max_length": 15},
        {"min_new_tokens": 5},
        {"suppress_tokens": [1, 2]},
    ],
    ids=str,
)
def test_greedy_text_is_that_of_generate(name, settings):
    model = target()
    expected = run(model, None, **settings)
    assert run(model, LOSSLESS[name](), **settings).tolist() == expected.tolist()


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 3}], ids=str)
def test_samples_follow_the_models_distribution(name, sampling):
    model = tiny_llama(5, seed=3, layers=LAYERS, scale=0.4)
    check_distribution(model, LOSSLESS[name](vocab=5), [1, 2], 600, steps=2, **sampling)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("sampling", [{"top_p": 0.5}, {"min_p": 0.4}, {"top_k": 1}], ids=str)
def test_warpers_restrict_what_is_sampled(name, sampling):
    """With all mass but the likeliest token's cut away, sampling is greedy decoding."""
    model = target(scale=8)  # one token has nearly all the mass
    torch.manual_seed(0)
    sampled = run(model, ALL[name](), do_sample=True, **{"top_k": 0} | sampling)
    greedy = run(model, ALL[name]())
    assert sampled.tolist() == greedy.tolist()


@pytest.mark.parametrize("name", ALL)
def test_an_end_token_ends_the_text_wherever_it_comes(name):
    model = target()
    text = run(model, ALL[name]())[0, PROMPT.shape[1] :].tolist()
    for place, token in enumerate(text):
        if token in text[:place] or name == "three beams":  # an end token changes which beams survive
            continue
        got = run(model, ALL[name](), eos_token_id=[token, VOCAB + 5])[0, PROMPT.shape[1] :].tolist()
        assert got == text[: place + 1]
    for token in range(VOCAB):
        got = run(model, ALL[name](), eos_token_id=token)[0, PROMPT.shape[1] :].tolist()
        ends = [place for place, item in enumerate(got) if item == token]
        assert not ends or set(got[ends[0] :]) <= {token, 0}


@pytest.mark.parametrize("name", ALL)
def test_ragged_batches_give_what_single_rows_give(name):
    model = target()
    prompts = [[3, 5, 8, 2, 7, 7, 1], [4, 4], [9, 1, 6, 2]]
    single = [run(model, ALL[name](), torch.tensor([p]))[0, len(p) :].tolist() for p in prompts]
    ids = torch.tensor([[0] * (7 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (7 - len(p)) + [1] * len(p) for p in prompts])
    together = run(model, ALL[name](), ids, attention_mask=mask)[:, 7:].tolist()
    if name == "tokenselect":  # chunks of a prompt begin elsewhere, and with them its selections
        together, single = together[:1], single[:1]
    assert together == single


@pytest.mark.parametrize("name", [*LOSSLESS, "tokenselect"])
def test_a_cache_is_reused_across_calls(name):
    model = target()
    whole = run(
        model, LOSSLESS[name]() if name in LOSSLESS else TokenSelect(top_k=2, n_init=1, n_local=4, chunk_size=1)
    )
    make = LOSSLESS.get(name, lambda: TokenSelect(top_k=2, n_init=1, n_local=4, chunk_size=1))
    first = run(model, make(), max_new_tokens=5, return_dict_in_generate=True)
    assert first.sequences.tolist() == whole[:, : PROMPT.shape[1] + 5].tolist()
    cache = first.past_key_values
    assert 0 < cache.get_seq_length() < first.sequences.shape[1]
    second = run(model, make(), first.sequences, max_new_tokens=7, past_key_values=cache)
    assert second.tolist() == whole.tolist()


class Recorder:
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("name", STREAMING)
def test_a_streamer_sees_every_token_once_and_in_order(name):
    model, recorder = target(), Recorder()
    output = ALL[name]().generate(
        model, PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, max_new_tokens=12, streamer=recorder
    )
    assert recorder.tokens == output[0].tolist()
    assert recorder.ended == 1


def test_beams_refuse_a_streamer():
    with pytest.raises(BadInputError, match="streamer"):
        QStarBeam(3)(target(), PROMPT, generation_config=target().generation_config, streamer=Recorder())


@pytest.mark.parametrize("name", ALL)
def test_cancelling_leaves_the_model_as_it_was(name):
    model = target()
    before = run(model, None).tolist()
    hooks = [len(item._forward_hooks) + len(item._forward_pre_hooks) for item in model.modules()]
    keys = [set(item.__dict__) for item in model.modules()]

    def stop(input_ids, scores, **kwargs):
        if input_ids.shape[1] >= PROMPT.shape[1] + 3:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)

    decoder = ALL[name]()
    with pytest.raises(KeyboardInterrupt):
        run(model, decoder, stopping_criteria=[stop])
    assert [len(item._forward_hooks) + len(item._forward_pre_hooks) for item in model.modules()] == hooks
    assert [set(item.__dict__) for item in model.modules()] == keys
    assert run(model, None).tolist() == before
    again = run(model, decoder)
    assert again.tolist() == run(model, ALL[name]()).tolist()


@pytest.mark.parametrize("name", LOSSLESS)
def test_scores_and_logits_are_those_of_generate(name):
    model = target()
    arguments = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, repetition_penalty=1.2)
    expected, actual = run(model, None, **arguments), run(model, LOSSLESS[name](), **arguments)
    for kind in ("scores", "logits"):
        for ours, theirs in zip(actual[kind], expected[kind], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("three beams", "one beam")])
def test_several_samples_of_one_prompt_and_the_seed(name):
    model = target(scale=0.2)
    samples = []
    for _ in range(2):
        torch.manual_seed(5)
        samples.append(run(model, ALL[name](), do_sample=True, num_return_sequences=3).tolist())
    assert samples[0] == samples[1]
    assert len(samples[0]) == 3
    assert len({tuple(row) for row in samples[0]}) > 1


@pytest.mark.parametrize("name", ALL)
def test_stop_strings(name):
    from everytoken.reproduce.beds.small_models import character_tokenizer

    tokenizer = character_tokenizer("abcdefghijk")
    model = target()
    text = tokenizer.decode(run(model, ALL[name]())[0, PROMPT.shape[1] :])
    stop = text[4:6]
    output = ALL[name]().generate(
        model, PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, max_new_tokens=12, stop_strings=stop,
        tokenizer=tokenizer,
    )  # fmt: skip
    got = tokenizer.decode(output[0, PROMPT.shape[1] :])
    if name == "three beams":
        assert stop not in got[:-2].rstrip("\n")
    else:
        assert got == text[: text.index(stop) + 2]


@pytest.mark.parametrize("name", ALL)
def test_inside_inference_mode_and_out_again(name):
    model = target()
    with torch.inference_mode():
        inside = run(model, ALL[name]())
    assert inside.tolist() == run(model, ALL[name]()).tolist()
    model(PROMPT, labels=PROMPT).loss.backward()
    assert next(model.parameters()).grad is not None


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_matcher_is_obeyed(name):
    model, matcher = target(), ToyMatcher()
    expected = run(model, None, logits_processor=[MatcherLogitsProcessor(matcher, PROMPT.shape[1])])
    got = run(model, LOSSLESS[name](matcher=matcher))
    assert got.tolist() == expected.tolist()
    assert [token % 2 for token in got[0, PROMPT.shape[1] :].tolist()] == [0, 1] * 6


@pytest.mark.parametrize("name", ALL)
def test_a_finished_matcher_ends_every_row(name):
    model = target()
    decoder = ALL[name](matcher=ToyMatcher(length=4, end=12))
    prompts = torch.tensor([[3, 5, 8], [1, 1, 2]])
    output = run(model, decoder, prompts, eos_token_id=12)
    for row in output[:, 3:].tolist():
        assert [token % 2 for token in row[:4]] == [0, 1, 0, 1]
        assert row[4] == 12


@pytest.mark.parametrize("name", ALL)
def test_traces_have_a_value_for_every_token(name):
    model = target()
    decoder = ALL[name](trace_enabled=True)
    prompts = torch.tensor([[3, 5, 8], [1, 1, 2]])
    output = run(model, decoder, prompts)
    assert len(decoder.trace) == 2
    for trace, row in zip(decoder.trace, output.tolist(), strict=True):
        assert trace.ids in (row, row[3:])
        assert decoder.colour in trace.columns
    assert decoder.stats.new_tokens == 24
    assert decoder.stats.seconds > 0
    assert all(isinstance(value, float) for value in decoder.figures().values())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"use_cache": False}, "use_cache"), ({"penalty_alpha": 0.5, "top_k": 4}, "contrastive")],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name_before_any_forward(name, arguments, words):
    model = target()
    called = []
    model.register_forward_pre_hook(lambda *_: called.append(1))
    config = model.generation_config.__class__(**{"do_sample": False, "max_new_tokens": 4} | arguments)
    with pytest.raises(BadInputError, match=words):
        ALL[name]()(model, PROMPT, generation_config=config, past_key_values=None)
    assert not called


@pytest.mark.parametrize("name", ALL)
def test_an_empty_prompt_is_refused(name):
    model = target()
    with pytest.raises(BadInputError, match="empty"):
        ALL[name]()(model, PROMPT[:, :0], generation_config=model.generation_config)


@pytest.mark.parametrize("name", ["skipdecode", "tokenselect", "skipdecode, all layers", "tokenselect, all tokens"])
def test_transformers_beams_run_through_these_decoders(name):
    model = target()
    output = run(model, ALL[name](), num_beams=3)
    if name in LOSSLESS:
        assert output.tolist() == run(model, None, num_beams=3).tolist()
    assert output.shape[1] <= PROMPT.shape[1] + 12

"""The Decoder contract: counters, refusals, vocabulary checks."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from transformers import GenerationConfig, T5Config

from everytoken.core.errors import BadInputError, TokenizerMismatchError, UnsupportedModelError
from everytoken.decoding.base import Decoder
from everytoken.decoding.call import DecodingStats
from everytoken.decoding.checks import (
    check_prompt,
    check_same_vocabulary,
    refuse_unsupported,
)
from everytoken.decoding.plain import PlainDecoding
from everytoken.decoding.trial import Trial, TrialRequest, run_decoders
from everytoken.generation.r2r import R2R
from everytoken.generation.skipdecode import LinearDepth, SkipDecode
from everytoken.testing.models import tiny_tokenizer

from ..conftest import tiny_llama


def test_counters():
    stats = DecodingStats(new_tokens=30, accepted=12, rounds=6, seconds=2.0)
    assert stats.tokens_per_second == 15
    assert stats.mean_accepted == 2
    assert DecodingStats().tokens_per_second == DecodingStats().mean_accepted == 0
    assert stats.as_dict()["mean_accepted"] == 2


def test_refusals_name_what_they_refuse():
    with pytest.raises(BadInputError, match="num_beams > 1, use_cache=False"):
        refuse_unsupported("X", GenerationConfig(num_beams=3, use_cache=False), False)
    with pytest.raises(BadInputError, match="synced_gpus"):
        refuse_unsupported("X", GenerationConfig(), True)
    refuse_unsupported("X", GenerationConfig(do_sample=True, temperature=0.3), False)


def test_prompts():
    check_prompt(tiny_llama(9), 255)
    for length, word in ((0, "empty"), (256, "context")):
        with pytest.raises(BadInputError, match=word):
            check_prompt(tiny_llama(9), length)


def test_vocabularies_may_differ_by_padding_only():
    assert check_same_vocabulary(tiny_llama(40), tiny_llama(32)) == 40  # the target writes what the draft lacks
    assert check_same_vocabulary(tiny_llama(32), tiny_llama(40)) == 32
    assert check_same_vocabulary(tiny_llama(40, eos=35), tiny_llama(32, eos=3)) == 40
    with pytest.raises(TokenizerMismatchError, match="end a text"):
        check_same_vocabulary(tiny_llama(40, eos=5), tiny_llama(32, eos=3))
    with pytest.raises(TokenizerMismatchError):
        check_same_vocabulary(tiny_llama(1000), tiny_llama(32))


def test_base_class_is_abstract():
    with pytest.raises(NotImplementedError):
        Decoder()(tiny_llama(9), torch.tensor([[1]]))


def test_decoders_are_copied_pickled_and_replaced_without_their_last_call():
    decoder, model = SkipDecode(LinearDepth(2, 1, 1, 4), trace_enabled=True), tiny_llama(9)
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, custom_generate=decoder)
    assert decoder.stats.new_tokens == 3
    assert len(decoder.trace) == 1
    assert decoder.layers_run
    for other in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder)), dataclasses.replace(decoder)):
        assert other == decoder
        assert other.stats.new_tokens == 0
        assert other.trace == other.layers_run == []
    assert dataclasses.asdict(decoder)["schedule"] == dataclasses.asdict(LinearDepth(2, 1, 1, 4))
    assert "stats" not in dataclasses.asdict(decoder)


def test_what_a_decoder_lacks_is_said_from_the_configuration():
    config = tiny_llama(9).config
    SkipDecode(LinearDepth(2, 1)).check_model(config)
    with pytest.raises(BadInputError, match="the model has 2"):
        SkipDecode(LinearDepth(3, 1)).check_model(config)
    with pytest.raises(BadInputError, match="impossible"):
        SkipDecode(speedup=3.0).check_model(config)
    with pytest.raises(UnsupportedModelError, match="No draft model ships"):
        R2R().check_model(config)
    with pytest.raises(UnsupportedModelError, match="encoder"):
        SkipDecode().check_model(T5Config())


def test_a_trial_asks_before_weights_are_read(tmp_path):
    model = tiny_llama(9)
    model.config.save_pretrained(tmp_path)  # there are no weights to read
    with pytest.raises(UnsupportedModelError, match="No draft model ships"):
        run_decoders(TrialRequest([Trial("r2r", R2R)], model=str(tmp_path)), "a prompt")


def test_a_trial_warms_every_decoder_up_and_counts_its_second_run(tmp_path):
    """Kernels are compiled and speeds measured where a decoder first runs: that is not its speed."""
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer), seed=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    calls = []

    class Counting(PlainDecoding):
        def decode_row(self, call, row):
            super().decode_row(call, row)
            calls.append((len(row.text) - len(row.new), len(row.new)))

    prompt = "abc" * 30
    options = {"max_new_tokens": 20, "calibrate": False}
    result = run_decoders(TrialRequest([Trial("it", Counting)], str(tmp_path), prompt, options=options), "")
    assert [new for _, new in calls] == [8, 20] and calls[0][0] == 64 < calls[1][0]
    assert result.rows["it"]["new tokens"] == 20 and len(result.traces) == 1

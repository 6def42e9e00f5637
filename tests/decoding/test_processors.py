"""Processors and criteria, as one row of a batch, or a node of a tree, has to be shown to them."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from everytoken.core.errors import BadInputError
from everytoken.generation.dyspec import DySpec
from everytoken.generation.qstar_beam import QStarBeam
from everytoken.generation.r2r import R2R
from everytoken.testing.models import tiny_llama

IDS = torch.tensor([[0, 0, 0, 3, 5, 5, 7], [2, 9, 4, 4, 8, 1, 6], [0, 0, 8, 8, 3, 8, 3]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 0, 1, 1, 1, 1, 1]])
MODEL = tiny_llama(13, seed=1, layers=3)
DRAFT = tiny_llama(13, seed=9)
DECODERS = {
    "DySpec": lambda: DySpec(DRAFT, budget=6),
    "fixed size": lambda: DySpec(DRAFT, budget=5, threshold=None),
    "R2R": lambda: R2R(DRAFT, threshold=0.0),
    "beam of one": lambda: QStarBeam(1),
}
SETTINGS = {
    "penalty": {"repetition_penalty": 1.4},
    "penalty of a configuration": {"generation_config": GenerationConfig(repetition_penalty=1.4, pad_token_id=0)},
    "prompt's penalty": {"encoder_repetition_penalty": 1.5},
    "prompt's n-grams": {"encoder_no_repeat_ngram_size": 2},
    "allowed by row": {"prefix_allowed_tokens_fn": lambda row, ids: [2 * row + 1, 2 * row + 2, int(ids[-1])]},
    "bias": {"sequence_bias": [[[5], 4.0], [[3, 4], -8.0]]},
}


def run(decoder=None, ids=IDS, mask=MASK, **settings):
    arguments = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0} | settings
    return MODEL.generate(ids, attention_mask=mask, custom_generate=decoder, **arguments)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", SETTINGS)
def test_rows_of_a_padded_batch_are_those_of_generate(name, decoder):
    expected = run(**SETTINGS[name])
    assert run(DECODERS[decoder](), **SETTINGS[name]).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["penalty", "allowed by row"])
def test_beams_that_a_decoder_makes_are_those_that_generate_makes(name):
    expected = run(num_beams=3, length_penalty=0.0, early_stopping=False, **SETTINGS[name])
    assert run(QStarBeam(3), **SETTINGS[name]).tolist() == expected.tolist()


def test_guidance_follows_the_checked_tokens_of_every_row():
    negative = torch.tensor([[1, 2], [7, 7], [4, 9]])
    for settings in ({"guidance_scale": 1.8}, {"guidance_scale": 1.8, "negative_prompt_ids": negative}):
        expected = run(**settings)
        assert run(DySpec(DRAFT, budget=6), **settings).tolist() == expected.tolist()
        with pytest.raises(BadInputError, match="UnbatchedClassifierFreeGuidance"):
            run(R2R(DRAFT), **settings)
    with pytest.raises(BadInputError, match="num_beams=2"):
        run(QStarBeam(2), guidance_scale=1.8)


class Alternates(LogitsProcessor):
    """Forbids odd tokens at every other call, and takes one text only."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        assert len(input_ids) == len(scores) == 1
        self.calls += 1
        scores = scores.clone()
        scores[:, self.calls % 2 :: 2] = -torch.inf
        return scores


class Parity(LogitsProcessor):
    """Forbids tokens of the last one's parity; remembers nothing, and takes one text only."""

    def __call__(self, input_ids, scores):
        assert len(input_ids) == len(scores) == 1
        scores = scores.clone()
        scores[:, int(input_ids[0, -1]) % 2 :: 2] = -torch.inf
        return scores


def test_a_processor_of_the_users_is_asked_once_a_token_in_order():
    one, mask = IDS[1:2], MASK[1:2]
    expected = run(ids=one, mask=mask, logits_processor=[Alternates()])
    mine = Alternates()
    got = run(DySpec(DRAFT, budget=6), ids=one, mask=mask, logits_processor=[mine])
    assert got.tolist() == expected.tolist()
    assert mine.calls == 9
    for decoder, ids, keep in ((DySpec(DRAFT, budget=6), IDS, MASK), (R2R(DRAFT), one, mask)):
        with pytest.raises(BadInputError, match=r"Alternates remembers earlier calls .calls changed"):
            run(decoder, ids=ids, mask=keep, logits_processor=[Alternates()])


def test_a_processor_without_memory_serves_everyone():
    one, mask = IDS[1:2], MASK[1:2]
    expected = run(ids=one, mask=mask, logits_processor=[Parity()]).tolist()
    for name, decoder in DECODERS.items():
        assert run(decoder(), ids=one, mask=mask, logits_processor=[Parity()]).tolist() == expected, name
    together = run(DySpec(DRAFT, budget=6), logits_processor=[Parity()])
    assert together[1].tolist() == expected[0]


class Counts(StoppingCriteria):
    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return torch.full((len(input_ids),), self.calls >= 4)


class SureOf(StoppingCriteria):
    """Ends where the last step's likeliest token had a large score."""

    def __call__(self, input_ids, scores, **kwargs):
        return scores[-1].max(-1).values > 6.0


@pytest.mark.parametrize("decoder", DECODERS)
def test_criteria(decoder):
    one, mask = IDS[1:2], MASK[1:2]
    expected = run(ids=one, mask=mask, stopping_criteria=[Counts()])
    got = run(DECODERS[decoder](), ids=one, mask=mask, stopping_criteria=[Counts()])
    assert got.tolist() == expected.tolist()
    asked = {"stopping_criteria": [SureOf()], "return_dict_in_generate": True, "output_scores": True}
    expected = run(ids=one, mask=mask, **asked).sequences
    assert run(DECODERS[decoder](), ids=one, mask=mask, **asked).sequences.tolist() == expected.tolist()


def test_a_criterion_that_remembers_is_refused_for_several_rows():
    with pytest.raises(BadInputError, match="Counts remembers earlier calls"):
        run(DySpec(DRAFT, budget=6), stopping_criteria=[Counts()])

"""Prompts read in fewer positions."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.tokenization.dynamic_prefill import DynamicPrefill
from everytoken.tokenization.dynamic_tokenization import DynamicTokenizer
from everytoken.tokenization.hyper import MeanEmbedding

from .common import TEXTS, byte_level, hyper_for, model_for, prompts


def test_prefill_without_merges_is_plain_generation():
    tokenizer = byte_level()
    model = model_for(tokenizer)
    inputs = prompts(tokenizer, TEXTS)
    prefill = DynamicPrefill(DynamicTokenizer(tokenizer, merges=0, embedder=MeanEmbedding(model)))
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=1)
    ours = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=1, custom_generate=prefill)
    assert torch.equal(plain, ours)


@pytest.mark.slow
def test_prefill_reads_fewer_positions():
    tokenizer = byte_level()
    model = model_for(tokenizer)
    inputs = prompts(tokenizer, TEXTS)
    for keep in (0, 1, 3):
        dynamic = DynamicTokenizer(tokenizer, reduction=1.0, embedder=hyper_for(model))
        prefill = DynamicPrefill(dynamic, keep)
        torch.manual_seed(0)
        out = model.generate(**inputs, max_new_tokens=5, do_sample=True, pad_token_id=1, custom_generate=prefill)
        assert out.shape == (3, inputs["input_ids"].shape[1] + 5) and torch.equal(out[:, :-5], inputs["input_ids"])
        assert prefill.positions < int(inputs["attention_mask"].sum())
        one = prompts(tokenizer, TEXTS[:1])
        first = model.generate(**one, max_new_tokens=1, do_sample=False, pad_token_id=1, custom_generate=prefill)
        ids = one["input_ids"][0].tolist()
        batch = dynamic([ids[: len(ids) - keep]])
        embeds = torch.cat(
            [
                batch.inputs_embeds,
                model.get_input_embeddings()(torch.tensor([ids[len(ids) - keep :]], dtype=torch.long)),
            ],
            1,
        )
        assert int(first[0, -1]) == int(model(inputs_embeds=embeds).logits[0, -1].argmax())


def test_a_prompt_that_is_kept_whole():
    tokenizer = byte_level()
    model = model_for(tokenizer)
    inputs = prompts(tokenizer, ["hel", TEXTS[0]])
    prefill = DynamicPrefill(DynamicTokenizer(tokenizer, reduction=1.0, embedder=hyper_for(model)), keep_last=100)
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=1)
    ours = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=1, custom_generate=prefill)
    assert torch.equal(plain, ours) and prefill.positions == int(inputs["attention_mask"].sum())


def test_bad_input():
    tokenizer = byte_level()
    mean = MeanEmbedding(model_for(tokenizer))
    with pytest.raises(BadInputError, match="no embedder"):
        DynamicPrefill(DynamicTokenizer(tokenizer))
    with pytest.raises(BadInputError, match="keep_last"):
        DynamicPrefill(DynamicTokenizer(tokenizer, embedder=mean), -1)

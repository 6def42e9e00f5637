"""Generation over a vocabulary of any size: against the definition, and the index against exact search."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.tokenization.hyper import MeanEmbedding
from everytoken.tokenization.large_vocabulary import LargeVocabulary

from ..conftest import tiny_llama
from .common import TEXTS, byte_level, hyper_for, model_for, new_tokens, prompts


def test_no_new_tokens_and_exact_search_is_plain_greedy():
    tokenizer = byte_level()
    model = model_for(tokenizer)
    inputs = prompts(tokenizer, TEXTS)
    decoder = LargeVocabulary([], MeanEmbedding(model), index="exact").build(model)
    plain = model.generate(**inputs, max_new_tokens=9, do_sample=False, pad_token_id=1)
    assert torch.equal(
        plain, model.generate(**inputs, max_new_tokens=9, do_sample=False, pad_token_id=1, custom_generate=decoder)
    )
    assert decoder.steps == 27


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_the_large_vocabulary_is_the_definition(index):
    tokenizer = byte_level()
    model = model_for(tokenizer)
    tokens, hyper = new_tokens(tokenizer), hyper_for(model)
    torch.nn.init.normal_(hyper.write.weight, std=2.0)  # large enough to be chosen
    decoder = LargeVocabulary(tokens, hyper, top_k=5, index=index).build(model)
    assert len(decoder) == len(tokenizer) + len(tokens)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1, custom_generate=decoder)
    embeds, text = model.get_input_embeddings()(ids), []
    inputs, outputs = hyper.embed(tokens)
    head = torch.cat([model.lm_head.weight, outputs])
    while len(text) < 12:  # by hand: every inner product, the whole text anew
        hidden = model.base_model(inputs_embeds=embeds).last_hidden_state[0, -1]
        number = int((head @ hidden).argmax())
        text += decoder.pieces(number)
        vector = (
            model.get_input_embeddings().weight[number] if number < len(tokenizer) else inputs[number - len(tokenizer)]
        )
        embeds = torch.cat([embeds, vector[None, None]], 1)
    assert out[0, ids.shape[1] :].tolist() == text[:12]
    assert any(len(item) > 1 for item in decoder.chosen[0])


def test_the_index_finds_what_exact_search_finds():
    torch.manual_seed(0)
    model = tiny_llama(3000, hidden=32)
    pieces = [tuple(row) for row in torch.randint(0, 3000, (3000, 3)).tolist()]
    sample = torch.randint(0, 3000, (8, 120)).tolist()
    decoder = LargeVocabulary(pieces, MeanEmbedding(model), top_k=16, expansion_search=512).build(model, sample)
    hidden = model.base_model(torch.randint(0, 3000, (4, 60))).last_hidden_state.flatten(0, 1)
    assert decoder.recall(hidden) > 0.95
    numbers, logits = decoder.nearest(hidden[:3])
    assert torch.allclose(logits, (decoder._outputs[numbers] @ hidden[:3, :, None])[..., 0], atol=1e-4)
    assert (logits.diff(dim=-1) <= 0).all()


def test_sampling_follows_the_softmax_of_what_was_found():
    from scipy.stats import chisquare

    tokenizer = byte_level()
    model = model_for(tokenizer)
    decoder = LargeVocabulary(new_tokens(tokenizer), MeanEmbedding(model), top_k=4, index="exact").build(model)
    ids = tokenizer("hello wor", return_tensors="pt")["input_ids"]
    numbers, logits = decoder.nearest(model.base_model(ids).last_hidden_state[:, -1])
    wanted = (logits[0] / 3).softmax(-1).double().numpy()
    torch.manual_seed(1)
    seen = Counter()
    out = model.generate(
        ids.repeat(400, 1),
        max_new_tokens=1,
        do_sample=True,
        temperature=3.0,
        top_k=0,
        pad_token_id=1,
        custom_generate=decoder,
    )
    assert out.shape == (400, ids.shape[1] + 1)
    for row in decoder.chosen:
        seen[row[0]] += 1
    found = [seen[decoder.pieces(int(number))] for number in numbers[0]]
    assert sum(found) == 400 and chisquare(found, 400 * wanted / wanted.sum()).pvalue > 1e-4


def test_bad_input():
    tokenizer = byte_level()
    model = model_for(tokenizer)
    mean = MeanEmbedding(model)
    large = LargeVocabulary([(3, 4)], mean, index="exact")

    def short(decoder, **options):
        return model.generate(torch.tensor([[3, 4]]), custom_generate=decoder, max_new_tokens=2, **options)

    for make, message in (
        (lambda: LargeVocabulary([()], mean), "pieces"),
        (lambda: LargeVocabulary([], mean, top_k=0), "top_k"),
        (lambda: LargeVocabulary([], mean, index="scann"), "index"),
        (lambda: short(large), "not at all"),
        (lambda: short(large.build(model), repetition_penalty=1.2), "Repetition"),
        (lambda: short(large.build(model), num_beams=2), "num_beams"),
    ):
        with pytest.raises(BadInputError, match=message):
            make()
    biased = model_for(tokenizer)
    biased.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    with pytest.raises(UnsupportedModelError, match="inner products"):
        large.build(biased)

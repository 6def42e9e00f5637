"""Dynamic tokenization: texts never change, merges equal counting anew; embeddings, prefill, the large vocabulary."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.core.vocabulary import backend_of
from everytoken.tokenization.base import spell, token_bytes
from everytoken.tokenization.dynamic_prefill import DynamicPrefill
from everytoken.tokenization.dynamic_tokenization import DynamicTokenizer
from everytoken.tokenization.embedding import EmbeddingCache
from everytoken.tokenization.hyper import HyperConfig, HyperEmbedding, MeanEmbedding
from everytoken.tokenization.large_vocabulary import LargeVocabulary

from ..conftest import tiny_llama
from .common import byte_level, sentencepiece

TEXTS = [
    "strawberries wonderful wonderful helpers",
    "unbelievable strawberries, isn't it?\n\n  well",
    "naïve 漢字漢字 12345",
]
ANY = st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=3)


def model_for(tokenizer):
    return tiny_llama(len(tokenizer), seed=4)


# -- merges ------------------------------------------------------------------------------------------------------------
def anew(dynamic, rows, merges):
    """The paper's algorithm on tokens' bytes, counted anew for every merge; special tokens are single objects."""
    table = token_bytes(dynamic.tokenizer)
    rows, done = [[table[item] if table[item] else item for item in row] for row in rows], 0
    while merges is None or done < merges:
        counts = Counter()
        for row in rows:
            for left, right in itertools.pairwise(row):
                if isinstance(left, bytes) and isinstance(right, bytes) and dynamic.valid(left, right):
                    counts[left, right] += 1
        if not counts:
            break
        left, right = max(counts, key=counts.get)
        done += 1
        for number, row in enumerate(rows):
            new, place = [], 0
            while place < len(row):
                if row[place : place + 2] == [left, right]:
                    new.append(left + right)
                    place += 2
                else:
                    new.append(row[place])
                    place += 1
            rows[number] = new
    return rows


@pytest.mark.parametrize("boundary", ["pretoken", "word", "sentence"])
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@given(texts=ANY | st.just(TEXTS), merges=st.none() | st.integers(0, 30))
def test_merges_equal_counting_anew(make, boundary, texts, merges):
    tokenizer = make()
    dynamic = DynamicTokenizer(tokenizer, merges=10_000 if merges is None else merges, boundary=boundary)
    batch = dynamic(texts)
    wanted = anew(dynamic, batch.base_ids, merges)
    for number, row in enumerate(wanted):
        assert dynamic.spell(batch, number) == [item if isinstance(item, bytes) else b"" for item in row]


@given(texts=ANY, reduction=st.floats(0, 1))
def test_texts_never_change(texts, reduction):
    for make in (byte_level, sentencepiece):
        tokenizer = make()
        dynamic = DynamicTokenizer(tokenizer, reduction=reduction)
        batch = dynamic(texts)
        table = token_bytes(tokenizer)
        for number, base in enumerate(batch.base_ids):
            assert base == tokenizer(texts[number])["input_ids"]
            assert b"".join(dynamic.spell(batch, number)) == spell(tokenizer, base)
            assert [place for place, _ in batch.spans[number]] == [0, *[end for _, end in batch.spans[number]][:-1]]
            for token, (first, end) in zip(batch.tokens[number], batch.spans[number], strict=True):
                data = b"".join(table[item] or b"" for item in base[first:end])
                if token >= 0:
                    assert token == base[first] or table[token] == data
                else:
                    assert b"".join(table[item] or b"" for item in batch.pieces[-1 - token]) == data


def test_no_merges_is_the_identity():
    tokenizer = byte_level()
    model = model_for(tokenizer)
    dynamic = DynamicTokenizer(tokenizer, merges=0, embedder=MeanEmbedding(model))
    batch = dynamic(TEXTS)
    assert batch.tokens == batch.base_ids and not batch.pieces and batch.reduction == 0
    embeds = model.get_input_embeddings()(torch.tensor(batch.base_ids[0]))
    assert torch.equal(batch.inputs_embeds[0][batch.attention_mask[0].bool()], embeds)


def test_full_merging_gives_whole_pretokens():
    tokenizer = byte_level()
    cut = backend_of(tokenizer).pre_tokenizer
    text = "there were 12 helpers, they'd say: how unbelievably helpful the 漢字 café was"
    dynamic = DynamicTokenizer(tokenizer, reduction=1.0)
    batch = dynamic([text])
    pre = [text.encode()[len(text[:a].encode()) : len(text[:b].encode())] for _, (a, b) in cut.pre_tokenize_str(text)]
    assert dynamic.spell(batch, 0) == pre


def test_boundaries():
    tokenizer = byte_level()

    def parts(text, boundary):
        dynamic = DynamicTokenizer(tokenizer, reduction=1.0, boundary=boundary)
        return dynamic.spell(dynamic([text]), 0)

    assert parts("(helpful)", "pretoken") == [b"(", b"helpful", b")"]
    assert parts("(helpful) or", "word") == [b"(helpful)", b" or"]
    assert parts("well\n\nwell", "pretoken") == [b"well", b"\n", b"\n", b"well"]
    assert parts("a    b", "pretoken") == [b"a", b"   ", b" b"] or b"".join(parts("a    b", "pretoken")) == b"a    b"
    one = DynamicTokenizer(tokenizer)
    assert not one.valid(b"\n", b"\n") and one.valid(b" ", b" ") and not one.valid(b"a", b" b")
    assert one.valid(b" \xe6", b"\xbc")  # half a character: nothing to test yet


def test_special_tokens_stay():
    tokenizer = byte_level()
    dynamic = DynamicTokenizer(tokenizer, reduction=1.0, boundary="sentence")
    batch = dynamic([[0, *tokenizer("hello")["input_ids"], 1, 1]])
    assert batch.tokens[0][0] == 0 and batch.tokens[0][-2:] == [1, 1]


# -- targets -----------------------------------------------------------------------------------------------------------
def test_reductions_reach_their_share():
    tokenizer = byte_level()
    base = sum(len(row) for row in DynamicTokenizer(tokenizer, merges=0)(TEXTS).tokens)
    least = sum(len(row) for row in DynamicTokenizer(tokenizer, reduction=1.0)(TEXTS).tokens)
    before = base
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        dynamic = DynamicTokenizer(tokenizer, reduction=share)
        batch = dynamic(TEXTS)
        count = sum(map(len, batch.tokens))
        assert base - count >= share * (base - least) - 1e-6 and count <= before
        if batch.merges:
            fewer = DynamicTokenizer(tokenizer, merges=batch.merges - 1)(TEXTS)
            assert base - sum(map(len, fewer.tokens)) < share * (base - least)
        before = count


def test_a_fitted_table_gives_one_number_of_merges():
    tokenizer = byte_level()
    dynamic = DynamicTokenizer(tokenizer, reduction=0.5).fit(TEXTS, batch_size=2)
    assert dynamic.table[0] == pytest.approx(np.mean([len(tokenizer(text)["input_ids"]) for text in TEXTS]))
    assert (np.diff(dynamic.table) <= 0).all()
    merges = dynamic.merges_for(0.5)
    assert dynamic(TEXTS).merges == merges == DynamicTokenizer(tokenizer, merges=merges)(TEXTS).merges
    assert dynamic.merges_for(0.0) == 0


def test_labels_are_carried():
    tokenizer = byte_level()
    encoded = tokenizer(["unbelievable helpers say"])
    dynamic = DynamicTokenizer(tokenizer, reduction=1.0)
    batch = dynamic(["unbelievable helpers say"])
    assert batch.carry(encoded.word_ids(0), 0) == [0, 1, 2]
    with pytest.raises(BadInputError, match="values"):
        batch.carry([1], 0)


# -- embeddings --------------------------------------------------------------------------------------------------------
def hyper_for(model, seed=0, trained=True):
    torch.manual_seed(seed)
    weight = model.get_input_embeddings().weight
    hyper = HyperEmbedding(HyperConfig(weight.shape[1], 16, 1, 2, 4, len(weight), float(weight.detach().std()))).eval()
    if trained:
        for layer in (hyper.score, hyper.write):
            torch.nn.init.normal_(layer.weight, std=0.3)
    return hyper.attach(model)


def test_an_untrained_hypernetwork_is_the_mean_of_the_pieces():
    model = model_for(byte_level())
    pieces = [(3, 4), (5, 6, 7), (8,), (9, 9, 9, 9, 9, 9, 9)]
    for mine, mean in zip(
        hyper_for(model, trained=False).embed(pieces), MeanEmbedding(model).embed(pieces), strict=True
    ):
        assert torch.allclose(mine, mean, atol=1e-5)
    weight = model.get_input_embeddings().weight
    assert torch.allclose(MeanEmbedding(model).embed(pieces)[0][1], weight[[5, 6, 7]].mean(0), atol=1e-6)


def test_padding_and_company_change_nothing():
    model = model_for(byte_level())
    hyper = hyper_for(model)
    alone = hyper.embed([(3, 4)])[0][0]
    together = hyper.embed([(3, 4), (5, 6, 7, 8, 9)])[0][0]
    assert torch.allclose(alone, together, atol=1e-5)
    assert not torch.allclose(alone, hyper.embed([(4, 3)])[0][0], atol=1e-3)  # order matters


def test_gradients_reach_every_weight():
    model = model_for(byte_level())
    hyper = hyper_for(model).train()
    first, second = hyper.apply_to([(3, 4), (5, 6, 7, 8)])
    (first.square().sum() + second.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in hyper.parameters())


def test_saved_and_loaded(tmp_path):
    model = model_for(byte_level())
    hyper = hyper_for(model)
    hyper.save_pretrained(tmp_path)
    again = HyperEmbedding.from_pretrained(tmp_path).attach(model)
    assert torch.allclose(again.embed([(3, 4)])[0], hyper.embed([(3, 4)])[0], atol=1e-2)  # half precision
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    for folder, message in ((tmp_path, "cannot be read"), ("nowhere", "no hypernetwork")):
        with pytest.raises(BadInputError, match=message):
            HyperEmbedding.from_pretrained(folder)
    with pytest.raises(BadInputError, match="embeddings of width"):
        hyper.attach(tiny_llama(50))


def test_the_cache_drops_the_least_recently_used():
    model = model_for(byte_level())
    mean, cache = MeanEmbedding(model), EmbeddingCache(2)
    a, b, c = (3, 4), (4, 5), (5, 6)
    cache.rows([a, b], mean)
    cache.rows([a], mean)
    rows = cache.rows([c, a], mean)
    assert a in cache and c in cache and b not in cache and len(cache) == 2
    assert (cache.hits, cache.misses) == (2, 3)
    assert torch.equal(rows, mean.embed([c, a])[0])
    assert torch.equal(cache.rows([b, c, a], mean), mean.embed([b, c, a])[0]) and len(cache) == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_and_embedded(side):
    tokenizer = byte_level()
    model = model_for(tokenizer)
    hyper = hyper_for(model)
    dynamic = DynamicTokenizer(tokenizer, reduction=1.0, embedder=hyper, padding_side=side)
    for _ in range(2):  # from the cache the second time
        batch = dynamic(TEXTS)
        for number, row in enumerate(batch.tokens):
            mask = batch.attention_mask[number].bool()
            places = mask.nonzero()[:, 0]
            assert int(mask.sum()) == len(row) and int(places[0]) == (0 if side == "right" else len(mask) - len(row))
            for vector, token in zip(batch.inputs_embeds[number][mask], row, strict=True):
                wanted = (
                    hyper.base(torch.tensor([token]))[0]
                    if token >= 0
                    else hyper.embed([batch.pieces[-1 - token]])[0][0]
                )
                assert torch.allclose(vector, wanted, atol=1e-5)
            assert not batch.inputs_embeds[number][~mask].any()
    assert dynamic.cache.hits == dynamic.cache.misses == len(batch.pieces)
    model(inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask)


# -- decoding ----------------------------------------------------------------------------------------------------------
def prompts(tokenizer, texts):
    tokenizer.pad_token = "</s>"
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")


def test_prefill_without_merges_is_plain_generation():
    tokenizer = byte_level()
    model = model_for(tokenizer)
    inputs = prompts(tokenizer, TEXTS)
    prefill = DynamicPrefill(DynamicTokenizer(tokenizer, merges=0, embedder=MeanEmbedding(model)))
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=1)
    ours = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=1, custom_generate=prefill)
    assert torch.equal(plain, ours)


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


def new_tokens(tokenizer):
    return DynamicTokenizer(tokenizer).vocabulary(TEXTS, 40)


def test_vocabularies_go_on_merging():
    tokenizer = byte_level()
    table = token_bytes(tokenizer)
    tokens = new_tokens(tokenizer)
    spelled = [b"".join(table[item] for item in pieces) for pieces in tokens]
    assert len(set(spelled)) == len(spelled) > 30 and not set(spelled) & {data for data in table if data}
    assert DynamicTokenizer(tokenizer).vocabulary(TEXTS, 7) == tokens[:7]


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


# -- bad input and traces ----------------------------------------------------------------------------------------------
def test_traces_show_the_tokens():
    tokenizer = byte_level()
    batch = DynamicTokenizer(tokenizer, reduction=1.0)(TEXTS)
    trace = batch.trace(1, tokenizer)
    assert "".join(trace.texts) == TEXTS[1] and max(trace.columns["pieces in the token"]) > 2
    assert trace.columns["token"][-1] == len(batch.tokens[1]) - 1


def test_bad_input():
    tokenizer = byte_level()
    model = model_for(tokenizer)
    mean = MeanEmbedding(model)
    large = LargeVocabulary([(3, 4)], mean, index="exact")

    def short(decoder, **options):
        return model.generate(torch.tensor([[3, 4]]), custom_generate=decoder, max_new_tokens=2, **options)

    for make, message in (
        (lambda: DynamicTokenizer(tokenizer, boundary="line"), "boundary"),
        (lambda: DynamicTokenizer(tokenizer, merges=-1), "merges"),
        (lambda: DynamicTokenizer(tokenizer, reduction=30), "share"),
        (lambda: DynamicTokenizer(tokenizer, cache_size=0), "at least one"),
        (lambda: DynamicTokenizer(tokenizer)("one text"), "list of texts"),
        (lambda: DynamicTokenizer(tokenizer)([]), "list of texts"),
        (lambda: DynamicTokenizer(tokenizer)(["a", ""]), "Text 1 has no tokens"),
        (lambda: DynamicTokenizer(tokenizer)([[10**6]]), "outside"),
        (lambda: DynamicTokenizer(tokenizer).merges_for(0.5), "fit"),
        (lambda: DynamicPrefill(DynamicTokenizer(tokenizer)), "no embedder"),
        (lambda: DynamicPrefill(DynamicTokenizer(tokenizer, embedder=mean), -1), "keep_last"),
        (lambda: mean.embed([()]), "without pieces"),
        (lambda: HyperEmbedding(HyperConfig(16)).embed([(1, 2)]), "attached"),
        (lambda: LargeVocabulary([()], mean), "pieces"),
        (lambda: LargeVocabulary([], mean, top_k=0), "top_k"),
        (lambda: LargeVocabulary([], mean, index="scann"), "index"),
        (lambda: short(large), "not at all"),
        (lambda: short(large.build(model), repetition_penalty=1.2), "Repetition"),
        (lambda: short(large.build(model), num_beams=2), "num_beams"),
    ):  # fmt: skip
        with pytest.raises(BadInputError, match=message):
            make()
    biased = model_for(tokenizer)
    biased.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    with pytest.raises(UnsupportedModelError, match="inner products"):
        large.build(biased)
    bare = model_for(tokenizer)
    bare.get_input_embeddings = lambda: None
    with pytest.raises(UnsupportedModelError, match="no token embeddings"):
        MeanEmbedding(bare)

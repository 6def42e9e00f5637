"""TokenAdapt: what new rows are made of, the limits of the mixture, and models that load with plain transformers."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.tokenization.base import token_bytes
from everytoken.tokenization.byte_view import ByteView
from everytoken.tokenization.tokenadapt import TokenAdapt, nearest, pieces_of

from ..conftest import tiny_llama
from ..tiers import commit_tier
from .common import byte_level, sentencepiece
from .families import family


def letters(texts):
    """A stand-in for a sentence embedder: counts of hashed pairs of letters."""
    vectors = np.zeros((len(texts), 64), np.float32)
    for row, text in enumerate(texts):
        for pair in zip(" " + text, text + " ", strict=False):
            vectors[row, (ord(pair[0]) * 31 + ord(pair[1])) % 64] += 1
        vectors[row] += np.random.default_rng(zlib.crc32(text.encode())).random(64) / 20  # no two texts are alike
    return vectors


def adapt(**settings):
    return TokenAdapt(embedder=letters, **settings)


def model_for(tokenizer, tied=False):
    model = tiny_llama(len(tokenizer), seed=3)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.get_input_embeddings().weight
    return model


PAIRS = {
    "to sentencepiece": (byte_level, sentencepiece),
    "to byte-level": (sentencepiece, byte_level),
    "to a larger one": (byte_level, lambda: byte_level(420)),
}


@pytest.mark.parametrize("strategy", ["tokenadapt", "retok", "mean", "random"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_same_tokenizer_changes_nothing(tied, strategy):
    tokenizer = byte_level()
    model = model_for(tokenizer, tied)
    ids = torch.tensor([tokenizer("hello world")["input_ids"]])
    for multiple in (1, 128):
        fresh = adapt(strategy=strategy, pad_to_multiple_of=multiple).transplant(model, tokenizer, tokenizer)
        with torch.inference_mode():
            old, new = model(ids).logits, fresh(ids).logits
        assert new.shape[-1] % multiple == 0
        if multiple == 1:
            assert torch.equal(old, new)
        assert torch.allclose(old, new[..., : old.shape[-1]], atol=1e-5)  # another width, another order of sums
    assert model.config.vocab_size == len(tokenizer)  # the original is as it was


@pytest.mark.parametrize("pair", commit_tier(PAIRS, ["to sentencepiece"]))
@given(g=st.floats(0, 1), temperature=st.floats(0, 2), top_k=st.integers(1, 5))
def test_weights_are_shares(pair, g, temperature, top_k):
    old, new = (make() for make in PAIRS[pair])
    mixture = adapt(global_weight=g, temperature=temperature, top_k=top_k).mix(old, new)
    assert (mixture.weights >= 0).all()
    total = mixture.weights.sum(1)
    assert np.all(np.isclose(total, 1) | (total == 0)) and len(total)
    names, ours = token_bytes(new), token_bytes(old)
    for index, source in enumerate(mixture.copied.tolist()):
        if source >= 0 and names[index]:
            assert names[index] == ours[source]
    assert not set(mixture.rows.tolist()) & set(np.flatnonzero(mixture.copied >= 0).tolist())
    spelled = {data for data in names if data}
    assert {names[i] for i in mixture.rows.tolist()} == spelled - {data for data in ours if data}


def by_hand(old, new, row, g, temperature=0.3, top_k=3):
    """The paper's two estimates for one new token, written out: ``{old id: weight}``."""
    ours, token = token_bytes(old), token_bytes(new)[row]
    view = ByteView(old)
    table = {data: i for i, data in reversed(list(enumerate(ours))) if data}
    pieces = pieces_of(view, token, table)

    def ext(data):
        vector = letters([data.decode("utf-8", "replace")])[0]
        return vector / max(np.linalg.norm(vector), 1e-12)

    def softmax(values):
        values = np.exp(np.array(values) - max(values))
        return values / values.sum()

    def size(data):
        return len(data.decode("utf-8", "replace"))

    w1 = softmax([float(ext(token) @ ext(ours[p])) for p in pieces])
    length = [size(ours[p]) / size(token) for p in pieces]
    local = softmax([(a + b) / 2 / (temperature + 1e-5) for a, b in zip(w1, length, strict=True)])
    cosines = sorted(((float(ext(token) @ ext(data)), i) for i, data in enumerate(ours) if data), reverse=True)[:top_k]
    share = softmax([cosine / (temperature + 1e-5) for cosine, _ in cosines])
    found = {}
    for weight, piece in zip(local, pieces, strict=True):
        found[piece] = found.get(piece, 0) + (1 - g) * weight
    for weight, (_, neighbour) in zip(share, cosines, strict=True):
        found[neighbour] = found.get(neighbour, 0) + g * weight
    return {key: value for key, value in found.items() if value > 1e-9}, cosines


@pytest.mark.parametrize("g", commit_tier([0.0, 0.3, 1.0], [0.3]))
def test_the_mixture_is_the_papers(g):
    old, new = byte_level(), byte_level(420)
    mixture = adapt(global_weight=g).mix(old, new)
    checked = 0
    for place, row in enumerate(mixture.rows.tolist()):
        wanted, cosines = by_hand(old, new, row, g)
        if g > 0 and len({round(c, 5) for c, _ in cosines}) < len(cosines):
            continue  # neighbours at the same distance: either may be taken
        found = {}
        for source, weight in zip(mixture.sources[place].tolist(), mixture.weights[place].tolist(), strict=True):
            if weight > 1e-9:
                found[source] = found.get(source, 0) + weight
        if set(found) != set(wanted) and g > 0:
            continue  # a fourth one at the same distance
        assert found == pytest.approx(wanted, abs=1e-4)
        checked += 1
    assert checked > 20


def test_rows_are_copied_mixed_and_tied():
    old, new = byte_level(), sentencepiece()
    for tied in (True, False):
        model = model_for(old, tied)
        method = adapt()
        fresh = method.transplant(model, old, new)
        before, after = model.get_input_embeddings().weight, fresh.get_input_embeddings().weight
        shared = np.flatnonzero(method.mixture.copied >= 0)
        assert len(shared) > 20 and torch.equal(after[shared], before[method.mixture.copied[shared]])
        place = int(np.flatnonzero(method.mixture.weights.sum(1) > 0)[0])
        row = int(method.mixture.rows[place])
        weights = torch.from_numpy(method.mixture.weights[place]).float()
        for matrix, result in ((before, after), (model.lm_head.weight, fresh.lm_head.weight)):
            assert torch.allclose(weights @ matrix[method.mixture.sources[place]], result[row], atol=1e-5)
        assert (fresh.lm_head.weight is after) == tied
        assert fresh.config.eos_token_id == new.eos_token_id and fresh.config.vocab_size == len(after)
        assert torch.equal(after[new.eos_token_id], before[old.eos_token_id])  # by role


def test_baselines():
    old, new = byte_level(), byte_level(420)
    model = model_for(old)
    weight = model.get_input_embeddings().weight
    rows = {
        name: TokenAdapt(strategy=name).transplant(model, old, new).get_input_embeddings().weight
        for name in ("retok", "mean", "random")
    }
    mixture = TokenAdapt(strategy="retok").mix(old, new)
    view = ByteView(old)
    table = {token: i for i, token in enumerate(view.bytes) if token}
    for place, row in enumerate(mixture.rows.tolist()):
        pieces = pieces_of(view, token_bytes(new)[row], table)
        assert torch.allclose(rows["retok"][row], weight[pieces].mean(0), atol=1e-5)
        assert sorted(mixture.sources[place][mixture.weights[place] > 0].tolist()) == sorted(pieces)
        assert torch.allclose(rows["mean"][row], weight.mean(0), atol=1e-5)
    drawn = rows["random"][mixture.rows]
    assert torch.allclose(drawn.mean(0), weight.mean(0), atol=5 * float(weight.std()) / len(drawn) ** 0.5)
    again = TokenAdapt(strategy="random").transplant(model, old, new).get_input_embeddings().weight
    assert torch.equal(again, rows["random"])


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 5), st.integers(0, 9))
def test_neighbours_equal_brute_force(n, m, k, seed):
    rng = np.random.default_rng(seed)
    queries, keys = rng.standard_normal((n, 8)).astype(np.float32), rng.standard_normal((m, 8)).astype(np.float32)
    places, values = nearest(queries, keys, k)
    scores = queries @ keys.T
    assert np.array_equal(places, np.argsort(-scores, 1)[:, :k])
    assert np.allclose(values, np.take_along_axis(scores, places, 1), atol=1e-5)


@given(st.binary(min_size=1, max_size=8))
def test_pieces_spell_any_token(data):
    for make in (byte_level, sentencepiece):
        view = ByteView(make())
        table = {token: i for i, token in enumerate(view.bytes) if token}
        assert b"".join(view.bytes[p] for p in pieces_of(view, data, table)) == data


def test_saved_models_load_with_plain_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    old, new = byte_level(), sentencepiece()
    fresh = adapt().transplant(model_for(old, tied=True), old, new)
    fresh.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("hello world", return_tensors="pt")
    with torch.inference_mode():
        assert torch.allclose(model(**ids).logits, fresh(**ids).logits, atol=1e-5)
    model.generate(**ids, max_new_tokens=3)


def test_traces_name_the_parts():
    old, new = byte_level(), byte_level(420)
    trace = adapt().trace(old, new, new("hello other helpers")["input_ids"])
    kinds = set(trace.columns["origin"])
    assert kinds == {"shared", "mixed"} and any("0." in text for text in trace.columns["made of"])


def test_bad_input():
    old, new = byte_level(), byte_level(420)
    for make, message in (
        (lambda: TokenAdapt(strategy="zett"), "strategy"),
        (lambda: TokenAdapt(global_weight=1.5), "share"),
        (lambda: TokenAdapt(top_k=0), "top_k"),
        (lambda: TokenAdapt(embedder=lambda texts: np.zeros(3)).mix(old, new), "one vector a text"),
        (lambda: adapt().transplant(tiny_llama(50), old, new), "trained with"),
    ):
        with pytest.raises(BadInputError, match=message):
            make()
    bare = tiny_llama(len(old))
    bare.get_input_embeddings = lambda: None
    with pytest.raises(UnsupportedModelError, match="no token embeddings"):
        adapt().transplant(bare, old, new)


# -- what users bring --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", ["tokenadapt", "retok", "mean"])
def test_byte_fallback_is_no_source_of_letters(strategy):
    """``<0x61>`` spells "a" too, but no text has it: the same tokenizer is the identity, another one copies "a"."""
    tokenizer = sentencepiece()
    model = model_for(tokenizer)
    fresh = adapt(strategy=strategy, pad_to_multiple_of=1).transplant(model, tokenizer, tokenizer)
    assert torch.equal(fresh.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert torch.equal(fresh.lm_head.weight, model.lm_head.weight)
    names, new = tokenizer.get_vocab(), byte_level()
    copied = adapt(strategy=strategy).mix(tokenizer, new).copied
    assert copied[new.get_vocab()["h"]] == names["h"] != names["<0x68>"]
    rare = next(byte for byte in range(128, 256) if (bytes([byte]) in token_bytes(new)))
    assert copied[token_bytes(new).index(bytes([rare]))] == names[f"<0x{rare:02X}>"]


@pytest.mark.parametrize("name", ["GPT-2", "SmolLM2"])
def test_a_token_of_several_roles_takes_the_row_of_eos(name):
    old, new = family("Gemma"), family(name)
    model = tiny_llama(len(old), seed=3)
    fresh = TokenAdapt(strategy="mean").transplant(model, old, new)
    before, after = model.get_input_embeddings().weight, fresh.get_input_embeddings().weight
    assert len({new.eos_token_id, new.pad_token_id}) == 1
    assert torch.equal(after[new.eos_token_id], before[old.eos_token_id])
    if new.bos_token_id != new.eos_token_id:
        assert torch.equal(after[new.bos_token_id], before[old.bos_token_id])
    assert fresh.get_input_embeddings().padding_idx == new.pad_token_id


def test_added_tokens_may_lack_a_row():
    """Gemma's and mergekit's: nothing is made of them; a whole vocabulary without rows is another model's."""
    old = family("Gemma")
    model = tiny_llama(len(old) - 1, seed=3)
    for new in (old, byte_level()):
        method = adapt()
        fresh = method.transplant(model, old, new)
        assert method.mixture.copied.max() < len(old) - 1 and torch.isfinite(fresh.lm_head.weight).all()


@pytest.mark.parametrize("family_of_new", ["BERT", "GPT-2"])
def test_masked_language_models(tmp_path, family_of_new):
    """The output bias moves with the rows, the tied matrix stays tied, and saved files say the same."""
    from transformers import BertConfig, BertForMaskedLM

    old, new = family("BERT"), family(family_of_new)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(old), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    method = adapt(pad_to_multiple_of=1)
    fresh = method.transplant(model, old, new)
    copied = torch.from_numpy(method.mixture.copied)
    shared = torch.from_numpy(np.flatnonzero(method.mixture.copied >= 0))
    assert torch.equal(fresh.cls.predictions.decoder.bias[shared], model.cls.predictions.bias[copied[shared]])
    place = int(np.flatnonzero(method.mixture.weights.sum(1) > 0)[0]) if len(method.mixture.rows) else None
    if place is not None:
        weights = torch.from_numpy(method.mixture.weights[place]).float()
        made = fresh.get_output_embeddings().bias[method.mixture.rows[place]]
        assert torch.allclose(made, weights @ model.cls.predictions.bias[method.mixture.sources[place]], atol=1e-5)
    ids = torch.tensor([new("hello world")["input_ids"]])
    fresh.save_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.allclose(BertForMaskedLM.from_pretrained(tmp_path)(ids).logits, fresh(ids).logits, atol=1e-5)
        if new is old:
            assert torch.equal(fresh(ids).logits, model(ids).logits)


def test_mixtures_of_experts(tmp_path):
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    old, new = family("Mistral"), family("Llama 3")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(old), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, output_router_logits=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    fresh = adapt().transplant(model, old, new)
    ids = torch.tensor([new("hello world")["input_ids"]])
    fresh.save_pretrained(tmp_path)
    output = fresh(ids, labels=ids)
    assert torch.isfinite(output.loss) and torch.isfinite(output.aux_loss)
    with torch.inference_mode():
        assert torch.allclose(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, output.logits, atol=1e-5)
    same = adapt(pad_to_multiple_of=1).transplant(model, old, old)
    ids = torch.tensor([old("hello world")["input_ids"]])
    with torch.inference_mode():
        assert torch.equal(same(ids).logits, model(ids).logits)


def test_progress_is_reported_by_stage():
    pytest.importorskip("sentence_transformers")
    seen = []
    TokenAdapt().mix(byte_level(), byte_level(420), report=lambda *item: seen.append(item))
    assert seen[0][0] == "embedding the texts of both vocabularies' tokens" and seen[-1][1] == seen[-1][2] > 300

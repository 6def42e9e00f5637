"""One battery: every method of the station, by its card, over tokenizers of all families.

A method keeps its contract on every family, or refuses the family by name before any forward pass.
"""

from __future__ import annotations

import pytest
import torch

from everytoken.catalog.cards import load_catalog
from everytoken.core.errors import BadInputError
from everytoken.core.vocabulary import own_ids, spell, token_bytes, unused_byte_tokens
from everytoken.tokenization.base import BatchMerger, ByteMethod, Retokenizer, Transplanter
from everytoken.tokenization.byte_view import ByteView
from everytoken.tokenization.dynamic_prefill import DynamicPrefill
from everytoken.tokenization.hyper import MeanEmbedding
from everytoken.tokenization.token_healing import TokenHealing

from ..conftest import tiny_llama
from ..tiers import commit_tier
from .common import check_steps
from .families import FAMILIES, LOSSLESS, family

TEXTS = [
    "hello world",
    " hello",
    "a   b",
    "it's 12345, isn't it?\n\n  well",
    "naïve 漢字 😀 é",
    "  \U0001d7d8 \u3000x",
    "whole worlds. The helpers say: hello ",
]
METHODS = {
    card.slug: card.load() for card in load_catalog().values() if card.station == "tokenization" and card.implementation
}


def rows_of(tokenizer):
    """Embeddings of a model for it: one token of Gemma's has none."""
    return len(tokenizer) - ("<image_soft_token>" in tokenizer.get_vocab())


def model_for(tokenizer, seed=3):
    model = tiny_llama(rows_of(tokenizer), seed=seed, eos=tokenizer.eos_token_id, scale=0.3)
    model.config.bos_token_id, model.config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    return model


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def context_of(tokenizer):
    """BERT has neither BOS nor EOS."""
    return [tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.eos_token_id]


# -- what all methods stand on -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_spell_the_text(name, text):
    tokenizer = family(name)
    view = ByteView.of(tokenizer)
    assert view.spell(view.encode(view.spelled(text))) == view.spelled(text)
    assert spell(tokenizer, ids_of(tokenizer, text)) in (view.spelled(text), text.encode())
    assert tokenizer.decode(ids_of(tokenizer, text.strip())) == text.strip()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_own_id_is_what_the_tokenizer_writes(name):
    """Everything that the tokenizer makes of texts is the own id of its bytes."""
    tokenizer = family(name)
    table, own, unused = token_bytes(tokenizer), own_ids(tokenizer), unused_byte_tokens(tokenizer)
    written = {token for text in TEXTS for token in ids_of(tokenizer, text) if table[token]}
    assert written and all(own[table[token]] == token for token in written)
    assert not unused & written and not unused & set(own.values())
    assert set(own) == {data for data in table if data}


def test_lone_surrogates_are_refused_by_name():
    from everytoken.core.scoring import turn_ids
    from everytoken.tokenization.base import bits_a_byte
    from everytoken.tokenization.dynamic_tokenization import DynamicTokenizer
    from everytoken.tokenization.ensemble import ByteEnsemble
    from everytoken.tokenization.exact_bytes import ExactBytes
    from everytoken.tokenization.supertokens import SupertokenTrainer, trace

    tokenizer = family("GPT-2")
    model, broken = model_for(tokenizer), "hello \ud800 world"
    lm = ExactBytes().on(model, tokenizer)
    for call in (
        lambda: lm.next_byte_logprobs(broken),
        lambda: lm.logprob(broken),
        lambda: lm.generate(broken),
        lambda: lm.trace(broken),
        lambda: ByteEnsemble([lm]).logprob(broken),
        lambda: ByteEnsemble([lm]).generate(broken),
        lambda: bits_a_byte(model, tokenizer, broken),
        lambda: DynamicTokenizer(tokenizer)([broken]),
        lambda: SupertokenTrainer(300).train([broken]),
        lambda: trace(tokenizer, broken),
        lambda: turn_ids(tokenizer, broken),
    ):
        with pytest.raises(BadInputError, match=r"character 6 is a lone surrogate \(U\+D800\)"):
            call()


# -- every method, by its contract -------------------------------------------------------------------------------------
def retokenizer(method, tokenizer, _name):
    splitter, unused = method(tokenizer, expand_prop=1.0), unused_byte_tokens(tokenizer)
    for text in TEXTS:
        ids = ids_of(tokenizer, text)
        new = splitter.expand(ids, seed=1)
        assert spell(tokenizer, new.ids) == spell(tokenizer, ids) and len(new.ids) >= len(ids)
        assert not unused & set(new.ids.tolist())


def batch_merger(method, tokenizer, _name):
    model = model_for(tokenizer)
    merger = method(tokenizer, reduction=1.0, embedder=MeanEmbedding(model))
    batch = merger(TEXTS, add_special_tokens=False)
    for row, text in enumerate(TEXTS):
        ids = ids_of(tokenizer, text)
        assert b"".join(merger.spell(batch, row)) == spell(tokenizer, ids) and len(batch.tokens[row]) <= len(ids)
    unused = unused_byte_tokens(tokenizer)
    assert not unused & {token for row in batch.tokens for token in row}
    assert not unused & {piece for pieces in merger.vocabulary(TEXTS, 50) for piece in pieces}
    ids = torch.tensor([ids_of(tokenizer, TEXTS[0])])
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    whole = method(tokenizer, merges=0, embedder=MeanEmbedding(model))
    assert torch.equal(
        plain, model.generate(ids, max_new_tokens=4, do_sample=False, custom_generate=DynamicPrefill(whole))
    )


def byte_method(method, tokenizer, name):
    model = model_for(tokenizer)
    if name not in LOSSLESS:
        before = model.forward
        model.forward = lambda *a, **k: pytest.fail("a forward pass before the refusal")
        with pytest.raises(BadInputError, match="does not keep the text"):
            method().on(model, tokenizer, context_of(tokenizer))
        model.forward = before
        return
    lm = method(tolerance=0.0).on(model, tokenizer, context_of(tokenizer))
    for text in (b" he", b"a  b", b"he w", "  \U0001d7d8".encode(), "\u3000é".encode()):
        check_steps(lm, text)
    for unit in ("byte", "token"):
        assert len(lm.generate(" he", 4, unit=unit)) <= 4


def transplanter(method, tokenizer, name):
    names = list(FAMILIES)
    other = family(names[(names.index(name) + 1) % len(names)])
    model = model_for(tokenizer)
    ids = torch.tensor([ids_of(tokenizer, "hello whole world é")])
    same = method(strategy="retok", pad_to_multiple_of=1).transplant(model, tokenizer, tokenizer)
    with torch.inference_mode():
        old, new = model(ids).logits, same(ids).logits
    assert torch.allclose(old, new[..., : old.shape[-1]], atol=1e-5)  # one row more is another order of sums
    moved = method(strategy="retok").transplant(model, tokenizer, other)
    if tokenizer.eos_token_id is not None and other.eos_token_id is not None:
        before, after = model.get_input_embeddings().weight, moved.get_input_embeddings().weight
        assert torch.equal(after[other.eos_token_id], before[tokenizer.eos_token_id])
        assert moved.config.eos_token_id == other.eos_token_id
    moved.generate(torch.tensor([ids_of(other, "hello world")]), max_new_tokens=2, do_sample=False)


BATTERY = {
    Retokenizer: retokenizer,
    BatchMerger: batch_merger,
    ByteMethod: byte_method,
    Transplanter: transplanter,
}


@pytest.mark.parametrize("name", commit_tier(FAMILIES, ["GPT-2", "Llama 2", "unigram"]))
@pytest.mark.parametrize("slug", METHODS)
def test_every_method_on_every_family(slug, name):
    checks = [check for contract, check in BATTERY.items() if issubclass(METHODS[slug], contract)]
    assert checks, f"{slug} keeps no contract of the station"
    for check in checks:
        check(METHODS[slug], family(name), name)


@pytest.mark.parametrize("name", FAMILIES)
def test_token_healing_on_every_family(name):
    """The prompt's bytes stay, a special token at its end stays; a tokenizer that loses text is refused."""
    tokenizer = family(name)
    if name not in LOSSLESS:
        with pytest.raises(BadInputError, match="does not keep the text"):
            TokenHealing(tokenizer)
        return
    model = model_for(tokenizer)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([ids_of(tokenizer, "hello 12, wor")])
    healed = model.generate(ids, max_new_tokens=4, do_sample=False, custom_generate=TokenHealing(tokenizer))
    assert spell(tokenizer, healed[0].tolist()).startswith(spell(tokenizer, ids[0].tolist()))
    ended = torch.tensor([[*ids[0].tolist(), tokenizer.eos_token_id]])
    arguments = {"attention_mask": torch.ones_like(ended), "max_new_tokens": 4, "do_sample": False}
    kept = model.generate(ended, custom_generate=TokenHealing(tokenizer), **arguments)
    assert torch.equal(kept, model.generate(ended, **arguments))

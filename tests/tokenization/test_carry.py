"""Token ids and chat templates under another tokenizer."""

from __future__ import annotations

import copy

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.tokenization.base import token_bytes
from everytoken.tokenization.carry import MovedIds, with_chat_template
from everytoken.tokenization.tokenadapt import TokenAdapt

from ..conftest import tiny_llama
from .families import family

OLD, NEW = "Qwen", "Llama 2"


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def with_settings(**settings):
    """A model for the old tokenizer with these generation settings."""
    model = tiny_llama(len(family(OLD)), eos=family(OLD).eos_token_id)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


def moved(**settings):
    return TokenAdapt(strategy="mean").transplant(with_settings(**settings), family(OLD), family(NEW)).generation_config


def test_the_same_tokenizer_changes_no_id():
    for name in (OLD, NEW, "Gemma", "BERT"):
        tokenizer = family(name)
        same = MovedIds(tokenizer, tokenizer)
        assert [same.one(token) for token in range(len(tokenizer))] == list(range(len(tokenizer)))


def test_stop_tokens_follow():
    """EOS is the new tokenizer's; what else stopped stops on if the new one has it."""
    old, new = family(OLD), copy.deepcopy(family(NEW))
    assert moved(eos_token_id=[old.eos_token_id, old.pad_token_id]).eos_token_id == new.eos_token_id
    new.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    model = with_settings(eos_token_id=[old.convert_tokens_to_ids("<|im_start|>"), old.eos_token_id])
    fresh = TokenAdapt(strategy="mean").transplant(model, old, new)
    assert fresh.generation_config.eos_token_id == [new.eos_token_id, new.convert_tokens_to_ids("<|im_start|>")]


def test_suppressed_tokens_and_bad_words_are_the_same_texts():
    old, new = family(OLD), family(NEW)
    theirs, ours = token_bytes(new), token_bytes(old)
    hello = ids_of(old, " hello")
    assert len(hello) == 1
    fresh = moved(
        suppress_tokens=hello,
        begin_suppress_tokens=[*hello, old.eos_token_id],
        bad_words_ids=[hello, ids_of(old, "éa")],
    )
    assert [theirs[token] for token in fresh.suppress_tokens] == [ours[hello[0]]] == [b" hello"]
    assert fresh.begin_suppress_tokens == [*fresh.suppress_tokens, new.eos_token_id]
    assert [b"".join(theirs[token] for token in word) for word in fresh.bad_words_ids] == [b" hello", "éa".encode()]
    fresh = moved(sequence_bias={tuple(hello): -2.0})
    assert fresh.sequence_bias == {tuple(moved(suppress_tokens=hello).suppress_tokens): -2.0}
    assert moved(suppress_tokens=[old.convert_tokens_to_ids("<|im_start|>")]).suppress_tokens == []


def test_suppression_holds_after_a_transplant():
    """With the first greedy token suppressed under the old ids, the same text is suppressed under the new ones."""
    old, new = family(OLD), family(NEW)
    hello = ids_of(old, " hello")
    model = with_settings(bad_words_ids=[hello])
    fresh = TokenAdapt(strategy="retok").transplant(model, old, new)
    target = token_bytes(new).index(b" hello")
    with torch.no_grad():
        fresh.lm_head.weight[target] = fresh.lm_head.weight.mean(0)
    out = fresh.generate(torch.tensor([ids_of(new, "hello")]), max_new_tokens=6, do_sample=True, temperature=9.0)
    assert target not in out[0, len(ids_of(new, "hello")) :].tolist()


@pytest.mark.parametrize(
    ("name", "text"),
    [("suppress_tokens", "sold"), ("forced_bos_token_id", "sold"), ("forced_decoder_ids", "sold")],
)
def test_what_cannot_be_carried_is_refused_by_name(name, text):
    old = family(OLD)
    token = next(i for i, data in enumerate(token_bytes(old)) if data and data not in token_bytes(family(NEW)))
    value = {"suppress_tokens": [token], "forced_bos_token_id": token, "forced_decoder_ids": [[1, token]]}[name]
    with pytest.raises(BadInputError, match=name):
        moved(**{name: value})


def test_forced_tokens_follow():
    old, new = family(OLD), family(NEW)
    fresh = moved(forced_eos_token_id=old.eos_token_id, decoder_start_token_id=old.eos_token_id)
    assert fresh.forced_eos_token_id == fresh.decoder_start_token_id == new.eos_token_id


def test_chat_templates():
    old, new = copy.deepcopy(family(OLD)), copy.deepcopy(family(NEW))
    assert with_chat_template(old, new) == (new, None)
    old.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    same, note = with_chat_template(old, new)
    assert same.chat_template is None and "<|im_end|>, <|im_start|>" in note
    new.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    changed, note = with_chat_template(old, new)
    messages = [{"role": "user", "content": "hello"}]
    assert changed.apply_chat_template(messages, tokenize=False) == old.apply_chat_template(messages, tokenize=False)
    assert "came along" in note and new.chat_template is None
    new.chat_template = "{{ messages[0]['content'] }}"
    assert with_chat_template(old, new) == (new, None)

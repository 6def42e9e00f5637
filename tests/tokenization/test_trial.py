"""Trials of the station: each method by its contract or by its own, on a tiny model from a folder."""

from __future__ import annotations

import importlib

import pytest

from everytoken.catalog.cards import load_catalog
from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.core.settings import parse_settings
from everytoken.decoding.trial import Trial, TrialRequest
from everytoken.tokenization.base import ByteMethod, ByteModel, Retokenizer, Transplanter
from everytoken.tokenization.dynamic_tokenization import DynamicTokenizer
from everytoken.tokenization.exact_bytes import ExactBytes
from everytoken.tokenization.stochastok import StochasTok
from everytoken.tokenization.tokenadapt import TokenAdapt
from everytoken.tokenization.trial import trial, trial_of

from ..conftest import tiny_llama
from .common import byte_level

METHODS = [card for card in load_catalog().values() if card.station == "tokenization" and card.implementation]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and its tokenizer, as a user would name them."""
    place = tmp_path_factory.mktemp("models")
    for name, size in (("old", 330), ("new", 400)):
        tokenizer = byte_level(size)
        tokenizer.save_pretrained(place / name)
    tiny_llama(len(byte_level()), eos=byte_level().eos_token_id, scale=0.3).save_pretrained(place / "old")
    return place


@pytest.mark.parametrize("card", METHODS, ids=lambda card: card.slug)
def test_every_card_has_a_trial(card):
    """Of its own, or of its contract."""
    run = card.load_trial()
    assert callable(run)
    if run is trial:
        assert callable(importlib.import_module(trial_of(card.load())).trial)


def test_methods_keep_their_contracts():
    assert issubclass(StochasTok, Retokenizer) and not issubclass(StochasTok, ByteMethod)
    assert issubclass(ExactBytes, ByteMethod) and issubclass(TokenAdapt, Transplanter)
    tokenizer = byte_level()
    lm = ExactBytes().on(tiny_llama(len(tokenizer), eos=tokenizer.eos_token_id), tokenizer)
    assert isinstance(lm, ByteModel)


@pytest.mark.parametrize(
    ("factory", "settings", "data", "arms"),
    [
        (StochasTok, {"expand_prop": 1.0}, None, ["tokenizer", "it"]),
        (ExactBytes, {"unit": "byte"}, None, ["own tokens", "it"]),
        (DynamicTokenizer, {"reduction": 1.0}, None, ["own tokens", "it"]),
        (TokenAdapt, {"strategy": "retok"}, "new", ["own tokenizer", "it"]),
    ],
)
def test_trials_run(factory, settings, data, arms, folder):
    data = None if data is None else str(folder / data)
    options = {"max_new_tokens": 4, "seed": 1}
    text = "the helpers say hello to the oth"
    run = next(card for card in METHODS if card.load() is factory).load_trial()
    result = run(TrialRequest([Trial("it", factory, settings)], str(folder / "old"), text, data, options))
    assert list(result.rows) == arms
    assert all(result.headline in row for row in result.rows.values())
    assert len(result.traces) == 1 and result.column in result.traces[0].columns
    assert any(note.startswith("it:") for note in result.notes)


def test_a_model_of_bytes_refuses_an_architecture_before_weights_are_read(tmp_path):
    from transformers import CLIPConfig, MambaConfig

    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path)
    for config, error in (
        (MambaConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1), UnsupportedModelError),
        (CLIPConfig(), BadInputError),
    ):
        config.save_pretrained(tmp_path)  # and no weights
        with pytest.raises(error, match=r"MambaForCausalLM|no causal model of the kind 'clip'"):
            trial(TrialRequest([Trial("bytes", ExactBytes, {})], str(tmp_path), "hel"))


def test_methods_of_two_kinds_are_refused(folder):
    items = [Trial("a", StochasTok, {}), Trial("b", ExactBytes, {})]
    with pytest.raises(BadInputError, match="cannot be compared"):
        trial(TrialRequest(items, str(folder / "old")))


@pytest.mark.parametrize("card", METHODS, ids=lambda card: card.slug)
def test_settings_of_every_method_can_be_read(card):
    """The command line reads the types of a method's fields."""
    with pytest.raises(BadInputError, match="no_such_setting"):
        parse_settings(card.slug, card.load(), ["no_such_setting=1"])

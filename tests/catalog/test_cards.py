"""The catalogue: every card is sound, every path in it exists, its status is what is true."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import everytoken
from everytoken.catalog import CardError, find_card, load_catalog, stations
from everytoken.catalog import cards as cards_module
from everytoken.catalog.cards import STATUSES, parse_card
from everytoken.catalog.exports import public_names
from everytoken.catalog.house import load_house, parse_place
from everytoken.core.errors import BadInputError, UnknownNameError

GOOD = """
slug = "new-method"
title = "A New Method"
arxiv = "2501.00001"
year = 2025
station = "generation"
summary = "Does something."
claim = "faster"
figure = "2x"
"""


def test_a_card_a_paper():
    """Every file is a card, every method has one card, and only the page of papers is no paper itself."""
    catalog = load_catalog()
    folder = Path(cards_module.__file__).parent / "cards"
    assert sorted(catalog) == sorted(path.stem for path in folder.glob("*.toml"))
    assert [slug for slug, card in catalog.items() if not card.arxiv] == ["daily-papers"]
    assert len({(card.arxiv, card.title) for card in catalog.values()}) == len(catalog)  # a paper may have two methods


@pytest.mark.parametrize("card", load_catalog().values(), ids=lambda card: card.slug)
def test_every_card_is_sound_and_its_paths_resolve(card):
    assert card.station in stations()
    assert 2023 <= card.year <= 2026
    assert card.status in STATUSES
    assert card.preprint_year is None or card.preprint_year <= card.year <= card.preprint_year + 2
    assert card.authors is None or 1 <= card.authors <= 100
    assert 60 <= len(card.summary) <= 260
    assert card.claim
    assert card.figure
    assert not card.code or re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", card.code)
    if card.implementation:
        assert callable(card.load())
    else:
        assert card.status == "planned"
    if card.reproduction:
        experiment = card.load_reproduction()
        assert experiment.name == card.slug
        assert experiment.claims


@pytest.mark.parametrize("name", ["stochastok", "dyspec", "tdpo"])
def test_the_three_founding_methods_are_measured(name):
    card = find_card(name)
    assert card.status == "measured"
    assert card.headline


def test_a_card_has_the_whole_title_and_the_years():
    card = find_card("tokenselect")
    assert card.title.endswith("Length Extrapolation for LLMs via Dynamic Token-Level KV Cache Selection")
    assert card.authors == 9
    assert (card.year, card.preprint_year) == (2025, 2024)  # the venue's, the preprint's
    assert card.as_dict()["preprint_year"] == 2024


def test_find_by_slug_spelling_and_arxiv_id():
    assert find_card("DySpec").slug == "dyspec"
    assert find_card("r_to_q_star").slug == "r-to-q-star"
    assert find_card("2410.11744").slug == "dyspec"


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean dyspec") as error:
        find_card("dispec")
    assert error.value.suggestions[0] == "dyspec"
    with pytest.raises(UnknownNameError, match=f"`everytoken papers` lists all {len(load_catalog())}"):
        find_card("zzzzzzzz")


def test_what_is_only_planned_says_so():
    card = parse_card(GOOD, "new-method.toml")
    assert card.status == "planned"
    with pytest.raises(BadInputError, match="not implemented yet"):
        card.load()
    with pytest.raises(BadInputError, match="no experiment yet"):
        card.load_reproduction()
    with pytest.raises(BadInputError, match="nothing to train"):
        card.load_training()


def test_exports_are_those_of_the_cards():
    """A name of a card is a name of the package; a path that is no path is refused."""
    assert public_names()["DySpec"] == find_card("dyspec").implementation.partition(":")[0]
    for card in load_catalog().values():
        for path in card.exports:
            module, _, name = path.partition(":")
            assert getattr(everytoken, name) is getattr(importlib.import_module(module), name)
    for exports in ('["DySpec"]', "[3]", '"everytoken.core.trace:TokenTrace"'):
        with pytest.raises(CardError, match="exports"):
            parse_card(GOOD + f"exports = {exports}\n", "new-method.toml")


def test_files_of_the_house():
    assert list(stations())[:2] == ["tokenization", "reduction"]
    assert load_house()["core"].kind == "floor"
    good = 'name = "attic"\nkind = "floor"\norder = 9\nflow = "what is kept"\n'
    assert parse_place(good, "attic.toml").exports == ()
    assert parse_place(good + 'trial = "a.b:c"\n', "attic.toml").trial == "a.b:c"
    for change in (
        ("attic", "cellar"),
        ("floor", "roof"),
        ("order = 9", 'order = "9"'),
        ("flow", "flows"),
        ("flow =", "trials = 3\nflow ="),
        ("= 9", "="),
    ):
        with pytest.raises(CardError, match=r"attic\.toml"):
            parse_place(good.replace(*change), "attic.toml")


def test_a_trial_is_the_cards_or_its_stations():
    """Where a station adds nothing to what the floor tries, its file in the house names the floor's."""
    from everytoken.constraints.trial import trial as of_constraints
    from everytoken.decoding.trial import trial as of_decoders

    assert find_card("dyspec").load_trial() is parse_card(GOOD, "new-method.toml").load_trial() is of_decoders
    assert find_card("xgrammar").load_trial() is of_constraints
    own = parse_card(GOOD + 'trial = "everytoken.constraints.trial:trial"\n', "new-method.toml")
    assert own.load_trial() is of_constraints
    with pytest.raises(BadInputError, match="nothing to try"):
        parse_card(GOOD.replace("generation", "distributed"), "new-method.toml").load_trial()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('slug = "new-method"', 'slug = "new-method'), "not valid TOML"),
        (("year = 2025", 'year = "2025"'), "year must be a number"),
        (("year = 2025\n", ""), "lacks year"),
        (("year = 2025", "year = 2025\nmood = 3"), "unknown fields: mood"),
        (('"generation"', '"generations"'), "no station 'generations'"),
        (('"2501.00001"', '"arXiv:2501"'), "not an arXiv id"),
        (('"new-method"', '"New Method"'), "slug"),
        (('figure = "2x"', 'figure = "2x"\nimplementation = "nowhere"'), "module:attribute"),
    ],
)
def test_broken_cards(change, message):
    assert parse_card(GOOD, "good.toml").slug == "new-method"
    with pytest.raises(CardError, match=message) as error:
        parse_card(GOOD.replace(*change), "broken.toml")
    assert "broken.toml" in str(error.value)


def test_paths_that_lead_nowhere():
    for path in ("everytoken.nowhere:X", "everytoken.generation.dyspec:Nothing"):
        card = parse_card(GOOD + f'implementation = "{path}"\n', "new-method.toml")
        with pytest.raises(CardError, match="new-method"):
            card.load()


def test_other_packages_add_cards(tmp_path, monkeypatch):
    """A real package with a real entry point, installed on the path."""
    package = tmp_path / "mymethods"
    package.mkdir()
    (package / "__init__.py").write_text("def thing():\n    return 42\n")
    (package / "new-method.toml").write_text(GOOD + 'implementation = "mymethods:thing"\n')
    info = tmp_path / "mymethods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mymethods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[everytoken.cards]\nmymethods = mymethods\n")
    monkeypatch.syspath_prepend(tmp_path)
    load_catalog.cache_clear()
    try:
        card = find_card("new-method")
        assert card.load()() == 42
        assert card.status == "implemented"
        (package / "new-method.toml").unlink()
        (package / "dyspec.toml").write_text(GOOD.replace("new-method", "dyspec"))
        load_catalog.cache_clear()
        with pytest.raises(CardError, match="exists already"):
            load_catalog()
    finally:
        monkeypatch.undo()
        load_catalog.cache_clear()


def test_a_result_file_that_is_broken_is_no_result(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "dyspec.json").write_text("{")
    monkeypatch.setattr(cards_module, "result_folders", lambda: [tmp_path / "results"])
    assert find_card("dyspec").status == "implemented"

"""TDWA and fusion by the numbers of the sheet, retrieval against brute force, what is embedded and when."""

from __future__ import annotations

import numpy as np
import pytest

from everytoken.agents.base import PARTS, Key
from everytoken.agents.indexes import MatrixIndex
from everytoken.agents.metrics import average_precision, ndcg, recall
from everytoken.agents.scalemcp import Retriever, ScaleMCP, fused, weighted_average
from everytoken.agents.store import SQLiteStore
from everytoken.core.errors import BadInputError, UnknownNameError

from .common import embed, spec

UNITS = dict(zip(PARTS, np.array([[1, 0], [0, 1], [0.6, 0.8], [1, 0]]), strict=True))


def weights(*values):
    return dict(zip(PARTS, values, strict=True))


def test_weighted_averages_by_hand():
    usual = weights(0.2, 0.3, 0.2, 0.3)
    assert np.allclose(weighted_average(UNITS, usual), [0.80310, 0.59585], atol=5e-6)
    raw = sum(usual[name] * UNITS[name] for name in PARTS)
    assert np.linalg.norm(raw) == pytest.approx(0.77201, abs=5e-6)
    assert np.allclose(weighted_average(UNITS, weights(0.2, 0.2, 0.2, 0.4)), [0.89443, 0.44721], atol=5e-6)
    for name in PARTS:
        assert np.allclose(weighted_average(UNITS, {name: 1.0}), UNITS[name])
    assert np.allclose(weighted_average(UNITS, {k: 2 * w for k, w in usual.items()}), weighted_average(UNITS, usual))
    query = np.array([0.28, 0.96])  # late fusion of cosines, divided by the agreement
    late = sum(usual[name] * (query @ UNITS[name]) for name in PARTS) / np.linalg.norm(raw)
    assert query @ weighted_average(UNITS, usual) == pytest.approx(late, abs=1e-6)


def test_parts_that_are_missing_or_opposite():
    assert np.allclose(weighted_average({"name": UNITS["name"]}, weights(0.2, 0.3, 0.2, 0.3)), [1, 0])
    opposite = {"name": np.array([1.0, 0]), "description": np.array([-1.0, 0])}
    assert np.allclose(weighted_average(opposite, weights(1, 1, 0, 0)), [-1, 0])  # the description alone
    for bad in (weights(-1, 1, 1, 1), weights(float("nan"), 1, 1, 1), weights(0, 0, 0, 0)):
        with pytest.raises(BadInputError):
            weighted_average(UNITS, bad)


def test_metrics_by_hand():
    ranking, relevant = list("badce"), {"a", "c"}
    assert average_precision(ranking, relevant, 5) == pytest.approx(0.5)
    assert ndcg(ranking, relevant, 5) == pytest.approx(0.65092, abs=5e-6)
    assert recall(ranking, relevant, 3) == 0.5
    assert ndcg(["a", "c"], relevant, 5) == average_precision(["a", "c"], relevant, 5) == 1.0


def test_fusion_by_hand():
    assert dict(fused([[7, 8, 9], [8, 9, 7]]))[7] == pytest.approx(0.0322665, abs=5e-8)
    assert [item for item, _ in fused([[1, 2], [2, 1]])] == [1, 2]  # equal ones by id


def stocked(kind="tdwa", **more):
    store = SQLiteStore()
    texts = ["Adds two numbers.", "Sends an email to a person.", "Forecasts rain for a city.", "Books a flight."]
    for server in ("s", "t", "u"):
        names = ("add", "send_mail", "forecast", "book_flight")
        tools = [spec(name, f"{text} By {server}.", server) for name, text in zip(names, texts, strict=True)]
        store.apply(server, tools)
    return Retriever(store, ScaleMCP(kind, **more), embed, "words")


@pytest.mark.parametrize("kind", ["tdwa", "concat", "bm25", "hybrid"])
def test_every_retriever_finds_what_was_asked(kind):
    found = stocked(kind)
    assert found.search("rain in a city tomorrow", 1)[0].spec.name == "forecast"
    assert [hit.spec.server for hit in found.search("forecasts rain", 2, "t")][:1] == ["t"]
    assert {hit.spec.server for hit in found.search("adds numbers", 4, "t")} == {"t"}


def test_dense_search_equals_brute_force():
    found = stocked(fair=False)
    hits = found.search("a person books rain", 12)
    query = embed(["a person books rain"])[0]
    brute = {}
    for item in found.store.tools():
        parts = {}
        for name, texts in found.settings.texts(item.spec).items():
            mean = embed(texts).mean(0)
            parts[name] = mean / np.linalg.norm(mean)
        brute[item.spec.key] = float(weighted_average(parts, found.settings.weights) @ query)
    assert [hit.score for hit in hits] == pytest.approx(sorted(brute.values(), reverse=True), abs=1e-6)
    assert all(brute[hit.spec.key] == pytest.approx(hit.score, abs=1e-6) for hit in hits)


def test_what_has_not_changed_is_not_embedded_again():
    """One changed description embeds its own parts only; a new retriever of the same store embeds nothing."""
    found = stocked()
    found.refresh()
    before = found.embedded
    again = Retriever(found.store, found.settings, embed, "words")
    again.refresh()
    assert again.embedded == 0
    tools = [item.spec for item in found.store.tools() if item.spec.server == "s"]
    changed = [spec("add", "Sums up.", "s"), *tools[1:]]
    assert found.prepare(changed) == 1 + found.settings.questions  # the description and its questions, not the name
    assert found.prepare(changed) == 0
    found.store.apply("s", changed)
    found.refresh()
    assert found.embedded == before + 4
    assert found.search("sums up", 1)[0].spec.description == "Sums up."
    assert Retriever(found.store, ScaleMCP("bm25"), embed).prepare(changed) == 0


def test_one_server_does_not_fill_a_search():
    """A server that writes its descriptions to match everything gets half of the places while others have some."""
    store = SQLiteStore()
    store.apply("greedy", [spec(f"g{n}", "rain city forecast mail numbers", "greedy") for n in range(20)])
    store.apply("honest", [spec("forecast", "Forecasts rain.", "honest"), spec("mail", "Mail.", "honest")])
    for kind in ("tdwa", "hybrid", "bm25"):
        servers = [hit.spec.server for hit in Retriever(store, ScaleMCP(kind), embed).search("rain mail forecast", 4)]
        assert servers.count("greedy") == 2
    alone = Retriever(store, ScaleMCP(fair=False), embed).search("rain mail forecast numbers city", 4)
    assert [hit.spec.server for hit in alone].count("greedy") >= 3
    assert len(Retriever(store, ScaleMCP(), embed).search("rain", 6, "greedy")) == 6
    store.forget_others(["greedy"])
    assert len(Retriever(store, ScaleMCP(), embed).search("rain", 6)) == 6  # nobody else has any


def test_stale_and_quarantined_tools():
    found = stocked()
    found.store.approve(Key("s", "add"))
    found.store.apply("s", [spec("add", "Evil.", "s")], max_loss=1.0)
    found.store.mark_down("t", "gone")
    hits = found.search("adds two numbers", 12)
    assert Key("s", "add") not in [hit.spec.key for hit in hits]
    assert {hit.spec.server for hit in hits if hit.stale} == {"t"}


def test_bad_searches_and_settings():
    found = stocked()
    for query, k in (("", 3), ("\u200b", 3), ("x", 0), ("x", 101)):
        with pytest.raises(BadInputError, match="A search needs"):
            found.search(query, k)
    with pytest.raises(UnknownNameError, match="server"):
        found.search("x", 3, "nowhere")
    for bad in (
        {"retriever": "magic"},
        {"name_weight": -1.0},
        {"questions": 11},
        {"k": 0},
        dict.fromkeys(("name_weight", "description_weight"), 0.0),
    ):
        with pytest.raises(BadInputError):
            ScaleMCP(**bad)
    assert Retriever(SQLiteStore(), ScaleMCP(), embed).search("anything") == []
    assert found.search("x " * 5000)  # cut


@pytest.mark.parametrize("exact", [10_000, 100])
def test_the_matrix_index_and_the_graph(exact):
    """Against brute force; the graph of usearch finds nearly all of it."""
    from everytoken.agents.base import Record

    if exact < 1000:
        pytest.importorskip("usearch")
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(500, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = MatrixIndex(exact)
    assert index.search(vectors[0], 3) == []
    index.upsert([Record(Key(f"s{n % 3}", str(n)), "m", row) for n, row in enumerate(vectors)])
    index.delete([Key("s0", "0"), Key("s0", "none")])
    assert len(index.snapshot()) == 499
    agree = 0
    for query in vectors[:20]:
        best = np.argsort(-(vectors[1:] @ query))[:10] + 1
        found = index.search(query, 10)
        agree += len({key.name for key, _ in found} & {str(n) for n in best})
        assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    assert agree == 200 or (exact < 1000 and agree >= 190)
    assert {key.server for key, _ in index.search(vectors[5], 10, "s1")} == {"s1"}
    assert index.search(vectors[5], 3, "nobody") == []
    assert len(index.search(vectors[5], 1000)) >= 490
    with pytest.raises(BadInputError):
        index.search(vectors[5], 0)


def test_qdrant_finds_what_the_matrix_finds():
    """Qdrant's own in-process mode."""
    qdrant = pytest.importorskip("qdrant_client")
    from everytoken.agents.indexes import QdrantIndex

    plain = stocked(fair=False)
    remote = QdrantIndex(qdrant.QdrantClient(":memory:"), 64)
    other = Retriever(plain.store, plain.settings, embed, "words", remote)
    for query in ("rain in a city", "send mail", "adds numbers"):
        ours, theirs = plain.search(query, 5), other.search(query, 5)
        assert [hit.score for hit in ours] == pytest.approx([hit.score for hit in theirs], abs=1e-5)
        assert other.search(query, 2, "t")[0].spec.server == "t"
    plain.store.forget_others(["s"])
    other.refresh()
    assert set(remote.snapshot()) == {item.spec.key for item in plain.store.tools()}
    remote.delete([])
    remote.upsert([])

"""The experiments of the preference station: their instruments against brute force."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

pytest.importorskip("trl")


# -- instruments -----------------------------------------------------------------------------------------------------
def test_area_under_curve_by_all_pairs():
    from everytoken.reproduce.cdpo import area_under_curve

    generator = np.random.default_rng(0)
    for _ in range(20):
        scores = generator.integers(0, 6, 15).astype(float)
        labels = generator.random(15) < 0.4
        if labels.all() or not labels.any():
            continue
        pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(scores[labels], scores[~labels])]
        assert area_under_curve(scores, labels) == pytest.approx(np.mean(pairs))


def test_rank_correlation_agrees_with_scipy():
    from everytoken.reproduce.t_reg import rank_correlation

    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(1)
    one, other = generator.integers(0, 5, 40).astype(float), generator.normal(size=40)
    assert rank_correlation(one, other) == pytest.approx(stats.spearmanr(one, other).statistic)


def test_worked_sums_are_graded_by_their_total():
    from everytoken.reproduce.beds.sums import correct

    assert correct("21+43=", "21+43=64#64\n")
    assert not correct("21+43=", "21+43=64#65\n")
    assert not correct("21+43=", "64")  # no final answer
    assert correct("99+99=", "99+99=891#891")  # 198, from its last digit


def test_rewards_along_a_curve():
    from everytoken.reproduce.beds.frontier import reward_at
    from everytoken.reproduce.rto import SMOOTH, rollouts_to, smoothed

    curve = [(0.0, 0.1), (2.0, 0.5), (4.0, 0.3)]
    assert [reward_at(curve, kl) for kl in (0.0, 1.0, 3.0, 9.0)] == pytest.approx([0.1, 0.3, 0.4, 0.3])
    by_question = [(0.0, [0.0, 0.2]), (2.0, [1.0, 0.0])]
    assert reward_at(by_question, 0.5) == pytest.approx([0.25, 0.15])
    steps = [(10 * (index + 1), float(index)) for index in range(12)]
    means = smoothed(steps)
    assert means[0] == (10 * SMOOTH, (SMOOTH - 1) / 2)
    assert rollouts_to(steps, means[3][1]) == means[3][0]
    assert rollouts_to(steps, 100.0) == 130  # never: all of them, and a batch more


def test_frozen_lake_is_gymnasiums():
    pytest.importorskip("gymnasium")
    from everytoken.reproduce.ift import MOVES, lake, shortest_path, succeeds

    rng = random.Random(0)
    for _ in range(10):
        field = lake(rng)
        path = shortest_path(field)
        assert succeeds(field, path)
        assert not succeeds(field, path[:-1])
    field = ["SFFFF", "FFFFF", "FFFFF", "FFFFF", "FFFFG"]
    assert len(shortest_path(field)) == 8
    for moves in ("", "LLLL", "RRRRDDDX", "x"):
        assert not succeeds(field, moves)
    assert not succeeds(["SHFFF", *field[1:]], "R")
    assert MOVES == "LDRU"


def test_a_pruned_tokenizer_encodes_its_texts_as_before(embedded_tokenizer):
    from everytoken.reproduce.beds.small_models import pruned_tokenizer

    texts = ["The film was a quiet delight.", "Nobody said that the hotel was lovely, naïve ☕!"]
    small, old = pruned_tokenizer(embedded_tokenizer, texts)
    for text in texts:
        ids = small(text)["input_ids"]
        assert [old[token] for token in ids] == embedded_tokenizer(text)["input_ids"]
        assert small.decode(ids) == text
    assert len(small) < 1000
    other = "Quite another text, zygomorphic."
    assert small.decode(small(other)["input_ids"]) == other
    rare, _ = pruned_tokenizer(embedded_tokenizer, texts, min_count=2)
    assert len(rare) < len(small)
    assert rare.decode(rare(texts[0])["input_ids"]) == texts[0]


def test_the_frontier_is_one_plot_of_all_experiments():
    from everytoken.reproduce.beds.frontier import frontier_svg

    def result(names):
        return {
            "artifacts": {
                str(seed): {"curves": {name: [[0, 0.1], [2, 0.2 + seed], [50, 0.9]] for name in names}}
                for seed in range(2)
            }
        }

    picture = frontier_svg([result(["DPO", "TDPO2"]), result(["DPO", "TGDPO"])])
    assert all(picture.count(f">{name}</text>") == 1 for name in ("DPO", "TDPO2", "TGDPO"))  # DPO once
    assert "up to 20" in picture  # the point at 50 is left out, and the axis says so


def test_the_dpo_arm_is_the_same_in_all_shipped_experiments():
    from everytoken.catalog import find_card

    results = [find_card(name).result() for name in ("tdpo", "tgdpo", "t-reg")]
    for seed in ("0", "1", "2"):
        curves = [result["artifacts"][seed]["curves"]["DPO"] for result in results]
        assert np.allclose(curves[0], curves[1], atol=1e-3)
        assert np.allclose(curves[0], curves[2], atol=1e-3)

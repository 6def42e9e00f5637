"""The sentiment test bed: openings, scores, pairs."""

from __future__ import annotations

import pytest

from everytoken.core.errors import BadInputError
from everytoken.training.datasets.sentiment import continuations, openings, positivity, sentiment_pairs

pytest.importorskip("vaderSentiment")


def test_openings_do_not_overlap():
    train, test = openings("train"), openings("test")
    assert len(train) == 84
    assert len(test) == 36
    assert not set(train) & set(test)
    assert "Looking back, the hotel" in train
    with pytest.raises(BadInputError, match="no split"):
        openings("dev")


def test_scores():
    good, bad, flat = positivity(["A wonderful, happy day!", "A horrible, sad day.", "A day."])
    assert good > flat == 0 > bad


@pytest.mark.rotating
def test_pairs_are_ordered_by_score_and_repeatable(embedded):
    import torch

    model, tokenizer = embedded
    rows = []
    for _ in range(2):
        torch.manual_seed(0)
        rows.append(sentiment_pairs(model, tokenizer, 4, margin=0.3, max_new_tokens=6))
    assert rows[0] == rows[1]
    for row in rows[0]:
        chosen, rejected = positivity([row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]])
        assert chosen - rejected >= 0.3
    assert len(continuations(model, tokenizer, ["The film was"] * 3, 4, batch=2)) == 3

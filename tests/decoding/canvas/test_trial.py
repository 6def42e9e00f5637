"""``everytoken try rcr``: the small model that ships, and texts without open positions."""

from __future__ import annotations

import pytest

from everytoken.core.errors import BadInputError
from everytoken.decoding.canvas_trial import EXAMPLE, trial
from everytoken.decoding.trial import Trial, TrialRequest
from everytoken.generation.rcr import RCR
from everytoken.training.datasets.sudoku import sudoku_tokenizer


def test_it_fills_a_sudoku_step_by_step():
    shown = []
    request = TrialRequest([Trial("rcr", RCR, {"steps": 4})], stream=shown.append)
    result = trial(request)
    assert list(result.rows) == ["confidence order", "rcr"]
    assert all(row["forwards"] == 4 and row["tokens per forward"] == 3 for row in result.rows.values())
    assert len(shown) == 5 and shown[0].endswith("1·3·······2·4···\n") and "·" not in shown[-1].split()[-1]
    assert [len(trace) for trace in result.traces] == [12]
    given = EXAMPLE.replace(" ", "")
    for text in result.texts.values():
        assert all(old in (".", new) for old, new in zip(given, text, strict=True))
    assert 'type="range" min="0" max="4"' in result.pictures[0]
    assert sudoku_tokenizer()(EXAMPLE)["input_ids"] == [2, 1, 4] + [1] * 7 + [3, 1, 5, 1, 1, 1]


def test_a_text_without_open_positions_is_gone_on_with():
    options = {"max_new_tokens": 4, "temperature": 1.0, "seed": 3}
    request = TrialRequest([Trial("rcr", RCR, {"steps": 2})], prompt="123412", options=options)
    result = trial(request)
    assert result.rows["rcr"]["tokens per forward"] == 2
    with pytest.raises(BadInputError, match=r"[Ee]mpty"):
        trial(TrialRequest([Trial("rcr", RCR, {})], prompt=" "))

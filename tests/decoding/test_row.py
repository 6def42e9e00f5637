"""One row of a batch: scores, ends, traces."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper

from everytoken.core.errors import BadInputError
from everytoken.decoding.output import stacked
from everytoken.decoding.row import DecodingRow

from ..generation.common import ToyMatcher

GREEDY = GenerationConfig(do_sample=False)
SCORED = GenerationConfig(do_sample=False, return_dict_in_generate=True, output_scores=True)
IDS, NONE = torch.tensor([3, 4]), torch.tensor([], dtype=torch.long)


def test_processors_see_padded_text_and_raw_logits_stay():
    seen = []

    def look(ids, scores):
        seen.append(ids.tolist())
        return scores + 1

    row = DecodingRow(IDS, torch.tensor([0, 0]), [look, TemperatureLogitsWarper(2.0)], [], GREEDY)
    logits = torch.arange(6.0)
    assert row.processed(logits).tolist() == [(value + 1) / 2 for value in range(6)]
    assert logits.tolist() == list(range(6))
    assert seen == [[[0, 0, 3, 4]]]
    assert row.choose(logits) == 5


def test_tokens_are_kept_with_scores_and_columns():
    def three(ids, scores, **kwargs):
        return torch.tensor([ids.shape[1] >= 4])

    row = DecodingRow(IDS, NONE, LogitsProcessorList(), [three], SCORED, columns=("source",))
    logits = torch.zeros(6)
    assert not row.append(1, logits, logits, source="small")
    assert row.append(2, logits + 1, logits, source="large", other=3)
    assert row.text == [3, 4, 1, 2]
    assert row.new == [1, 2]
    assert row.columns == {"source": ["small", "large"]}
    assert len(row.scores) == 2
    assert row.logits is None


def test_a_matcher_masks_ends_and_objects():
    row = DecodingRow(IDS, NONE, [], [], GREEDY, matcher=ToyMatcher(6, length=1, end=5))
    assert row.processed(torch.zeros(6)).isfinite().tolist() == [True, False, True, False, True, False]
    with pytest.raises(BadInputError, match="forbids"):
        row.append(1, torch.zeros(6), torch.zeros(6))
    assert not row.append(2, torch.zeros(6), torch.zeros(6))
    assert row.append(5, torch.zeros(6), torch.zeros(6))


def test_finished_rows_repeat_their_last_scores():
    a, b = torch.tensor([1.0]), torch.tensor([2.0])
    assert [step.tolist() for step in stacked([[a, b], [b]])] == [[[1.0], [2.0]], [[2.0], [2.0]]]
    assert stacked([None, None]) is None
    assert stacked([]) is None

"""What a call is checked for: positions, whole texts, inputs, processors, and rows of a batch."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PrefixConstrainedLogitsProcessor
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor as Guidance

from everytoken.core.errors import BadInputError
from everytoken.decoding.checks import (
    check_one_row,
    check_positions,
    check_whole_text,
    must_sync,
    refuse_inputs,
    refuse_processors,
    refuse_unsupported,
    split_rows,
)
from everytoken.decoding.processors import processors_for_row

from ..conftest import tiny_llama
from ..testing.test_decoder import Plain

IDS = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


def test_rows_are_split_by_their_padding():
    rows = [(ids.tolist(), padding.tolist()) for ids, padding in split_rows(IDS, MASK)]
    assert rows == [([5, 6], [0, 0]), ([1, 2, 3, 4], [])]
    for mask, word in (([1, 1, 0, 1], "left"), ([1, 1, 1, 0], "left"), ([0, 0, 0, 0], "empty")):
        with pytest.raises(BadInputError, match=word):
            split_rows(IDS, torch.tensor([mask, [1, 1, 1, 1]]))


def test_positions_are_those_of_the_tokens_or_refused():
    right = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])
    check_positions("X", right, MASK, 4)
    check_positions("X", right.expand(3, 2, 4), MASK, 4)  # a row an axis, as multimodal models have
    check_positions("X", torch.arange(4)[None], None, 4)
    for wrong, mask in ((right + 1, MASK), (torch.arange(4)[None] * 2, None)):
        with pytest.raises(BadInputError, match="position_ids"):
            check_positions("X", wrong, mask, 4)


def test_positions_of_the_users_own_are_refused_by_name():
    model = tiny_llama(9)
    with pytest.raises(BadInputError, match="Plain counts positions"):
        model.generate(
            torch.tensor([[1, 2]]), max_new_tokens=2, custom_generate=Plain(), position_ids=torch.tensor([[4, 5]])
        )


def test_the_end_of_a_text_alone_is_refused():
    model, text = tiny_llama(9), torch.tensor([[1, 2, 3, 4, 5]])
    cache = DynamicCache()
    model(text[:, :3], past_key_values=cache, use_cache=True)
    with pytest.raises(BadInputError, match="whole text"):
        model.generate(
            text[:, 3:], attention_mask=torch.ones_like(text), past_key_values=cache, max_new_tokens=2,
            custom_generate=Plain(),
        )  # fmt: skip
    check_whole_text("X", text, {"attention_mask": None}, GenerationConfig())


def test_inputs_are_carried_or_refused_by_name():
    inputs = {"attention_mask": MASK, "use_cache": True, "pixel_values": 1, "token_type_ids": 2, "nothing": None}
    refuse_inputs("X", inputs, {"pixel_values", "token_type_ids"})
    with pytest.raises(BadInputError, match="X does not pass pixel_values, token_type_ids on"):
        refuse_inputs("X", inputs, ())


def test_modes_are_refused_by_name():
    for name, value in (("prompt_lookup_num_tokens", 3), ("prefill_chunk_size", 4)):
        with pytest.raises(BadInputError, match=name):
            refuse_unsupported("X", GenerationConfig(**{name: value}), False)
    assert not must_sync(tiny_llama(9))


def test_processors_that_follow_a_batch_are_refused():
    with pytest.raises(BadInputError, match="UnbatchedClassifierFreeGuidance"):
        refuse_processors("X", LogitsProcessorList([Guidance(2.0, tiny_llama(9))]))


def test_functions_of_a_rows_number_are_told_it():
    """``prefix_allowed_tokens_fn`` sees the number of its row although rows are decoded one by one."""
    model = tiny_llama(9)
    prompts = torch.tensor([[1, 2], [1, 2], [3, 4]])
    arguments = dict(
        max_new_tokens=4, do_sample=False, prefix_allowed_tokens_fn=lambda row, text: [2 * row, 2 * row + 1]
    )  # fmt: skip
    expected = model.generate(prompts, **arguments)
    assert model.generate(prompts, custom_generate=Plain(), **arguments).tolist() == expected.tolist()
    (alone,) = processors_for_row([PrefixConstrainedLogitsProcessor(lambda row, text: [row], 1)], 2)
    assert alone(torch.tensor([[1]]), torch.zeros(1, 4)).isfinite().tolist() == [[False, False, True, False]]


def test_special_caches_serve_one_row():
    class Odd(DynamicCache):
        pass

    check_one_row("X", 1, None, Odd())
    check_one_row("X", 2, None, DynamicCache())
    with pytest.raises(BadInputError, match="Odd"):
        check_one_row("X", 2, None, Odd())

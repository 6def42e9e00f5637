"""Token healing, the cheap baseline of exact bytes."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.tokenization.token_healing import TokenHealing

from ..conftest import tiny_llama
from .common import byte_level


def test_a_word_cut_in_the_middle(embedded):
    model, tokenizer = embedded
    healed = model.generate(
        **tokenizer("The capital of France is Par", return_tensors="pt"), max_new_tokens=4, do_sample=False,
        custom_generate=TokenHealing(tokenizer),
    )  # fmt: skip
    assert "France is Paris" in tokenizer.decode(healed[0])


def test_bad_settings(embedded_tokenizer):
    with pytest.raises(BadInputError, match="back is at least 1"):
        TokenHealing(embedded_tokenizer, back=0)


def prompt_of(tokenizer, text, special=True):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if special else ids


@pytest.mark.parametrize("back", [1, 3])
def test_a_special_token_at_the_prompts_end_is_kept(back):
    """There is nothing to mend: the text is plain generate's."""
    tokenizer = byte_level()
    model = tiny_llama(len(tokenizer), eos=tokenizer.eos_token_id, scale=0.3)
    ids = torch.tensor([prompt_of(tokenizer, "hello wor")])
    arguments = {"max_new_tokens": 8, "do_sample": False}
    decoder = TokenHealing(tokenizer, back=back, trace_enabled=True)
    healed = model.generate(ids, custom_generate=decoder, **arguments)
    assert torch.equal(healed, model.generate(ids, **arguments))
    assert decoder.stats.new_tokens == healed.shape[1] - ids.shape[1]
    assert not any(decoder.trace[0].columns["healed"])


def test_only_what_stands_behind_a_special_token_is_mended():
    tokenizer = byte_level()
    model = tiny_llama(len(tokenizer), eos=None, scale=0.3)
    word = tokenizer("hel", add_special_tokens=False)["input_ids"]
    start = prompt_of(tokenizer, "hello wor")
    ids = torch.tensor([[*start, *word]])
    decoder = TokenHealing(tokenizer, back=len(word) + 4)
    healed = model.generate(ids, custom_generate=decoder, max_new_tokens=6, do_sample=False)[0].tolist()
    assert healed[: len(start)] == start and decoder.stats.dropped == len(word)
    assert decoder.view.spell(healed[len(start) :]).startswith(b"hel")


def test_prompts_of_both_kinds_are_refused():
    tokenizer = byte_level()
    model = tiny_llama(len(tokenizer), eos=None)
    ends = [prompt_of(tokenizer, "hello"), prompt_of(tokenizer, "hello", False)]
    width = max(map(len, ends))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in ends])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ends])
    with pytest.raises(BadInputError, match="Special tokens end some"):
        model.generate(ids, attention_mask=mask, custom_generate=TokenHealing(tokenizer), max_new_tokens=2)

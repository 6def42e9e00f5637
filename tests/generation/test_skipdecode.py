"""SkipDecode: schedules, cached decoding against whole sequences, layers really skipped, training."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.generation.skipdecode import (
    LinearDepth,
    SkipDecode,
    SkipDecodeCallback,
    active_layers,
    depths_of,
    skip_layers,
    speedup,
)

from ..conftest import tiny_llama

PROMPTS = torch.tensor([[0, 0, 0, 3, 5, 8, 2], [1, 4, 9, 9, 2, 6, 6], [0, 0, 7, 1, 2, 5, 8], [0, 0, 0, 0, 0, 4, 4]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]])


# -- schedules ---------------------------------------------------------------------------------------------------------
@given(
    layers=st.integers(2, 40),
    data=st.data(),
    length=st.integers(1, 300),
)
def test_schedules_fall_and_keep_their_bounds(layers, data, length):
    top = data.draw(st.integers(1, layers))
    bottom = data.draw(st.integers(1, top))
    warmup = data.draw(st.integers(1, bottom))
    schedule = LinearDepth(top, bottom, warmup, length)
    depths = [schedule.depth(t) for t in range(length + 20)]
    assert depths[0] == top
    assert set(depths[length:]) == {bottom}
    assert all(a >= b for a, b in itertools.pairwise(depths))
    previous = set(range(layers))
    for t in (0, length // 2, length):
        running = active_layers(schedule, t, layers)
        assert len(running) == schedule.depth(t)
        assert running[:warmup] == list(range(warmup))
        rest = running[warmup:]
        assert rest == list(range(layers - len(rest), layers))  # the top ones
        assert set(running) <= previous  # what runs has always run
        previous = set(running)


def test_the_papers_schedule():
    """20 down to 8 of 24 layers: 14 on average, a nominal speed-up of 1.7."""
    schedule = LinearDepth(20, 8, length=100)
    assert speedup(schedule, 24, 101) == pytest.approx(24 / 14, rel=0.01)
    assert active_layers(schedule, 100, 24) == [0, *range(17, 24)]


@given(layers=st.integers(4, 48), ratio=st.floats(1, 4), length=st.integers(16, 200))
def test_schedules_for_a_speed_up_have_that_mean_depth(layers, ratio, length):
    schedule = LinearDepth.for_speedup(layers, ratio, length)
    assert abs(sum(schedule.depth(t) for t in range(length)) / length - layers / ratio) <= 1.1


# -- cached decoding ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    "schedule", [LinearDepth(7, 2, 1, 10), LinearDepth(8, 3, 2, 5), LinearDepth(6, 1, 1, 12)], ids=str
)
def test_cached_decoding_equals_the_masked_full_forward(rows, schedule):
    model = tiny_llama(13, seed=2, layers=8)
    ids, mask = PROMPTS[:rows], MASK[:rows]
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, custom_generate=SkipDecode(schedule),
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    text = output.sequences
    labels = text.clone()
    labels[:, :7] = -100
    whole = torch.cat([mask, torch.ones(rows, 12, dtype=torch.long)], 1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    with skip_layers(model, schedule), torch.no_grad():
        logits = model(input_ids=text, attention_mask=whole, position_ids=positions, labels=labels).logits
    for step in range(12):
        assert torch.allclose(logits[:, 6 + step], output.logits[step], atol=1e-4)


def test_every_layer_holds_a_prefix_of_the_text():
    model = tiny_llama(13, seed=2, layers=8)
    schedule = LinearDepth(7, 2, 1, 10)
    decoder = SkipDecode(schedule)
    output = model.generate(
        PROMPTS[1:2], max_new_tokens=12, do_sample=False, custom_generate=decoder, return_dict_in_generate=True
    )
    depths = [schedule.depth(t) for t in range(12)]
    assert decoder.layers_run == depths
    lengths = [layer.get_seq_length() for layer in output.past_key_values.layers]
    expected = [7 * (index in active_layers(schedule, 0, 8)) for index in range(8)]
    for t in range(1, 12):
        for index in active_layers(schedule, t, 8):
            expected[index] += 1
    assert lengths == expected


def test_layers_run_are_counted_by_hooks_of_our_own():
    model = tiny_llama(13, seed=2, layers=6)
    schedule, seen = LinearDepth(5, 2, 1, 6), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: seen.append(1))
    counts = []

    def count(*_):
        counts.append(len(seen))
        seen.clear()

    model.register_forward_hook(count)
    model.generate(PROMPTS[1:2], max_new_tokens=9, do_sample=False, custom_generate=SkipDecode(schedule))
    assert counts == [schedule.depth(t) for t in range(9)]


def test_chunked_prefill_runs_at_full_depth():
    model = tiny_llama(13, seed=2, layers=6)
    decoder = SkipDecode(LinearDepth(5, 2, 1, 6))
    whole = model.generate(PROMPTS[1:2], max_new_tokens=6, do_sample=False, custom_generate=decoder)
    chunks = model.generate(
        PROMPTS[1:2], max_new_tokens=6, do_sample=False, custom_generate=decoder, prefill_chunk_size=3
    )
    assert decoder.layers_run == [5, 5, 5, 4, 4, 4, 3, 2]  # three chunks, then depths 1 to 5
    assert chunks.tolist() == whole.tolist()


def test_a_cache_goes_on_at_the_same_depth_and_refuses_a_greater_one():
    model = tiny_llama(13, seed=2, layers=6)
    prompt = PROMPTS[1:2]
    flat = LinearDepth(3, 3, 1, 6)
    whole = model.generate(prompt, max_new_tokens=10, do_sample=False, custom_generate=SkipDecode(flat))
    first = model.generate(
        prompt, max_new_tokens=4, do_sample=False, custom_generate=SkipDecode(flat), return_dict_in_generate=True
    )
    second = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=6, do_sample=False,
        custom_generate=SkipDecode(flat),
    )  # fmt: skip
    assert second.tolist() == whole.tolist()
    fallen = model.generate(
        prompt, max_new_tokens=8, do_sample=False, custom_generate=SkipDecode(LinearDepth(5, 2, 1, 6)),
        return_dict_in_generate=True,
    )  # fmt: skip
    with pytest.raises(BadInputError, match="lacks keys of layer"):
        model.generate(
            fallen.sequences, past_key_values=fallen.past_key_values, max_new_tokens=3, do_sample=False,
            custom_generate=SkipDecode(LinearDepth(5, 2, 1, 6)),
        )  # fmt: skip


# -- training ----------------------------------------------------------------------------------------------------------
def test_depths_follow_the_labels():
    schedule = LinearDepth(5, 2, 1, 3)
    labels = torch.tensor([[-100, -100, 4, 4, 4, 4, -100], [-100] * 7, [-100, 3, 3, 3, 3, 3, 3]])
    assert depths_of(schedule, labels).tolist() == [
        [5, 5, 4, 3, 2, 2, 2],  # the position before the first answer token predicts token 0
        [5] * 7,
        [5, 4, 3, 2, 2, 2, 2],
    ]


def test_gradients_reach_the_layers_that_run_and_training_learns():
    model = tiny_llama(13, seed=2, layers=6)
    schedule = LinearDepth(4, 1, 1, 4)
    ids = torch.tensor([[3, 5, 8, 2, 6, 6, 1, 1]])
    labels = ids.clone()
    labels[:, :3] = -100
    with skip_layers(model, schedule):
        model(input_ids=ids, labels=labels).loss.backward()
    layers = model.model.layers
    assert all(
        weight.grad is None or not weight.grad.any() for index in (1, 2) for weight in layers[index].parameters()
    )
    assert all(layers[index].mlp.up_proj.weight.grad.any() for index in (0, 3, 4, 5))
    model.zero_grad()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    with skip_layers(model, schedule):
        for _ in range(30):
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    output = model.generate(ids[:, :3], max_new_tokens=5, do_sample=False, custom_generate=SkipDecode(schedule))
    assert output.tolist() == ids.tolist()


@pytest.mark.slow
def test_the_callback_works_in_a_real_trainer(tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    model = tiny_llama(13, seed=2, layers=6)
    rows = [{"input_ids": [3, 5, 8, 2, 6, 6], "labels": [-100, -100, 8, 2, 6, 6]}] * 8
    counts: list[int] = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(lambda *_: counts.append(1))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        gradient_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=Dataset.from_list(rows), callbacks=[SkipDecodeCallback(LinearDepth(2, 1))]
    )
    trainer.train()
    assert len(counts) == 3 * 2 * 2  # two layers a step, forward and again for the backward of a checkpoint
    counts.clear()
    model(torch.tensor([[1, 2]]))
    assert len(counts) == 6


def test_the_callback_works_in_trls_trainer(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from everytoken.reproduce.beds.small_models import character_tokenizer

    tokenizer = character_tokenizer("abcdefghijk")
    model = tiny_llama(len(tokenizer), seed=2, layers=6)
    rows = Dataset.from_list([{"prompt": "abc", "completion": "defg"}] * 4)
    counts: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: counts.append(1))
    arguments = SFTConfig(
        str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, bf16=False,
        gradient_checkpointing=False, per_device_train_batch_size=4,
    )  # fmt: skip
    schedule = LinearDepth(3, 1, 1, 2)
    SFTTrainer(
        model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[SkipDecodeCallback(schedule)]
    ).train()
    assert len(counts) == 2 * 3  # the prompt's three layers a step
    assert model(input_ids=torch.tensor([[1, 2]])).logits is not None
    assert len(counts) == 2 * 3 + 6


def test_what_others_patched_is_put_back():
    model = tiny_llama(13, layers=4)
    original = model.model.layers[1].forward
    patched = lambda *args, **kwargs: original(*args, **kwargs)  # noqa: E731
    model.model.layers[1].forward = patched
    with skip_layers(model, LinearDepth(2, 1)):
        pass
    assert model.model.layers[1].forward is patched
    assert "forward" not in model.__dict__
    assert "forward" not in model.model.layers[0].__dict__


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("values", [(4, 5, 1, 8), (5, 1, 2, 8), (5, 2, 0, 8), (5, 2, 1, 0)], ids=str)
def test_impossible_schedules(values):
    with pytest.raises(BadInputError, match="LinearDepth needs"):
        LinearDepth(*values)


def test_schedules_that_do_not_fit():
    model = tiny_llama(13, layers=4)
    with pytest.raises(BadInputError, match="the model has 4"):
        model.generate(PROMPTS[1:2], max_new_tokens=2, custom_generate=SkipDecode(LinearDepth(6, 2)))

    class Rising:
        warmup = 1

        def depth(self, t):
            return min(1 + t, 4)

    with pytest.raises(BadInputError, match="must not rise"):
        model.generate(PROMPTS[1:2], max_new_tokens=2, custom_generate=SkipDecode(Rising()))
    with pytest.raises(BadInputError, match="impossible with 4 layers"):
        LinearDepth.for_speedup(4, 5, 10)
    with pytest.raises(BadInputError, match="schedule must have"):
        SkipDecode(schedule=3)
    with pytest.raises(BadInputError, match="speedup >= 1"):
        SkipDecode(speedup=0.5)
    with pytest.raises(BadInputError, match="needs labels"), skip_layers(model, LinearDepth(2, 1)):
        model(PROMPTS[1:2])
    assert model(PROMPTS[1:2]).logits is not None


def test_models_without_one_list_of_layers():
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=13, n_embd=8, n_layer=2, n_head=2, n_positions=32))
    gpt.transformer.h = torch.nn.Sequential(*gpt.transformer.h)
    with pytest.raises(UnsupportedModelError, match="in one list of 2"):
        gpt.generate(PROMPTS[1:2], max_new_tokens=2, custom_generate=SkipDecode())


def test_a_static_cache_is_refused():
    with pytest.raises(BadInputError, match="cache that grows"):
        tiny_llama(13, layers=4).generate(
            PROMPTS[1:2], max_new_tokens=2, custom_generate=SkipDecode(), cache_implementation="static"
        )

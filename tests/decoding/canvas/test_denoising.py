"""Masked diffusion: schedules by the released code's numbers, one step by brute force, and models of transformers."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import TextDiffusionStreamer

from everytoken.architectures.any_order.configuration_any_order import AnyOrderConfig
from everytoken.architectures.any_order.modeling_any_order import AnyOrderLM
from everytoken.core.errors import BadInputError, UnknownNameError
from everytoken.decoding.canvas.denoising import DenoisingSampler, StepInfo, ranked, top
from everytoken.decoding.canvas.model import CanvasModel
from everytoken.decoding.canvas.schedules import CURVES, make_plan, step_counts
from everytoken.decoding.canvas.trajectory import Trajectory
from everytoken.testing.canvas import LENGTH, MASK, VOCAB, TinyDenoiser
from everytoken.testing.models import tiny_tokenizer

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def any_order(**settings):
    torch.manual_seed(0)
    config = AnyOrderConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5, **settings
    )
    return AnyOrderLM(config).eval()


# -- schedules ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("curve", "count", "steps", "expected"),
    [
        ("linear", 16, 4, [4, 4, 4, 4]),
        ("cosine", 16, 4, [2, 3, 5, 6]),
        ("pow2", 16, 4, [1, 3, 5, 7]),
        ("exp", 16, 4, [2, 2, 4, 8]),
        ("log", 16, 4, [8, 4, 3, 1]),
        ("linear", 10, 4, [3, 2, 3, 2]),
        ("cosine", 10, 4, [1, 2, 4, 3]),
        ("cosine", 512, 8, [10, 29, 48, 63, 78, 89, 96, 99]),
        ("linear", 4, 8, [1, 0, 1, 0, 1, 0, 1, 0]),
        ("even", 10, 4, [3, 3, 2, 2]),
        ("even", 3, 5, [1, 1, 1, 0, 0]),
    ],
)
def test_counts_of_the_released_schedules(curve, count, steps, expected):
    assert step_counts(count, steps, curve) == expected


@pytest.mark.parametrize("curve", CURVES)
def test_counts_sum_to_the_text(curve):
    for count in (0, 1, 2, 7, 32):
        for steps in (1, 2, 3, 32):
            counts = step_counts(count, steps, curve)
            assert len(counts) == steps and sum(counts) == count and min(counts) >= 0


def test_plans_that_do_not_fit():
    assert make_plan("even", 12, 6, 4) == [[2, 2], [2, 2], [2, 2]]
    for arguments, message in (
        (("even", 12, 6, 5), "do not divide a text"),
        (("even", 12, 13, None), "more than the 12 positions"),
        (("even", 12, 4, 4), "do not divide into 3 blocks"),
        (("even", 12, 0, None), "at least 1"),
        (("even", 12, 6, 24), "do not divide a text"),
    ):
        with pytest.raises(BadInputError, match=message):
            make_plan(*arguments)
    with pytest.raises(UnknownNameError, match="cosine"):
        DenoisingSampler(schedule="cosin")
    with pytest.raises(UnknownNameError, match="margin"):
        DenoisingSampler(remasking="margins")
    for settings in ({"temperature": -1.0}, {"cfg_scale": -0.1}, {"rank_temperature": 0.0}, {"gen_length": 0}):
        with pytest.raises(BadInputError):
            DenoisingSampler(**settings)
    with pytest.raises(BadInputError, match="more than the 8"):
        DenoisingSampler(gen_length=8, steps=9)

    class Wrong:
        def plan(self, length, steps, blocks):
            return [[length + 1]]

    with pytest.raises(BadInputError, match="plans"):
        make_plan(Wrong(), 4, None, None)


# -- steps -------------------------------------------------------------------------------------------------------------
def brute_force(model, ids, length, steps, first=0):
    """Confidence order, one row, position by position in plain Python."""
    canvas = torch.cat([ids, torch.full((length,), MASK)])
    for count in step_counts(length, steps):
        with torch.no_grad():
            logits = CanvasModel(model, MASK).logits(canvas[None])[0]
        probs = logits.softmax(-1)
        open_ = [place for place in range(len(canvas)) if canvas[place] == MASK]
        best = sorted(open_, key=lambda place: (-float(probs[place].max()), place))[:count]
        for place in best:
            canvas[place] = int(probs[place].argmax())
    return canvas


@pytest.mark.parametrize("steps", [1, 3, 12])
def test_confidence_order_by_brute_force(steps):
    model = TinyDenoiser()
    found = DenoisingSampler(gen_length=LENGTH, steps=steps)(model, IDS)
    for row in range(2):
        assert torch.equal(found.final_ids[row], brute_force(model, IDS[row], LENGTH, steps))


def test_one_block_is_no_block_and_blocks_go_from_left_to_right():
    model = TinyDenoiser()
    plain = DenoisingSampler(gen_length=12, steps=6)(model, IDS)
    one = DenoisingSampler(gen_length=12, steps=6, block_length=12)(model, IDS)
    assert torch.equal(plain.final_ids, one.final_ids) and torch.equal(plain.fix_step, one.fix_step)
    blocks = DenoisingSampler(gen_length=12, steps=6, block_length=4)(model, IDS).fix_step[:, 3:]
    for number in range(3):
        inside = blocks[:, 4 * number : 4 * number + 4]
        assert set(inside.flatten().tolist()) == {2 * number, 2 * number + 1}


def test_rows_of_different_lengths_keep_their_own_steps():
    model, ids = TinyDenoiser(), torch.tensor([[1, MASK, MASK, 2, MASK, MASK], [MASK, 3, 4, 5, 6, MASK]])
    found = DenoisingSampler(steps=2)(model, ids, editable=ids == MASK)
    assert found.counts.tolist() == [[2, 2], [1, 1]]
    for row in range(2):
        alone = DenoisingSampler(steps=2)(model, ids[row : row + 1], editable=ids[row : row + 1] == MASK)
        assert torch.equal(alone.final_ids[0], found.final_ids[row])
    with pytest.raises(BadInputError, match="more than the 2 positions"):
        DenoisingSampler(steps=3)(model, ids, editable=ids == MASK)


def test_ranks_are_what_they_say():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 3.0]])
    tokens = torch.tensor([0, 1])
    probs = logits.softmax(-1)
    prob, low = ranked(logits, tokens, "low_confidence")
    assert torch.allclose(prob, probs[[0, 1], tokens]) and torch.equal(prob, low)
    assert torch.allclose(ranked(logits, tokens, "margin")[1], torch.tensor([probs[0, 0] - probs[0, 2], 0.0]))
    assert torch.allclose(ranked(logits, tokens, "entropy")[1], (probs * probs.log()).sum(-1))
    closed = torch.tensor([[1.0, -torch.inf]])
    assert ranked(closed, tokens[:1], "entropy")[1].item() == 0
    assert top(torch.tensor([[1.0, 2.0, 2.0, -torch.inf]]), torch.tensor([1])).tolist() == [[False, True, False, False]]
    assert top(torch.tensor([[1.0, -torch.inf]]), torch.tensor([2])).tolist() == [[True, False]]


def test_temperature_samples_the_models_distribution():
    model = TinyDenoiser(peak=0.7)
    ids = torch.tensor([[1, 2, 3]]).repeat(4000, 1)
    found = DenoisingSampler(gen_length=1, temperature=2.0, rank_temperature=2.0)(
        model, ids, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        probs = (CanvasModel(model, MASK).logits(torch.tensor([[1, 2, 3, MASK]]))[0, 3] / 2).softmax(-1)
    counts = torch.bincount(found.final_ids[:, 3], minlength=VOCAB)
    expected = probs * 4000
    chi = ((counts - expected) ** 2 / expected.clamp(min=1e-9))[probs > 0].sum()
    assert counts[MASK] == 0 and chi < 27.9  # 9 degrees of freedom, p = 0.001
    assert torch.allclose(found.choice_prob[:, 3], probs[found.final_ids[:, 3]], rtol=1e-4)


def test_guidance_weighs_against_the_bare_canvas():
    model, scale = TinyDenoiser(), 0.7
    sampler = DenoisingSampler(gen_length=1, cfg_scale=scale)
    found = sampler(model, IDS)
    with torch.no_grad():
        wrapped = CanvasModel(model, MASK)
        full = wrapped.logits(torch.nn.functional.pad(IDS, (0, 1), value=MASK))[:, 3]
        bare = wrapped.logits(torch.full((2, 4), MASK))[:, 3]
    mixed = bare + (1 + scale) * (full - bare)
    mixed[:, MASK] = -torch.inf
    assert torch.equal(found.final_ids[:, 3], mixed.argmax(-1)) and sampler.stats.target_forwards == 2


def test_a_transform_changes_ranks_and_not_tokens():
    seen = []

    def last_first(confidence, tokens, at: StepInfo):
        seen.append((int(at.step[0]), int(at.block_step[0]), int(at.block_steps[0]), int(at.steps[0])))
        return torch.arange(len(confidence), dtype=torch.float32)

    model = TinyDenoiser()
    found = DenoisingSampler(gen_length=4, steps=4, block_length=2, transform=last_first)(model, IDS[:1])
    assert found.fix_step[0, 3:].tolist() == [1, 0, 3, 2]
    assert seen == [(0, 0, 2, 4), (1, 1, 2, 4), (2, 0, 2, 4), (3, 1, 2, 4)]


def test_guesses_of_every_step():
    model = TinyDenoiser()
    found = DenoisingSampler(gen_length=6, steps=6, block_length=3, record_guesses=True)(model, IDS)
    assert found.guesses.shape == (2, 6, 9) and not bool((found.guesses == MASK).any())
    for step, state in enumerate(found.states()):
        if step < 6:
            kept = state != MASK
            assert torch.equal(found.guesses[:, step][kept], state[kept])
            with torch.no_grad():
                probs = CanvasModel(model, MASK).logits(state).softmax(-1)
            assert torch.equal(found.guesses[:, step][~kept], probs.argmax(-1)[~kept])
            torch.testing.assert_close(found.confidence[:, step][~kept], probs.amax(-1)[~kept])
            assert bool((found.confidence[:, step][kept] == 0).all())
    assert torch.equal(found.guesses[:, -1], found.final_ids)


# -- models ------------------------------------------------------------------------------------------------------------
SMALL = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def bert(kind):
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    extra = special if kind == "ModernBert" else {}
    config = getattr(transformers, f"{kind}Config")(**SMALL, max_position_embeddings=64, initializer_range=0.5, **extra)
    return getattr(transformers, f"{kind}ForMaskedLM")(config).eval()


@pytest.mark.parametrize("kind", ["Bert", "ModernBert"])
def test_encoders_of_transformers(kind):
    model, sampler = bert(kind), DenoisingSampler(gen_length=6, steps=3, mask_id=30)
    bare = sampler(model, IDS)
    ids = torch.nn.functional.pad(IDS, (2, 0))
    padded = sampler(model, ids, attention_mask=torch.tensor([[0, 0] + [1] * 3] * 2))
    assert torch.equal(padded.final_ids[:, 2:], bare.final_ids) and not bool((bare.final_ids == 30).any())


def test_generate_takes_a_sampler():
    model = any_order()
    sampler = DenoisingSampler(steps=4, trace_enabled=True)
    found = model.generate(IDS, max_new_tokens=8, custom_generate=sampler)
    direct = DenoisingSampler(gen_length=8, steps=4)(model, IDS)
    assert torch.equal(found, direct.final_ids) and sampler.stats.target_forwards == 4 and len(sampler.trace) == 2
    whole = model.generate(IDS, max_new_tokens=8, custom_generate=sampler, return_dict_in_generate=True, seeds=[1, 2])
    assert torch.equal(whole.sequences, found) and torch.equal(whole.trajectory.fix_step, direct.fix_step)
    for arguments, message in (
        ({"do_sample": True, "temperature": 0.5}, "TemperatureLogitsWarper"),
        ({"max_time": 5.0}, "MaxTimeCriteria"),
        ({"num_beams": 2}, "num_beams"),
    ):
        with pytest.raises((BadInputError, ValueError), match=message):
            model.generate(IDS, max_new_tokens=8, custom_generate=sampler, **arguments)
    with pytest.raises(BadInputError, match="any order"):
        model.generate(IDS, max_new_tokens=8)


def test_a_decoder_made_bidirectional_generates(capsys):
    torch.manual_seed(0)
    config = transformers.GemmaConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, use_bidirectional_attention=True, initializer_range=0.5,
        pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = transformers.GemmaForCausalLM(config).eval()
    tokenizer = tiny_tokenizer("".join(map(chr, range(65, 91))))
    sampler = DenoisingSampler(steps=2, mask_id=30)
    streamer = TextDiffusionStreamer(tokenizer, skip_prompt=True)
    found = model.generate(IDS[:1], max_new_tokens=4, custom_generate=sampler, streamer=streamer)
    assert found.shape == (1, 7) and sampler.stats.target_forwards == 2
    shown = capsys.readouterr().out
    assert shown.count("\033[33m") == 2 and tokenizer.decode(found[0, 3:]) in shown


def test_records_of_another_shape_are_refused():
    found = DenoisingSampler(gen_length=4, steps=2)(TinyDenoiser(), IDS)
    with pytest.raises(BadInputError, match="step 3"):
        found.state(3)
    for name, value in (("fix_step", found.fix_step[:, 1:]), ("counts", found.counts[:1]), ("guesses", IDS)):
        with pytest.raises(BadInputError, match=name):
            Trajectory(**(vars(found) | {name: value}))


def test_a_row_does_not_depend_on_the_others_where_its_steps_are_empty():
    """A logarithmic schedule leaves steps of a short row empty while a long one still writes."""
    model = TinyDenoiser()
    ids = torch.full((2, 18), MASK)
    ids[:, :2], editable = 1, ids == MASK
    editable[0, 10:] = False
    ids[0, 10:] = 1
    sampler = DenoisingSampler(steps=8, schedule="log", temperature=1.0)
    both = sampler(model, ids, editable=editable, seeds=[5, 6])
    alone = sampler(model, ids[:1], editable=editable[:1], seeds=[5])
    assert torch.equal(both.final_ids[0], alone.final_ids[0])

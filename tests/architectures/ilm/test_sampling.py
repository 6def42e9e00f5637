"""Insertion: the distribution of texts by enumeration, rows, stops, what users see, and what is refused."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from everytoken.architectures.any_order.losses import insertion_logps
from everytoken.architectures.ilm.likelihood import insertion_logp
from everytoken.architectures.ilm.sampling import InsertionSampler
from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.decoding.canvas.replay import replay_html, step_lines

from ..any_order.test_modeling import network as any_order
from .common import BOS, CLS, MASK, PAD, START, A, B, C, network

LETTERS = (A, B, C)


def law(net, longest):
    """The distribution of answers of at most ``longest`` letters."""
    found = {}
    for length in range(longest + 1):
        for letters in itertools.product(LETTERS, repeat=length):
            ids = torch.tensor([CLS, BOS, *letters])
            found[letters] = float(insertion_logp(net, ids, torch.arange(len(ids)) > 1, limit=longest).exp())
    return found


@pytest.mark.parametrize("order", ["joint", pytest.param("gap-first", marks=pytest.mark.slow)])
def test_texts_have_the_models_own_law(order):
    net, count = network(initializer_range=0.5, num_hidden_layers=1), 1000
    with torch.no_grad():
        net.stop_head.weight.mul_(0.3)
    wanted = law(net, 2)
    assert sum(wanted.values()) == pytest.approx(1, abs=1e-6)
    assert min(wanted[()], sum(wanted[(letter,)] for letter in LETTERS)) > 0.02  # texts end early, too
    sampler = InsertionSampler(order, stop_threshold=None, gen_length=2)
    found = sampler(net, START.repeat(count, 1), seeds=range(count))
    seen = Counter(tuple(found.text(row)[2:]) for row in range(count))
    large = {text: chance * count for text, chance in wanted.items() if chance * count >= 5}
    rest = count - sum(large.values())
    chi = sum((seen[text] - mean) ** 2 / mean for text, mean in large.items())
    chi += (count - sum(seen[text] for text in large) - rest) ** 2 / max(rest, 5)
    assert chi < len(large) + 4 * (2 * len(large)) ** 0.5
    assert found.forwards == 3 and set(seen) <= set(wanted)


def test_the_record_can_be_replayed():
    net = network(stop=-9.0)
    sampler = InsertionSampler(gen_length=4, trace_enabled=True)
    found = sampler(net, START, seeds=[3])
    texts = [found.text(0, step) for step in range(found.steps + 1)]
    assert [len(text) for text in texts] == [2, 3, 4, 5, 6] and texts[-1] == found.text(0)
    assert torch.equal(list(found.states())[-1], found.final_ids) and found.counts.tolist() == [[1, 1, 1, 1]]
    assert [token for token in found.state(2)[0].tolist() if token != MASK] == texts[2]
    steps, text = found.fix_step[0].tolist(), found.text(0)
    for number in range(4):  # each probability again, from the text before it
        place = steps.index(number)
        gap = sum(step < number for step in steps[:place]) - 1
        ids = torch.tensor([texts[number]])
        closed = torch.arange(7) <= BOS
        with torch.no_grad():
            output = net(input_ids=ids)
        logps = insertion_logps(output.logits, net.open_gaps(ids), closed)
        assert found.choice_prob[0, place].item() == pytest.approx(float(logps[0, gap, text[place]].exp()), rel=1e-4)
        assert found.stop_prob[0, number].item() == pytest.approx(float(output.stop_logits.softmax(-1)[0, 0]), rel=1e-4)
        assert sampler.trace[0].columns["gap"][place - 2] == gap - 1
    assert sampler.trace[0].columns["step"] == steps[2:] and sampler.stats.new_tokens == 4


def test_a_text_grows_in_the_terminal_and_on_a_page():
    found = InsertionSampler(gen_length=2)(network(stop=-9.0), START, seeds=[0])
    lines = step_lines(found, 0, None)
    assert [line.count("<") for line in lines] == [2, 3, 4] and not any("·" in line for line in lines)
    page = replay_html(found, 0, None)
    assert 'max="2"' in page and '"gap": ""' in page


@pytest.mark.parametrize("settings", [{}, {"order": "gap-first", "top_p": 0.6}, {"temperature": 0.0}])
def test_rows_do_not_depend_on_their_batch_nor_on_the_side_of_padding(settings):
    net, sampler = network(stop=-9.0), InsertionSampler(gen_length=4, **settings)
    texts = [[CLS, BOS, A, B], [CLS, BOS], [CLS, C, BOS]]
    for left in (False, True):
        pads = [[PAD] * (4 - len(text)) for text in texts]
        ids = torch.tensor([pad + text if left else text + pad for pad, text in zip(pads, texts, strict=True)])
        together = sampler(net, ids, attention_mask=(ids != PAD).long(), seeds=[1, 2, 3])
        for row, text in enumerate(texts):
            alone = sampler(net, torch.tensor([text]), seeds=[row + 1])
            assert alone.text(0) == together.text(row) == together.rows(torch.tensor([row])).text(0)


def test_the_stop_head_ends_rows_for_good_and_questions_stay_as_they_are():
    assert InsertionSampler(gen_length=5)(network(stop=9.0), START, seeds=[0]).text(0) == [CLS, BOS]
    net = network()
    with torch.no_grad():
        net.stop_head.weight.mul_(20)
    found = InsertionSampler(gen_length=6, stop_threshold=0.5)(net, START.repeat(40, 1), seeds=range(40))
    lengths = [len(found.text(row)) for row in range(40)]
    assert 0 < int(found.stopped.sum()) < 40 and len(set(lengths)) > 1
    assert all(length == 8 for length, ended in zip(lengths, found.stopped, strict=True) if not ended)
    ids = torch.tensor([[CLS, A, BOS, B]])
    found = InsertionSampler(gen_length=5)(network(stop=-9.0), ids, seeds=[0])
    assert found.text(0)[:3] == [CLS, A, BOS] and len(found.text(0)) == 9
    kept = InsertionSampler(gen_length=5)(network(stop=-9.0), ids, seeds=[0], editable=torch.tensor([[0, 0, 1, 0]]))
    assert kept.text(0)[:3] == [CLS, A, BOS] and kept.text(0)[-1] == B and len(kept.text(0)) == 9
    inside = InsertionSampler(gen_length=3)(network(stop=-9.0, prefix_gaps=True), ids, seeds=[0])
    assert inside.text(0)[0] == CLS and len(inside.text(0)) == 7


def test_left_to_right_fills_the_last_gap():
    found = InsertionSampler("left-to-right", gen_length=4)(network(stop=-9.0), START, seeds=[1])
    assert found.fix_step[0].tolist() == [-1, -1, 0, 1, 2, 3]
    name, plain = InsertionSampler().baseline()
    assert name == "from left to right" and plain.order == "left-to-right"


def test_gap_first_with_a_cut():
    """The likeliest gap, and of its tokens those that share half of it."""
    net = network(stop=-9.0)
    logps = insertion_logps(net(input_ids=START).logits, net.open_gaps(START), torch.arange(7) <= BOS)[0, 1]
    order = logps.argsort(descending=True)
    half = {int(token) for token, share in zip(order, logps[order].exp().cumsum(0), strict=True) if share < 0.5}
    half.add(int(order[len(half)]))
    sampler = InsertionSampler("gap-first", gap_temperature=0.0, top_p=0.5, gen_length=1)
    seen = {sampler(net, START, seeds=[seed]).text(0)[2] for seed in range(30)}
    assert seen <= half


def test_generate_counts_and_streams():
    net = network(stop=-9.0)
    ids = torch.tensor([[PAD, CLS, BOS], [CLS, A, BOS]])
    greedy = net.generate(ids, attention_mask=(ids != PAD).long(), max_new_tokens=3)
    wanted = InsertionSampler(gen_length=3, temperature=0.0)(net, ids, attention_mask=(ids != PAD).long(), seeds=[0, 0])
    assert torch.equal(greedy, wanted.final_ids) and greedy.tolist()[0][-1] == PAD
    torch.manual_seed(0)
    one = net.generate(ids[1:], max_new_tokens=3, do_sample=True, temperature=2.0)
    torch.manual_seed(0)
    assert torch.equal(one, net.generate(ids[1:], max_new_tokens=3, do_sample=True, temperature=2.0))
    others = [net.generate(ids[1:], max_new_tokens=3, do_sample=True, temperature=2.0) for _ in range(8)]
    assert any(not torch.equal(one, other) for other in others)
    cold = net.generate(ids[1:], max_new_tokens=3, do_sample=True, temperature=0.0)
    assert torch.equal(cold, net.generate(ids[1:], max_new_tokens=3))
    sharp = [net.generate(ids[1:], max_new_tokens=1, do_sample=True, top_p=1e-6) for _ in range(8)]
    gaps = {tuple(text[0].tolist()) for text in sharp}
    assert len(gaps) <= 2  # of each gap its likeliest token
    for wrong in ({"top_k": 1}, {"min_new_tokens": 2}):
        with pytest.raises(BadInputError, match=next(iter(wrong))):
            net.generate(ids[1:], max_new_tokens=3, do_sample=True, **wrong)
    sampler = InsertionSampler()
    output = net.generate(ids[1:], max_new_tokens=2, custom_generate=sampler, return_dict_in_generate=True)
    assert output.stats.target_forwards == 3 and output.trajectory.steps == 2
    seen = []

    class Streamer:
        def put_draft(self, value):
            seen.append(value.tolist())

        def put(self, value):
            seen.append(("put", value.tolist()))

        def end(self):
            seen.append("end")

    found = InsertionSampler(gen_length=2)(net, ids[1:], seeds=[0], streamer=Streamer())
    assert seen[0] == ("put", [CLS, A, BOS]) and [len(item) for item in seen[1:3]] == [1, 2]
    assert seen[-2:] == [("put", found.new_ids(0)), "end"]


def test_what_is_refused():
    for settings in (
        {"order": "token-first"}, {"temperature": -1.0}, {"stop_threshold": 0.0}, {"top_p": 0.0}, {"top_p": 0.5},
        {"gen_length": 0},
    ):  # fmt: skip
        with pytest.raises(BadInputError):
            InsertionSampler(**settings)
    sampler, net = InsertionSampler(gen_length=2), network()
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    for ids, arguments, message in (
        (START, {"seeds": [1, 2]}, "one a row"),
        (torch.tensor([[CLS, BOS, A]]), {"attention_mask": torch.tensor([[1, 0, 1]])}, "inside"),
        (START, {"editable": torch.tensor([[1, 0]])}, "does not fill"),
        (START, {"editable": torch.tensor([[0, 0]])}, "no open gap"),
        (START, {"editable": torch.tensor([[1]])}, "must be as"),
        (torch.tensor([[CLS]]), {}, "no open gap"),
        (torch.tensor([[CLS, BOS, MASK]]), {}, "mask token"),
        (torch.tensor([[CLS, BOS, 99]]), {}, "vocabulary"),
        (START[:, :0], {}, "[Ee]mpty"),
        (START, {"pixel_values": START}, "pixel_values"),
        (START.repeat(2, 1), {"streamer": type("S", (), {"end": lambda self: None})()}, "one row"),
    ):
        with pytest.raises(BadInputError, match=message):
            sampler(net, ids, **arguments)
    with pytest.raises(BadInputError, match="how many"):
        InsertionSampler()(net, START)
    with pytest.raises(UnsupportedModelError, match="stop head"):
        sampler(any_order(), torch.tensor([[1, 2]]))
    assert not calls

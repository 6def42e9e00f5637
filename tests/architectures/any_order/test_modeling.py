"""AnyOrderLM: both sides, two streams by sequential conditionals, padding, positions, checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from everytoken.architectures.any_order.configuration_any_order import AnyOrderConfig
from everytoken.architectures.any_order.modeling_any_order import AnyOrderLM
from everytoken.core.errors import BadInputError
from everytoken.decoding.canvas.orders import order_mask, subset_order

IDS = torch.randint(1, 9, (2, 6), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def network(**settings):
    torch.manual_seed(0)
    shape = {"vocab_size": 10, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AnyOrderLM(AnyOrderConfig(**shape | {"initializer_range": 0.4} | settings)).eval()


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


@pytest.mark.parametrize("settings", [{}, {"streams": 2, "stop_head": True}])
def test_auto_loads_what_it_saves(tmp_path, settings):
    model = network(**settings)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert type(again) is AnyOrderLM and again.config.mask_token_id == 9
    assert torch.equal(logits(model), logits(again))
    assert again.lm_head.weight is again.embed_tokens.weight
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in again.named_parameters()}


def test_every_token_moves_every_row():
    model = network()
    for place in range(6):
        other = IDS.clone()
        other[:, place] = IDS[:, place] % 8 + 1
        assert bool(((logits(model) - logits(model, other)).abs().amax(-1) > 0).all())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", ["eager", "sdpa"])
def test_padding_changes_nothing(side, way):
    model = network()
    model.set_attn_implementation(way)
    pads = (3, 0) if side == "left" else (0, 3)
    ids, mask = (torch.nn.functional.pad(x, pads) for x in (IDS, torch.ones_like(IDS)))
    found = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(found[:, 3:] if side == "left" else found[:, :-3], logits(model), **CLOSE)
    assert bool(found.isfinite().all())


def test_masks_of_all_kinds_and_positions_of_ones_own():
    model = network()
    mask = torch.ones_like(IDS)
    mask[:, :2] = 0
    two, three = logits(model, attention_mask=mask), mask.bool()[:, None].expand(-1, 6, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(two, logits(model, attention_mask=three, position_ids=positions), **CLOSE)
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~three[:, None], -torch.inf)
    torch.testing.assert_close(two, logits(model, attention_mask=additive, position_ids=positions), **CLOSE)
    moved = logits(model, position_ids=torch.arange(6).expand(2, -1) + 5)
    torch.testing.assert_close(moved, logits(model), **CLOSE)  # positions are relative
    spread = logits(model, position_ids=torch.tensor([[0, 1, 2, 3, 4, 9]] * 2))
    assert not torch.allclose(spread, logits(model))


def test_gradient_checkpointing_changes_no_gradient():
    model = network(streams=2, stop_head=True)
    known = torch.tensor([[1, 0, 0, 1, 0, 0]] * 2).bool()
    inputs = {"perm_mask": order_mask(subset_order(known), known), "labels": IDS, "stop_labels": torch.tensor([0, 1])}

    def gradients(network):
        network.train()
        network.zero_grad()
        network(input_ids=IDS, **inputs).loss.backward()
        return [weight.grad.clone() for weight in network.parameters()]

    wanted = gradients(model)
    recomputed = copy.deepcopy(model)
    recomputed.gradient_checkpointing_enable()
    for one, two in zip(wanted, gradients(recomputed), strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


# -- two streams -------------------------------------------------------------------------------------------------------
KNOWN = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 1, 1]]).bool()


def test_one_pass_gives_all_sequential_conditionals():
    model = network(streams=2)
    ranks = subset_order(KNOWN)
    together = logits(model, perm_mask=order_mask(ranks, KNOWN))
    for row in range(2):
        shown = IDS[row].masked_fill(~KNOWN[row], 9)
        for place in (~KNOWN[row]).nonzero()[:, 0].tolist():
            rank = int(ranks[row, place])
            mask = order_mask(ranks[row : row + 1], KNOWN[row : row + 1], torch.tensor([rank]))
            target = torch.eye(6)[None, [place]]
            alone = logits(model, shown[None], perm_mask=mask, target_mapping=target)
            torch.testing.assert_close(alone[0, 0], together[row, place], **CLOSE)
            shown[place] = IDS[row, place]


def test_a_query_sees_neither_itself_nor_what_comes_later():
    model = network(streams=2)
    ranks = subset_order(KNOWN)
    before = logits(model, perm_mask=order_mask(ranks, KNOWN))
    for place in (1, 4):
        other = IDS.clone()
        other[0, place] = other[0, place] % 8 + 1
        moved = (logits(model, other, perm_mask=order_mask(ranks, KNOWN)) - before).abs().amax(-1)[0] > 0
        assert moved.tolist() == [not bool(KNOWN[0, i]) and int(ranks[0, i]) > int(ranks[0, place]) for i in range(6)]


def test_a_query_that_sees_nothing_does_not_know_the_text():
    model, nothing = network(streams=2), torch.zeros_like(IDS, dtype=torch.bool)
    mask = order_mask(subset_order(nothing), nothing)
    first, other = (logits(model, ids, perm_mask=mask)[:, 0] for ids in (IDS, IDS.flip(1) % 8 + 1))
    assert torch.equal(first, other) and bool(first.isfinite().all())
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, perm_mask=mask)[:, 0], first, **CLOSE)


def test_padding_and_orders():
    model = network(streams=2)
    wanted = logits(model, perm_mask=order_mask(subset_order(KNOWN), KNOWN))
    ids = torch.nn.functional.pad(IDS, (2, 0))
    known = torch.nn.functional.pad(KNOWN, (2, 0), value=True)
    mask = torch.nn.functional.pad(torch.ones_like(IDS), (2, 0))
    found = logits(model, ids, attention_mask=mask, perm_mask=order_mask(subset_order(known), known))
    torch.testing.assert_close(found[:, 2:][~KNOWN], wanted[~KNOWN], **CLOSE)


# -- heads and refusals ------------------------------------------------------------------------------------------------
def test_shifted_labels_and_the_stop_head():
    model = network(shift_logits=True, stop_head=True)
    output = model(input_ids=IDS, labels=IDS, stop_labels=torch.tensor([0, 1]))
    wanted = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    stop = torch.nn.functional.cross_entropy(output.stop_logits, torch.tensor([0, 1]))
    torch.testing.assert_close(output.loss, wanted + stop)


def test_what_is_refused():
    model = network()
    for inputs, message in (
        ({}, "input_ids or inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 6, 16)}, "not both"),
        ({"input_ids": IDS, "perm_mask": torch.zeros(2, 6, 6)}, "streams=2"),
        ({"input_ids": IDS, "target_mapping": torch.zeros(2, 1, 6)}, "perm_mask too"),
        ({"input_ids": IDS, "stop_labels": torch.zeros(2).long()}, "stop_head"),
    ):
        with pytest.raises(BadInputError, match=message):
            model(**inputs)
    for settings in ({"streams": 3}, {"hidden_size": 18}, {"mask_token_id": 10}, {"streams": 2, "shift_logits": True}):
        with pytest.raises(BadInputError):
            network(**settings)

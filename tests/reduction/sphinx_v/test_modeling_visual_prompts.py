"""The prompt encoder against its equations, the kernel of its frequencies, and what is kept from learning."""

from __future__ import annotations

import math

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.reduction.sphinx_v.configuration_visual_prompts import VisualPromptConfig
from everytoken.reduction.sphinx_v.modeling_visual_prompts import VisualPromptEncoder
from everytoken.reduction.sphinx_v.prompts import BOX, POINT, Prompts


def encoder(**settings):
    torch.manual_seed(0)
    return VisualPromptEncoder(VisualPromptConfig(**{"hidden_size": 12, "width": 16, "max_prompts": 4, **settings}))


def prompts(rows=2, slots=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(rows, slots, 4, generator=generator),
        torch.randint(0, 2, (rows, slots), generator=generator),
        torch.rand(rows, slots, generator=generator) < 0.6,
    )


def test_it_equals_the_equations_slot_by_slot():
    made = encoder()
    coordinates, kinds, valid = prompts()

    def phi(v):
        a = 2 * math.pi * ((2 * v - 1) @ made.frequencies)
        return torch.cat([a.sin(), a.cos()])

    zero = phi(torch.zeros(2))
    tl, br = made.corners.weight
    for row in range(2):
        for slot in range(4):
            c, there = coordinates[row, slot], int(valid[row, slot])
            if kinds[row, slot] == POINT:
                t = made.lift((phi(c[:2]) if there else zero) + made.point_types.weight[there])
            else:
                first, second = (phi(c[:2]), phi(c[2:])) if there else (zero, zero)
                t = torch.cat([first + tl, second + br]) + made.box_types.weight[there]
            wanted = made.norm(made.project(t))
            assert torch.allclose(made(coordinates, kinds, valid)[row, slot], wanted, atol=1e-5)


def test_the_map_of_places():
    made = encoder()
    v, w, shift = torch.rand(5, 2), torch.rand(5, 2), torch.tensor([0.1, -0.2])
    assert torch.allclose(made.places(v).square().sum(-1), torch.full((5,), 8.0), atol=1e-4)
    moved = (made.places(v + shift) * made.places(w + shift)).sum(-1)
    assert torch.allclose(moved, (made.places(v) * made.places(w)).sum(-1), atol=1e-4)
    centre = made.places(torch.tensor([0.5, 0.5]))
    assert torch.allclose(centre, torch.cat([torch.zeros(8), torch.ones(8)]), atol=1e-6)


def test_the_mean_kernel_over_many_frequencies():
    """E cos(4 pi (v - w) G) = exp(-(4 pi)^2 |v - w|^2 / 2) for standard normal G."""
    made = encoder()
    made.frequencies = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0))
    for distance in (0.03, 0.06, 0.1):
        v = torch.tensor([0.4, 0.4])
        w = v + distance / math.sqrt(2)
        found = float((made.places(v) * made.places(w)).sum() / 20_000)
        assert found == pytest.approx(math.exp(-((4 * math.pi * distance) ** 2) / 2), abs=0.025)


def test_slots_have_no_vectors_of_their_own():
    made = encoder()
    coordinates, kinds, valid = prompts()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = made(coordinates[:, order], kinds[:, order], valid[:, order])
    assert torch.allclose(shuffled, made(coordinates, kinds, valid)[:, order], atol=1e-6)


def test_types_change_what_they_name_and_nothing_else():
    coordinates, kinds, valid = prompts(4, 4)

    def changed(table, row):
        made = encoder()
        before = made(coordinates, kinds, valid)
        with torch.no_grad():
            getattr(made, table).weight[row] += 1
        return (made(coordinates, kinds, valid) - before).abs().amax(-1) > 1e-5

    assert torch.equal(changed("point_types", 1), (kinds == POINT) & valid)
    assert torch.equal(changed("point_types", 0), (kinds == POINT) & ~valid)
    assert torch.equal(changed("box_types", 0), (kinds == BOX) & ~valid)
    assert torch.equal(changed("box_types", 1), (kinds == BOX) & valid)


def test_a_prompt_at_the_origin_is_not_an_empty_slot():
    made = encoder()
    zeros, kinds = torch.zeros(1, 2, 4), torch.tensor([[POINT, BOX]])
    there, empty = (made(zeros, kinds, torch.full((1, 2), value)) for value in (True, False))
    assert ((there - empty).abs().amax(-1) > 1e-3).all()


def test_ten_slots_are_twelve_tokens_and_empty_ones_may_be_left_out():
    valid = torch.zeros(2, 10, dtype=torch.bool)
    valid[1, :3] = True
    given = Prompts(torch.rand(2, 10, 4), torch.zeros(2, 10, dtype=torch.long), valid)
    made = encoder(max_prompts=10)
    rows = made.tokens(given)
    assert [len(row) for row in rows] == [12, 12]
    assert torch.equal(rows[0][0], made.ends.weight[0]) and torch.equal(rows[1][-1], made.ends.weight[1])
    short = encoder(max_prompts=10, drop_empty=True)
    assert [len(row) for row in short.tokens(given)] == [2, 5]
    assert torch.allclose(short.tokens(given)[1][1:4], rows[1][1:4], atol=1e-6)


def test_frequencies_do_not_learn_and_are_saved(tmp_path):
    made = encoder(coordinate_shift=0.5)
    made(*prompts()).square().sum().backward()
    assert "frequencies" in made.state_dict() and not made.frequencies.requires_grad
    assert made.frequencies.std() == pytest.approx(1, abs=0.4)
    made.save_pretrained(tmp_path)
    again = VisualPromptEncoder.from_pretrained(tmp_path, use_safetensors=True)
    assert torch.equal(again.frequencies, made.frequencies)
    assert torch.equal(again(*prompts()), made(*prompts()))


def test_the_shift_of_the_released_weights():
    coordinates, kinds, valid = prompts()
    shifted, plain = encoder(coordinate_shift=0.5), encoder()
    assert torch.allclose(
        shifted(coordinates, kinds, valid & True)[valid], plain(coordinates + 0.5, kinds, valid)[valid]
    )


def test_what_is_refused():
    made = encoder()
    coordinates, kinds, valid = prompts()
    for call, words in (
        (lambda: made(coordinates[..., :2], kinds, valid), r"coordinates \[B, P, 4\]"),
        (lambda: made(*prompts(1, 5)), "more than this encoder's 4"),
        (lambda: made(coordinates, kinds + 1, valid), "a point"),
        (lambda: encoder(width=5), "even width"),
    ):
        with pytest.raises(BadInputError, match=words):
            call()

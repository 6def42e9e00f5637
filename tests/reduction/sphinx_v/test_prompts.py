"""Coordinates of prompts: by the sheet's numbers, whatever the image's size, and what is refused."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.reduction.sphinx_v.prompts import (
    BOX,
    POINT,
    Box,
    Point,
    Stroke,
    contour_points,
    encode_prompts,
    shaken,
)


def coordinates(prompt, height, width, **settings):
    return encode_prompts([[prompt]], [(height, width)], slots=1, **settings).coordinates[0, 0].tolist()


def test_the_numbers_of_the_sheet():
    assert coordinates(Point(10, 20), 50, 100) == pytest.approx([0.1, 0.45, 0, 0])
    assert coordinates(Box(10, 20, 40, 30), 50, 100) == pytest.approx([0.1, 0.45, 0.4, 0.55])
    assert coordinates(Point(10, 20), 100, 51) == pytest.approx([0.34, 0.2, 0, 0])  # 24 pixels on the left


def test_the_same_place_in_a_larger_image_is_the_same():
    small, large = coordinates(Box(3, 7, 20, 11), 40, 30), coordinates(Box(6, 14, 40, 22), 80, 60)
    assert small == pytest.approx(large, abs=1e-6)


def test_rounding_is_an_option():
    assert coordinates(Point(1, 2), 7, 7, decimals=None)[:2] == pytest.approx([1 / 7, 2 / 7])
    assert coordinates(Point(1, 2), 7, 7)[:2] == pytest.approx([0.143, 0.286])


def test_slots_that_are_empty_say_so_and_a_prompt_at_the_origin_does_not():
    found = encode_prompts([[Point(0, 0)], [Box(1, 1, 2, 2)], []], [(4, 4)] * 3, slots=3, empty=BOX)
    assert found.valid.tolist() == [[True, False, False]] * 2 + [[False] * 3]
    assert found.kinds.tolist() == [[POINT] * 3, [BOX] * 3, [BOX] * 3]
    mixed = encode_prompts([[Point(1, 1), Box(0, 0, 1, 1)]], [(4, 4)], slots=2)
    assert mixed.kinds.tolist() == [[POINT, BOX]]


def test_a_stroke_is_its_box_or_points_along_it():
    stroke = Stroke(((0, 0), (4, 0), (4, 8)))
    assert stroke.box() == Box(0, 0, 4, 8)
    assert coordinates(stroke, 8, 8) == coordinates(Box(0, 0, 4, 8), 8, 8)
    assert stroke.along(4) == [Point(0, 0), Point(4, 0), Point(4, 4), Point(4, 8)]
    assert stroke.along(1) == [Point(4, 2)] and Stroke(((1, 2),)).along(2) == [Point(1, 2)] * 2


def test_noise():
    box, rng = Box(10, 10, 42, 26), random.Random(0)
    assert shaken(box, rng, 0, 0) == box
    assert shaken(box, random.Random(1)) == shaken(box, random.Random(1)) != box
    for _ in range(200):
        moved = shaken(box, rng)
        assert abs(moved.x0 - 10) <= 4 and abs(moved.y0 - 10) <= 2
        assert 0.85 * 32 <= moved.x1 - moved.x0 <= 1.15 * 32 and 0.85 * 16 <= moved.y1 - moved.y0 <= 1.15 * 16


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (Point(math.nan, 1), "Point"),
        (Point(1, 9), "does not lie in an image of 8 x 8"),
        (Box(3, 3, 3, 5), "no area"),
        (Box(5, 3, 3, 5), "exchanged"),
        (Stroke(()), "without points"),
    ],
)
def test_prompts_that_cannot_be(prompt, words):
    with pytest.raises(BadInputError, match=words):
        coordinates(prompt, 8, 8)


def test_more_than_there_are_slots_and_other_bad_calls():
    with pytest.raises(BadInputError, match="3 prompts for 2 slots"):
        encode_prompts([[Point(1, 1)] * 3], [(4, 4)], slots=2)
    with pytest.raises(BadInputError, match="sizes of 2"):
        encode_prompts([[]], [(4, 4)] * 2)
    for call in (lambda: Stroke(()).along(2), lambda: Stroke(((1, 1),)).along(0)):
        with pytest.raises(BadInputError, match="Ask for one"):
            call()
    with pytest.raises(BadInputError, match="shift is 0 or more"):
        shaken(Box(0, 0, 1, 1), random.Random(0), -1)
    assert torch.equal(encode_prompts([[]], [(4, 4)]).valid, torch.zeros(1, 10, dtype=torch.bool))


def test_a_free_form_region_is_its_box_or_points_on_its_edge():
    mask = np.zeros((12, 16), bool)
    mask[2:7, 3:12] = True
    mask[6, 3:9] = False
    assert Box.around(mask) == Box(3, 2, 12, 7)
    found = contour_points(mask, 8)
    assert 4 <= len(found) <= 8 and len(set(found)) == len(found)
    edge = mask & ~(np.roll(mask, 1, 0) & np.roll(mask, -1, 0) & np.roll(mask, 1, 1) & np.roll(mask, -1, 1))
    assert all(edge[int(point.y), int(point.x)] for point in found)
    dot = np.zeros((4, 4), bool)
    dot[1, 2] = True
    assert contour_points(dot, 5) == [Point(2.5, 1.5)] and Box.around(dot) == Box(2, 1, 3, 2)
    for call, words in (
        (lambda: Box.around(np.zeros((3, 3), bool)), "empty"),
        (lambda: Box.around(np.ones((3, 3))), "of bool"),
        (lambda: contour_points(mask, 0), "one point"),
    ):
        with pytest.raises(BadInputError, match=words):
            call()

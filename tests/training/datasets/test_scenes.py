"""Scenes: what is drawn is what is asked, and both follow from the seed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.training.datasets.scenes import (
    COLOURS,
    DIGITS,
    IDS,
    IMAGE,
    KINDS,
    NUMBER,
    PLACES,
    SHAPES,
    WORDS,
    Question,
    SceneMaker,
    digit_masks,
    patch_labels,
    question_batch,
    scene_tokenizer,
    shape_mask,
)

SCENES = SceneMaker().draw(40, 3)


def test_a_seed_gives_the_same_scenes_and_another_others():
    again, other = SceneMaker().draw(2, 3), SceneMaker().draw(2, 4)
    assert np.array_equal(again[0].pixels, SceneMaker().draw(2, 3)[0].pixels)
    assert again[0].things == SceneMaker().draw(2, 3)[0].things
    assert not np.array_equal(again[0].pixels, other[0].pixels)
    assert not np.array_equal(again[0].pixels, SceneMaker().draw(2, 3, "another part")[0].pixels)


def test_objects_are_different_do_not_overlap_and_have_their_colour():
    for scene in SCENES:
        assert 3 <= len(scene.things) <= 5
        assert len({item.colour for item in scene.things}) == len({item.shape for item in scene.things})
        covered = np.zeros((64, 64), int)
        for item in scene.things:
            x0, y0, x1, y1 = item.box
            covered[y0:y1, x0:x1] += 1
            painted = scene.pixels[y0:y1, x0:x1][shape_mask(item.shape, item.side)]
            assert np.abs(painted.astype(int) - COLOURS[item.colour]).max() <= 15
        assert covered.max() == 1
        assert scene.pixels[covered == 0].max() < 48


def test_every_answer_is_true():
    rng, seen = random.Random(0), set()
    for scene in SCENES:
        by_colour = {item.colour: item for item in scene.things}
        by_shape = {item.shape: item for item in scene.things}
        for _ in range(12):
            asked = scene.ask(rng)
            seen.add((asked.kind, asked.answer))
            if asked.kind == "shape?":
                assert by_colour[asked.about].shape == asked.answer
            elif asked.kind == "colour?":
                assert by_shape[asked.about].colour == asked.answer
            elif asked.kind == "exists?":
                assert (asked.about in by_colour) == (asked.answer == "yes")
            else:
                x, y = by_colour[asked.about].centre
                assert asked.answer == PLACES[2 * (y > 32) + (x > 32)]
                assert min(abs(x - 32), abs(y - 32)) >= 4
    assert {kind for kind, _ in seen} == set(KINDS)
    assert {answer for _, answer in seen} == {*SHAPES, *COLOURS, "yes", "no", *PLACES}


def test_half_of_the_colours_that_are_asked_for_are_absent():
    rng = random.Random(1)
    answers = [scene.ask(rng, "exists?").answer for scene in SCENES for _ in range(20)]
    assert 0.4 < answers.count("no") / len(answers) < 0.6


def test_digits_can_be_read_and_are_asked_for():
    assert len({digit_masks(number)[1].tobytes() for number in range(10)}) == 10
    (scene,) = SceneMaker(size=128, side=28, digits=True).draw(1, 0)
    asked = scene.ask(random.Random(0), NUMBER)
    thing = next(item for item in scene.things if item.colour == asked.about)
    assert asked.answer == thing.digit
    plate, strokes = digit_masks(DIGITS.index(thing.digit))
    top, left = thing.top + (28 - 14) // 2, thing.left + (28 - 10) // 2
    assert np.array_equal(scene.pixels[top : top + 14, left : left + 10, 0] == 245, strokes)
    assert plate.shape == strokes.shape
    with pytest.raises(BadInputError, match="no question"):
        SCENES[0].ask(random.Random(0), NUMBER)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"least": 0}, "from 1 to 6"),
        ({"most": 7}, "from 1 to 6"),
        ({"side": 40}, "do not fit"),
        ({"digits": True}, "20 pixels"),
        ({"clutter": -1}, "clutter"),
    ],
)
def test_scenes_that_cannot_be(settings, words):
    with pytest.raises(BadInputError, match=words):
        SceneMaker(**settings)


def test_patches_name_what_covers_them():
    colours, shapes, quarters = patch_labels(SCENES, 8)
    scene = SCENES[0]
    for patch in range(64):
        top, left = 8 * (patch // 8), 8 * (patch % 8)
        counts = {}
        for item in scene.things:
            whole = np.zeros((64, 64), bool)
            x0, y0, x1, y1 = item.box
            whole[y0:y1, x0:x1] = shape_mask(item.shape, 14)
            counts[item] = int(whole[top : top + 8, left : left + 8].sum())
        best = max(counts, key=counts.get)
        if counts[best] > 8:
            assert list(COLOURS)[colours[0, patch]] == best.colour and SHAPES[shapes[0, patch]] == best.shape
            place = scene.place(best)
            assert quarters[0, patch] == (-1 if place is None else PLACES.index(place))
        else:
            assert colours[0, patch] == shapes[0, patch] == quarters[0, patch] == -1


def test_a_batch_learns_answers_and_ends_alone():
    asked = [[Question("shape?", "red", "disc"), Question("exists?", "blue", "no")]] * 2
    batch = question_batch(SCENES[:2], asked, 4)
    words = [[WORDS[token] for token in row] for row in batch["input_ids"].tolist()]
    assert words[0] == [IMAGE] * 4 + ["shape?", "red", "disc", "</s>", "exists?", "blue", "no", "</s>"]
    learned = [WORDS[token] for token in batch["labels"][1].tolist() if token != -100]
    assert learned == ["disc", "</s>", "no", "</s>"]
    assert torch.equal(batch["labels"][1, [6, 7, 10, 11]], batch["input_ids"][1, [6, 7, 10, 11]])
    assert batch["pixel_values"].shape == (2, 3, 64, 64)


def test_the_tokenizer_knows_every_word():
    tokenizer = scene_tokenizer()
    assert len(tokenizer) == len(WORDS) == len(set(WORDS))
    text = "<image><image> where? green top-left</s>"
    ids = tokenizer(text)["input_ids"]
    assert ids == [IDS[word] for word in (IMAGE, IMAGE, "where?", "green", "top-left", "</s>")]
    assert tokenizer.decode(ids[2:5]) == "where? green top-left"

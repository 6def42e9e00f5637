"""Pictures: what fades, what is tinted, and that a page needs nothing from outside."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.reduction.base import combination, selection
from everytoken.reduction.pictures import image_of, kept_picture, reduction_html, score_picture

FEATURES = torch.randn(8, 3)
BLACK = np.zeros((32, 64, 3), np.uint8)


def test_dropped_patches_fade():
    drawn = kept_picture(BLACK, (2, 4), selection(FEATURES, torch.tensor([0, 5])))
    assert drawn.shape == (128, 256, 3)
    patches = drawn.reshape(2, 64, 4, 64, 3).mean((1, 3, 4))
    assert (patches[0, 0], patches[1, 1]) == (0, 0)
    assert patches.sum() == 6 * 204  # four fifths of white


def test_merged_groups_share_a_colour():
    assignment = torch.zeros(3, 8)
    assignment[0, :4], assignment[1, 4:7], assignment[2, 7] = 0.25, 1 / 3, 1
    drawn = kept_picture(BLACK, (2, 4), combination(FEATURES, assignment, torch.tensor([4, 3, 1])))
    patches = drawn.reshape(2, 64, 4, 64, 3)[:, 0, :, 0].reshape(8, 3)
    assert len({tuple(patch) for patch in patches[:4]}) == 1
    assert tuple(patches[0]) != tuple(patches[4])
    assert not patches[7].any()  # a token alone keeps its own look


def test_scores_and_refusals():
    scored = selection(FEATURES, torch.tensor([1]), torch.arange(8.0))
    drawn = score_picture(BLACK, (2, 4), scored)
    assert tuple(drawn[0, 0]) != tuple(drawn[-1, -1])
    page = reduction_html(BLACK, (2, 4), "<method>", scored)
    assert page.count("data:image/png;base64,") == 2 and "&lt;method&gt;: 1 of 8 tokens" in page
    with pytest.raises(BadInputError, match="3 x 3"):
        kept_picture(BLACK, (3, 3), scored)
    with pytest.raises(BadInputError, match="score"):
        score_picture(BLACK, (2, 4), selection(FEATURES, torch.tensor([1])))


def test_what_the_encoder_saw():
    pixels = image_of(torch.tensor([[[-1.0, 3.0]], [[1.0, -1.0]], [[3.0, 3.0]]]))
    assert pixels.tolist() == [[[0, 128, 255], [255, 0, 255]]]
    assert not image_of(torch.zeros(3, 2, 2)).any()
